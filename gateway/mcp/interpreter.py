"""Following one POST of MCP's Streamable HTTP transport (the Interpreter of gateway/interpret.py).

A batch becomes one span: it is named after its first request, and its error is the first one that a response reports.
A posted body that holds only responses (to a server's own request) is left to plain HTTP.
"""

from __future__ import annotations

from typing import Final

from clrk.gateway.interpret import Allowance, Facts, RequestHead, ResponseHead
from clrk.gateway.llm import values
from clrk.gateway.llm.body import BoundedBody, ResponseBody
from clrk.gateway.mcp.messages import METHODS, Request, Response, requests, responses
from clrk.gateway.telemetry import attributes as names
from clrk.gateway.telemetry.spans import AttributeValue

_PLAIN_HTTP: Final = Facts("")


class McpInterpreter:
    """One exchange that looks like MCP by its headers; its body decides."""

    def __init__(self, head: RequestHead, allowance: Allowance) -> None:
        self._allowance = allowance
        self._sure = any(name.lower().startswith("mcp-") for name, _ in head.headers)
        self._session = values.text(head.header("mcp-session-id"))
        self._version = values.text(head.header("mcp-protocol-version"), 32)
        self._readable = head.header("content-encoding") is None
        self._request = BoundedBody(allowance)
        self._calls: tuple[Request, ...] = ()
        self._asked: frozenset[str] = frozenset()
        self._status = 0
        self._body: ResponseBody | None = None
        self._answers: dict[str, Response] = {}
        self._refusal: Response | None = None

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
        """Decide whether this is MCP: other protocols are JSON-RPC over HTTP too (A2A, language servers, chains)."""
        body = self._request.take()
        calls = (requests(body) or ()) if self._readable else ()
        if calls and (self._sure or calls[0].method in METHODS):
            self._calls = calls
            self._asked = frozenset(call.id for call in calls if call.id is not None)

    def response_head(self, head: ResponseHead, elapsed_s: float) -> None:
        """Take the session that an initialize was given, and choose how to read the body."""
        self._status = head.status
        self._session = values.text(head.header("mcp-session-id")) or self._session
        self._body = ResponseBody(head, self._allowance)

    def response_data(self, chunk: bytes, elapsed_s: float) -> bytes:
        """Take response bytes; the agent gets the same."""
        if self._calls and self._body is not None:
            for event in self._body.feed(chunk):
                self._take(event.data)
        return chunk

    def response_end(self, *, complete: bool) -> bytes:
        """Read a whole document, or the last event."""
        last = self._body.finish() if self._calls and self._body is not None and complete else None
        if last is not None:
            self._take(last if isinstance(last, bytes) else last.data)
        return b""

    def facts(self) -> Facts:
        """Return what was understood; plain HTTP when it was no MCP."""
        if not self._calls:
            return _PLAIN_HTTP
        first = self._calls[0]
        answered = [self._answers[call.id] for call in self._calls if call.id is not None and call.id in self._answers]
        failed = next((answer for answer in answered if answer.error_type is not None), self._refusal)
        found = self._request_attributes(first)
        version = next((answer.protocol_version for answer in answered if answer.protocol_version), None)
        if first.method == "initialize" and version is not None:
            found[names.MCP_PROTOCOL_VERSION] = version
        error_type = failed.error_type if failed is not None else None
        if error_type is not None:
            found[names.ERROR_TYPE] = error_type
        if failed is not None and failed.error_code is not None:
            found[names.RPC_RESPONSE_STATUS_CODE] = str(failed.error_code)
        if first.id is not None and not answered and error_type is None and self._status < 400:
            found[names.CLRK_BODY_USAGE_VISIBLE] = False
        target = first.tool or first.prompt
        name = f"{first.method} {target}" if target else first.method
        return Facts(name, found, error_type, failed.message if failed is not None else "")

    def _request_attributes(self, first: Request) -> dict[str, AttributeValue]:
        found: dict[str, AttributeValue | None] = {
            names.MCP_METHOD_NAME: first.method,
            names.MCP_SESSION_ID: self._session,
            names.MCP_PROTOCOL_VERSION: self._version or first.protocol_version,
            names.JSONRPC_REQUEST_ID: first.id,
            names.GEN_AI_OPERATION_NAME: names.OPERATION_EXECUTE_TOOL if first.method == "tools/call" else None,
            names.GEN_AI_TOOL_NAME: first.tool,
            names.GEN_AI_PROMPT_NAME: first.prompt,
            names.MCP_RESOURCE_URI: first.uri,
        }
        return {key: value for key, value in found.items() if value is not None}

    def _take(self, raw: bytes) -> None:
        """Keep the answers to what was asked; servers may send their own requests and notifications in between."""
        for answer in (responses(raw) or ()) if raw else ():
            if answer.id is None and answer.error_code is not None:
                self._refusal = answer  # an error about a message whose id could not be read (JSON-RPC 2.0, section 5)
            elif answer.id is not None and answer.id in self._asked:
                self._answers.setdefault(answer.id, answer)
