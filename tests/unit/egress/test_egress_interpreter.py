"""The seam to LLM and MCP parsers: what an interpreter sees, what it may change, and what its facts do to the span."""

from __future__ import annotations

import json

import pytest
from egress_lab import aliased, answer, laboratory, read_request, upstream

from clrk.gateway.egress import upload
from clrk.gateway.egress.guarded import recognise_guarded
from clrk.gateway.interpret import Facts, RequestHead, ResponseHead

NAME = "api.example.com"
ALLOW = [{"hostnames": [NAME]}]


class Scribe:
    """Writes down what it is told; rewrites and withholds on request."""

    def __init__(self, *, rewrite: bytes | None = None, withhold: bytes = b"") -> None:
        self.rewrite, self.withhold = rewrite, withhold
        self.request, self.response, self.order = b"", b"", []
        self.head: RequestHead | None = None

    @property
    def wants_whole_request(self) -> bool:
        return self.rewrite is not None

    def rewrite_request(self, body: bytes) -> bytes:
        self.order.append("rewrite")
        return self.rewrite or body

    def request_data(self, chunk: bytes) -> None:
        self.order.append("request_data")
        self.request += chunk

    def request_end(self) -> None:
        self.order.append("request_end")

    def response_head(self, head: ResponseHead, elapsed_s: float) -> None:
        self.order.append(f"head {head.status}")

    def response_data(self, chunk: bytes, elapsed_s: float) -> bytes:
        self.response += chunk
        return chunk.replace(self.withhold, b"") if self.withhold else chunk

    def response_end(self, *, complete: bool) -> bytes:
        self.order.append(f"end {complete}")
        return b"<tail>" if self.withhold and complete else b""

    def facts(self) -> Facts:
        return Facts("chat model-1", {"gen_ai.operation.name": "chat"}, "overloaded_error", "try later")


async def exchange(scribe: Scribe, request: bytes, reply: bytes):
    seen = []

    async def handle(reader, writer):
        seen.append(await read_request(reader))
        writer.write(reply)

    def recognise(head: RequestHead) -> Scribe:
        scribe.head = head
        return scribe

    async with (
        upstream(handle) as port,
        laboratory(gateway=aliased(port, NAME), rules=ALLOW, recognise=recognise) as lab,
    ):
        wire = await lab.dial(NAME, 80)
        raw = await wire.ask(request)
        span = (await lab.recorder.wait())[0]
    return seen, raw, span


def post(body: bytes, framing: str = "length") -> bytes:
    head = b"POST /v1/x?y=1 HTTP/1.1\r\nHost: api.example.com\r\nConnection: close\r\n"
    if framing == "chunked":
        return head + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    return head + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)


async def test_an_interpreter_sees_everything_and_names_the_span():
    scribe = Scribe()
    seen, raw, span = await exchange(scribe, post(b"question"), answer(b"reply"))
    assert (scribe.request, scribe.response) == (b"question", b"reply")
    assert scribe.order == ["request_data", "request_end", "head 200", "end True"]
    assert (scribe.head.host, scribe.head.path, scribe.head.query, scribe.head.scheme) == (NAME, "/v1/x", "y=1", "http")
    assert span.name == "chat model-1"
    assert span.attributes["gen_ai.operation.name"] == "chat"
    assert span.attributes["error.type"] == "overloaded_error"
    assert span.attributes["http.response.status_code"] == 200
    assert (span.status.code, span.status.message) == ("STATUS_CODE_ERROR", "try later")
    assert raw.endswith(b"reply")
    assert seen[0][1] == b"question"


@pytest.mark.parametrize("framing", ["length", "chunked"])
async def test_a_rewritten_request_has_the_right_length(framing):
    scribe = Scribe(rewrite=b"a longer question")
    seen, _, span = await exchange(scribe, post(b"question", framing), answer(b"reply"))
    head, body = seen[0]
    assert scribe.order[0] == "rewrite"
    assert scribe.request == b"question"  # as the agent sent it
    if framing == "length":
        assert b"Content-Length: 17\r\n" in head
        assert body == b"a longer question"
    else:
        assert body == b"11\r\na longer question\r\n0\r\n\r\n"
    assert span.attributes["clrk.req.bytes"] == 17


async def test_withheld_bytes_change_the_framing_not_the_truth():
    scribe = Scribe(rewrite=b"rewritten", withhold=b"-secret-")
    _, raw, _ = await exchange(scribe, post(b"question"), answer(b"a-secret-b"))
    head, _, body = raw.partition(b"\r\n\r\n")
    assert b"Content-Length" not in head
    assert b"Transfer-Encoding: chunked" in head
    assert body == b"2\r\nab\r\n6\r\n<tail>\r\n0\r\n\r\n"


async def test_an_oversized_body_passes_unrewritten(monkeypatch):
    monkeypatch.setattr(upload, "MAX_REWRITE_SIZE", 1000)
    scribe = Scribe(rewrite=b"never used")
    big = bytes(range(256)) * 2000
    seen, _, _ = await exchange(scribe, post(big), answer(b"reply"))
    assert seen[0][1] == big
    assert scribe.request == big
    assert "rewrite" not in scribe.order


