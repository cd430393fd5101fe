"""What it costs to understand an exchange, by provider: the same bytes through the relay, with and without.

    .venv/bin/python -P tests/bench/interpret.py [--exchanges 100] [--rounds 5]

The relay is the real one, with real sockets and TLS (the laboratory of the unit tests); agent and upstream share its
process and its processor time, so the ratio is less than that of the relay alone. Beside it stands what the interpreter
takes by itself, from the request's head to its facts, for one exchange and for one event.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / "unit" / "egress"), str(TESTS / "unit"), str(TESTS)]

from egress_lab import aliased, laboratory, read_request, upstream  # noqa: E402 - not installed: found by path
from tls_material import Authority  # noqa: E402

from clrk.gateway.interpret import Interpreter, RequestHead, ResponseHead  # noqa: E402
from clrk.gateway.llm.aws_event_stream import MEDIA_TYPE, encode_message  # noqa: E402
from clrk.gateway.recognise import recognise  # noqa: E402

PIECES = 200  # events of a stream, some 16 bytes of text each
WORD = "word after word "
PROMPT = "Where is my lamp? " * 200
JSON, SSE = "application/json", "text/event-stream"
BEDROCK = "bedrock-runtime.us-east-1.amazonaws.com"


@dataclass(frozen=True)
class Call:
    """One exchange: where it goes, what is asked, and the answer in the pieces in which it comes."""

    host: str
    path: str
    query: str
    request: dict[str, Any]
    content_type: str
    pieces: list[bytes]


def sse(*events: dict[str, Any]) -> list[bytes]:
    """Return events with their names, as Anthropic writes them."""
    return [f"event: {one.get('type', 'x')}\ndata: {json.dumps(one)}\n\n".encode() for one in events]


def data(*events: dict[str, Any]) -> list[bytes]:
    """Return events without names."""
    return [f"data: {json.dumps(one)}\r\n\r\n".encode() for one in events]


def frames(*events: tuple[str, dict[str, Any]]) -> list[bytes]:
    """Return messages of an AWS event stream."""
    return [
        encode_message(
            {":event-type": kind, ":content-type": JSON, ":message-type": "event"}, json.dumps(payload).encode()
        )
        for kind, payload in events
    ]


def claude_events() -> list[dict[str, Any]]:
    """Return a streamed message."""
    message = {"id": "msg_1", "model": "claude-haiku-4-5", "usage": {"input_tokens": 900, "output_tokens": 1}}
    delta = {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": WORD}}
    end = {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 600}}
    return [{"type": "message_start", "message": message}, *([delta] * PIECES), end, {"type": "message_stop"}]


def gemini_elements() -> list[dict[str, Any]]:
    """Return the elements of a stream, each with the counts so far."""
    usage = {"promptTokenCount": 900, "candidatesTokenCount": 600, "totalTokenCount": 1500}
    part = {"candidates": [{"content": {"parts": [{"text": WORD}], "role": "model"}, "index": 0}]}
    common = {"usageMetadata": usage, "modelVersion": "gemini-2.5-flash", "responseId": "r"}
    last = {"candidates": [{"content": {"parts": [{"text": WORD}]}, "finishReason": "STOP", "index": 0}]}
    return [part | common] * PIECES + [last | common]


def calls() -> dict[str, Call]:
    """Return what is measured."""
    openai = {"id": "c", "model": "gpt-5.4-mini"}
    chunk = openai | {"choices": [{"index": 0, "delta": {"content": WORD}, "finish_reason": None}]}
    done = openai | {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
    usage = openai | {"choices": [], "usage": {"prompt_tokens": 900, "completion_tokens": 600}}
    messages = [{"role": "user", "content": PROMPT}]
    asked = {"model": "gpt-5.4-mini", "stream": True, "stream_options": {"include_usage": True}, "messages": messages}
    contents = {"contents": [{"parts": [{"text": PROMPT}]}]}
    elements = [json.dumps(one).encode() for one in gemini_elements()]
    array = [(b"," if number else b"[") + one for number, one in enumerate(elements)] + [b"]"]
    converse = {"messages": [{"role": "user", "content": [{"text": PROMPT}]}]}
    deltas = [("contentBlockDelta", {"delta": {"text": WORD}, "contentBlockIndex": 0, "p": "abcdefgh"})] * PIECES
    counts = {"usage": {"inputTokens": 900, "outputTokens": 600, "totalTokens": 1500}}
    chunks = [("chunk", {"bytes": base64.b64encode(json.dumps(one).encode()).decode()}) for one in claude_events()]
    gemini, model = "generativelanguage.googleapis.com", "/v1beta/models/gemini-2.5-flash:"
    haiku = "/model/us.anthropic.claude-haiku-4-5-20251001-v1%3A0/"
    return {
        "OpenAI chat, streamed": Call(
            "api.openai.com", "/v1/chat/completions", "", asked, SSE, data(*[chunk] * PIECES, done, usage)
        ),
        "Anthropic, streamed": Call(
            "api.anthropic.com", "/v1/messages", "", {"model": "claude-haiku-4-5", "messages": messages}, SSE,
            sse(*claude_events()),
        ),
        "Gemini, events": Call(
            gemini, f"{model}streamGenerateContent", "alt=sse", contents, SSE, data(*gemini_elements())
        ),
        "Gemini, array": Call(gemini, f"{model}streamGenerateContent", "", contents, JSON, array),
        "Gemini, document": Call(gemini, f"{model}generateContent", "", contents, JSON, [elements[-1]]),
        "Bedrock ConverseStream": Call(
            BEDROCK, f"{haiku}converse-stream", "", converse, MEDIA_TYPE,
            frames(*deltas, ("messageStop", {"stopReason": "end_turn"}), ("metadata", counts)),
        ),
        "Bedrock InvokeModel, streamed": Call(
            BEDROCK, f"{haiku}invoke-with-response-stream", "", {"anthropic_version": "x", "messages": messages},
            MEDIA_TYPE, frames(*chunks),
        ),
    }  # fmt: skip


def alone_us(call: Call, exchanges: int) -> float:
    """Return the microseconds of processor time that understanding one exchange takes."""
    request = json.dumps(call.request).encode()
    head = RequestHead("POST", "https", call.host, 443, call.path, call.query, (("Content-Type", JSON),))
    response = ResponseHead(200, (("Content-Type", call.content_type), ("Transfer-Encoding", "chunked")))
    began = time.process_time()
    for _ in range(exchanges):
        interpreter = recognise(head)
        assert interpreter is not None
        interpreter.request_data(request)
        interpreter.request_end()
        interpreter.response_head(response, 0.0)
        for piece in call.pieces:
            interpreter.response_data(piece, 0.0)
        interpreter.response_end(complete=True)
        assert interpreter.facts().attributes["gen_ai.usage.input_tokens"] == 900
    return (time.process_time() - began) / exchanges * 1e6


def _blind(head: RequestHead, *_: object) -> Interpreter | None:
    return None


async def relayed_us(call: Call, exchanges: int, *, understood: bool) -> float:
    """Return the microseconds of processor time of one exchange on a kept connection, both ends included."""
    authority = Authority("upstream")
    body = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in call.pieces) + b"0\r\n\r\n"
    head = f"HTTP/1.1 200 OK\r\nContent-Type: {call.content_type}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_request(reader)
            writer.write(head + body)
            await writer.drain()

    raw = json.dumps(call.request).encode()
    target = f"{call.path}?{call.query}" if call.query else call.path
    asked = f"POST {target} HTTP/1.1\r\nHost: {call.host}\r\nContent-Type: {JSON}\r\nContent-Length: {len(raw)}\r\n\r\n"
    chosen: Any = "real" if understood else _blind
    async with (
        upstream(serve, authority.server_context([call.host])) as port,
        laboratory(
            gateway=aliased(port, call.host), rules=[{"hostnames": [call.host]}], recognise=chosen,
            upstream_ca=authority.cert_pem,
        ) as lab,
    ):  # fmt: skip
        wire = await lab.dial_tls(call.host)
        began = 0.0
        for number in range(exchanges + 1):
            if number == 1:  # the first one pays for handshakes
                began = time.process_time()
            wire.writer.write(asked.encode() + raw)
            await wire.reader.readuntil(b"\r\n0\r\n\r\n")
        return (time.process_time() - began) / exchanges * 1e6


def median(measure: Callable[[], float], rounds: int) -> float:
    """Return the median of several rounds."""
    return statistics.median(measure() for _ in range(rounds))


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--exchanges", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    print("| call | KiB | relayed, µs | understood | ratio | by itself, µs | an event, µs |")
    print("|---|---|---|---|---|---|---|")
    for name, call in calls().items():
        pairs = [
            tuple(asyncio.run(relayed_us(call, given.exchanges, understood=how)) for how in (False, True))
            for _ in range(given.rounds)  # in alternation: the machine is not always the same
        ]
        plain, understood = (statistics.median(side) for side in zip(*pairs, strict=True))
        ratio = statistics.median(with_it / without for without, with_it in pairs)
        alone = median(lambda call=call: alone_us(call, given.exchanges), given.rounds)
        size = sum(map(len, call.pieces)) / 1024
        print(
            f"| {name} | {size:.0f} | {plain:.0f} | {understood:.0f} | {ratio:.2f} | {alone:.0f} | "
            f"{alone / len(call.pieces):.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
