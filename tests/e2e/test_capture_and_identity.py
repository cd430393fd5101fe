"""captureBody shows what went over the wire and no secret, also not on disk; identity is proven, and on every span."""

from __future__ import annotations

import asyncio
import gzip
import json
import queue
import signal
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import aiohttp
import pytest
from instances import DEADLINE_S, instance
from span_contract import violations
from stack import ROOT, Daemon, agent, document, free_port, invoke

sys.path.insert(0, str(ROOT / "tests/unit"))
from issuer import EC, OTHER, RSA, jwks, jwt_extractor, public_jwk, token

pytestmark = [pytest.mark.kernel, pytest.mark.e2e]

RUN_PYTHON = "import json,sys; exec(json.load(sys.stdin)['data'])"
PEM_BODY = "MIIEvQIBADANBgkqhkiG9w0BAQEFAASC"
SECRETS = {  # what must not be in the store
    "bearer": "hunter2-bearer-0123456789",
    "api-key": "hunter2-x-api-key",
    "cookie": "hunter2-cookie",
    "query": "hunter2-query",
    "json": "hunter2 is the json password",
    "nested": "hunter2-nested",
    "shape": "sk-ant-api03-hunter2aaBBccDDeeFF",
    "aws": "AKIAHUNTER2EXAMPLE00",
    "jwt": "eyJodW50ZXIyIjoxfQ.eyJodW50ZXIyIjoyfQ.aHVudGVyMmh1bnRlcjI",
    "pem": f"-----BEGIN PRIVATE KEY-----\n{PEM_BODY}\n-----END PRIVATE KEY-----",
    "set-cookie": "hunter2-set-cookie",
    "location": "hunter2-location",
    "answer": "hunter2-access-token",
    "streamed": "sk-proj-hunter2streamedaaBBcc",
    "cut": "hunter2-that-the-ring-cuts",
    "zipped": "ghp_hunter2zippedaaBBccDDeeFF11",
    "form": "hunter2-form",
}
AGENT = f"""
import http.client, json
S = json.loads({json.dumps(json.dumps(SECRETS))!s})
def call(method, target, body=None, headers=None):
    c = http.client.HTTPConnection("tools.internal", timeout=60)
    c.request(method, target, body, headers or {{}})
    return c.getresponse().read()
headers = {{
    "Authorization": "Bearer " + S["bearer"], "X-Api-Key": S["api-key"], "Cookie": "sid=" + S["cookie"],
    "X-Note": "with " + S["shape"], "Content-Type": "application/json",
}}
body = json.dumps({{
    "canary": "sent-by-the-agent", "password": S["json"], "key": S["pem"], "text": S["aws"] + " " + S["jwt"],
    "arguments": json.dumps({{"client_secret": S["nested"]}}),
}})
found = [call("POST", "/answer?a=1&api_key=" + S["query"], body, headers)]
found.append(call("POST", "/form", "user=alice&password=" + S["form"], {{"Content-Type": "application/x-www-form-urlencoded"}}))
found += [call("GET", "/stream"), call("GET", "/zipped"), call("GET", "/long")]
print([len(one) for one in found])
"""  # noqa: E501


HANGING: queue.Queue[str] = queue.Queue()


