"""Leaving out of answers the tools that may not be called: `result.tools` of a JSON-RPC response. Pure.

Theory of operation: an event of a stream is held until its blank line has come, read, and passed on as it came unless
something had to be left out: what comes out is always whole events, so that others may be put between them. A document
is held to its end. What no client can read passes; what only we can not read (too large, nested too deeply, an unknown
content coding) ends the answer, since it may hold what must not be shown.
Source: MCP 2025-06-18, server/tools (ListToolsResult); WHATWG HTML, section 9.2.6 (event streams).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, Final

from clrk.core.errors import ClrkError
from clrk.gateway.interpret import Allowance
from clrk.gateway.llm.sse import MAX_BURST_EVENTS, SseEvent, SseSplitter
from clrk.gateway.mcp.members import MALFORMED, read_items, read_members, write_members

MAX_HELD_BYTES: Final = 16 << 20  # of one event, or of one document
MAX_ITEMS: Final = 10_000  # tools of a list, messages of a batch
MAX_LENIENT_BYTES: Final = 1 << 20  # of what has to be built as objects: more would hold up everybody
_SPACE: Final = b" \t\r\n"
_BOM: Final = b"\xef\xbb\xbf"
_ROW: Final = re.compile(rb"[^\r\n]*(?:\r\n|\r|\n|$)")
_MAX_DIGITS: Final = 4000  # Python refuses to read longer integers

Shows = Callable[[str], bool]


class UnfilterableError(ClrkError):
    """An answer that may hold what must not be shown."""


def filter_message(raw: bytes, shows: Shows) -> bytes:
    """Return a JSON-RPC message or batch without the tools that shows() hides; the same object if there are none.

    Shape: what comes back has the same values otherwise.
    Raises: UnfilterableError for JSON that a client may read and we can not.
    """
    if b"tools" not in raw and b"\\" not in raw:  # no spelling of the member's name
        return raw
    try:
        shown = _filter_body(raw, shows)
    except (*MALFORMED, ValueError):
        return _filter_leniently(raw, shows)
    return raw if shown is None else shown


def _filter_body(raw: bytes, shows: Shows) -> bytes | None:
    """Return what is shown of well-formed JSON without ambiguous members; None for all of it."""
    raw.decode("utf-8")
    if raw.lstrip(_SPACE)[:1] != b"[":
        return _filter_message(raw, shows)
    messages = read_items(raw, MAX_ITEMS)
    shown = [_filter_message(message, shows) if message[:1] == b"{" else None for message in messages]
    if all(message is None for message in shown):
        return None
    return b"[" + b",".join(new or old for new, old in zip(shown, messages, strict=True)) + b"]"


def _filter_message(raw: bytes, shows: Shows) -> bytes | None:
    message = read_members(raw)
    if message.get("result", b"")[:1] != b"{":
        return None
    result = read_members(message["result"])
    if result.get("tools", b"")[:1] != b"[":
        return None
    tools = read_items(result["tools"], MAX_ITEMS)
    kept = [tool for tool in tools if tool[:1] == b"{" and _is_shown(_name_of(tool), shows)]
    if len(kept) == len(tools):
        return None
    return write_members(message | {"result": write_members(result | {"tools": b"[" + b",".join(kept) + b"]"})})


def _name_of(tool: bytes) -> object:
    name = read_members(tool).get("name", b"")
    return json.loads(name) if name[:1] == b'"' else None


def _filter_leniently(raw: bytes, shows: Shows) -> bytes:
    """Filter what some clients read and others do not: bytes that are no UTF-8, NaN, members of one name."""
    if len(raw) > MAX_LENIENT_BYTES:
        raise UnfilterableError("an answer that is too large to be filtered, and no clean JSON")
    reader = _Reader()
    try:
        value = reader.read(raw)
    except RecursionError as exc:
        raise UnfilterableError("an answer that is nested too deeply to be filtered") from exc
    except json.JSONDecodeError:
        return raw
    changed = [_filter(message, shows) for message in (value if isinstance(value, list) else [value])]
    if not any(changed) and not (reader.ambiguous and _lists_tools(value)):
        return raw
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


class _Reader:
    """Reads what clients read, and more. ambiguous: an object had two members of one name; the last one counts."""

    def __init__(self) -> None:
        self.ambiguous = False

    def read(self, raw: bytes) -> Any:
        """Return the value. Raises: json.JSONDecodeError, RecursionError."""
        text = raw.removeprefix(_BOM).decode("utf-8", "replace")
        return json.loads(
            text,
            object_pairs_hook=self._pairs,
            parse_constant=lambda _: None,
            parse_float=_finite,
            parse_int=lambda digits: int(digits) if len(digits) < _MAX_DIGITS else _finite(digits),
            strict=False,
        )

    def _pairs(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        self.ambiguous = self.ambiguous or len(found) != len(pairs)
        return found


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else math.copysign(1e308, value)


def _tools(message: Any) -> list[Any] | None:
    result = message.get("result") if isinstance(message, dict) else None
    tools = result.get("tools") if isinstance(result, dict) else None
    return tools if isinstance(tools, list) else None


def _lists_tools(value: Any) -> bool:
    return any(_tools(message) is not None for message in (value if isinstance(value, list) else [value]))


def _filter(message: Any, shows: Shows) -> bool:
    """Take hidden tools out of a message; say whether there were any."""
    tools = _tools(message)
    if tools is None:
        return False
    kept = [tool for tool in tools if isinstance(tool, dict) and _is_shown(tool.get("name"), shows)]
    if len(kept) == len(tools):
        return False
    tools[:] = kept
    return True


def _is_shown(name: object, shows: Shows) -> bool:
    return isinstance(name, str) and name.isprintable() and shows(name)


class DocumentFilter:
    """Filters one JSON document. Gives its bytes back to the allowance when it is closed."""

    def __init__(self, shows: Shows, allowance: Allowance) -> None:
        self._shows, self._held = shows, _Held(allowance)

    def feed(self, chunk: bytes) -> bytes:
        """Hold a chunk. Raises: UnfilterableError."""
        self._held.add(chunk)
        return b""

    def finish(self) -> bytes:
        """Return what is shown. Raises: UnfilterableError."""
        return filter_message(self._held.take(), self._shows)

    def close(self) -> None:
        """Let go of what is held. Idempotent."""
        self._held.take()


class EventFilter:
    """Filters one event stream. Shape: on_event sees each event that has data, as it was sent."""

    def __init__(self, shows: Shows, allowance: Allowance, on_event: Callable[[SseEvent], None] | None = None) -> None:
        self._shows, self._held, self._on_event = shows, _Held(allowance), on_event
        self._splitter = SseSplitter(MAX_HELD_BYTES)

    def feed(self, chunk: bytes) -> bytes:
        """Return the events that end in this chunk. Raises: UnfilterableError."""
        return b"".join(self._pieces(chunk))

    def finish(self) -> bytes:
        """Return what a stream left without its blank line: some clients read it. Raises: UnfilterableError."""
        event = self._splitter.finish()
        raw = self._held.take()
        return raw if event is None else self._show(event, raw)

    def close(self) -> None:
        """Let go of what is held. Idempotent."""
        self._held.take()

    def _pieces(self, chunk: bytes) -> Iterator[bytes]:
        at = 0
        if self._splitter.expects_lf and chunk.startswith(b"\n") and not self._held.size:
            yield b"\n"  # it ends the event before
            at = 1
        for count, event in enumerate(self._splitter.feed(chunk)):
            if count == MAX_BURST_EVENTS:
                raise UnfilterableError(f"more than {MAX_BURST_EVENTS} events in one piece of a stream")
            self._held.add(chunk[at : event.end])
            at = event.end
            yield self._show(event, self._held.take())
        self._held.add(chunk[at:])

    def _show(self, event: SseEvent, raw: bytes) -> bytes:
        if not event.data:
            return raw
        if self._on_event is not None:
            self._on_event(event)
        shown = filter_message(event.data, self._shows)
        return raw if shown is event.data else _with_data(raw, shown)


def _with_data(raw: bytes, data: bytes) -> bytes:
    """Return an event with other data, in one line where its first data line was; all other lines are kept.

    Shape: data is JSON, in which the ends of lines are no more than space.
    """
    data = data.replace(b"\r", b" ").replace(b"\n", b" ")
    rows: list[bytes] = []
    pending: bytes | None = b"data: " + data
    for number, row in enumerate(_ROW.findall(raw)):
        line = row.rstrip(b"\r\n")
        if (line.removeprefix(_BOM) if number == 0 else line).partition(b":")[0] != b"data":
            rows.append(row)
        elif pending is not None:
            rows.append(pending + row[len(line) :])
            pending = None
    return b"".join(rows)


class _Held:
    """Bytes that wait to be judged: bounded by themselves and, for all exchanges of a run, by its allowance."""

    def __init__(self, allowance: Allowance) -> None:
        self._allowance = allowance
        self._pieces: list[bytes] = []
        self.size = 0

    def add(self, piece: bytes) -> None:
        if not piece:
            return
        if self.size + len(piece) > MAX_HELD_BYTES or not self._allowance.take(len(piece)):
            raise UnfilterableError("an answer that is too large to be filtered")
        self.size += len(piece)
        self._pieces.append(piece)

    def take(self) -> bytes:
        raw = b"".join(self._pieces)
        self._allowance.give_back(self.size)
        self._pieces.clear()
        self.size = 0
        return raw
