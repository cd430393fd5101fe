"""Event streams of AWS, and the dialects of Gemini, Vertex AI and Bedrock: the same facts however the bytes arrive.

A damaged frame ends an event stream at its checksum, so the dialects get each line of the input as a frame of its own:
`TYPE PAYLOAD`, or `TYPE!PAYLOAD` for an exception. `bedrock_invoke` wraps the payload in base64, as Bedrock does.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import replace
from itertools import islice

from splits import ways_to_arrive

from clrk.gateway.interpret import Facts, RequestHead, ResponseHead
from clrk.gateway.llm.aws_event_stream import MEDIA_TYPE, EventStreamSplitter, encode_message
from clrk.gateway.recognise import recognise

JSON = (("Content-Type", "application/json"),)
GEMINI = RequestHead("POST", "https", "generativelanguage.googleapis.com", 443, "/v1beta/models/g:", "", JSON)
VERTEX = replace(GEMINI, host="aiplatform.googleapis.com", path="/v1/projects/p/locations/l/publishers/")
BEDROCK = replace(GEMINI, host="bedrock-runtime.us-east-1.amazonaws.com", path="/model/")
HEADS = (
    replace(GEMINI, path="/v1beta/models/gemini-2.5-flash:generateContent"),
    replace(VERTEX, path=VERTEX.path + "google/models/text-embedding-005:predict"),
    replace(VERTEX, path=VERTEX.path + "anthropic/models/claude-sonnet-4-5:streamRawPredict"),
    replace(VERTEX, path=VERTEX.path + "mistralai/models/mistral-small-2503:rawPredict"),
    replace(BEDROCK, path="/model/us.amazon.nova-lite-v1%3A0/converse"),
    replace(BEDROCK, path="/model/us.amazon.nova-lite-v1%3A0/invoke"),
    replace(BEDROCK, path="/model/anthropic.claude-3-haiku-20240307-v1%3A0/invoke"),
)


def aws_event_stream(data: bytes) -> None:
    """Every way to arrive gives the messages of the whole, and no more than were sent."""
    results = []
    for pieces in ways_to_arrive(data):
        splitter = EventStreamSplitter(max_event_bytes=4096)
        events = [(event.name, event.data) for piece in pieces for event in splitter.feed(piece)]
        results.append((events, splitter.failed))
        assert sum(len(payload) for _, payload in events) <= 6 * len(data)  # an error's message is escaped into JSON
    assert all(result == results[0] for result in results)


def _follow(
    head: RequestHead,
    content_type: str,
    body: bytes,
    request: bytes = b"{}",
    status: int = 200,
    most_ways: int | None = None,
) -> None:
    response = ResponseHead(status, (("Content-Type", content_type),))
    ways = islice(ways_to_arrive(body), most_ways)
    found = [_facts(head, request, response, pieces, body) for pieces in ways]
    assert all(facts == found[0] for facts in found)
    json.dumps(found[0].attributes, allow_nan=False).encode()


def _facts(head: RequestHead, request: bytes, response: ResponseHead, pieces: list[bytes], body: bytes) -> Facts:
    interpreter = recognise(head)
    assert interpreter is not None
    interpreter.request_data(request)
    interpreter.request_end()
    interpreter.response_head(response, 0.0)
    received = b"".join(interpreter.response_data(piece, 0.0) for piece in pieces)
    assert received + interpreter.response_end(complete=True) == body
    return interpreter.facts()


def gemini_sse(data: bytes) -> None:
    """Server-sent events of streamGenerateContent."""
    head = replace(GEMINI, path="/v1beta/models/gemini-2.5-flash:streamGenerateContent", query="alt=sse")
    _follow(head, "text/event-stream", data)


def gemini_array(data: bytes) -> None:
    """The array of streamGenerateContent."""
    _follow(replace(GEMINI, path="/v1beta/models/gemini-2.5-flash:streamGenerateContent"), "application/json", data)


def _framed(data: bytes, wrap: Callable[[bytes], bytes]) -> bytes:
    frames = []
    for line in data.splitlines()[:64]:
        name, mark, payload = line.partition(b"!") if b"!" in line.split(b" ")[0] else line.partition(b" ")
        kind = "exception" if mark == b"!" else "event"
        headers = {f":{kind}-type": name.decode(errors="replace")[:60], ":message-type": kind}
        frames.append(encode_message(headers, payload if mark == b"!" else wrap(payload)))
    return b"".join(frames)


def bedrock_converse(data: bytes) -> None:
    """Events of ConverseStream."""
    head = replace(BEDROCK, path="/model/us.amazon.nova-lite-v1%3A0/converse-stream")
    _follow(head, MEDIA_TYPE, _framed(data, bytes))


def bedrock_invoke(data: bytes) -> None:
    """Events of InvokeModelWithResponseStream, of Claude and of others."""
    body = _framed(data, lambda payload: json.dumps({"bytes": base64.b64encode(payload).decode()}).encode())
    for model in ("anthropic.claude-3-haiku-20240307-v1%3A0", "us.amazon.nova-lite-v1%3A0"):
        _follow(replace(BEDROCK, path=f"/model/{model}/invoke-with-response-stream"), MEDIA_TYPE, body)


def google_aws_documents(data: bytes) -> None:
    """A request, or a response with a status of success or not, of every API."""
    for head in HEADS:
        _follow(head, "application/json", b"", request=data)
        _follow(head, "application/json", data, most_ways=2)  # documents are collected: whole, and byte by byte
        _follow(head, "application/json", data, status=429, most_ways=1)


TARGETS = {
    "aws_event_stream": aws_event_stream,
    "gemini_sse": gemini_sse,
    "gemini_array": gemini_array,
    "bedrock_converse": bedrock_converse,
    "bedrock_invoke": bedrock_invoke,
    "google_aws_documents": google_aws_documents,
}
