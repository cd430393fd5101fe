"""Every parser that reads a stranger's bytes, as a function of bytes that raises when an invariant breaks.

Each `target_*.py` of this folder has a TARGETS of its own; `corpus/<target>/` holds inputs that once meant something.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Final

FOLDER: Final = Path(__file__).parent
CORPUS: Final = FOLDER / "corpus"

Target = Callable[[bytes], None]


def _gather() -> dict[str, Target]:
    found: dict[str, Target] = {}
    for path in sorted(FOLDER.glob("target_*.py")):
        for name, target in import_module(path.stem).TARGETS.items():
            assert name not in found, f"two fuzz targets are called {name}"
            found[name] = target
    return found


TARGETS: Final = _gather()


def seeds(name: str) -> list[bytes]:
    """Return the corpus of a target, in the order of the files' names."""
    return [path.read_bytes() for path in sorted((CORPUS / name).glob("*"))]
