"""Judging the exchanges with the MCP servers that an MCPRoute names (the Governor of gateway/govern.py).

Theory of operation: on a governed host every request body is read strictly, whatever its headers say; it goes out as it
is, or the agent gets a JSON-RPC error in the form that its transport has for answers. In Streamable HTTP that is the
answer to the POST. In HTTP+SSE clients read answers from their GET stream only, so the error is put between the events
of that stream, and the POST is accepted. Of a batch all messages go out, or none.
Source: MCP 2025-06-18, basic/transports; 2024-11-05, basic/transports (HTTP with SSE).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from clrk.gateway.govern import Answer, Cut, Inject
from clrk.gateway.interpret import Allowance, Facts, RequestHead, ResponseHead
from clrk.gateway.llm.body import media_type
from clrk.gateway.llm.decompress import Decoder, Identity, decoder, unpack_chunk
from clrk.gateway.llm.framing import EVENT_STREAM
from clrk.gateway.llm.sse import SseEvent
from clrk.gateway.mcp.conversations import Key, endpoint_key, named_endpoint
from clrk.gateway.mcp.list_filter import MAX_HELD_BYTES, DocumentFilter, EventFilter, UnfilterableError
from clrk.gateway.mcp.strict import TOOLS_LIST, Message, Post, UnreadableError, read_post
from clrk.gateway.mcp.tool_policy import CallCounts, HostPolicy, Verdict
from clrk.gateway.telemetry.spans import AttributeValue

DENIED: Final = -32010  # MCP 2026-07-28 leaves -32000 to -32019 to implementations; the SDKs use -32000 and -32001
UNREADABLE: Final = "mcp_unreadable"
UNFILTERABLE: Final = "mcp_unfilterable"
UPGRADE: Final = "mcp_upgrade"
BATCH_DENIED: Final = "batch_denied"
_JSON: Final = "application/json"
_UPGRADE_TEXT: Final = "a connection that becomes something else than HTTP can not be judged by an MCPRoute"


@dataclass(slots=True)
class McpRunState:
    """What the governed exchanges of one run share.

    Shape: streams are the open GET streams of HTTP+SSE by the endpoint that they named; as many as there are exchanges.
    """

    counts: CallCounts = field(default_factory=CallCounts)
    streams: dict[Key, Inject] = field(default_factory=dict)
    allowance: Allowance = field(default_factory=Allowance)


class McpGovernor:
    """Governs one exchange. enforces False: it judges and counts, and changes nothing."""

    decodes_response = False
    rewrites_response = False

    def __init__(self, policy: HostPolicy, state: McpRunState, head: RequestHead, *, enforces: bool) -> None:
        self._policy, self._state, self._head, self._enforces = policy, state, head, enforces
        self._filters = enforces and policy.restricts_names
        self._lists = False  # the agent asked for a list of tools
        self._counted: Sequence[str] = ()
        self._answer: DocumentFilter | EventFilter | None = None
        self._decoder: Decoder | None = Identity()
        self._inject: Inject | None = None
        self._endpoint: Key | None = None

    @property
    def wants_plain_response(self) -> bool:
        """Whatever may be answered by a list of tools has to be read."""
        return self._filters

    # --- the request ------------------------------------------------------------------------------------------------

    def judge(self, body: bytes) -> Answer | None:
        """Judge a request by its whole body; GET and DELETE have none."""
        if self._head.header("upgrade") is not None:
            return self._refuse(403, UnreadableError(DENIED, _UPGRADE_TEXT), UPGRADE)
        if not body and self._head.method != "POST":
            return None
        try:
            post = read_post(self._head.headers, body)
        except UnreadableError as exc:
            return self._refuse(400, exc, UNREADABLE)
        self._lists = any(message.method == TOOLS_LIST for message in post.messages)
        verdicts, self._counted = self._policy.judge(post.messages, self._state.counts)
        denied = next((verdict for verdict in verdicts if verdict is not None), None)
        return None if denied is None else self._deny(post, verdicts, denied)

    def rewrite_request(self, body: bytes) -> bytes:
        """Return the body: what goes out is what the agent sent."""
        return body

    def _refuse(self, status: int, error: UnreadableError, reason: str) -> Answer:
        body = _render(None, error.code, str(error), {"reason": reason, "rule": self._policy.label})
        return Answer(status, _JSON, json.dumps(body).encode(), reason, str(error), self._policy.label)

    def _deny(self, post: Post, verdicts: Sequence[Verdict | None], denied: Verdict) -> Answer:
        errors = [
            _error(message, verdict, denied)
            for message, verdict in zip(post.messages, verdicts, strict=True)
            if message.method and message.id is not None
        ]
        status, kind, body = 200, _JSON, b""
        if not errors:
            status = 202  # nobody waits for an answer to a notification
        elif self._delivered(errors):
            status, kind, body = 202, "text/plain; charset=utf-8", b"Accepted"
        else:
            body = json.dumps(errors if post.is_batch else errors[0]).encode()
            if not _accepts_json(self._head):
                kind, body = EVENT_STREAM, _event(body)
        return Answer(status, kind, body, denied.reason, denied.message, denied.rule)

    def _delivered(self, errors: Sequence[dict[str, Any]]) -> bool:
        """Send errors over the stream that the client reads answers from, if this is HTTP+SSE."""
        inject = self._state.streams.get(endpoint_key(self._head, self._head.path, self._head.query))
        if inject is None or not self._enforces:
            return False
        return inject(b"".join(_event(json.dumps(error).encode()) for error in errors))

    # --- the answer -------------------------------------------------------------------------------------------------

    def response_head(self, head: ResponseHead) -> None:
        """Choose what is filtered: every stream, and the document that answers a request for tools."""
        kind = media_type(head.header("content-type"))
        shows = self._policy.shows if self._filters else _everything
        if self._enforces and kind == EVENT_STREAM:
            on_event = self._take_endpoint if self._head.method == "GET" else None
            self._answer = EventFilter(shows, self._state.allowance, on_event)
        elif self._filters and self._lists:
            self._answer = DocumentFilter(shows, self._state.allowance)
        else:
            return
        self.rewrites_response = True
        self._decoder = decoder(",".join(value for name, value in head.headers if name.lower() == "content-encoding"))
        self.decodes_response = not isinstance(self._decoder, Identity)

    def stream_opened(self, inject: Inject) -> None:
        """Take the way into the answer, which has begun; see Governor."""
        self._inject = inject

    def response_data(self, chunk: bytes) -> bytes | Cut:
        """Return what is shown of a chunk."""
        if self._answer is None:
            return chunk
        if self._decoder is None:
            return Cut(b"", UNFILTERABLE, "an answer with a Content-Encoding that can not be undone, so not filtered")
        try:
            shown = self._answer.feed(_plain(self._decoder, chunk))
        except UnfilterableError as exc:
            return Cut(b"", UNFILTERABLE, str(exc))
        return Cut(b"", UNFILTERABLE, "an answer whose coding is broken") if self._decoder.failed else shown

    def response_end(self, *, complete: bool) -> bytes | Cut:
        """Return what was held, if it is whole."""
        self._close_stream()
        if self._answer is None or not complete:
            return b""
        try:
            return self._answer.finish()
        except UnfilterableError as exc:
            return Cut(b"", UNFILTERABLE, str(exc))

    def settle(self, facts: Facts | None, *, sent: bool) -> Mapping[str, AttributeValue]:
        """Give back what is held, and calls that never went out."""
        self._close_stream()
        if self._answer is not None:
            self._answer.close()
        if not sent:
            self._state.counts.give_back(self._counted)
        return {}

    def _take_endpoint(self, event: SseEvent) -> None:
        """HTTP+SSE: the first event names where this stream's requests are posted."""
        if self._inject is None or self._endpoint is not None:
            return
        self._endpoint = named_endpoint(self._head, event)
        if self._endpoint is not None:
            self._state.streams[self._endpoint] = self._inject

    def _close_stream(self) -> None:
        if self._endpoint is not None and self._state.streams.get(self._endpoint) is self._inject:
            del self._state.streams[self._endpoint]


