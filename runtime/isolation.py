"""The command line of one run: bwrap's view of the file system, then the launcher that becomes the agent.

Theory of operation. bwrap starts as root inside the sandbox's cgroup and network namespace. It makes the mount, pid,
ipc, uts and cgroup namespaces, builds the root from read-only binds of the top-level folders, keeps three
capabilities, loads the seccomp filter and executes the launcher (csrc/launch.c), which changes uid, gid and groups,
empties the bounding set, and waits on ORDER_FD for the environment before it executes the agent. bwrap's options
travel in a memfd, since command lines are public on the host; nothing in them is of an invocation, so a sandbox can be
prepared before there is one.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from clrk.core.errors import HostError
from clrk.core.resources import Mount, TemplateSpec

from .view import HOSTNAME, LAUNCHER, HostView, ca_environment

BWRAP: Final = "/usr/bin/bwrap"
OPTIONS_FD: Final = 3
SECCOMP_FD: Final = 4
PASSWD_FD: Final = 5
GROUP_FD: Final = 6
ORDER_FD: Final = 7  # csrc/launch.c
MAX_ENVIRONMENT_BYTES: Final = 1 << 20  # csrc/launch.c

_LAUNCH: Final = "/run/clrk/launch"
_CPUS: Final = "/sys/devices/system/cpu"  # programs count CPUs there
_TMP: Final = "/tmp"  # noqa: S108 - here and below: the sandbox's own
_SHM: Final = "/dev/shm"  # noqa: S108
_VAR_TMP: Final = "/var/tmp"  # noqa: S108
_DEFAULT_ENVIRONMENT: Final = {"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin", "HOME": _TMP}

# Made anew in every sandbox, or kernel interfaces. /sys stays out but for the CPU topology.
_OWN_IN_SANDBOX: Final = frozenset({"proc", "sys", "dev", "run", "tmp", "etc"})
# What is shown of a host that is its own rootfs: programs. Everything else, whatever a host calls it, may hold data or
# the sockets of services, which a read-only mount does not close; a sandbox gets it by `mounts` only.
_PROGRAMS: Final = frozenset(
    {"usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32", "libexec", "opt", "nix", "gnu", "snap"}
)

_OTHERS_ENTER: Final = stat.S_IROTH | stat.S_IXOTH


@dataclass(frozen=True, slots=True)
class Run:
    """What to execute, for the spawner.

    Shape: options is what OPTIONS_FD delivers; passwd and group are the contents of PASSWD_FD and GROUP_FD.
    """

    argv: tuple[str, ...]
    options: bytes
    passwd: bytes
    group: bytes


def plan_run(template: TemplateSpec, view: HostView, *, uid: int, memory: int, state_path: str | None = None) -> Run:
    """Compose one run of an agent, but for its environment.

    Shape: state_path is where the agent has its state, if it has one: what the spawner puts at view.state_point.
    Units: memory in bytes; /tmp and /dev/shm may each take half of it.
    Raises: HostError when the rootfs can not be listed, a mount's source is missing or its place is behind a link, or
        a string holds NUL.
    """
    mounts = list(template.mounts)
    if state_path is not None:
        mounts.append(Mount(host_path=str(view.state_point), path=state_path, read_only=False))
    _refuse_links(template, mounts)
    options = [
        *_namespace_options(),
        *_file_options(template, view, memory, mounts),
        "--clearenv",
        "--chdir", template.workdir,
        "--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID", "--cap-add", "CAP_SETPCAP",
        "--seccomp", str(SECCOMP_FD),
    ]  # fmt: skip
    launch = (_LAUNCH, str(uid))
    argv = (BWRAP, "--args", str(OPTIONS_FD), "--", *launch, *template.command, *template.args)
    if any("\0" in text for text in (*options, *argv)):
        raise HostError("a NUL character in the command or mounts of the agent")
    return Run(argv, b"\0".join(os.fsencode(text) for text in options) + b"\0", _passwd(uid), _group(uid))


def encode_environment(template: TemplateSpec, environment: Mapping[str, str]) -> bytes:
    """Compose what the launcher reads from ORDER_FD.

    Shape: environment is what the agent gets beside PATH, HOME and the CA variables, which it may override, and PWD.
    Raises: HostError when it is over MAX_ENVIRONMENT_BYTES or holds NUL.
    """
    merged = _DEFAULT_ENVIRONMENT | ca_environment() | dict(environment) | {"PWD": template.workdir}
    words = [f"{name}={value}" for name, value in merged.items()]
    if any("\0" in word for word in words):
        raise HostError("a NUL character in the environment of the agent")
    raw = b"".join(os.fsencode(word) + b"\0" for word in words)
    if len(raw) > MAX_ENVIRONMENT_BYTES:
        raise HostError(f"the environment of the agent has {len(raw)} bytes; at most {MAX_ENVIRONMENT_BYTES} fit")
    return len(raw).to_bytes(4, "little") + raw


def _namespace_options() -> list[str]:
    """Everything but the network: the spawner has entered that."""
    return [
        "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup", "--hostname", HOSTNAME,
        "--die-with-parent", "--new-session",
    ]  # fmt: skip


def _file_options(template: TemplateSpec, view: HostView, memory: int, mounts: Sequence[Mount]) -> list[str]:
    half = str(max(1 << 20, memory // 2))
    return [
        *_rootfs_options(template, view, tuple(os.path.normpath(mount.path) for mount in mounts)),
        "--ro-bind", str(view.etc_for(template.rootfs)), "/etc",
        "--perms", "0644", "--ro-bind-data", str(PASSWD_FD), "/etc/passwd",
        "--perms", "0644", "--ro-bind-data", str(GROUP_FD), "/etc/group",
        *_parent_options(_LAUNCH), "--ro-bind", str(LAUNCHER), _LAUNCH,
        "--proc", "/proc", "--dev", "/dev",
        "--perms", "1777", "--size", half, "--tmpfs", _SHM,
        "--perms", "1777", "--size", half, "--tmpfs", _TMP,
        *_parent_options(_CPUS), "--ro-bind-try", _CPUS, _CPUS,
        *(word for mount in mounts for word in _mount_options(mount)),
        *(word for path in view.hidden for word in _hide_options(str(path), template)),
        "--remount-ro", "/",
    ]  # fmt: skip


def _rootfs_options(template: TemplateSpec, view: HostView, points: tuple[str, ...]) -> Iterator[str]:
    """Bind each top-level folder that others may enter; folders that only root can read are absent, not just closed."""
    rootfs = template.rootfs
    is_host = os.path.realpath(rootfs) == "/"
    for entry in _list_folder(rootfs, f"rootfs {rootfs}"):
        if (
            entry.name in _OWN_IN_SANDBOX
            or (is_host and entry.name not in _PROGRAMS)
            or entry.path in map(str, view.hidden)
        ):
            continue
        if entry.is_symlink():
            yield from ("--symlink", os.readlink(entry.path), f"/{entry.name}")
        elif entry.is_dir() and entry.stat().st_mode & _OTHERS_ENTER == _OTHERS_ENTER:
            yield from _folder_options(entry.path, f"/{entry.name}", points)
    if is_host:
        # Programs expect these two; both lead to what the sandbox has of its own.
        yield from (
            "--perms",
            "0755",
            "--dir",
            "/var",
            "--symlink",
            "../tmp",
            _VAR_TMP,
            "--symlink",
            "../run",
            "/var/run",
        )


def _folder_options(source: str, target: str, points: tuple[str, ...]) -> Iterator[str]:
    """Bind a folder read-only; one that lacks a mount point is made anew, with what is in it bound piece by piece.

    Nothing can be created in a read-only bind, so that `path: /opt/agent` would need an /opt/agent on the host.
    """
    inside = tuple(point for point in points if point.startswith(f"{target}/"))
    if all(os.path.lexists(source + point.removeprefix(target)) for point in inside):
        yield from ("--ro-bind", source, target)
        return
    yield from ("--perms", "0755", "--dir", target)
    for entry in _list_folder(source, source):
        place = f"{target}/{entry.name}"
        if entry.is_symlink():
            yield from ("--symlink", os.readlink(entry.path), place)
        elif entry.is_dir():
            yield from _folder_options(entry.path, place, inside)
        elif entry.is_file():
            yield from ("--ro-bind", entry.path, place)


def _list_folder(path: str, what: str) -> list[os.DirEntry[str]]:
    try:
        return sorted(os.scandir(path), key=lambda entry: entry.name)
    except OSError as exc:
        raise HostError(f"{what}: {exc.strerror}") from exc


def _mount_options(mount: Mount) -> Iterator[str]:
    if not os.path.exists(mount.host_path):
        raise HostError(f"mount {mount.path}: host path {mount.host_path} does not exist")
    yield from _parent_options(mount.path)
    yield from ("--ro-bind" if mount.read_only else "--bind", mount.host_path, mount.path)


def _refuse_links(template: TemplateSpec, mounts: Sequence[Mount]) -> None:
    """Refuse a mount point behind a link of the rootfs or of another mount: they may be somebody else's.

    bwrap, as root, follows links to wherever they lead while it builds: over the launcher, which still has its
    capabilities then, or out of the view. The links of a host that is its own rootfs are the operator's.
    """
    shown = [("/", template.rootfs)] if os.path.realpath(template.rootfs) != "/" else []
    shown += [(mount.path, mount.host_path) for mount in mounts]
    for mount in mounts:
        point = PurePosixPath("/" + os.path.normpath(mount.path).lstrip("/"))
        for path, source in shown:
            place, above = source, PurePosixPath("/" + os.path.normpath(path).lstrip("/"))
            for name in point.relative_to(above).parts if point.is_relative_to(above) else ():
                place = os.path.join(place, name)
                if os.path.islink(place):
                    raise HostError(f"mount {mount.path}: {place} is a link; name the place that it leads to")


def _parent_options(path: str) -> Iterator[str]:
    """Make the folders above a mount point enterable: those that bwrap makes by itself are root's alone."""
    for parent in reversed(PurePosixPath(path).parents[:-1]):
        yield from ("--perms", "0755", "--dir", str(parent))


def _hide_options(path: str, template: TemplateSpec) -> Iterator[str]:
    """Cover a hidden folder wherever a bind shows it."""
    shown = []
    for target, folder in (("/", template.rootfs), *((mount.path, mount.host_path) for mount in template.mounts)):
        source = os.path.realpath(folder)
        if target == source == "/" and path.split("/")[1] not in _PROGRAMS:
            continue
        if path == source or path.startswith(source.rstrip("/") + "/"):
            shown.append(os.path.normpath(f"{target.rstrip('/')}/{os.path.relpath(path, source)}"))
    for place in shown if Path(path).is_dir() else ():
        yield from ("--perms", "0000", "--tmpfs", place)


def _passwd(uid: int) -> bytes:
    return (
        "root:x:0:0:root:/nonexistent:/usr/sbin/nologin\n"
        f"agent:x:{uid}:{uid}:agent:/tmp:/bin/sh\n"
        "nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n"
    ).encode()


def _group(uid: int) -> bytes:
    return f"root:x:0:\nagent:x:{uid}:\nnogroup:x:65534:\n".encode()
