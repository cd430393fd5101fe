"""What a sandbox sees of other sandboxes, and of the host's processes and sockets: nothing (CONTRACT section 8)."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import pytest_asyncio
from host_harness import LAYOUT, Host, run_in, running_host, task_agent, wait_readable

pytestmark = [pytest.mark.kernel, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def host() -> AsyncIterator[Host]:
    async with running_host() as running:
        yield running


@asynccontextmanager
async def sleeping(host: Host) -> AsyncIterator[int]:
    """Another sandbox with a listening socket and a file. Yields the pid of its first process on the host."""
    sandbox = await host.pool.acquire()
    script = (
        "import socket, sys\n"
        "open('/tmp/neighbour', 'w').write('x'); open('/dev/shm/neighbour', 'w').write('x')\n"
        "s = socket.socket(socket.AF_UNIX); s.bind('\\0clrk-neighbour'); s.listen()\n"
        "t = socket.create_server(('127.0.0.1', 8099))\n"
        "print('ready', flush=True); sys.stdin.read()\n"
    )
    try:
        stdin, stdout, stderr = sandbox.open_stdio()
        agent = task_agent("/usr/bin/python3", "-I", "-c", script)
        spawned = await sandbox.spawn(agent=agent, environment={})
        assert await asyncio.to_thread(wait_readable, stdout) == b"ready\n"
        yield spawned.pid
        for fd in (stdin, stdout, stderr):
            os.close(fd)
    finally:
        await sandbox.remove()


async def test_a_neighbour_is_invisible(host: Host) -> None:
    async with sleeping(host) as pid:
        ran = await host.python(
            "import os, socket, json\n"
            "def attempt(f):\n"
            "    try: f(); return 0\n"
            "    except OSError as exc: return exc.errno\n"
            "unix = socket.socket(socket.AF_UNIX)\n"
            "print(json.dumps([\n"
            "    sorted(int(name) for name in os.listdir('/proc') if name.isdigit()),\n"
            "    attempt(lambda: unix.connect('\\0clrk-neighbour')),\n"
            "    attempt(lambda: socket.create_connection(('127.0.0.1', 8099))),\n"
            f"    attempt(lambda: os.kill({pid}, 0)),\n"
            "    os.path.exists('/tmp/neighbour') or os.path.exists('/dev/shm/neighbour'),\n"
            "]))\n"
        )
    assert json.loads(ran.out) == [[1, 2], errno.ECONNREFUSED, errno.ECONNREFUSED, errno.ESRCH, False]


async def test_sandboxes_share_no_uid_no_namespace_and_no_cookie(host: Host) -> None:
    names = ("net", "pid", "mnt", "ipc", "uts", "cgroup")
    async with sleeping(host) as pid:
        first = {name: os.readlink(f"/proc/{await agent_pid(pid)}/ns/{name}") for name in names}
        sandbox = await host.pool.acquire()
        try:
            ran = await run_in(sandbox, "/bin/sh", "-c", "cd /proc/self/ns && readlink " + " ".join(names))
        finally:
            await sandbox.remove()
        other = await host.pool.acquire()
        try:
            assert other.uid != sandbox.uid
            assert other.netns_cookie != sandbox.netns_cookie
        finally:
            await other.remove()
    for name, second in zip(names, ran.out.split(), strict=True):
        assert len({os.readlink(f"/proc/self/ns/{name}"), first[name], second}) == 3, name


async def agent_pid(monitor: int) -> int:
    """The agent is the only child of bwrap's pid 1, which is the only child of its monitor."""
    children = [Path(f"/proc/{monitor}/task/{monitor}/children").read_text().split()]
    children.append(Path(f"/proc/{children[0][0]}/task/{children[0][0]}/children").read_text().split())
    return int(children[1][0])


async def test_host_abstract_sockets_are_out_of_reach(host: Host) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        name = f"\0{LAYOUT.instance}-service"
        listener.bind(name)
        listener.listen()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(name)  # it is there
        ran = await host.python(
            "import socket\n"
            f"try: socket.socket(socket.AF_UNIX).connect({name!r}); print('reached')\n"
            "except OSError as exc: print(exc.errno)\n"
        )
    assert ran.out.strip() == str(errno.ECONNREFUSED)


async def test_host_loopback_is_out_of_reach(host: Host) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        script = f"import socket; print(socket.socket().connect_ex(('127.0.0.1', {port})))"
        assert (await host.python(script)).out.strip() == str(errno.ECONNREFUSED)


async def test_only_lo_is_seen(host: Host) -> None:
    ran = await host.python("import socket; print([name for _, name in socket.if_nameindex()])")
    assert ran.out.strip() == "['lo']"
