"""Build hook for the cffi extension; everything else is in pyproject.toml."""

from setuptools import setup

setup(cffi_modules=["src/clrk/ebpf/_build.py:ffibuilder"])
