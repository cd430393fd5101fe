"""Hostile agents end within their limits, and nothing stays (DESIGN section 8)."""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest
import pytest_asyncio
from host_harness import Host, assert_nothing_left, count_leftovers, run_in, running_host, task_agent, until_gone

from clrk.core.errors import HostError
from clrk.runtime.sandbox import Sandbox

pytestmark = [pytest.mark.kernel, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def host() -> AsyncIterator[Host]:
    async with running_host(ready=0) as running:
        yield running


async def none_left(uid: int) -> None:
    """Wait until the uid has no process."""

    def processes() -> Counter[str]:
        command = ["ps", "-o", "pid=,stat=,wchan=,args=", "-u", str(uid)]
        return Counter(subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines())

    await until_gone(processes, Counter())


async def begin(sandbox: Sandbox, *command: str, ready: bytes = b"", **spec: object) -> tuple[int, int]:
    """Start a command and wait for its first words. Returns its pid on the host, and its stdout."""
    stdin, stdout, stderr = sandbox.open_stdio()
    os.close(stdin)
    os.close(stderr)
    spawned = await sandbox.spawn(agent=task_agent(*command, **spec), environment={})
    os.set_blocking(stdout, True)
    if ready:
        assert await asyncio.to_thread(os.read, stdout, 4096) == ready
    return spawned.pid, stdout


# --- how runs end ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "exit_code"),
    [("exit 0", 0), ("exit 3", 3), ("exit 255", 255), ("kill -TERM $$", 143), ("kill -KILL $$", 137)],
)
async def test_exit_codes_are_as_a_shell_shows_them(host: Host, script: str, exit_code: int) -> None:
    ran = await host.sh(script)
    assert ran.exit.exit_code == exit_code
    assert not ran.exit.oom


async def test_cpu_and_memory_are_accounted_with_children(host: Host) -> None:
    script = (
        "import subprocess, sys, time\n"
        "code = 'import time\\nx = bytearray(50 << 20)\\nwhile time.process_time() < 0.3: pass'\n"
        "subprocess.run([sys.executable, '-c', code])\n"
    )
    began_s = time.monotonic()
    ran = await host.python(script)
    assert 0.3 <= ran.exit.cpu_s <= (time.monotonic() - began_s) * (os.cpu_count() or 1)
    assert 50 << 20 <= ran.exit.max_rss_bytes < 512 << 20


async def test_exit_time_is_between_start_and_now(host: Host) -> None:
    before_ns = time.time_ns()
    ran = await host.sh("true")
    assert before_ns < ran.exit.exit_ns <= time.time_ns()


# --- limits ---------------------------------------------------------------------------------------------------------


async def test_a_memory_hog_is_killed_and_flagged(host: Host) -> None:
    ran = await host.python("x = bytearray(200 << 20); print(len(x))", resources={"memory": "64Mi"})
    assert ran.out == ""
    assert ran.exit.oom
    assert ran.exit.exit_code == 137


async def test_a_hog_that_touches_memory_within_its_limit_is_not_flagged(host: Host) -> None:
    ran = await host.python("x = bytearray(30 << 20); print(len(x))", resources={"memory": "64Mi"})
    assert ran.exit.exit_code == 0
    assert not ran.exit.oom


async def test_files_in_tmp_count_as_memory(host: Host) -> None:
    script = "head -c 30M /dev/zero > /tmp/a; head -c 30M /dev/zero > /dev/shm/b; head -c 30M /dev/zero | sort > /tmp/c"
    ran = await host.sh(script, resources={"memory": "64Mi"})
    assert ran.exit.max_rss_bytes <= 64 << 20


async def test_a_fork_bomb_stops_at_its_limit(host: Host) -> None:
    script = (
        "import os, time\n"
        "made = 0\n"
        "try:\n"
        "    while True:\n"
        "        if os.fork() == 0: time.sleep(600)\n"
        "        made += 1\n"
        "except BlockingIOError: print(made)\n"
    )
    sandbox = await host.pool.acquire()
    try:
        ran = await run_in(sandbox, "/usr/bin/python3", "-I", "-c", script, resources={"pids": 20})
    finally:
        await sandbox.remove()
    assert int(ran.out) == 19  # itself is the twentieth
    await none_left(sandbox.uid)


async def test_a_growing_fork_bomb_is_killed_with_everything(host: Host) -> None:
    sandbox = await host.pool.acquire()
    script = "import os\nos.write(1, b'x')\nwhile True:\n    try: os.fork()\n    except OSError: pass\n"
    try:
        _, stdout = await begin(sandbox, "/usr/bin/python3", "-I", "-c", script, ready=b"x", resources={"pids": 64})
        os.close(stdout)
        sandbox.kill()
        assert (await sandbox.wait()).exit_code == 137
    finally:
        await sandbox.remove()
    await none_left(sandbox.uid)


async def test_an_fd_hog_meets_a_ceiling(host: Host) -> None:
    script = (
        "import os, resource\n"
        "soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))\n"
        "fds = []\n"
        "try:\n"
        "    while True: fds.append(os.dup(0))\n"
        "except OSError as exc: print(soft, len(fds), exc.errno)\n"
        "try: resource.setrlimit(resource.RLIMIT_NOFILE, (hard + 1, hard + 1))\n"
        "except ValueError: print('fixed')\n"
    )
    ran = await host.python(script)
    soft, opened, code, *fixed = ran.out.split()
    assert (int(soft), int(code), fixed) == (1024, 24, ["fixed"])
    assert int(opened) < 4096


