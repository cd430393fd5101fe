"""What passes through the gateway is what was sent: every byte, and when it was sent."""

from __future__ import annotations

import json
import secrets
import sys
from pathlib import Path

import aiohttp
import pytest
from stack import ROOT, Daemon, StandIn, invoke

sys.path.insert(0, str(ROOT / "examples/standin"))
from internal_api import blob

pytestmark = [pytest.mark.kernel, pytest.mark.e2e]

SIZE = 64 * 2**20

# The agent makes the same bytes as the stand-in does, so that each side hashes what it sent and what it got.
BLOB = (Path(ROOT) / "examples/standin/internal_api.py").read_text()
BLOB_SOURCE = (
    "import hashlib, json, ssl, http.client\n_CHUNK_SIZE = 65536\n"
    + BLOB[BLOB.index("def blob(") : BLOB.index("async def _blob")].replace("Iterator[bytes]", "object")
    + "def connect():\n"
    "    return http.client.HTTPSConnection('files.internal', timeout=120) if TLS else"
    " http.client.HTTPConnection('tools.internal', timeout=120)\n"
)
DOWN = """
connection = connect()
connection.request('GET', f'/blob/{SIZE}' + ('?chunked=1' if CHUNKED else ''))
answer = connection.getresponse()
digest, size = hashlib.sha256(), 0
while piece := answer.read(65536):
    digest.update(piece)
    size += len(piece)
framing = 'chunked' if answer.headers.get('transfer-encoding') == 'chunked' else 'length'
print(json.dumps({'bytes': size, 'sha256': digest.hexdigest(), 'framing': framing}))
"""
UP = """
connection = connect()
headers = {'transfer-encoding': 'chunked'} if CHUNKED else {'content-length': str(SIZE)}
connection.request('PUT', '/digest', body=blob(SIZE), headers=headers, encode_chunked=CHUNKED)
print(connection.getresponse().read().decode())
"""
EVENTS = """
events, gates, seen = connect(), connect(), 0
events.request('GET', f'/events/{COUNT}/{GATE}')
answer = events.getresponse()
while line := answer.readline():
    if line.startswith(b'data: '):
        gates.request('POST', f'/gate/{GATE}-{seen}/open')
        gates.getresponse().read()
        seen += 1
print(seen)
"""


def expected() -> dict[str, object]:
    import hashlib

    digest, size = hashlib.sha256(), 0
    for chunk in blob(SIZE):
        digest.update(chunk)
        size += len(chunk)
    assert size == SIZE
    return {"bytes": SIZE, "sha256": digest.hexdigest()}


@pytest.mark.parametrize("tls", [True, False], ids=["tls", "plain"])
@pytest.mark.parametrize("chunked", [True, False], ids=["chunked", "length"])
@pytest.mark.parametrize("direction", ["down", "up"])
async def test_64_mib_arrive_unchanged(
    daemon: Daemon, caller: aiohttp.ClientSession, *, direction: str, chunked: bool, tls: bool
) -> None:
    settings = f"SIZE = {SIZE}; CHUNKED = {chunked}; TLS = {tls}\n"
    text, invocation_id = await invoke(
        caller, daemon, "python", settings + BLOB_SOURCE + (DOWN if direction == "down" else UP)
    )
    assert json.loads(text) == expected() | {"framing": "chunked" if chunked else "length"}
    (span,) = [span for span in daemon.spans_when_complete(invocation_id) if span["kind"] == "SPAN_KIND_CLIENT"]
    counted = span["attributes"]["clrk.resp.bytes" if direction == "down" else "clrk.req.bytes"]
    # The body, plus heads and chunk framing if those are counted: never less, and never more than 1 % more.
    assert SIZE <= counted <= SIZE * 1.01


@pytest.mark.parametrize("tls", [True, False], ids=["tls", "plain"])
async def test_events_arrive_one_by_one(daemon: Daemon, caller: aiohttp.ClientSession, *, tls: bool) -> None:
    """Each is sent when the agent has said that it has the one before: were they gathered, this would hang."""
    source = f"COUNT = 200; GATE = '{secrets.token_hex(4)}'; TLS = {tls}\n" + BLOB_SOURCE + EVENTS
    text, _ = await invoke(caller, daemon, "python", source)
    assert int(text) == 200


async def test_head_arrives_as_sent(daemon: Daemon, providers: StandIn, caller: aiohttp.ClientSession) -> None:
    """Header order, case, doubled values and the odd target survive; only traceparent is added."""
    source = """
import json, socket
sock = socket.create_connection(('tools.internal', 80))
head = ['GET /echo?a=%2f;b=%C3%A9 HTTP/1.1', 'hOST: tools.internal', 'X-B: 1', 'x-a: 2', 'X-B: 3', 'Connection: close']
sock.sendall('\\r\\n'.join(head + ['', '']).encode())
answer = b''
while piece := sock.recv(65536):
    answer += piece
print(answer.partition(b'\\r\\n\\r\\n')[2].decode())
"""
    text, _ = await invoke(caller, daemon, "python", source)
    echoed = json.loads(text[text.index("{") : text.rindex("}") + 1])
    assert echoed["target"] == "/echo?a=%2f;b=%C3%A9"
    names = [name for name, _ in echoed["headers"] if name.lower() not in ("connection", "traceparent", "tracestate")]
    assert names == ["hOST", "X-B", "x-a", "X-B"]
    assert [value for name, value in echoed["headers"] if name == "X-B"] == ["1", "3"]
    assert len([value for name, value in echoed["headers"] if name.lower() == "traceparent"]) == 1
