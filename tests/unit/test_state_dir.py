"""Where the runtime keeps its state: one runtime at a time, and nobody else's hands in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from clrk.core.errors import HostError
from clrk.runtime.state_dir import StateDir


def test_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    state = StateDir.take(tmp_path / "a/b")
    assert state.path.stat().st_mode & 0o777 == 0o700
    state.release()


def test_two_runtimes_can_not_share_one(tmp_path: Path) -> None:
    first = StateDir.take(tmp_path / "state")
    with pytest.raises(HostError, match="is in use by another runtime; give each its own"):
        StateDir.take(tmp_path / "state")
    first.release()
    StateDir.take(tmp_path / "state").release()


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o1777])
def test_a_folder_that_others_may_write_is_refused(tmp_path: Path, mode: int) -> None:
    """Root would follow a link that they put at <stateDir>/gateway, and change its target's owner."""
    (tmp_path / "state").mkdir()
    (tmp_path / "state").chmod(mode)
    with pytest.raises(HostError, match="nobody else may write there"):
        StateDir.take(tmp_path / "state")


@pytest.mark.parametrize("mode", [0o700, 0o711, 0o755])
def test_usual_modes_are_fine(tmp_path: Path, mode: int) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state").chmod(mode)
    StateDir.take(tmp_path / "state").release()
    assert (tmp_path / "state").stat().st_mode & 0o7777 == mode  # taken as it is


def test_something_else_is_there(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("")
    with pytest.raises(HostError, match="File exists"):
        StateDir.take(tmp_path / "state")
