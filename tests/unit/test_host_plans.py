"""The pure parts of the host side: names, addresses, hierarchies, undo."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import pytest

from clrk.core.errors import HostError
from clrk.core.messages import StartedFd
from clrk.core.resources import Resources
from clrk.netns import plan
from clrk.netns.reconcile import owned_names
from clrk.runtime.cgroup import Cgroup, find_hierarchy
from clrk.runtime.seccomp import build_filter
from clrk.runtime.undo import Undo

# --- namespaces -----------------------------------------------------------------------------------------------------


def test_listeners_are_in_the_order_of_the_control_protocol() -> None:
    assert list(plan.LISTENERS) == list(StartedFd)[: StartedFd.STDIN]


def test_every_listener_has_its_address_on_lo() -> None:
    assert {listener.address for listener in plan.LISTENERS.values()} <= {address for address, _ in plan.ADDRESSES}


def test_each_family_has_an_address_that_resolvers_count() -> None:
    """AI_ADDRCONFIG ignores loopback and link-local addresses."""
    counted = [ipaddress.ip_address(address) for address, _ in plan.ADDRESSES]
    assert {ip.version for ip in counted if not ip.is_loopback and not ip.is_link_local} == {4, 6}


def test_addresses_are_single_hosts() -> None:
    for address, length in plan.ADDRESSES:
        assert length == ipaddress.ip_address(address).max_prefixlen


def test_listeners_ports_are_reserved() -> None:
    reserved = next(item.value for item in plan.SYSCTLS if item.name == "net.ipv4.ip_local_reserved_ports")
    assert {int(port) for port in reserved.split(",")} == {item.port for item in plan.LISTENERS.values()}


@pytest.mark.parametrize(
    "name",
    ["clrk-0000000", "clrk-000000000", "clrk-0000000G", "clrk-ABCDEF01", "clrkx-00000000", "xclrk-00000000",
     "clrk_00000000", "clrk-00000000\n", "clrk-00000000.bak", "docker-00000000", ""],
)  # fmt: skip
def test_names_of_others_are_not_owned(name: str) -> None:
    assert owned_names("clrk-", [name]) == ()


def test_owned_names_are_sorted_and_the_prefix_is_literal() -> None:
    assert owned_names("clrk-", ["clrk-ffffffff", "clrk-00000000"]) == ("clrk-00000000", "clrk-ffffffff")
    assert owned_names("cl.k-", ["clrk-00000000"]) == ()


# --- cgroups --------------------------------------------------------------------------------------------------------

PURE_V2 = "proc /proc proc rw 0 0\ncgroup2 /sys/fs/cgroup cgroup2 rw,nosuid,nsdelegate 0 0\n"
HYBRID = (
    "cgroup /sys/fs/cgroup/cpu,cpuacct cgroup rw,cpu,cpuacct 0 0\n"
    "cgroup /sys/fs/cgroup/cpuset cgroup rw,cpuset 0 0\n"
    "cgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0\n"
    "cgroup /sys/fs/cgroup/pids cgroup rw,pids 0 0\n"
    "cgroup /sys/fs/cgroup/systemd cgroup rw,name=systemd 0 0\n"
    "cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n"
)


def test_a_v2_host_has_one_tree() -> None:
    found = find_hierarchy(PURE_V2)
    assert found.v2 == Path("/sys/fs/cgroup")
    assert found.v1 == {}


def test_a_hybrid_host_has_controllers_beside() -> None:
    found = find_hierarchy(HYBRID)
    assert found.v2 == Path("/sys/fs/cgroup/unified")
    assert found.v1 == {
        "cpu": Path("/sys/fs/cgroup/cpu,cpuacct"),
        "memory": Path("/sys/fs/cgroup/memory"),
        "pids": Path("/sys/fs/cgroup/pids"),
    }


def test_no_v2_tree_is_an_error_that_says_how_to_mend_it() -> None:
    with pytest.raises(HostError, match="mount -t cgroup2"):
        find_hierarchy(HYBRID.replace("cgroup2", "cgroup"))


def make_files(directory: Path, *names: str) -> Path:
    directory.mkdir()
    for name in names:
        (directory / name).write_text("")
    return directory


def test_limits_of_a_v2_host(tmp_path: Path) -> None:
    names = ("cpu.max", "memory.max", "memory.swap.max", "memory.oom.group", "pids.max")
    v2 = make_files(tmp_path / "v2", *names)
    Cgroup(v2, {}).limit(Resources(cpu=0.5, memory=64 * 2**20, pids=10))
    assert {name: (v2 / name).read_text() for name in names} == {
        "cpu.max": "50000 100000",
        "memory.max": str(64 * 2**20),
        "memory.swap.max": "0",
        "memory.oom.group": "1",
        "pids.max": "12",
    }


def test_swap_limits_are_written_only_where_the_kernel_has_them(tmp_path: Path) -> None:
    v2 = make_files(tmp_path / "v2", "cpu.max", "memory.max", "memory.oom.group", "pids.max")
    Cgroup(v2, {}).limit(Resources())
    assert not (v2 / "memory.swap.max").exists()


def test_a_tiny_cpu_share_is_the_least_the_kernel_takes(tmp_path: Path) -> None:
    v2 = make_files(tmp_path / "v2")
    Cgroup(v2, {}).limit(Resources(cpu=0.0001))
    assert (v2 / "cpu.max").read_text() == "1000 100000"


def test_counters_of_a_v2_host(tmp_path: Path) -> None:
    v2 = make_files(tmp_path / "v2")
    (v2 / "memory.events").write_text("low 0\nhigh 0\nmax 9\noom 2\noom_kill 1\noom_group_kill 1\n")
    (v2 / "cpu.stat").write_text("usage_usec 1500000\nuser_usec 1000000\nsystem_usec 500000\n")
    (v2 / "memory.peak").write_text("4096\n")
    group = Cgroup(v2, {})
    assert (group.oom_kills(), group.cpu_s(), group.peak_memory_bytes()) == (1, 1.5, 4096)


def test_counters_of_a_group_that_is_gone_are_zero(tmp_path: Path) -> None:
    group = Cgroup(tmp_path / "gone", {})
    assert (group.oom_kills(), group.cpu_s(), group.peak_memory_bytes()) == (0, 0.0, 0)
    group.kill()
    group.remove()


# --- undo -----------------------------------------------------------------------------------------------------------


def test_undo_runs_newest_first_and_once() -> None:
    done: list[str] = []
    undo = Undo("test")
    undo.push("first", lambda: done.append("first"))
    undo.push("second", lambda: done.append("second"))
    undo.run()
    undo.run()
    assert done == ["second", "first"]


def test_undo_goes_on_after_a_failure_and_tells_all() -> None:
    done: list[str] = []

    def fail() -> None:
        raise HostError("stuck")

    undo = Undo("test")
    undo.push("first", lambda: done.append("first"))
    undo.push("bad", fail)
    undo.push("worse", fail)
    with pytest.raises(ExceptionGroup, match="undo test") as caught:
        undo.run()
    assert len(caught.value.exceptions) == 2
    assert done == ["first"]


# --- seccomp --------------------------------------------------------------------------------------------------------


def test_the_filter_is_a_whole_number_of_instructions_within_the_kernels_limit() -> None:
    program = build_filter()
    assert len(program) % 8 == 0
    assert 0 < len(program) // 8 <= 4096  # BPF_MAXINSNS
