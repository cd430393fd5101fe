"""What a sandbox sees of the host's files: a sanitised /etc with the gateway's CA.

Prepared once for each start of the daemon, under the run folder, in a folder that only root can enter: bwrap, as root,
binds parts of it into sandboxes.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
import stat
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Final

from clrk.core.errors import HostError
from clrk.core.gateway_config import ca_id
from clrk.core.layout import HostLayout

HOSTNAME: Final = "sandbox"
RESOLVER: Final = "169.254.0.1"  # clrk.netns.plan.EGRESS_V4
CA_BUNDLE: Final = "/etc/ssl/certs/ca-certificates.crt"

CA_VARIABLES: Final = (
    "SSL_CERT_FILE",
    "REQUESTS_CA_BUNDLE",
    "CURL_CA_BUNDLE",
    "NODE_EXTRA_CA_CERTS",
    "GIT_SSL_CAINFO",
    "AWS_CA_BUNDLE",
    "DENO_CERT",
    "CARGO_HTTP_CAINFO",
)
"""Environment variables by which common programs find the CA bundle (CONTRACT section 8)."""

# Where distributions and libraries look: Debian, Fedora and RHEL (old and new), Alpine and OpenSSL, SUSE.
_BUNDLE_PATHS: Final = (
    "ssl/certs/ca-certificates.crt",
    "pki/tls/certs/ca-bundle.crt",
    "pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "ssl/cert.pem",
    "ssl/ca-bundle.pem",
)

# Not for agents although the world may read it: the operator's configuration, names of host users, the host's identity;
# and libraries that the dynamic loader would put into every program.
_ABSENT: Final = frozenset(
    {"clrk", "passwd", "passwd-", "group", "group-", "machine-id", "hostname", "fstab", "ssh", "subuid", "subgid"}
    | {"ld.so.preload"}
)

# Built from csrc/launch.c by setup.py. Sandboxes get it from here: distributions mount /run so that no program runs.
LAUNCHER: Final = Path(__file__).with_name("_launch")
_OTHERS_READ: Final = stat.S_IROTH
_OTHERS_ENTER: Final = stat.S_IROTH | stat.S_IXOTH


@dataclass(frozen=True, slots=True)
class HostView:
    """The prepared files. `etc_for` adds to them, once for each other rootfs.

    Shape: state_point is an empty folder: where a run's own mount namespace has the agent's state.
    """

    directory: Path
    state_point: Path
    hidden: tuple[PurePosixPath, ...]
    ca_cert_pem: str = field(repr=False)
    _numbers: Iterator[int] = field(default_factory=itertools.count, repr=False)  # of the folders, for every CA
    _etc: dict[str, Path] = field(default_factory=dict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @classmethod
    def prepare(cls, layout: HostLayout, *, ca_cert_pem: str, hidden: tuple[str, ...] = ()) -> HostView:
        """Write the files anew; what an earlier start left is removed.

        Shape: ca_cert_pem is the gateway's CA, one or more certificates. hidden are absolute host paths that no
            sandbox may see although their parents are shown (the state folder).
        Raises: HostError.
        """
        if not LAUNCHER.exists():
            raise HostError(f"{LAUNCHER} is not built; run packaging/setup.sh")
        directory = layout.run_dir / "view"
        try:
            layout.run_dir.mkdir(mode=0o755, exist_ok=True)
            if directory.exists():
                shutil.rmtree(directory)
            directory.mkdir(mode=0o700)
            state_point = directory / "state"
            state_point.mkdir(mode=0o700)
            paths = tuple(PurePosixPath(os.path.realpath(path)) for path in hidden)
            view = cls(directory, state_point, paths, ca_cert_pem)
            view.etc_for("/")
        except OSError as exc:
            raise HostError(f"prepare {directory}: {exc}") from exc
        return view

    @property
    def ca_id(self) -> str:
        """Return the name of the CA in the bundles."""
        return ca_id(self.ca_cert_pem)

    def with_ca(self, ca_cert_pem: str) -> HostView:
        """Return this view with another CA in its bundles; sandboxes with files of this one keep them."""
        return dataclasses.replace(self, ca_cert_pem=ca_cert_pem, _etc={}, _lock=threading.Lock())

    def etc_for(self, rootfs: str) -> Path:
        """Return the sanitised copy of this rootfs's /etc, made at the first call. Blocks; safe in threads.

        Raises: HostError.
        """
        with self._lock:
            if (known := self._etc.get(rootfs)) is None:
                target = self.directory / f"etc-{next(self._numbers)}"
                try:
                    _write_etc(Path(rootfs), target, self.ca_cert_pem)
                except OSError as exc:
                    raise HostError(f"copy {rootfs}/etc for sandboxes: {exc}") from exc
                known = self._etc[rootfs] = target
        return known

    def remove(self) -> None:
        """Remove the files. Idempotent."""
        shutil.rmtree(self.directory, ignore_errors=True)


def ca_environment() -> dict[str, str]:
    """Return the variables that name the CA bundle."""
    return dict.fromkeys(CA_VARIABLES, CA_BUNDLE)


def _write_etc(rootfs: Path, target: Path, ca_cert_pem: str) -> None:
    """Copy the rootfs's /etc. What is in an image may be somebody else's: its links are not followed to host files."""
    source = rootfs / "etc"
    target.mkdir(mode=0o755)
    if _is_inside(source, rootfs) and source.is_dir():
        _copy_readable(source, target, _ABSENT)
    _replace(target, "resolv.conf", f"nameserver {RESOLVER}\noptions timeout:2 attempts:2 ndots:1\n")
    _replace(target, "hosts", f"127.0.0.1 localhost\n127.0.1.1 {HOSTNAME}\n::1 localhost ip6-localhost ip6-loopback\n")
    _replace(target, "hostname", f"{HOSTNAME}\n")
    _replace(
        target, "nsswitch.conf", "passwd: files\ngroup: files\nhosts: files dns\nservices: files\nprotocols: files\n"
    )
    # Mount points of each sandbox's own files.
    _replace(target, "passwd", "")
    _replace(target, "group", "")
    bundle = _system_roots(rootfs) + "\n" + ca_cert_pem
    for path in _BUNDLE_PATHS:
        _replace(target, path, bundle)
    _add_to_hashed_folder(target, "ssl/certs", ca_cert_pem)


def _copy_readable(source: Path, target: Path, absent: frozenset[str]) -> None:
    """Copy what the world may read: files, folders and links; never sockets, devices or fifos."""
    for entry in os.scandir(source):
        if entry.name in absent:
            continue
        status = entry.stat(follow_symlinks=False)
        copy = target / entry.name
        if stat.S_ISLNK(status.st_mode):
            copy.symlink_to(os.readlink(entry.path))
        elif stat.S_ISREG(status.st_mode) and status.st_mode & _OTHERS_READ:
            shutil.copyfile(entry.path, copy)
            copy.chmod(0o755 if status.st_mode & stat.S_IXOTH else 0o644)
        elif stat.S_ISDIR(status.st_mode) and status.st_mode & _OTHERS_ENTER == _OTHERS_ENTER:
            copy.mkdir(mode=0o755)
            _copy_readable(Path(entry.path), copy, frozenset())


def _replace(root: Path, name: str, text: str) -> None:
    """Write a file of the copy in place of whatever is there.

    A link on the way becomes a folder: Fedora links /etc/ssl/certs, and an image's link may lead anywhere.
    """
    path = root / name
    for parent in reversed(PurePosixPath(name).parents[:-1]):
        folder = root / parent
        if folder.is_symlink():
            folder.unlink()
        folder.mkdir(mode=0o755, exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_text(text)
    path.chmod(0o644)


def _system_roots(rootfs: Path) -> str:
    """Return the PEM bundle of this rootfs, else of the host; empty where neither has one."""
    for base in (rootfs, Path("/")):
        for name in _BUNDLE_PATHS:
            path = base / "etc" / name
            if path.is_file() and _is_inside(path, base):
                return path.read_text(errors="replace")
    return ""


def _is_inside(path: Path, rootfs: Path) -> bool:
    """Whether a path still lies in the rootfs after its links: an absolute one leads to the host's own file."""
    return path.resolve().is_relative_to(rootfs.resolve())


def _add_to_hashed_folder(root: Path, folder: str, ca_cert_pem: str) -> None:
    """Add the CA where OpenSSL looks up by subject hash; programs that ignore the variables and the bundle use it."""
    _replace(root, f"{folder}/clrk-ca.pem", ca_cert_pem)
    openssl = shutil.which("openssl")
    if openssl is None:
        return
    argv = [openssl, "x509", "-noout", "-subject_hash"]
    done = subprocess.run(argv, input=ca_cert_pem, capture_output=True, text=True, check=False, timeout=10)
    if done.returncode == 0:
        link = root / folder / f"{done.stdout.strip()}.0"
        link.unlink(missing_ok=True)
        link.symlink_to("clrk-ca.pem")
