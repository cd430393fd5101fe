"""Following the exchanges of MCP's two HTTP transports (the Interpreter of gateway/interpret.py).

Each request and notification of a POST is a call with facts of its own; a batch has several. A POST that only answers
a server's question is named after the question. Streams that a client opens to listen, and the end of a session, stay
plain HTTP calls that name their session.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

from clrk.gateway.interpret import Allowance, Facts, RequestHead, ResponseHead
from clrk.gateway.llm import values
from clrk.gateway.llm.body import BoundedBody, ResponseBody
from clrk.gateway.llm.sse import SseEvent
from clrk.gateway.mcp.conversations import Conversations, Expected, Key, endpoint_key, named_endpoint, session_key
from clrk.gateway.mcp.messages import METHODS, Request, Response, parse
from clrk.gateway.telemetry import attributes as names
from clrk.gateway.telemetry.spans import AttributeValue

_PLAIN_HTTP: Final = Facts("")


class McpSession:
    """What the headers of an exchange say of its session."""

    def __init__(self, head: RequestHead) -> None:
        self._head = head
        self._id = values.text(head.header("mcp-session-id"))
        self._version = values.text(head.header("mcp-protocol-version"), 32)

    def answered(self, head: ResponseHead) -> None:
        """Take the session that an initialize was given."""
        self._id = values.text(head.header("mcp-session-id")) or self._id

    @property
    def key(self) -> Key:
        """The conversation's key."""
        return session_key(self._head, self._id)

    def attributes(self, version: str | None = None) -> dict[str, AttributeValue]:
        """Return the attributes; version is what an initialize negotiates."""
        found = {names.MCP_SESSION_ID: self._id, names.MCP_PROTOCOL_VERSION: version or self._version}
        return {name: value for name, value in found.items() if value is not None}


