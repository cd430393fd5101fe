"""Following one LLM call from request to the end of the response (the Interpreter of gateway/interpret.py)."""

from __future__ import annotations

from clrk.gateway.interpret import Allowance, Facts, RequestHead, ResponseHead
from clrk.gateway.llm.body import BoundedBody, ResponseBody
from clrk.gateway.llm.completion import Provider
from clrk.gateway.llm.cost import cost_usd
from clrk.gateway.llm.dialect import Dialect
from clrk.gateway.llm.include_usage import UsageChunkFilter, ask_for_usage
from clrk.gateway.telemetry import attributes as names
from clrk.gateway.telemetry.spans import AttributeValue


class LlmInterpreter:
    """One call of one provider, in one dialect."""

    def __init__(self, head: RequestHead, provider: Provider, dialect: Dialect, allowance: Allowance) -> None:
        self._allowance = allowance
        self._provider = provider
        self._dialect = dialect
        self._plain_request = head.header("content-encoding") is None
        self._request = BoundedBody(allowance)
        self._request_attributes: dict[str, AttributeValue] = {}
        self._asked_usage = False
        self._status = 0
        self._body: ResponseBody | None = None
        self._filter: UsageChunkFilter | None = None
        self._first_chunk_s: float | None = None
        self._complete = False

    @property
    def wants_whole_request(self) -> bool:
        """True where the request may have to ask for usage: whether it streams stands in the body."""
        return self._provider.asks_usage and self._plain_request

    def rewrite_request(self, body: bytes) -> bytes:
        """Return the body, asking for usage if it streams and does not ask itself."""
        asking = ask_for_usage(body) if self.wants_whole_request else body
        self._asked_usage = asking is not body
        return asking

    def request_data(self, chunk: bytes) -> None:
        """Take request bytes as the agent sent them."""
        self._request.add(chunk)

    def request_end(self) -> None:
        """Read the request."""
        body = self._request.take()
        if self._plain_request:
            self._request_attributes = self._dialect.request(body)

    def response_head(self, head: ResponseHead, elapsed_s: float) -> None:
        """Choose how to read the response; elapsed_s is not needed, the first chunk has its own."""
        self._status = head.status
        self._body = ResponseBody(head, self._allowance)
        # A body with a length can not become shorter, and an encoded one can not be cut at its events.
        can_filter = self._body.is_stream and self._body.is_plain and head.header("content-length") is None
        if self._asked_usage and can_filter:
            self._filter = UsageChunkFilter(self._body, self._dialect)

    def response_data(self, chunk: bytes, elapsed_s: float) -> bytes:
        """Take response bytes and return what the agent gets."""
        if self._body is None:
            return chunk
        if self._body.is_stream and chunk and self._first_chunk_s is None:
            self._first_chunk_s = elapsed_s
        if self._filter is not None:
            return self._filter.feed(chunk)
        for event in self._body.feed(chunk):
            self._dialect.event(event)
        return chunk

    def response_end(self, *, complete: bool) -> bytes:
        """Read what is left, and return held bytes."""
        self._complete = complete
        last = self._body.finish() if self._body is not None and complete else None
        if isinstance(last, bytes):
            self._dialect.document(last)
        elif last is not None and self._dialect.event(last) and self._filter is not None:
            self._filter.drop_held()
        return self._filter.finish() if self._filter is not None else b""

    def facts(self) -> Facts:
        """Return what was understood."""
        done = self._dialect.completion
        model = self._dialect.request_model or done.model
        found: dict[str, AttributeValue] = {
            names.GEN_AI_OPERATION_NAME: names.OPERATION_CHAT,
            names.GEN_AI_PROVIDER_NAME: self._provider.name,
            names.GEN_AI_SYSTEM: self._provider.system,
            **self._request_attributes,
            **done.attributes(),
        }
        if self._first_chunk_s is not None:
            found[names.GEN_AI_RESPONSE_TIME_TO_FIRST_CHUNK] = self._first_chunk_s
        if self._asked_usage:
            found[names.CLRK_BODY_REQUEST_REWRITTEN] = True
        if not done.usage.is_whole and done.error_type is None and self._status < 400:
            found[names.CLRK_BODY_USAGE_VISIBLE] = False
        cost = cost_usd(self._provider.price_id, (done.model, self._dialect.request_model), done.usage)
        if cost is not None:
            found[names.CLRK_COST_USD] = cost
        # An error body without a code says less than the HTTP status does.
        error_type = None if done.error_type == names.ERROR_TYPE_OTHER and self._status >= 400 else done.error_type
        if error_type is not None:
            found[names.ERROR_TYPE] = error_type
        name = f"{names.OPERATION_CHAT} {model}" if model else names.OPERATION_CHAT
        return Facts(name, found, error_type, done.error_message)