class Upstream(BaseHTTPRequestHandler):
    """Answers with secrets in every place."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:  # the name that http.server asks for
        self.rfile.read(int(self.headers["Content-Length"]))
        headers = {"Set-Cookie": f"sid={SECRETS['set-cookie']}", "Location": f"/x?token={SECRETS['location']}"}
        self._send(json.dumps({"canary": "said-by-the-upstream", "access_token": SECRETS["answer"]}).encode(), headers)

    def do_GET(self) -> None:
        if self.path.startswith("/hang/"):
            HANGING.put(self.path)
            self.connection.recv(1)  # until the other side is gone
            return
        if self.path == "/zipped":
            text = json.dumps({"canary": "out-of-the-zip", "text": SECRETS["zipped"]})
            self._send(gzip.compress(text.encode()), {"Content-Encoding": "gzip"})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for piece in self._pieces():
            self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
            self.wfile.flush()
        self.wfile.write(b"0\r\n\r\n")

    def _pieces(self) -> Iterator[bytes]:
        if self.path == "/stream":
            yield from (bytes([byte]) for byte in f'data: "{SECRETS["streamed"]}"\n\n'.encode())
            return
        for _ in range(100):  # more than maxBytes: the ring begins somewhere in the middle of these
            yield json.dumps({"password": SECRETS["cut"]}).encode() + b", "
        yield b"\n\ndata: the-end-of-the-stream\n\n"

    def _send(self, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(200)
        for name, value in ({"Content-Type": "application/json", "Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def upstream() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Upstream)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory, upstream: int) -> Iterator[Daemon]:
    folder = tmp_path_factory.mktemp("capture")
    (folder / "keys.json").write_text(jwks(public_jwk(EC, "ec"), public_jwk(RSA, "rsa")))
    python = ["/usr/bin/python3", "-I", "-c"]
    otlp = {"endpoint": f"http://127.0.0.1:{free_port()}", "captureBody": {"maxBytes": 1000}}
    who = {
        "extractors": [
            jwt_extractor(claim="sub", field="user", location="keys.json"),
            {"type": "Header", "name": "X-Tenant", "field": "tenant"},
            {"type": "Body", "jsonPath": "$.order.id", "field": "order"},
        ]
    }
    documents = [
        document(
            "EgressGateway", "default", otlp=otlp,
            hostAliases=[{"hostnames": ["tools.internal"], "address": f"127.0.0.1:{upstream}"}],
        ),
        document("EgressL4Route", "tools", rules=[{"hostnames": ["tools.internal"], "ports": [80]}]),
        agent("python", [*python, RUN_PYTHON]),
        agent(
            "who", ["/bin/bash", "-c", "cat; curl -sS http://tools.internal/zipped -o /dev/null"], identity=who
        ),
    ]  # fmt: skip
    running = Daemon(folder, instance("ca"), documents)
    running.start()
    yield running
    spans = [json.loads(line) for line in running.clrk("traces", "--json").splitlines()]
    assert running.stop() == 0, running.log()
    assert sorted(set(violations(spans))) == []


def stored(daemon: Daemon) -> bytes:
    """Return every byte that the daemon keeps, but its certificate authority."""
    return b"\0".join(raw for path, raw in daemon.kept().items() if path.parent.name != "ca")


async def test_what_is_captured_holds_no_secret(own: Daemon, caller: aiohttp.ClientSession) -> None:
    said, invocation_id = await invoke(caller, own, "python", AGENT)
    sizes = json.loads(said)
    spans = await asyncio.to_thread(own.spans_when_complete, invocation_id)
    calls = {span["attributes"]["url.full"].partition("?")[0].rpartition("/")[2]: span for span in spans
             if span["kind"] == "SPAN_KIND_CLIENT"}  # fmt: skip
    assert set(calls) == {"answer", "form", "stream", "zipped", "long"}
    events = {name: {event["name"]: event["attributes"] for event in span["events"]} for name, span in calls.items()}
    in_order = [events[name] for name in ("answer", "form", "stream", "zipped", "long")]
    assert sizes == [found["http.response.body"]["http.response.body.size"] for found in in_order]
    assert calls["answer"]["attributes"]["url.full"] == "http://tools.internal/answer?a=1&api_key=REDACTED"
    for name in ("authorization", "x-api-key", "cookie"):
        assert events["answer"]["http.request.headers"][f"http.request.header.{name}"] == ["[redacted]"]
    sent = json.loads(events["answer"]["http.request.body"]["http.request.body.content"])
    assert sent == {
        "canary": "sent-by-the-agent", "password": "[redacted]", "key": "[redacted]", "text": "[redacted] [redacted]",
        "arguments": '{"client_secret": "[redacted]"}',
    }  # fmt: skip
    contents = {name: found["http.response.body"]["http.response.body.content"] for name, found in events.items()}
    assert json.loads(contents["answer"]) == {"canary": "said-by-the-upstream", "access_token": "[redacted]"}
    assert json.loads(contents["zipped"]) == {"canary": "out-of-the-zip", "text": "[redacted]"}
    assert contents["stream"] == 'data: "[redacted]"\n\n'
    assert contents["long"].endswith("data: the-end-of-the-stream\n\n")
    assert events["long"]["http.response.body"]["clrk.body.truncated"] is True
    assert events["form"]["http.request.body"]["http.request.body.content"] == "user=alice&password=[redacted]"

    raw = stored(own)
    for canary in (b"sent-by-the-agent", b"said-by-the-upstream", b"out-of-the-zip", b"the-end-of-the-stream"):
        assert canary in raw  # else a search for secrets would prove nothing
    assert b"hunter2" not in raw
    assert PEM_BODY.encode() not in raw
    assert SECRETS["jwt"][:20].encode() not in raw


async def ask(caller: aiohttp.ClientSession, own: Daemon, bearer: str | None) -> tuple[int, str, Any]:
    headers = {"X-Tenant": "acme", "ce-clrkidentity": "forged", "ce-x-tenant": "mallory"}
    headers |= {"Authorization": f"Bearer {bearer}"} if bearer is not None else {}
    async with caller.post(f"{own.url}/agents/who", json={"order": {"id": 1042}}, headers=headers) as answer:
        return answer.status, answer.headers["X-Clrk-Invocation-ID"], await answer.json(content_type=None)


async def test_who_calls_is_on_every_span_and_in_the_envelope(own: Daemon, caller: aiohttp.ClientSession) -> None:
    status, invocation_id, event = await ask(caller, own, token())
    assert status == 200
    assert json.loads(event["clrkidentity"]) == {"user": "alice", "tenant": "acme", "order": "1042"}
    spans = await asyncio.to_thread(own.spans_when_complete, invocation_id)
    assert {"ingress.dispatch", "invoke_agent who", "GET tools.internal", "sandbox.teardown"} <= {
        span["name"] for span in spans
    }
    for span in spans:
        found = {name: value for name, value in span["attributes"].items() if name.startswith("agent.identity.")}
        assert found == {
            "agent.identity.user": "alice", "agent.identity.tenant": "acme", "agent.identity.order": "1042",
        }, span["name"]  # fmt: skip


@pytest.mark.parametrize("bearer", [None, "garbage", token(OTHER), token(exp=1), token(aud="x"), token(sub=None)])
async def test_a_bad_token_runs_nothing(own: Daemon, caller: aiohttp.ClientSession, bearer: str | None) -> None:
    status, invocation_id, problem = await ask(caller, own, bearer)
    assert (status, problem["status"], problem["invocation_id"]) == (401, 401, invocation_id)
    spans = await asyncio.to_thread(_spans_when_there_are_some, own, invocation_id)
    assert [span["name"] for span in spans] == ["ingress.dispatch"]
    assert not [name for name in spans[0]["attributes"] if name.startswith("agent.identity.")]


async def test_keys_are_rotated_by_a_reload(own: Daemon, caller: aiohttp.ClientSession) -> None:
    fresh = token(OTHER, kid="new")
    assert (await ask(caller, own, fresh))[0] == 401
    (own.folder / "keys.json").write_text(jwks(public_jwk(OTHER, "new")))
    assert own.process is not None
    own.process.send_signal(signal.SIGHUP)
    async with asyncio.timeout(DEADLINE_S):
        while (await ask(caller, own, fresh))[0] != 200:
            continue
    assert (await ask(caller, own, token()))[0] == 401


async def test_a_killed_gateway_leaves_one_span_for_a_call_that_the_upstream_saw(
    own: Daemon, caller: aiohttp.ClientSession
) -> None:
    code = """