class McpInterpreter:
    """One POST that looks like MCP by its headers, or goes to a host that is known for it; its body decides.

    Shape: sure says that it is MCP if it is JSON-RPC at all: other protocols are too (A2A, language servers, chains).
    """

    def __init__(
        self, head: RequestHead, allowance: Allowance, conversations: Conversations | None = None, *, sure: bool = False
    ) -> None:
        self._head, self._allowance = head, allowance
        self._conversations = conversations or Conversations()
        self._session = McpSession(head)
        self._sure = sure or any(name.lower().startswith("mcp-") for name, _ in head.headers)
        self._readable = head.header("content-encoding") is None
        self._request = BoundedBody(allowance)
        self._calls: tuple[Request, ...] = ()
        self._asked: set[str] = set()
        self._replies: tuple[tuple[str, Response], ...] = ()
        self._status = 0
        self._body: ResponseBody | None = None
        self._answers: dict[str, Response] = {}
        self._refusal: Response | None = None
        self._ended = False
        self._expected: Expected | None = None
        self._resumable = False  # events have ids, as far as a glance can tell
        self._tail = b""

    @property
    def wants_whole_request(self) -> bool:
        """Nothing is rewritten."""
        return False

    def rewrite_request(self, body: bytes) -> bytes:
        """Return the body."""
        return body

    def request_data(self, chunk: bytes) -> None:
        """Take request bytes."""
        self._request.add(chunk)

    def request_end(self) -> None:
        """Decide whether this is MCP, and what it asks or answers."""
        body = self._request.take()
        messages = parse(body) if self._readable else ()
        calls = tuple(one for one in messages if isinstance(one, Request))
        if calls and (self._sure or calls[0].method in METHODS):
            self._calls = calls
            self._asked = {call.id for call in calls if call.id is not None}
            if self._asked and self._conversations.is_endpoint(self._head):
                self._expected = self._conversations.expect(self._key, self._asked)
        elif messages and not calls:
            self._replies = tuple(self._known_replies(messages))

    def response_head(self, head: ResponseHead, elapsed_s: float) -> None:
        """Choose how to read the body."""
        self._status = head.status
        self._session.answered(head)
        self._body = ResponseBody(head, self._allowance)

    def response_data(self, chunk: bytes, elapsed_s: float) -> bytes:
        """Take response bytes; the agent gets the same."""
        if self._calls and self._body is not None:
            self._resumable = self._resumable or b"id:" in self._tail + chunk
            self._tail = (self._tail + chunk)[-2:]
            for event in self._body.feed(chunk):
                self._take(event.data)
        return chunk

    def response_end(self, *, complete: bool) -> bytes:
        """Read a whole document, or the last event."""
        self._ended = complete
        last = self._body.finish() if self._calls and self._body is not None and complete else None
        if last is not None:
            self._take(last if isinstance(last, bytes) else last.data)
        return b""

    def facts(self) -> Facts:
        """Return what was understood; plain HTTP when it was no MCP."""
        if self._replies:
            return _joined([self._reply_facts(method, reply) for method, reply in self._replies])
        if not self._calls:
            return _PLAIN_HTTP
        elsewhere = self._expected is not None and self._status == 202
        expected = self._expected_late()
        answered = bool(self._asked) and self._asked <= self._answers.keys()
        facts = replace(self._call_facts(), answered=answered, elsewhere=elsewhere)
        if expected is None:
            return facts
        return replace(facts, later=lambda record: self._wait(expected, record))

    # --- answers that come elsewhere --------------------------------------------------------------------------------

    def _expected_late(self) -> Expected | None:
        """Return the answers that are still to come: on the stream of HTTP+SSE, or when a closed stream is resumed."""
        expected, self._expected = self._expected, None
        missing = self._asked - self._answers.keys()
        if expected is not None:
            self._keep(expected.answers)
            if self._status == 202 and expected.missing:
                return expected
            self._conversations.give_up(expected)
        elif missing and self._ended and self._resumable and self._body is not None and self._body.is_stream:
            return self._conversations.expect(self._session.key, missing) if self._status == 200 else None
        return None

    def _wait(self, expected: Expected, record: Callable[[Facts], None]) -> Callable[[], None]:
        def tell(answers: Sequence[Response]) -> None:
            self._keep(answers)
            record(self._call_facts())

        return self._conversations.wait(expected, tell)

    def _keep(self, answers: Sequence[Response]) -> None:
        self._answers.update({answer.id: answer for answer in answers if answer.id is not None})

    @property
    def _key(self) -> Key:
        """The conversation's key: of HTTP+SSE if a stream named this endpoint."""
        if self._conversations.is_endpoint(self._head):
            return endpoint_key(self._head, self._head.path, self._head.query)
        return self._session.key

    def _known_replies(self, messages: Sequence[Request | Response]) -> list[tuple[str, Response]]:
        replies = [(one, self._conversations.question(self._key, one.id or "")) for one in messages]
        return [(method, one) for one, method in replies if method is not None and isinstance(one, Response)]

    def _take(self, raw: bytes) -> None:
        """Keep the answers to what was asked; servers send their own questions and notifications in between."""
        for one in parse(raw) if raw else ():
            if isinstance(one, Request):
                if one.id is not None:
                    self._conversations.ask(self._key, one.id, one.method)
            elif one.id is None and one.error_code is not None:
                self._refusal = one  # an error about a message whose id could not be read (JSON-RPC 2.0, section 5)
            elif one.id in self._asked:
                self._answers.setdefault(one.id or "", one)

    # --- what goes on spans -----------------------------------------------------------------------------------------

    def _call_facts(self) -> Facts:
        return _joined([self._facts(call) for call in self._calls])

    def _facts(self, call: Request) -> Facts:
        answer = self._answers.get(call.id) if call.id is not None else None
        failed = answer if answer is not None else self._refusal
        negotiated = (answer.protocol_version if answer else None) or call.protocol_version
        found = self._session.attributes(negotiated if call.method == "initialize" else None)
        found |= _call_attributes(call)
        error_type = failed.error_type if failed is not None else None
        if error_type is not None:
            found[names.ERROR_TYPE] = error_type
        if failed is not None and failed.error_code is not None:
            found[names.RPC_RESPONSE_STATUS_CODE] = str(failed.error_code)
        if call.id is not None and answer is None and error_type is None and self._status < 400:
            found[names.CLRK_BODY_USAGE_VISIBLE] = False
        target = call.tool or call.prompt
        name = f"{call.method} {target}" if target else call.method
        return Facts(name, found, error_type, failed.message if failed is not None else "")

    def _reply_facts(self, method: str, reply: Response) -> Facts:
        found = self._session.attributes() | {names.MCP_METHOD_NAME: method}
        if reply.id is not None:
            found[names.JSONRPC_REQUEST_ID] = reply.id
        if reply.error_code is not None:
            found |= {
                names.ERROR_TYPE: str(reply.error_code),
                names.RPC_RESPONSE_STATUS_CODE: str(reply.error_code),
            }
        return Facts(method, found, reply.error_type, reply.message)


