"""Attaching, detaching, crashing, and what is left in the maps."""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
from pathlib import Path

import pytest
from harness import FAR_V4, Sandbox, dial, die_with_parent, instance_cgroup, layout_for_this_process

from clrk.core import wire
from clrk.core.errors import HostError
from clrk.core.layout import HostLayout
from clrk.ebpf import loader, maps
from clrk.ebpf.loader import Stamp

pytestmark = pytest.mark.kernel


def attached(cgroup: Path) -> int:
    """How many programs are attached to the cgroup itself."""
    fd = os.open(cgroup, os.O_RDONLY)
    try:
        return sum(len(maps.attached_programs(fd, hook.attach_type)) for hook in loader._CGROUP_HOOKS)
    finally:
        os.close(fd)


HOOKS = len(loader._CGROUP_HOOKS)


def attach_in_child(layout: HostLayout, cgroup: Path) -> int:
    """Fork a process that attaches and then waits to be killed; return its pid once it is attached."""
    ready, told = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            die_with_parent()
            stamp = Stamp.attach(layout, cgroup)
            os.write(told, b"x")
            signal.pause()
            stamp.close()
        finally:
            os._exit(1)
    os.close(told)
    assert os.read(ready, 1) == b"x"
    os.close(ready)
    return pid


def test_attach_and_close_leave_nothing() -> None:
    layout = layout_for_this_process("a")
    with instance_cgroup(layout.cgroup_name) as cgroup:
        gc.collect()
        fds = len(os.listdir("/proc/self/fd"))
        for _ in range(2):
            stamp = Stamp.attach(layout, cgroup)
            assert attached(cgroup) == HOOKS
            stamp.close()
            stamp.close()
            assert attached(cgroup) == 0
        assert len(os.listdir("/proc/self/fd")) == fds


def test_kill_leaves_nothing_attached_and_the_next_one_works() -> None:
    layout = layout_for_this_process("b")
    with instance_cgroup(layout.cgroup_name) as cgroup:
        pid = attach_in_child(layout, cgroup)
        assert attached(cgroup) == HOOKS
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert attached(cgroup) == 0
        with Stamp.attach(layout, cgroup) as stamp:
            sandbox = Sandbox(stamp, cgroup)
            sandbox.register()
            child = sandbox.spawn(lambda: dial(FAR_V4, 443).sendall(b"x"))
            sandbox.accept_stamped()
            child.result()
            sandbox.close()
        assert attached(cgroup) == 0


def test_a_predecessor_that_still_holds_links_is_detached() -> None:
    """A killed runtime's forked helper may still hold copies of the link fds."""
    layout = layout_for_this_process("c")
    with instance_cgroup(layout.cgroup_name) as cgroup:
        pid = attach_in_child(layout, cgroup)
        with Stamp.attach(layout, cgroup):
            assert attached(cgroup) == HOOKS
        assert attached(cgroup) == 0
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_programs_attached_without_a_link_are_detached() -> None:
    """What an older version, or bcc itself, leaves behind when it dies."""
    layout = layout_for_this_process("d")
    with instance_cgroup(layout.cgroup_name) as cgroup:
        bpf = loader._compile()
        fd = os.open(cgroup, os.O_RDONLY)
        for hook in loader._CGROUP_HOOKS[:4]:
            program = loader._load(bpf, hook.function, hook.program_type, hook.attach_type)
            maps.attach_program(fd, program, hook.attach_type)
        os.close(fd)
        bpf.cleanup()
        assert attached(cgroup) == 4
        with Stamp.attach(layout, cgroup):
            assert attached(cgroup) == HOOKS
        assert attached(cgroup) == 0


def test_another_instances_cgroup_is_not_touched(stamp: Stamp, cgroup: Path) -> None:
    """Attaching one instance leaves the programs of another where they are."""
    before = attached(cgroup)
    layout = layout_for_this_process("e")
    with instance_cgroup(layout.cgroup_name) as own, Stamp.attach(layout, own):
        assert attached(cgroup) == before == HOOKS
    with pytest.raises(HostError, match="not the cgroup of instance"):
        Stamp.attach(layout, cgroup)
    assert attached(cgroup) == before