def _plain(undo: Decoder, chunk: bytes) -> bytes:
    """Return what a chunk holds. Raises: UnfilterableError when it is a bomb, which nobody could hold in time."""
    if isinstance(undo, Identity):
        return chunk
    plain = unpack_chunk(undo, chunk, MAX_HELD_BYTES)
    if plain is None:
        raise UnfilterableError(f"{len(chunk)} bytes that unpack to more than {MAX_HELD_BYTES}")
    return plain


def _everything(tool: str) -> bool:
    return True


def _error(message: Message, verdict: Verdict | None, denied: Verdict) -> dict[str, Any]:
    """Return the answer to one request of a denied body."""
    if verdict is None:
        text = f"not sent: another call of this batch is denied ({denied.message})"
        return _render(message.id, DENIED, text, {"reason": BATCH_DENIED, "rule": denied.rule})
    return _render(message.id, DENIED, verdict.message, {"reason": verdict.reason, "rule": verdict.rule})


def _render(id_: str | int | None, code: int, message: str, data: Mapping[str, str]) -> dict[str, Any]:
    text = message if message.startswith("clrk") else f"clrk: {message}"
    return {"jsonrpc": "2.0", "id": id_, "error": {"code": code, "message": text, "data": dict(data)}}


def _event(message: bytes) -> bytes:
    return b"event: message\ndata: " + message + b"\n\n"


def _accepts_json(head: RequestHead) -> bool:
    """Say whether a client reads JSON; one that names nothing does."""
    accepted = {
        media_type(item) for name, value in head.headers if name.lower() == "accept" for item in value.split(",")
    }
    return not accepted or bool(accepted & {_JSON, "application/*", "*/*"}) or EVENT_STREAM not in accepted