import http.client, os
c = http.client.HTTPConnection("tools.internal", timeout=60)
c.request("GET", "/hang/" + os.environ["CLRK_INVOCATION_ID"])
c.getresponse()
"""
    running = asyncio.create_task(_post(caller, own, code))
    target = await asyncio.to_thread(HANGING.get, timeout=DEADLINE_S)
    invocation_id = target.rpartition("/")[2]
    assert await asyncio.to_thread(own.kill_gateway)
    assert isinstance(await running, aiohttp.ClientError)
    spans = await asyncio.to_thread(_spans_when_there_are_some, own, invocation_id)
    (call,) = [span for span in spans if span["kind"] == "SPAN_KIND_CLIENT"]
    assert call["name"] == "GET tools.internal"
    assert call["attributes"]["url.full"] == f"http://tools.internal{target}"
    assert call["status"]["code"] == "STATUS_CODE_ERROR"


async def _post(caller: aiohttp.ClientSession, own: Daemon, code: str) -> Exception | None:
    try:
        async with caller.post(f"{own.url}/agents/python", data=code, headers={"Content-Type": "text/plain"}) as answer:
            await answer.read()
    except aiohttp.ClientError as exc:
        return exc
    return None


def _spans_when_there_are_some(own: Daemon, invocation_id: str) -> list[dict[str, Any]]:
    deadline = time.monotonic() + DEADLINE_S
    while True:
        try:
            return own.spans(invocation_id)
        except AssertionError:  # the client found nobody, or nothing yet
            if time.monotonic() > deadline:
                raise
