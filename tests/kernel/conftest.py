"""One attachment for the whole session; one namespace per test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import Sandbox, compiled, instance_cgroup, layout_for_this_process
from instances import clean_host  # noqa: F401 - a fixture

from clrk.ebpf.loader import Stamp


@pytest.fixture(scope="session")
def cgroup() -> Iterator[Path]:
    with instance_cgroup(layout_for_this_process().cgroup_name) as path:
        yield path


@pytest.fixture(scope="session")
def stamp(cgroup: Path) -> Iterator[Stamp]:
    with Stamp.attach(layout_for_this_process(), cgroup) as attached:
        yield attached


@pytest.fixture
def make_sandbox(stamp: Stamp, cgroup: Path) -> Iterator[Callable[..., Sandbox]]:
    made: list[Sandbox] = []

    def make(*, register: bool = True, **kwargs: Any) -> Sandbox:
        sandbox = Sandbox(stamp, cgroup, **kwargs)
        made.append(sandbox)
        if register:
            sandbox.register()
        return sandbox

    yield make
    for sandbox in made:
        sandbox.close()


@pytest.fixture
def sandbox(make_sandbox: Callable[..., Sandbox]) -> Sandbox:
    return make_sandbox()


@pytest.fixture
def counted(stamp: Stamp) -> Callable[[str], int]:
    """How much a kernel counter has grown since the test began."""
    before = stamp.counters()
    return lambda name: stamp.counters()[name] - before[name]


@pytest.fixture(scope="session")
def attacker() -> Iterator[Path]:
    with compiled(Path(__file__).with_name("attacker.c")) as program:
        yield program