async def test_cpu_is_limited(host: Host) -> None:
    """A fifth of a processor: half a second of work takes more than two."""
    ran = await host.python(
        "import time\nstart = time.monotonic()\nwhile time.process_time() < 0.4: pass\nprint(time.monotonic() - start)",
        resources={"cpu": "200m"},
    )
    assert float(ran.out) > 1.2


async def test_a_daemonised_child_is_killed_with_the_run(host: Host) -> None:
    script = (
        "import os, time\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    if os.fork() == 0:\n"
        "        for fd in (0, 1, 2): os.close(fd)\n"
        "        time.sleep(600)\n"
        "    os._exit(0)\n"
        "os.wait(); print('gone', flush=True)\n"
    )
    sandbox = await host.pool.acquire()
    try:
        ran = await run_in(sandbox, "/usr/bin/python3", "-I", "-c", script)
    finally:
        await sandbox.remove()
    assert (ran.out, ran.exit.exit_code) == ("gone\n", 0)
    await none_left(sandbox.uid)


async def test_ignoring_signals_does_not_help(host: Host) -> None:
    sandbox = await host.pool.acquire()
    script = (
        "import signal, time\n"
        "for n in (1, 2, 15): signal.signal(n, signal.SIG_IGN)\n"
        "print('up', flush=True)\n"
        "time.sleep(600)\n"
    )
    _, stdout = await begin(sandbox, "/usr/bin/python3", "-I", "-c", script, ready=b"up\n")
    os.close(stdout)
    sandbox.kill()
    sandbox.kill()
    assert (await sandbox.wait()).exit_code == 137
    await sandbox.remove()


async def test_signal_dispositions_are_the_default(host: Host) -> None:
    """Python ignores SIGPIPE; an agent that inherited this would not end when its reader goes."""
    ran = await host.sh("grep -E 'Sig(Ign|Blk)' /proc/self/status")
    libc_internal = 1 << 31 | 1 << 32  # 32 and 33 are glibc's own: nobody can set or send them through it
    assert [int(line.split()[1], 16) & ~libc_internal for line in ran.out.splitlines()] == [0, 0]


# --- order of calls -------------------------------------------------------------------------------------------------


async def test_killed_before_spawn_never_runs(host: Host, tmp_path: Path) -> None:
    """Whether spawn already sees the death or wait tells it: the agent does not get as far as its first write."""
    tmp_path.chmod(0o777)
    sandbox = await host.pool.acquire()
    fds = sandbox.open_stdio()
    sandbox.kill()
    mounts = [{"hostPath": str(tmp_path), "path": "/tmp/out", "readOnly": False}]
    with suppress(HostError):
        await sandbox.spawn(agent=task_agent("/bin/touch", "/tmp/out/ran", mounts=mounts), environment={})
        assert (await sandbox.wait()).exit_code == 137
    for fd in fds:
        os.close(fd)
    await sandbox.remove()
    assert list(tmp_path.iterdir()) == []


async def test_removed_without_a_run(host: Host) -> None:
    before = count_leftovers()
    sandbox = await host.pool.acquire()
    fds = sandbox.open_stdio()
    for fd in fds:
        os.close(fd)
    await sandbox.remove()
    await sandbox.remove()
    await assert_nothing_left(before)


async def test_one_spawn_for_each_sandbox(host: Host) -> None:
    sandbox = await host.pool.acquire()
    await run_in(sandbox, "/bin/true")
    with pytest.raises(HostError, match="one spawn"):
        await sandbox.spawn(agent=task_agent("/bin/true"), environment={})
    with pytest.raises(HostError, match="one spawn"):
        await sandbox.spawn(agent=task_agent("/bin/true"), environment={})
    await sandbox.remove()


async def test_wait_without_spawn_is_an_error(host: Host) -> None:
    sandbox = await host.pool.acquire()
    with pytest.raises(HostError, match="nothing was spawned"):
        await sandbox.wait()
    await sandbox.remove()


async def test_stamp_is_unregistered_by_remove(host: Host) -> None:
    sandbox = await host.pool.acquire()
    sandbox.register_stamp(b"4", b"6")
    assert host.stamp.cookies == {sandbox.netns_cookie}
    await sandbox.remove()
    assert host.stamp.cookies == set()


async def test_nul_and_oversized_command_lines_are_refused(host: Host) -> None:
    sandbox = await host.pool.acquire()
    for fd in sandbox.open_stdio():
        os.close(fd)
    with pytest.raises(HostError, match="NUL"):
        await sandbox.spawn(agent=task_agent("/bin/echo", "a\0b"), environment={})
    await sandbox.remove()
    with pytest.raises(HostError, match="too long"):
        await host.run("/bin/echo", "x" * 70_000)
    assert (await host.sh("echo fine")).out == "fine\n"


# --- the pool -------------------------------------------------------------------------------------------------------


async def test_twenty_at_once(host: Host) -> None:
    async def one(number: int) -> str:
        return (await host.sh(f"echo {number}; cat /proc/net/tcp | wc -l")).out.split()[0]

    assert await asyncio.gather(*(one(number) for number in range(20))) == [str(number) for number in range(20)]


async def test_fifty_runs_leave_nothing(host: Host) -> None:
    await host.sh("true")
    before = count_leftovers()
    for batch in range(10):
        await asyncio.gather(*(host.sh(f"echo {batch} > /tmp/x; sleep 600 & exit 0") for _ in range(5)))
    await assert_nothing_left(before)