def test_attach_says_what_is_wrong(tmp_path: Path) -> None:
    layout = layout_for_this_process("f")
    with pytest.raises(HostError, match="open cgroup"):
        Stamp.attach(layout, tmp_path / layout.cgroup_name)
    (tmp_path / layout.cgroup_name).mkdir()
    with pytest.raises(HostError, match=r"cgroup v2 directory|detach what is left"):
        Stamp.attach(layout, tmp_path / layout.cgroup_name)


def test_without_bcc_the_error_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bcc", None)
    with pytest.raises(HostError, match="apt install python3-bpfcc"):
        loader._compile()


def test_maps_do_not_grow(stamp: Stamp, cgroup: Path) -> None:
    """Connections of every fate, then unregister: all entries are gone."""
    before = stamp.entries()
    sandbox = Sandbox(stamp, cgroup)
    sandbox.register()

    def agent() -> None:
        socks = [dial(FAR_V4, 443) for _ in range(100)]  # never send: they stay in the SOCKHASH until closed
        for n in range(200):
            sock = dial(FAR_V4, 443)
            if n % 2:
                sock.sendall(b"x")
            sock.close()
        for sock in socks[:50]:
            sock.sendall(b"y")
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"q", (FAR_V4, 53))

    sandbox.run(agent)
    assert stamp.entries()["flows"] == before["flows"] + 300  # nobody accepted
    assert stamp.entries()["sandboxes"] == before["sandboxes"] + 1
    taken = [sandbox.take(sandbox.accept()) for _ in range(20)]
    assert None not in taken
    sandbox.stamp.unregister(sandbox.cookie)
    assert stamp.entries() == before
    stamp.unregister(sandbox.cookie)  # twice is harmless
    sandbox.close()


def test_unregister_removes_only_its_own_records(stamp: Stamp, cgroup: Path) -> None:
    one, two = Sandbox(stamp, cgroup), Sandbox(stamp, cgroup)
    for sandbox in (one, two):
        sandbox.register()
        sandbox.run(lambda: dial(FAR_V4, 443).close())
    stamp.unregister(one.cookie)
    conn = two.accept()
    assert two.take(conn) is not None
    one.close()
    two.close()


def test_the_registry_refuses_what_it_can_not_hold(stamp: Stamp) -> None:
    with pytest.raises(ValueError, match="512 bytes"):
        stamp.register(1, b"x", b"x" * wire.HEADER_SIZE)
    template = b"\0" * wire.HEADER_SIZE
    cookies = range(1 << 60, (1 << 60) + 5000)  # far from real ones

    def fill() -> None:
        for cookie in cookies:
            stamp.register(cookie, template, template)

    try:
        with pytest.raises(HostError, match="register netns cookie"):
            fill()
        assert stamp.entries()["sandboxes"] == 4096
    finally:
        for cookie in cookies:
            stamp.unregister(cookie)


def test_layouts_of_bcc_agree(stamp: Stamp) -> None:
    """The maps' key and value sizes in the kernel are those of core/wire.py."""
    for table, key_size, value_size in (
        (stamp._sandboxes, 8, wire.SANDBOX.size),
        (stamp._flows, wire.FLOW_KEY.size, wire.FLOW.size),
        (stamp._counters, 4, 8),
    ):
        raw = Path(f"/proc/self/fdinfo/{table.fd}").read_text()
        fields = dict(line.split(":\t") for line in raw.splitlines() if ":\t" in line)
        assert (int(fields["key_size"]), int(fields["value_size"])) == (key_size, value_size)
    bpf = loader._compile()
    tables = {name: bpf[name.encode()] for name in ("clrk_sandboxes", "clrk_flows")}
    flow, sandbox = tables["clrk_flows"].Leaf, tables["clrk_sandboxes"].Leaf
    assert {name: getattr(flow, name).offset for name, *_ in flow._fields_ if not name.startswith("__pad")} == {
        "dst": 0,
        "cookie": 16,
        "connect_ns": 24,
        "tgid": 32,
        "uid": 36,
        "dst_port": 40,
        "family": 44,
        "comm": 48,
    }
    assert (sandbox.header_v4.offset, sandbox.header_v6.offset) == (40, 40 + wire.HEADER_SIZE)
    bpf.cleanup()


def test_counters_have_the_names_of_the_header_file(stamp: Stamp) -> None:
    counters = stamp.counters()
    assert list(counters) == list(maps.counter_names())
    assert {"stamped", "refused_bind", "failed_sockmap_update", "dropped_bounds"} < set(counters)
    assert not any(value for name, value in counters.items() if name.startswith("failed_"))
