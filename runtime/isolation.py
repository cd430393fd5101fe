"""The command line of one run: bwrap's view of the file system, then the final drop to the agent's uid.

Theory of operation. bwrap starts as root inside the sandbox's cgroup and network namespace. It makes the mount, pid,
ipc, uts and cgroup namespaces, builds the root from read-only binds of the top-level folders, keeps three
capabilities, loads the seccomp filter and executes setpriv, which changes uid, gid and groups, empties the bounding
set and executes the agent. Its options travel in a memfd: other users of the host can read a command line, and the
agent's environment may hold secrets.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from clrk.core.errors import HostError
from clrk.core.resources import Mount, TemplateSpec

from .view import HOSTNAME, HostView, ca_environment

BWRAP: Final = "/usr/bin/bwrap"
OPTIONS_FD: Final = 3
SECCOMP_FD: Final = 4
PASSWD_FD: Final = 5
GROUP_FD: Final = 6

_DROP_DIR: Final = "/run/clrk"
_CPUS: Final = "/sys/devices/system/cpu"  # programs count CPUs there
_TMP: Final = "/tmp"  # noqa: S108 - here and below: the sandbox's own
_SHM: Final = "/dev/shm"  # noqa: S108
_VAR_TMP: Final = "/var/tmp"  # noqa: S108
_DEFAULT_ENVIRONMENT: Final = {"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin", "HOME": _TMP}

# The loader and the C library obey these before the drop, as root: they are set after it, by env, on a command line
# that every user of the host can read. Hence names and not prefixes where users have names of their own:
# LANGSMITH_API_KEY, LD_SDK_KEY. Sources: ld.so(8), glibc's elf/dl-support.c, gettext(3).
_LOADER_NAMES: Final = frozenset(
    {"LANG", "LANGUAGE", "NLSPATH", "LOCPATH", "TZDIR", "GCONV_PATH", "GETCONF_DIR"}
    | {f"LD_{name}" for name in (
        "ASSUME_KERNEL", "AUDIT", "BIND_NOT", "BIND_NOW", "DEBUG", "DEBUG_OUTPUT", "DYNAMIC_WEAK", "HWCAP_MASK",
        "LIBRARY_PATH", "ORIGIN_PATH", "POINTER_GUARD", "PREFER_MAP_32BIT_EXEC", "PRELOAD", "PROFILE",
        "PROFILE_OUTPUT", "SHOW_AUXV", "TRACE_LOADED_OBJECTS", "TRACE_PRELINKING", "USE_LOAD_BIAS", "VERBOSE", "WARN",
    )}
)  # fmt: skip
_LOADER_PREFIXES: Final = ("GLIBC_", "MALLOC_", "LC_")
_BUILT_IN_LOCALES: Final = ("C", "POSIX", "C.UTF-8")  # nothing is loaded for these; the usual value of LANG

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


def plan_run(template: TemplateSpec, view: HostView, *, uid: int, memory: int, environment: Mapping[str, str]) -> Run:
    """Compose one run of an agent.

    Shape: environment is what the agent gets beside PATH, HOME and the CA variables, which it may override.
    Units: memory in bytes; /tmp and /dev/shm may each take half of it.
    Raises: HostError when the rootfs can not be listed, a mount's source is missing, or a string holds NUL.
    """
    merged = _DEFAULT_ENVIRONMENT | ca_environment() | dict(environment)
    early = {name: value for name, value in merged.items() if not _is_for_loader(name, value)}
    late = [f"{name}={value}" for name, value in merged.items() if name not in early]
    options = [
        *_namespace_options(),
        *_file_options(template, view, memory),
        *_environment_options(early),
        "--chdir", template.workdir,
        "--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID", "--cap-add", "CAP_SETPCAP",
        "--seccomp", str(SECCOMP_FD),
    ]  # fmt: skip
    tool = [f"{_DROP_DIR}/{view.drop.loader}", "--inhibit-cache", "--library-path", _DROP_DIR]
    drop = [
        *tool, f"{_DROP_DIR}/setpriv", "--reuid", str(uid), "--regid", str(uid), "--clear-groups",
        "--inh-caps=-all", "--ambient-caps=-all", "--bounding-set=-all", "--no-new-privs", "--",
    ]  # fmt: skip
    after_drop = [*tool, f"{_DROP_DIR}/env", *late] if late else []
    argv = (BWRAP, "--args", str(OPTIONS_FD), "--", *drop, *after_drop, *template.command, *template.args)
    if any("\0" in text for text in (*options, *argv)):
        raise HostError("a NUL character in the command, environment or mounts of the agent")
    return Run(argv, b"\0".join(os.fsencode(text) for text in options) + b"\0", _passwd(uid), _group(uid))


def _is_for_loader(name: str, value: str) -> bool:
    return (name in _LOADER_NAMES or name.startswith(_LOADER_PREFIXES)) and value not in _BUILT_IN_LOCALES


def _namespace_options() -> list[str]:
    """Everything but the network: the spawner has entered that."""
    return [
        "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup", "--hostname", HOSTNAME,
        "--die-with-parent", "--new-session",
    ]  # fmt: skip


def _file_options(template: TemplateSpec, view: HostView, memory: int) -> list[str]:
    half = str(max(1 << 20, memory // 2))
    return [
        *_rootfs_options(template, view),
        "--ro-bind", str(view.etc_for(template.rootfs)), "/etc",
        "--perms", "0644", "--ro-bind-data", str(PASSWD_FD), "/etc/passwd",
        "--perms", "0644", "--ro-bind-data", str(GROUP_FD), "/etc/group",
        *_parent_options(f"{_DROP_DIR}/setpriv"), "--ro-bind", str(view.drop.directory), _DROP_DIR,
        "--proc", "/proc", "--dev", "/dev",
        "--perms", "1777", "--size", half, "--tmpfs", _SHM,
        "--perms", "1777", "--size", half, "--tmpfs", _TMP,
        *_parent_options(_CPUS), "--ro-bind-try", _CPUS, _CPUS,
        *(word for mount in template.mounts for word in _mount_options(mount)),
        *(word for path in view.hidden for word in _hide_options(str(path), template)),
        "--remount-ro", "/",
    ]  # fmt: skip


def _rootfs_options(template: TemplateSpec, view: HostView) -> Iterator[str]:
    """Bind each top-level folder that others may enter; folders that only root can read are absent, not just closed."""
    rootfs = template.rootfs
    is_host = os.path.realpath(rootfs) == "/"
    points = tuple(os.path.normpath(mount.path) for mount in template.mounts)
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


def _parent_options(path: str) -> Iterator[str]:
    """Make the folders above a mount point enterable: those that bwrap makes by itself are root's alone."""
    for parent in reversed(PurePosixPath(path).parents[:-1]):
        yield from ("--perms", "0755", "--dir", str(parent))


def _hide_options(path: str, template: TemplateSpec) -> Iterator[str]:
    """Cover a hidden folder wherever a bind shows it."""
    shown = []
    if template.rootfs == "/" and path.split("/")[1] in _PROGRAMS:
        shown.append(path)
    for mount in template.mounts:
        source = os.path.realpath(mount.host_path)
        if path == source or path.startswith(source.rstrip("/") + "/"):
            shown.append(os.path.normpath(f"{mount.path}/{os.path.relpath(path, source)}"))
    for place in shown if Path(path).is_dir() else ():
        yield from ("--perms", "0000", "--tmpfs", place)


def _environment_options(environment: Mapping[str, str]) -> Iterator[str]:
    yield "--clearenv"
    for name, value in environment.items():
        yield from ("--setenv", name, value)


def _passwd(uid: int) -> bytes:
    return (
        "root:x:0:0:root:/nonexistent:/usr/sbin/nologin\n"
        f"agent:x:{uid}:{uid}:agent:/tmp:/bin/sh\n"
        "nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n"
    ).encode()


def _group(uid: int) -> bytes:
    return f"root:x:0:\nagent:x:{uid}:\nnogroup:x:65534:\n".encode()