def _call_attributes(call: Request) -> dict[str, AttributeValue]:
    found: dict[str, AttributeValue | None] = {
        names.MCP_METHOD_NAME: call.method,
        names.JSONRPC_REQUEST_ID: call.id,
        names.GEN_AI_OPERATION_NAME: names.OPERATION_EXECUTE_TOOL if call.method == "tools/call" else None,
        names.GEN_AI_TOOL_NAME: call.tool,
        names.GEN_AI_PROMPT_NAME: call.prompt,
        names.MCP_RESOURCE_URI: call.uri,
    }
    return {key: value for key, value in found.items() if value is not None}


def _joined(several: list[Facts]) -> Facts:
    """Return the first facts with all others."""
    return replace(several[0], also=tuple(several[1:]))


class McpStream:
    """A GET or DELETE that may be MCP: a stream to listen on, the end of a session. Its name is plain HTTP's."""

    wants_whole_request = False

    def __init__(self, head: RequestHead, allowance: Allowance, conversations: Conversations) -> None:
        self._head, self._allowance, self._conversations = head, allowance, conversations
        self._session = McpSession(head)
        self._key: Key | None = None
        self._body: ResponseBody | None = None

    def rewrite_request(self, body: bytes) -> bytes:
        """Return the body."""
        return body

    def request_data(self, chunk: bytes) -> None:
        """Take nothing: these requests have no body."""

    def request_end(self) -> None:
        """Take nothing."""

    def response_head(self, head: ResponseHead, elapsed_s: float) -> None:
        """Listen, if it is a stream."""
        self._session.answered(head)
        body = ResponseBody(head, self._allowance)
        if head.status == 200 and body.is_stream and self._head.method == "GET":
            self._body = body
            if any(name.lower().startswith("mcp-") for name, _ in self._head.headers):
                self._listen(self._session.key)

    def response_data(self, chunk: bytes, elapsed_s: float) -> bytes:
        """Take response bytes; the agent gets the same."""
        if self._body is not None:
            for event in self._body.feed(chunk):
                self._take(event)
                if self._body is None:
                    break
        return chunk

    def response_end(self, *, complete: bool) -> bytes:
        """Listen no more."""
        last = self._body.finish() if self._body is not None and complete else None
        if isinstance(last, SseEvent):
            self._take(last)
        if self._key is not None:
            self._conversations.close_stream(self._key)
            self._key = None
        return b""

    def facts(self) -> Facts:
        """Return the session."""
        return Facts("", self._session.attributes())

    def _listen(self, key: Key) -> None:
        self._key = key
        self._conversations.open_stream(key)

    def _take(self, event: SseEvent) -> None:
        if self._key is None and (key := named_endpoint(self._head, event)) is not None:
            self._listen(key)
        elif self._key is None and event.data:
            self._body = None  # HTTP+SSE begins with its endpoint: these are events of something else
        elif self._key is not None and event.data:
            for one in parse(event.data):
                if isinstance(one, Response):
                    self._conversations.answer(self._key, one)
                elif one.id is not None:
                    self._conversations.ask(self._key, one.id, one.method)