async def test_a_truncated_answer_is_told_to_the_interpreter():
    scribe = Scribe()
    _, _, span = await exchange(scribe, post(b"question"), b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc")
    assert scribe.order[-1] == "end False"
    assert span.attributes["error.type"] == "truncated"
    assert span.name == "chat model-1"


async def test_the_real_recogniser_understands_a_real_provider_name():
    """No double between relay and parsers: an Anthropic call becomes a chat span."""
    from clrk.gateway.recognise import recognise

    reply = {
        "id": "msg_1", "type": "message", "role": "assistant", "model": "claude-sonnet-4-5", "stop_reason": "end_turn",
        "content": [{"type": "text", "text": "hi"}], "usage": {"input_tokens": 7, "output_tokens": 3},
    }  # fmt: skip
    name = "api.anthropic.com"

    async def handle(reader, writer):
        await read_request(reader)
        writer.write(answer(json.dumps(reply).encode(), headers="Content-Type: application/json\r\n"))

    async with (
        upstream(handle) as port,
        laboratory(gateway=aliased(port, name), rules=[{"hostnames": [name]}], recognise=recognise) as lab,
    ):
        wire = await lab.dial(name, 80)
        body = json.dumps({"model": "claude-sonnet-4-5", "max_tokens": 9, "messages": []}).encode()
        head = b"POST /v1/messages HTTP/1.1\r\nHost: api.anthropic.com\r\nConnection: close\r\n"
        raw = await wire.ask(
            head + b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        span = (await lab.recorder.wait())[0]
    assert raw.endswith(json.dumps(reply).encode())
    assert span.name == "chat claude-sonnet-4-5"
    assert span.attributes["gen_ai.usage.input_tokens"] == 7
    assert span.attributes["gen_ai.usage.output_tokens"] == 3


LAST_WORDS = {
    "OpenAI": ("/v1/chat/completions", b'data: {"choices":[]}\n\n', b"data: [DONE]\n\n", None),
    "Responses": (
        "/v1/responses", b'data: {"type":"response.output_text.delta","delta":"a"}\n\n',
        b'data: {"type":"response.completed","response":{"status":"completed"}}\n\n', None,
    ),
    "Anthropic": (
        "/v1/messages", b'event: message_start\ndata: {"type":"message_start","message":{}}\n\n',
        b'event: message_stop\ndata: {"type":"message_stop"}\n\n', None,
    ),
    "Ollama": ("/api/chat", b'{"model":"m","done":false}\n', b'{"model":"m","done":true}\n', None),
    "an error": (
        "/v1/chat/completions", b'data: {"choices":[]}\n\n',
        b'data: {"error":{"code":"server_error","message":"no"}}\n\n', "server_error",
    ),
}  # fmt: skip


@pytest.mark.parametrize("api", LAST_WORDS)
@pytest.mark.parametrize("last", [True, False], ids=["behind the last event", "before it"])
@pytest.mark.parametrize("how", ["agent_disconnected", "cancelled"])
async def test_a_client_leaves_a_stream_behind_its_last_event(api: str, last: bool, how: str) -> None:
    """As the openai package does: it closes the connection at [DONE], whether the last chunk has come or not."""
    path, first, end, error = LAST_WORDS[api]
    media = "application/x-ndjson" if api == "Ollama" else "text/event-stream"
    said = first + end if last else first

    async def handle(reader, writer):
        await read_request(reader)
        head = f"HTTP/1.1 200 OK\r\nContent-Type: {media}\r\nTransfer-Encoding: chunked\r\n\r\n"
        writer.write(head.encode() + b"%x\r\n%b\r\n" % (len(said), said))
        await reader.read()

    known = {"matches": [{"provider": "openai_compatible", "hostnames": [NAME]}]}
    config = {"ai_routes": [{"kind": "AIProviderRoute", "metadata": {"name": "ai"}, "spec": {"rules": [known]}}]}
    async with (
        upstream(handle) as port,
        laboratory(gateway=aliased(port, NAME), rules=ALLOW, recognise="real", config=config) as lab,
    ):
        wire = await lab.dial(NAME, 80)
        body = b'{"model": "m", "stream": true, "messages": []}'
        head = f"POST {path} HTTP/1.1\r\nHost: {NAME}\r\nContent-Type: application/json\r\n"
        wire.writer.write(head.encode() + b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
        await wire.reader.readuntil(said + b"\r\n")
        if how == "cancelled":
            await lab.egress.close()  # its run ends with it
        wire.reset()
        (span,) = await lab.recorder.wait()
    assert span.name == "chat m"
    assert span.attributes.get("error.type") == (error if last else how)


@pytest.mark.parametrize(
    "broken",
    [
        "wants_whole_request",
        "rewrite_request",
        "request_data",
        "request_end",
        "response_head",
        "response_data",
        "response_end",
        "facts",
    ],
)
async def test_an_interpreter_that_raises_breaks_nothing(broken: str, caplog: pytest.LogCaptureFixture) -> None:
    """The agent gets the upstream's bytes, and the span is there."""

    class Broken(Scribe):
        def __getattribute__(self, name: str):
            if name == broken:
                if name == "wants_whole_request":
                    raise ZeroDivisionError(name)
                return self._fail
            return super().__getattribute__(name)

        def _fail(self, *_args: object, **_kwargs: object) -> object:
            raise ZeroDivisionError(broken)

    scribe = Broken(rewrite=b"{}" if broken == "rewrite_request" else None)
    _, raw, span = await exchange(scribe, post(b"question"), answer(b"fine"))
    assert raw.endswith(b"fine")
    assert span.attributes["http.response.status_code"] == 200
    assert "goes on uninterpreted" in caplog.text


async def test_recognition_that_raises_breaks_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def recognise(head: RequestHead) -> None:
        raise ZeroDivisionError(head.method)

    head = RequestHead("GET", "https", NAME, 443, "/", "", ())
    assert recognise_guarded(recognise, head) is None
    assert "goes on uninterpreted" in caplog.text
