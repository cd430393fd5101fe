"""For every test: hypothesis judges what the code does, not how busy the machine is; with CLRK_MUST_WORK none skips."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Where the host's Node is too old for what drives the tests (packaging/setup.sh); sandboxes have the host's.
for _node in Path(__file__).parent.glob("nodejs/node_modules/node-linux-*/bin"):
    os.environ["PATH"] = f"{_node}:{os.environ['PATH']}"

settings.register_profile("clrk", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("clrk")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Where everything has to work, a test that could not be run has failed."""
    report = yield
    if report.skipped and os.environ.get("CLRK_MUST_WORK") == "1":
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped, and CLRK_MUST_WORK=1: {report.longrepr}"
    return report


def pytest_make_parametrize_id(config: pytest.Config, val: object, argname: str) -> str | None:
    """Name binary parameters by their argument: some hold the time, and workers of xdist have to agree on names."""
    return argname if isinstance(val, bytes) and not (val.isascii() and val.decode().isprintable()) else None
