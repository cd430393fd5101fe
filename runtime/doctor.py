"""`clrk-runtime doctor`: proves what this host can do, and says how to mend what is missing.

Reads facts first, then tries: every BPF program is loaded, and a throw-away sandbox makes a stamped round trip and
fails to escape. It has an instance of its own, so that it can run beside a live daemon, and leaves nothing.
"""

from __future__ import annotations

import json
import os
import pwd
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from clrk.core.errors import ClrkError
from clrk.core.layout import HostLayout
from clrk.core.resources import RuntimeSpec
from clrk.runtime.cgroup import find_hierarchy

_OLDEST_KERNEL: Final = (6, 0)
_FILES_OF_A_SANDBOX: Final = 30  # in the runtime and the gateway, while it starts or ends
_CONTROLLERS: Final = ("cpu", "memory", "pids")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. fix says how to mend it, "" when it is well. A warning stops nothing but what it
    names."""

    name: str
    ok: bool
    found: str
    fix: str = ""
    is_warning: bool = False


def examine(spec: RuntimeSpec, instance: str) -> Iterator[Finding]:
    """Yield findings as they come: the caller shows progress.

    Side effects: makes and removes one sandbox of `instance`.
    """
    facts = list(_facts(spec))
    yield from facts
    if not all(finding.ok or finding.is_warning for finding in facts):
        why = "not tried: mend the above first"
        yield Finding("sandbox", ok=False, found=why, fix="run clrk-runtime doctor again then")
        return
    programs = _check_programs()
    yield programs
    if programs.ok:
        from clrk.runtime.doctor_trial import try_sandbox

        yield from try_sandbox(HostLayout(instance), spec)


def report(findings: Iterator[Finding], *, as_json: bool) -> int:
    """Print findings as they come. Returns: the exit code, 0 when the daemon can do all of its work here."""
    seen: list[Finding] = []
    for finding in findings:
        seen.append(finding)
        if not as_json:
            for line in _lines(finding, colour=sys.stdout.isatty() and "NO_COLOR" not in os.environ):
                print(line, flush=True)
    ok = all(finding.ok or finding.is_warning for finding in seen)
    if as_json:
        print(json.dumps({"ok": ok, "findings": [asdict(finding) for finding in seen]}, indent=2))
    else:
        print("this host can run clrk" if ok else "this host can not run clrk yet: see the fixes above")
    return 0 if ok else 1


def _lines(finding: Finding, *, colour: bool) -> Iterator[str]:
    word, code = ("ok  ", "32") if finding.ok else ("warn", "33") if finding.is_warning else ("FAIL", "31")
    mark = f"\033[{code}m{word}\033[0m" if colour else word
    yield f"{mark}  {finding.name}: {finding.found}"
    if not finding.ok:
        yield f"      fix: {finding.fix}"


# --- facts ----------------------------------------------------------------------------------------------------------


def _facts(spec: RuntimeSpec) -> Iterator[Finding]:
    yield _check_root()
    yield _check_kernel(os.uname().release)
    yield _check_path(
        "BTF", Path("/sys/kernel/btf/vmlinux"), "socket storage needs it: a kernel with CONFIG_DEBUG_INFO_BTF=y"
    )
    yield _check_bcc()
    yield _check_headers()
    yield from check_cgroups(Path("/proc/self/mounts").read_text())
    yield _check_bubblewrap()
    yield _check_open_files(spec.limits.max_sandboxes)
    yield check_uids(spec, [entry.pw_uid for entry in pwd.getpwall()], _read("/etc/subuid"))
    yield _check_state_volumes()


def _check_root() -> Finding:
    is_root = os.geteuid() == 0
    return Finding("root", is_root, f"uid {os.geteuid()}", "" if is_root else "sudo clrk-runtime doctor")


def _check_kernel(release: str) -> Finding:
    found = re.match(r"(\d+)\.(\d+)", release)
    ok = found is not None and (int(found[1]), int(found[2])) >= _OLDEST_KERNEL
    fix = "Linux 6.0 or newer: before it, the unprivileged gateway may not read the flow records"
    return Finding("kernel", ok, release, "" if ok else fix)


def _check_path(name: str, path: Path, fix: str) -> Finding:
    ok = path.exists()
    return Finding(name, ok, str(path) if ok else f"no {path}", "" if ok else fix)


def _check_bcc() -> Finding:
    try:
        import bcc
    except ImportError as exc:
        return Finding("bcc", ok=False, found=str(exc), fix="apt install python3-bpfcc")
    return Finding("bcc", ok=True, found=str(getattr(bcc, "__version__", "present")))


def _check_headers() -> Finding:
    from clrk.ebpf.kernel_headers import find_kernel_headers

    try:
        headers = find_kernel_headers()
    except ClrkError as exc:
        text, _, fix = str(exc).partition("; ")
        return Finding("kernel headers", ok=False, found=text, fix=fix)
    return Finding("kernel headers", ok=True, found=str(headers.source or "found by bcc"))


def check_cgroups(mounts: str) -> Iterator[Finding]:
    """Look at the trees of /proc/self/mounts: v2 for BPF, and each controller on one side."""
    try:
        hierarchy = find_hierarchy(mounts)
    except ClrkError as exc:
        text, _, fix = str(exc).partition("; ")
        yield Finding("cgroup v2", ok=False, found=text, fix=fix)
        return
    yield Finding("cgroup v2", ok=True, found=str(hierarchy.v2))
    available = _read(str(hierarchy.v2 / "cgroup.controllers")).split()
    for controller in _CONTROLLERS:
        where = str(hierarchy.v1.get(controller) or (hierarchy.v2 if controller in available else ""))
        fix = f"boot with the {controller} controller enabled (cgroup_enable={controller})"
        found = where or "in neither tree"
        yield Finding(f"cgroup {controller}", bool(where), found, "" if where else fix)


def _check_bubblewrap() -> Finding:
    path = shutil.which("bwrap", path="/usr/bin:/bin")
    if path is None:
        return Finding("bubblewrap", ok=False, found="no bwrap", fix="apt install bubblewrap")
    done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False, timeout=10)
    return Finding("bubblewrap", done.returncode == 0, done.stdout.strip() or done.stderr.strip(), "reinstall it")


def _check_open_files(max_sandboxes: int) -> Finding:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = _FILES_OF_A_SANDBOX * max_sandboxes
    ok = hard == resource.RLIM_INFINITY or hard >= needed
    found = f"hard limit {'unlimited' if hard == resource.RLIM_INFINITY else hard}"
    fix = f"{max_sandboxes} sandboxes need about {needed}: raise it (LimitNOFILE= in the unit, or ulimit -Hn)"
    return Finding("open files", ok, found, "" if ok else fix, is_warning=not ok)


def check_uids(spec: RuntimeSpec, used: Sequence[int], subuid: str) -> Finding:
    """Look whether the uids that clrk takes belong to somebody: a user of the host, or a range of /etc/subuid."""
    start, end = spec.uid_range.start, spec.uid_range.start + spec.uid_range.count
    mine = f"{start}-{end - 1}"
    taken = [f"uid {uid}" for uid in used if start <= uid < end]
    for line in subuid.splitlines():
        owner, _, numbers = line.partition(":")
        first, _, count = numbers.partition(":")
        if first.isdigit() and count.isdigit() and int(first) < end and start < int(first) + int(count):
            taken.append(f"{first}:{count} of {owner} in /etc/subuid")
    if not taken:
        return Finding("uid range", ok=True, found=f"{mine} is free")
    fix = "choose another Runtime spec.uidRange: sandboxes must share their uids with nobody"
    return Finding("uid range", ok=False, found=f"{mine} overlaps {', '.join(taken[:3])}", fix=fix)


def _check_state_volumes() -> Finding:
    maker, control = shutil.which("mkfs.ext4", path="/usr/sbin:/sbin"), Path("/dev/loop-control")
    ok = maker is not None and control.exists()
    found = f"{maker or 'no mkfs.ext4'}, {control if control.exists() else 'no /dev/loop-control'}"
    fix = "only agents with `state` need it: apt install e2fsprogs; modprobe loop"
    return Finding("state volumes", ok, found, "" if ok else fix, is_warning=not ok)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:  # not there: nobody declares anything in it
        return ""


# --- trials ---------------------------------------------------------------------------------------------------------


def _check_programs() -> Finding:
    from clrk.ebpf.loader import check_programs

    try:
        programs = check_programs()
    except ClrkError as exc:
        return Finding("BPF programs", ok=False, found=str(exc), fix="see the compiler's messages above")
    refused = [f"{name}: {why}" for name, why in programs.items() if why]
    if refused:
        return Finding("BPF programs", ok=False, found="; ".join(refused), fix="a kernel with these program types")
    return Finding("BPF programs", ok=True, found=f"{len(programs)} compile and load")
