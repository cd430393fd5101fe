"""What goes to a terminal. Names and values come from agents and upstreams: none of them may speak to the terminal."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

from clrk.core.printable import printable as printable  # noqa: PLC0414 - for those who have the terminal at hand

if TYPE_CHECKING:
    from rich.console import Console

_WIDE: Final = 200  # columns when nobody looks: files and pipes do not wrap


def console() -> Console:
    """Return the console of stdout: colour only on a terminal and without NO_COLOR, no markup, no guessing."""
    from rich.console import Console

    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else _WIDE
    return Console(width=width, markup=False, emoji=False, highlight=False)


def error(message: object) -> None:
    """Write one line to stderr."""
    sys.stderr.write(f"clrk: {printable(message)}\n")


def write_json(document: object) -> None:
    """Write a document; escapes keep control characters out of the terminal."""
    sys.stdout.write(json.dumps(document, indent=2) + "\n")


def write_json_line(raw: bytes) -> None:
    """Write one line of the daemon's NDJSON; what is not printable ASCII is in strings, and becomes an escape."""
    text = raw.decode()
    if not (text.isascii() and text.isprintable()):
        text = json.dumps(json.loads(text), separators=(",", ":")).replace("\x7f", "\\u007f")
    sys.stdout.write(text + "\n")


def write_yaml(document: object) -> None:
    """Write a document as YAML."""
    import yaml

    sys.stdout.write(yaml.safe_dump(document, sort_keys=False, allow_unicode=False))


def write_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write an aligned table, one line a row at any width. Cells are made printable here."""
    from rich.cells import cell_len
    from rich.text import Text

    lines = [list(columns), *([printable(cell) for cell in row] for row in rows)]
    widths = [max(cell_len(cell) for cell in column) for column in zip(*lines, strict=True)]
    out = console()
    for number, cells in enumerate(lines):
        padded = (cell + " " * (width - cell_len(cell)) for cell, width in zip(cells, widths, strict=True))
        out.print(Text("  ".join(padded).rstrip(), "" if number else "bold"), soft_wrap=True)


def write_document(document: Any, form: str) -> None:
    """Write JSON or YAML, as `-o` asks."""
    if form == "yaml":
        write_yaml(document)
    else:
        write_json(document)
