"""Instances of clrk that tests make on this host: named after their process, so that what a dead one left is known."""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from clrk.core.layout import HostLayout
from clrk.netns.namespace import NETNS_DIR
from clrk.netns.reconcile import remove_leftovers
from clrk.runtime.cgroup import find_hierarchy

DEADLINE_S = 60.0  # of every wait: what is on its way comes long before, also on a busy machine
DIES_WITH_US = ("setpriv", "--pdeathsig", "KILL", "--")
"""Before the command of a child: SIGKILL when the thread that started it ends, as it does when a run is killed."""

OWNER_VARIABLE = "CLRK_TESTS_OWNER"  # in the environment of a test's child that makes instances of its test
OWNER = int(os.environ.get(OWNER_VARIABLE) or os.getpid())

FIRST_UID = 3_000_000 + OWNER % 1_000_000 * 1000  # of a thousand that are of this process alone

_NAME = re.compile(r"clrkt([0-9]+)[a-z]*")
_RUN_DIR = Path("/run")
_PLACES = (_RUN_DIR, Path(tempfile.gettempdir()), Path("/"), Path("/opt"))  # of folders with an instance's name
_MOUNTS = Path("/proc/self/mounts")
_MNT_DETACH = 2  # include/linux/fs.h
_LIBC = ctypes.CDLL(None, use_errno=True)


def instance(tag: str) -> str:
    """The name of an instance of this process. tag: one or two letters, different for each that lives at one time."""
    return HostLayout(f"clrkt{OWNER}{tag}").instance


@pytest.fixture(scope="session", autouse=True)
def clean_host() -> None:
    """Nothing of a test run that was killed is in the way of this one, or stays behind after it."""
    with cleaning_alone() as clean:
        clean()


@contextmanager
def cleaning_alone() -> Iterator[Callable[[], list[str]]]:
    """Of several test runs that start now, one cleans up.

    Yields: what removes every instance whose process is no more, and returns their names; the living keep theirs.
    """
    run = os.open(_RUN_DIR, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(run, fcntl.LOCK_EX)
        yield _remove_what_the_dead_left
    finally:
        os.close(run)


def _remove_what_the_dead_left() -> list[str]:
    dead = _names_of_the_dead()
    for name in dead:
        _remove(name)
    return dead


def _names_of_the_dead() -> list[str]:
    """Names of instances wherever these leave something, and no process with the number in it."""
    named = {entry.name for tree in _cgroup_trees() for entry in tree.iterdir()}
    named |= {_instance_in(entry) for place in (*_PLACES, NETNS_DIR) if place.is_dir() for entry in place.iterdir()}
    named |= {source for source, _ in _mounts()}
    found = filter(None, map(_NAME.fullmatch, sorted(named)))
    return [name[0] for name in found if not Path("/proc", name[1]).exists()]


def _remove(name: str) -> None:
    for tree in _cgroup_trees():
        remove_cgroups(tree / name)
    remove_leftovers(HostLayout(name).netns_prefix)
    for source, target in _mounts():
        if source == name:
            _LIBC.umount2(os.fsencode(target), _MNT_DETACH)
    for entry in [entry for place in _PLACES if place.is_dir() for entry in place.iterdir()]:
        if _instance_in(entry) == name and entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)


def _instance_in(path: Path) -> str:
    """The part of a name that may be an instance's: all of it, or that before the first dash."""
    return path.name.partition("-")[0]


def remove_cgroups(parent: Path) -> None:
    """Kill what is in a cgroup and below, and remove it, if it is there.

    Raises: OSError when a process in it does not end within DEADLINE_S.
    """
    deadline = time.monotonic() + DEADLINE_S
    while parent.exists():
        kill = parent / "cgroup.kill"  # of v2, where each process of v1's groups is as well
        if kill.exists():
            kill.write_text("1")
        try:
            for folder, _, _ in os.walk(parent, topdown=False):
                os.rmdir(folder)
        except OSError:  # a process that was killed is still leaving
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _cgroup_trees() -> list[Path]:
    hierarchy = find_hierarchy(_MOUNTS.read_text())
    return [hierarchy.v2, *hierarchy.v1.values()]


def _mounts() -> Iterator[tuple[str, str]]:
    """Source and target of each mount."""
    for line in _MOUNTS.read_text().splitlines():
        source, target, *_ = line.split()
        yield source, target
