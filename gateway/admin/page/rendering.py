"""Templates and static files, read when the gateway starts: afterwards it sees little of the host's files.

Every value that a template prints goes through `_shown` and then through autoescaping, without the template asking for
it: names, models, bodies and errors are hostile. Nothing here makes markup from a value.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from importlib import resources
from typing import Any, Final
from urllib.parse import quote, urlencode

from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup

from clrk import __version__
from clrk.core.printable import printable
from clrk.gateway.cli.facts import show_cost, show_duration

_FOLDER: Final = resources.files("clrk.gateway.admin.page")
_STATIC_TYPES: Final = {"page.css": "text/css", "page.js": "text/javascript"}

STATIC: Final = {
    name: ((_FOLDER / "static" / name).read_bytes(), content_type) for name, content_type in _STATIC_TYPES.items()
}


def _shown(value: object) -> object:
    """Return what is printed for a value: nothing unseen, no bidi overrides. Runs on every expression of a template."""
    if value is None:
        return ""
    return value if isinstance(value, Markup) else printable(value)


def _lines(value: object) -> Markup:
    """Return text of several lines; tabs and line ends stay as they are."""
    return Markup.escape(printable(str(value).replace("\r\n", "\n"), keep="\n\t"))


def show_moment(ns: int) -> str:
    """Return a CLOCK_REALTIME time in UTC with milliseconds; years that no clock shows appear as their number."""
    try:
        moment = datetime.fromtimestamp(ns // 10**9, UTC)
    except (ValueError, OverflowError, OSError):
        return f"{ns} ns"
    return f"{moment:%Y-%m-%d %H:%M:%S}.{ns // 10**6 % 1000:03d}"


def show_ago(ns: int, now_ns: int) -> str:
    """Return how long ago a time was, or how far ahead it is, in one unit."""
    distance = abs(now_ns - ns) // 10**9
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if distance >= size:
            text = f"{distance // size} {unit}"
            break
    else:
        text = f"{distance} s"
    return f"{text} ago" if ns <= now_ns else f"in {text}"


def show_bytes(size: int) -> str:
    """Return a size in three significant digits."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.3g} TiB"


def path(*segments: str) -> str:
    """Return an address of the page; every segment is quoted, so it can only lead to the page itself."""
    return "/" + "/".join(quote(segment, safe="") for segment in segments)


def _with_query(base: str, **query: object) -> str:
    kept = {key: str(value) for key, value in query.items() if value not in (None, "", False)}
    return f"{base}?{urlencode(kept)}" if kept else base


def _templates() -> dict[str, str]:
    folder = _FOLDER / "templates"
    return {entry.name: entry.read_text() for entry in folder.iterdir() if entry.name.endswith(".html")}


def _environment() -> Environment:
    environment = Environment(
        loader=DictLoader(_templates()),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "lines": _lines,
        "moment": show_moment,
        "ago": show_ago,
        "duration": show_duration,
        "cost": show_cost,
        "bytes": show_bytes,
    }
    environment.globals |= {"path": path, "with_query": _with_query, "version": __version__}
    return environment


_ENVIRONMENT: Final = _environment()


def render(template: str, **values: Any) -> str:
    """Return a page. Templates know `now_ns` beside what is given."""
    return _ENVIRONMENT.get_template(template).render({"now_ns": time.time_ns(), **values})
