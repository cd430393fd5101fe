"""Build hooks for what is in C: the cffi extension, and the launcher of agents. The rest is in pyproject.toml."""

from __future__ import annotations

import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext

PACKAGE = Path("src/clrk/runtime")
COMPILE = ("gcc", "-std=gnu11", "-O2", "-static", "-D_FORTIFY_SOURCE=2", "-fstack-protector-strong", "-Wall", "-Wextra")


class BuildAll(build_ext):
    """Also compiles runtime/csrc/launch.c into the package, beside its source for an editable install."""

    def run(self) -> None:
        """Build the extension, then the program."""
        super().run()
        in_place = self.inplace or getattr(self, "editable_mode", False)
        folder = PACKAGE if in_place else Path(self.build_lib) / "clrk/runtime"
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run([*COMPILE, "-o", folder / "_launch", PACKAGE / "csrc/launch.c"], check=True)


setup(cffi_modules=["src/clrk/ebpf/_build.py:ffibuilder"], cmdclass={"build_ext": BuildAll})
