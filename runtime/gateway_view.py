"""The gateway's view of the file system: system libraries, its own code and one writable folder, nothing else.

The gateway runs without privileges while the checkout or the virtual environment may stand below a folder that only
root can enter (`/root`, a `mktemp -d`), so each folder it needs is mounted by itself at the same path.
"""

from __future__ import annotations

import os
import site
import stat
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

import clrk
from clrk.core.errors import HostError

# Packages of clrk that the gateway may import; the privileged side is not in its view at all.
_PACKAGES: Final = ("core", "gateway")
_SYSTEM: Final = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
_ETC: Final = (
    "alternatives", "ca-certificates", "ca-certificates.conf", "gai.conf", "group", "host.conf", "hosts", "ld.so.cache",
    "ld.so.conf", "ld.so.conf.d", "localtime", "mime.types", "nsswitch.conf", "passwd", "pki", "protocols",
    "python3", f"python3.{sys.version_info.minor}", "resolv.conf", "services", "ssl", "timezone",
)  # fmt: skip


def bwrap_arguments(writable: Path) -> list[str]:
    """Return the arguments of bwrap up to the command: mounts, namespaces and the capabilities needed to drop the rest.

    Raises: HostError when a folder of the code can not be read by an unprivileged user.
    """
    # A pid namespace of its own: the kernel ends everything in it with its first process. A parent-death signal alone
    # would not do, since the kernel asks whether the dying parent may signal, and this bwrap has no CAP_KILL.
    arguments = ["--unshare-pid", "--unshare-ipc", "--unshare-uts", "--new-session", "--die-with-parent"]
    arguments += ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID", "--cap-add", "CAP_SETPCAP"]
    arguments += ["--dev", "/dev", "--proc", "/proc", "--perms", "1777", "--tmpfs", "/tmp"]  # noqa: S108 - private
    for path in map(Path, _SYSTEM):
        if path.is_symlink():
            arguments += ["--symlink", os.readlink(path), str(path)]
        elif path.is_dir():
            arguments += ["--ro-bind", str(path), str(path)]
    arguments += ["--dir", "/etc"]
    for name in _ETC:
        path = Path("/etc") / name
        if path.exists():  # follows resolv.conf and localtime to where they really are
            arguments += ["--ro-bind", os.path.realpath(path), str(path)]
    bound = [*map(Path, _SYSTEM)]
    for path in code_folders():
        _check_readable(path)
        arguments += [*_make_parents(path, bound), "--ro-bind", str(path), str(path)]
        bound.append(path)
    arguments += [*_make_parents(writable, bound), "--bind", str(writable), str(writable), "--chdir", "/"]
    return arguments


def _make_parents(path: Path, bound: list[Path]) -> Iterator[str]:
    """Yield --dir for each folder above path that is not in the view yet: made by itself, bwrap gives it mode 0700."""
    for parent in reversed(path.parents[:-1]):
        if not _inside_any(parent, bound):
            yield from ("--dir", str(parent))


def code_folders() -> list[Path]:
    """Return the folders outside the system's that Python and clrk are loaded from, parents first."""
    found = {Path(os.path.abspath(path)) for path in _candidates()}
    return sorted(path for path in found if path.exists() and not _inside_any(path, map(Path, _SYSTEM)))


def _candidates() -> Iterator[str]:
    yield from (sys.prefix, sys.base_prefix, *site.getsitepackages())
    executable = sys.executable
    while os.path.islink(executable):  # .venv/bin/python -> /opt/python/bin/python3 -> ...
        executable = os.path.join(os.path.dirname(executable), os.readlink(executable))
        yield os.path.dirname(os.path.dirname(executable))
    for package in clrk.__path__:
        yield from _package_folders(package)


def _package_folders(package: str) -> Iterator[str]:
    """Yield where clrk itself stands. In a checkout its packages are symlinks to the top of the tree."""
    links = [os.path.join(package, name) for name in _PACKAGES]
    if not any(os.path.islink(link) for link in links):
        yield from links
        yield from (os.path.join(package, name) for name in ("__init__.py", "py.typed"))
    else:  # the folder that holds the links (empty ones for the other packages), and where ours lead
        yield package
        yield from (os.path.realpath(link) for link in links)


def _inside_any(path: Path, folders: Iterable[Path]) -> bool:
    return any(path.is_relative_to(folder) for folder in folders)


def _check_readable(path: Path) -> None:
    """Refuse a checkout made under umask 077, which would show as an ImportError of the gateway much later."""
    info = path.stat()
    needed = stat.S_IROTH | stat.S_IXOTH if path.is_dir() else stat.S_IROTH
    if info.st_mode & needed != needed:
        raise HostError(f"the gateway runs without privileges and can not read {path}; run: chmod -R o+rX {path}")
