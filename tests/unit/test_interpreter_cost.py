"""Nothing that an agent or an upstream sends makes an interpreter hold the event loop that all sandboxes share."""

from __future__ import annotations

import gzip
import json

import pytest
from cost import as_objects, assert_cheap

from clrk.gateway.interpret import Interpreter, RequestHead, ResponseHead
from clrk.gateway.recognise import recognise

READ_SIZE = 256 * 1024  # what one read from a socket returns at most
EVENTS = ("content-type", "text/event-stream")
MAX_COST = 2  # of the baseline; a tenth is usual; without bounds these took from 50 to 450


def llm(encoding: str = "identity") -> Interpreter:
    head = RequestHead("POST", "https", "api.anthropic.com", 443, "/v1/messages", "", (("content-type", "x/json"),))
    return begun(head, b"{}", encoding)


def mcp(encoding: str = "identity") -> Interpreter:
    """A batch of many calls: each event is looked up in it."""
    headers = (("content-type", "application/json"), ("mcp-session-id", "1"))
    head = RequestHead("POST", "https", "mcp.internal", 443, "/mcp", "", headers)
    batch = [{"jsonrpc": "2.0", "id": number, "method": "tools/list"} for number in range(1024)]
    return begun(head, json.dumps(batch).encode(), encoding)


def begun(head: RequestHead, body: bytes, encoding: str) -> Interpreter:
    found = recognise(head)
    assert found is not None
    found.request_data(body)
    found.request_end()
    found.response_head(ResponseHead(200, (EVENTS, ("content-encoding", encoding))), 0.0)
    return found


@pytest.mark.parametrize("make", [llm, mcp])
@pytest.mark.parametrize("event", [b"\n", b"data:\n\n", b":\n\n", b"data:{}\n\n"])
@pytest.mark.parametrize("bomb", [False, True])
def test_one_read_of_events_is_soon_done(make, event, bomb):
    plain = event * ((64 << 20 if bomb else READ_SIZE) // len(event))
    chunk = gzip.compress(plain, 9)[:READ_SIZE] if bomb else plain

    def read() -> None:
        interpreter = make("gzip" if bomb else "identity")
        assert interpreter.response_data(chunk, 0.1) is chunk
        interpreter.response_end(complete=True)

    assert_cheap(read, as_objects, MAX_COST)


@pytest.mark.parametrize("encoding", ["identity", "gzip"])
def test_a_flood_of_events_is_given_up_visibly(encoding):
    interpreter = llm(encoding)
    flood = b"data:\n\n" * (READ_SIZE // 7)
    interpreter.response_data(gzip.compress(flood) if encoding == "gzip" else flood, 0.1)
    interpreter.response_end(complete=True)
    assert interpreter.facts().attributes["clrk.body.usage_visible"] is False
