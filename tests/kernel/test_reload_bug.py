"""A bug of ours in reading resources, met by a reload: what runs goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from clrk.core.layout import HostLayout
from clrk.runtime import daemon


class _Told:
    """Stands where the supervisor tells the gateway why a reload was refused."""

    def __init__(self) -> None:
        self.problems: asyncio.Queue[Sequence[str]] = asyncio.Queue()

    async def refuse_reload(self, problems: Sequence[str]) -> None:
        await self.problems.put(problems)


async def test_it_refuses_the_reload_and_waits_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_paths: object) -> object:
        raise TypeError("unhashable type: 'dict'")

    monkeypatch.setattr(daemon, "load", broken)
    subject, told = daemon._Daemon(HostLayout("clrkbug"), [], None, None), _Told()
    task = asyncio.get_running_loop().create_task(subject._reload_on_request(told))
    try:
        for _ in range(2):
            subject._reload.set()
            async with asyncio.timeout(30):
                (problem,) = await told.problems.get()
            assert "a bug of ours" in problem
        assert not task.done()
    finally:
        task.cancel()
