"""Following one LLM call from request to the end of the response (the Interpreter of gateway/interpret.py)."""

from __future__ import annotations

from typing import Final

from clrk.gateway.interpret import Allowance, Facts, RequestHead, ResponseHead
from clrk.gateway.llm.body import BoundedBody, ResponseBody, media_type
from clrk.gateway.llm.completion import NO_USAGE, Provider, Usage
from clrk.gateway.llm.cost import BUNDLED, PriceList
from clrk.gateway.llm.decompress import unpack
from clrk.gateway.llm.dialect import Dialect
from clrk.gateway.llm.framing import EVENT_STREAM
from clrk.gateway.llm.include_usage import UsageChunkFilter, ask_for_usage
from clrk.gateway.telemetry import attributes as names
from clrk.gateway.telemetry.spans import AttributeValue

_PLAIN_HTTP: Final = Facts("")


class LlmInterpreter:
    """One call of one provider, in one dialect.

    Shape: sure says that the host is known to serve this API; without it the request has to name a model, else the call
    stays plain HTTP. body is the response's, once there is one. boundary is the offset, in the bytes that response_data
    just returned, behind the last event that ended in them: there a stream can be cut. None when no event did, or the
    bytes are encoded. steps counts how often the response went on and was followed: a guard may have put us aside.
    """

    def __init__(
        self,
        head: RequestHead,
        provider: Provider,
        dialect: Dialect,
        allowance: Allowance,
        *,
        prices: PriceList = BUNDLED,
        sure: bool = True,
    ) -> None:
        self.provider = provider
        self.dialect = dialect
        self.body: ResponseBody | None = None
        self.boundary: int | None = None
        self.steps = 0
        self._allowance = allowance
        self._prices = prices
        self._sure = sure
        self._request_encoding = head.header("content-encoding")
        self._is_signed = (head.header("authorization") or "").startswith("AWS4-")  # and breaks when a byte changes
        self._request = BoundedBody(allowance)
        self._request_attributes: dict[str, AttributeValue] = {}
        self._asked_usage = False
        self._status = 0
        self._filter: UsageChunkFilter | None = None
        self._first_chunk_s: float | None = None

    def decode_request(self, body: bytes) -> bytes | None:
        """Return a request body without its content coding, None when that can not be undone or is too large."""
        return unpack(self._request_encoding, body)

    def cost(self, usage: Usage) -> float | None:
        """Return what usage costs in USD, by what is known of the model so far; None when the price is unknown."""
        models = self.dialect.price_models
        return self._prices.cost_usd(self.provider, models, usage, off_list=self.dialect.completion.off_list)

    @property
    def wants_whole_request(self) -> bool:
        """True where the request may have to ask for usage: whether it streams stands in the body."""
        asks = self.provider.asks_usage and self.dialect.takes_include_usage
        return asks and self._request_encoding is None and not self._is_signed

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
        body = self.decode_request(self._request.take())
        if body is not None:
            self._request_attributes = self.dialect.request(body)

    def response_head(self, head: ResponseHead, elapsed_s: float) -> None:
        """Choose how to read the response; elapsed_s is not needed, the first chunk has its own."""
        self._status = head.status
        self.dialect.response_head(head)
        self.body = ResponseBody(head, self._allowance, self.dialect.splitter)
        is_events = media_type(head.header("content-type")) == EVENT_STREAM
        # A body with a length can not become shorter, and an encoded one can not be cut at its events.
        can_filter = is_events and self.body.is_plain and head.header("content-length") is None
        if self._asked_usage and can_filter:
            self._filter = UsageChunkFilter(self.body, self.dialect)

    def response_data(self, chunk: bytes, elapsed_s: float) -> bytes:
        """Take response bytes and return what the agent gets."""
        if self.body is None:
            return chunk
        if self._filter is not None:
            passed = self._filter.feed(chunk)
            self.boundary = self._filter.boundary
        else:
            passed, end = chunk, None
            for event in self.body.feed(chunk):
                self.dialect.event(event)
                end = event.end
            self.boundary = end if self.body.is_plain else None
        if self._first_chunk_s is None and self.body.has_begun:
            self._first_chunk_s = elapsed_s
        self.steps += 1
        return passed

    def response_end(self, *, complete: bool) -> bytes:
        """Read what is left, and return held bytes."""
        self.boundary = None
        last = self.body.finish() if self.body is not None and complete else None
        if isinstance(last, bytes):
            self.dialect.document(last)
        elif last is not None and self.dialect.event(last) and self._filter is not None:
            self._filter.drop_held()
        self.steps += 1
        return self._filter.finish() if self._filter is not None else b""

    def _may_be_billed(self) -> bool:
        done = self.dialect.completion
        return done.usage != NO_USAGE or (done.error_type is None and 0 < self._status < 400)

    def facts(self) -> Facts:
        """Return what was understood."""
        done = self.dialect.completion
        model = self.dialect.request_model or done.model
        if not self._sure and model is None:
            return _PLAIN_HTTP
        found: dict[str, AttributeValue] = {
            names.GEN_AI_OPERATION_NAME: self.dialect.operation,
            names.GEN_AI_PROVIDER_NAME: self.provider.name,
            names.GEN_AI_SYSTEM: self.provider.system,
            **self._request_attributes,
            **done.attributes(),
        }
        if self._first_chunk_s is not None:
            found[names.GEN_AI_RESPONSE_TIME_TO_FIRST_CHUNK] = self._first_chunk_s
        if self._asked_usage:
            found[names.CLRK_BODY_REQUEST_REWRITTEN] = True
        usage_due = self.dialect.spends_tokens and done.error_type is None and self._status < 400
        if usage_due and not done.usage.is_whole:
            found[names.CLRK_BODY_USAGE_VISIBLE] = False
        cost = self.cost(done.usage)
        if cost is not None:
            found[names.CLRK_COST_USD] = cost
        elif self.dialect.spends_tokens and self._may_be_billed():
            found[names.CLRK_COST_UNKNOWN] = True
        # An error body without a code says less than the HTTP status does.
        error_type = None if done.error_type == names.ERROR_TYPE_OTHER and self._status >= 400 else done.error_type
        if error_type is not None:
            found[names.ERROR_TYPE] = error_type
        name = f"{self.dialect.operation} {model}" if model else self.dialect.operation
        # Clients of streams leave at the last event, or at an error, without the end of the body.
        answered = done.ended or (done.error_type is not None and self.body is not None and self.body.is_stream)
        return Facts(name, found, error_type, done.error_message, answered=answered)
