"""A small soak in every test run; `make soak` is the long one."""

from __future__ import annotations

from pathlib import Path

import pytest
from soak import run

pytestmark = [pytest.mark.kernel, pytest.mark.e2e, pytest.mark.alone, pytest.mark.timeout(900)]


async def test_every_invocation_is_accounted_for(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    verdict = await run(tmp_path, count=150, at_once=10, kills=2, seed=20261122)
    assert verdict.problems == []
    assert verdict.facts["gateway_kills"] == 2
    assert verdict.facts["phases"]["Succeeded"] > 30
    assert verdict.facts["upstream_calls"] > 50
