"""Finds kernel headers for bcc's compiler without touching /lib/modules."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from clrk.core.errors import HostError

_BCC_VARIABLE: Final = "BCC_KERNEL_SOURCE"
_DEBIAN_ARCH: Final = {"x86_64": ("amd64", "x86"), "aarch64": ("arm64", "arm64"), "riscv64": ("riscv64", "riscv")}


@dataclass(frozen=True, slots=True)
class KernelHeaders:
    """Where bcc finds headers.

    Shape: source is None if bcc finds them by itself; else the tree for BCC_KERNEL_SOURCE, and cflags add the
    generated headers that a distribution keeps in a second tree.
    """

    source: Path | None
    cflags: tuple[str, ...]

    @contextmanager
    def environment(self) -> Iterator[None]:
        """Show bcc the headers while it compiles; it reads the process's environment."""
        if self.source is None:
            yield
            return
        before = os.environ.get(_BCC_VARIABLE)
        os.environ[_BCC_VARIABLE] = str(self.source)
        try:
            yield
        finally:
            if before is None:
                del os.environ[_BCC_VARIABLE]
            else:
                os.environ[_BCC_VARIABLE] = before


def find_kernel_headers(
    release: str | None = None, machine: str | None = None, root: Path = Path("/")
) -> KernelHeaders:
    """Return the best headers of this host: the running kernel's, else the newest Debian ones under /usr/src.

    Our programs use stable UAPI structs alone, so headers of another version do: the verifier has the last word.
    Raises: HostError naming the package.
    """
    release = release or os.uname().release
    machine = machine or platform.machine()
    if os.environ.get(_BCC_VARIABLE):  # the operator's choice
        return KernelHeaders(None, ())
    if (root / "lib/modules" / release / "build/include").is_dir() or (root / "sys/kernel/kheaders.tar.xz").exists():
        return KernelHeaders(None, ())
    debian_arch, kernel_arch = _DEBIAN_ARCH.get(machine, (machine, machine))
    candidates = []
    for generated in (root / "usr/src").glob(f"linux-headers-*-{debian_arch}"):
        version = generated.name.removeprefix("linux-headers-").removesuffix(f"-{debian_arch}")
        common = generated.with_name(f"linux-headers-{version}-common")
        if common.is_dir():
            candidates.append((_version_key(version), common, generated))
    if not candidates:
        raise HostError(
            f"kernel headers for {release}: none in /lib/modules/{release}/build, /sys/kernel/kheaders.tar.xz or "
            f"/usr/src; apt install linux-headers-{debian_arch}"
        )
    _, common, generated = max(candidates)
    arch_include = generated / "arch" / kernel_arch / "include/generated"
    folders = (generated / "include", arch_include, arch_include / "uapi", generated / "include/generated/uapi")
    return KernelHeaders(common, tuple(f"-I{folder}" for folder in folders))


def _version_key(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version))
