"""Hosts as hardening guides and distributions have them: sandboxes must still get what is made for them."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest
import stack
from instances import instance
from stack import BIN, Daemon, agent, invoke

pytestmark = [pytest.mark.kernel, pytest.mark.e2e]

CAT = ["/bin/cat", "/etc/resolv.conf"]


@pytest.fixture
def hardened(tmp_path: Path) -> Iterator[Daemon]:
    """A daemon that inherited umask 077. LD_BIND_NOW is set after the drop, by a tool that root copied."""
    running = Daemon(tmp_path, instance("ha"), [agent("cat", CAT, env={"LD_BIND_NOW": "1"})])
    before = os.umask(0o077)
    try:
        running.start()
    finally:
        os.umask(before)
    yield running
    assert running.stop() == 0, running.log()


@pytest.fixture
def without_programs_in_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Daemon]:
    """A daemon on a host whose /run is mounted as Debian's initramfs mounts it."""
    script = 'mount -t tmpfs -o nosuid,nodev,noexec,mode=0755 tmpfs /run && exec "$0" "$@"'
    program = tmp_path / "clrk-runtime"
    program.write_text(
        f'#!/bin/sh\nexec unshare --mount sh -c {shlex.quote(script)} {shlex.quote(str(BIN / "clrk-runtime"))} "$@"\n'
    )
    program.chmod(0o755)
    monkeypatch.setattr(stack, "BIN", tmp_path)
    running = Daemon(tmp_path, instance("hr"), [agent("cat", CAT)])
    running.start()
    yield running
    assert running.stop() == 0, running.log()


async def test_umask_077(hardened: Daemon, caller: aiohttp.ClientSession) -> None:
    text, _ = await invoke(caller, hardened, "cat", "x")
    assert text.startswith("nameserver 169.254.0.1\n")


async def test_no_program_can_run_from_the_run_folder(
    without_programs_in_run: Daemon, caller: aiohttp.ClientSession
) -> None:
    text, _ = await invoke(caller, without_programs_in_run, "cat", "x")
    assert text.startswith("nameserver 169.254.0.1\n")
