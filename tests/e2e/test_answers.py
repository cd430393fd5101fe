"""Bad input, bad agents and bad callers: the contract's answer each time (CONTRACT sections 4 to 7)."""

from __future__ import annotations

import asyncio
import io
import json
import uuid
from typing import Any

import aiohttp
import pytest
import yarl
from stack import SOURCE, Daemon

pytestmark = [pytest.mark.kernel, pytest.mark.e2e]

JSON = {"content-type": "application/json"}
CANONICAL = "0198c6a7-0000-7000-8000-000000000001"


def check_problem(answer: aiohttp.ClientResponse, body: dict[str, Any], status: int) -> None:
    assert answer.status == status, body
    assert answer.headers["content-type"].partition(";")[0] == "application/problem+json"
    assert body["status"] == status
    assert body["title"]
    assert body["invocation_id"] == answer.headers["X-Clrk-Invocation-ID"]
    assert str(uuid.UUID(body["invocation_id"])) == body["invocation_id"]


@pytest.mark.parametrize(
    ("path", "headers", "body", "status"),
    [
        ("/", {}, b"", 400),
        ("/agents/", {}, b"", 400),
        ("/elsewhere", {"X-Clrk-TaskAgent": "not a name"}, b"", 400),
        ("/agents/nobody", {}, b"", 404),
        ("/agents/default/nobody", {}, b"", 404),
        ("/elsewhere", {"X-Clrk-TaskAgent": "default/nobody"}, b"", 404),
        ("/agents/curl", JSON, b"{", 400),
        ("/agents/curl", JSON, b'{"a": 1} trailing', 400),
        ("/agents/curl", {"content-type": "application/problem+json"}, b"nonsense", 400),
        ("/agents/curl", {"ce-id": ""}, b"", 400),
        ("/agents/curl", {"ce-type": "a%zz"}, b"", 400),
        ("/agents/curl", {"ce-type": "%00"}, b"", 400),
        ("/agents/curl", {"ce-time": "yesterday"}, b"", 400),
        ("/agents/curl", {"X-Clrk-Invocation-ID": "not-a-uuid"}, b"", 400),
        ("/agents/curl", {"X-Clrk-Invocation-ID": CANONICAL.upper()}, b"", 400),
        ("/agents/curl", {"X-Clrk-Trigger": "Not A Trigger"}, b"", 400),
        ("/agents/curl", {}, bytes(32 * 2**20 + 1), 413),
    ],
    ids=lambda value: repr(value)[:40] if not isinstance(value, bytes) else f"{len(value)} bytes",
)
async def test_bad_request(
    daemon: Daemon, caller: aiohttp.ClientSession, path: str, headers: dict[str, str], body: bytes, status: int
) -> None:
    async with caller.post(f"{daemon.url}{path}", data=io.BytesIO(body), headers=headers) as answer:
        check_problem(answer, await answer.json(content_type=None), status)


async def test_an_invocation_id_is_honoured_once(daemon: Daemon, caller: aiohttp.ClientSession) -> None:
    wanted = str(uuid.uuid4())
    async with caller.get(f"{daemon.url}/agents/curl", headers={"X-Clrk-Invocation-ID": wanted}) as answer:
        assert answer.status == 200
        assert answer.headers["X-Clrk-Invocation-ID"] == wanted
    async with caller.get(f"{daemon.url}/agents/curl", headers={"X-Clrk-Invocation-ID": wanted}) as answer:
        body = await answer.json(content_type=None)
        check_problem(answer, body, 409)
        assert body["invocation_id"] != wanted


@pytest.mark.parametrize("path", ["/agents/python", "/agents/default/python", "/agents/default/python/some/rest"])
async def test_the_envelope_says_who_asked(daemon: Daemon, caller: aiohttp.ClientSession, path: str) -> None:
    headers = SOURCE | {
        "ce-x-tenant-id": "acme", "X-Tenant-Id": "not-delivered", "Authorization": "Bearer secret",
        "ce-specversion": "9.9", "ce-traceparent": "forged", "ce-invocationid": "forged", "ce-subject": "caf%C3%A9",
    }  # fmt: skip
    url = yarl.URL(f"{daemon.url}{path}?a=b%2F", encoded=True)
    async with caller.post(url, data="print(json.dumps(event))", headers=headers) as answer:
        assert answer.status == 200
        event = json.loads(await answer.read())
        invocation_id = answer.headers["X-Clrk-Invocation-ID"]
    assert event["specversion"] == "1.0"
    assert event["x-tenant-id"] == "acme"
    assert event["subject"] == "café"
    assert event["source"] == "clrk://default/python"
    assert event["type"] == "dev.apoxy.clrk.taskagent.invoke"
    assert event["id"] == event["invocationid"] == invocation_id
    assert (event["httpmethod"], event["httpurl"], event["httpquery"]) == ("POST", path, "a=b%2F")
    assert event["datacontenttype"] == "text/plain"
    assert event["traceparent"].startswith("00-")
    assert "secret" not in json.dumps(event)
    assert "not-delivered" not in json.dumps(event)


async def test_the_environment_joins_the_trace(daemon: Daemon, caller: aiohttp.ClientSession) -> None:
    source = "import os; print(json.dumps([dict(os.environ), event['traceparent']]))"
    async with caller.post(f"{daemon.url}/agents/python", data=source, headers=SOURCE) as answer:
        environment, traceparent = json.loads(await answer.read())
        invocation_id = answer.headers["X-Clrk-Invocation-ID"]
    assert environment["TRACEPARENT"] == traceparent
    assert environment["CLRK_INVOCATION_ID"] == invocation_id
    assert environment["CLRK_METADATA_URL"] == "http://169.254.169.254"
    assert environment["CLRK_METADATA_URL_V6"] == "http://[fd00:ec2::254]"
    spans = await asyncio.to_thread(daemon.spans_when_complete, invocation_id)
    (run,) = [span for span in spans if span["name"] == "invoke_agent python"]
    assert traceparent == f"00-{run['trace_id']}-{run['span_id']}-01"


async def test_stdout_streams_as_it_is_written(daemon: Daemon, caller: aiohttp.ClientSession) -> None:
    """The first line arrives while the agent waits for what the caller does next: had it been held, this would hang."""
    source = "print('first', flush=True); import time; time.sleep(3600)"
    async with caller.post(f"{daemon.url}/agents/python", data=source, headers=SOURCE) as answer:
        assert answer.status == 200
        assert answer.headers["content-type"] == "application/octet-stream"
        assert await answer.content.readline() == b"first\n"
        invocation_id = answer.headers["X-Clrk-Invocation-ID"]
        answer.close()
    # The caller went away: the run is cancelled and everything of it removed, an hour early.
    spans = await asyncio.to_thread(daemon.spans_when_complete, invocation_id)
    (root,) = [span for span in spans if span["name"] == "ingress.dispatch"]
    assert root["status"]["code"] == "STATUS_CODE_ERROR"


async def test_failure_before_the_first_byte(daemon: Daemon, caller: aiohttp.ClientSession) -> None:
    source = "print('for the log', file=sys.stderr); sys.exit(7)"
    async with caller.post(f"{daemon.url}/agents/python", data=source, headers=SOURCE) as answer:
        body = await answer.json(content_type=None)
        check_problem(answer, body, 500)
        assert answer.headers["X-Clrk-Exit-Code"] == "7"
        assert "for the log" not in json.dumps(body)
        invocation_id = answer.headers["X-Clrk-Invocation-ID"]
    await asyncio.to_thread(daemon.spans_when_complete, invocation_id)
    assert "for the log" in daemon.clrk("agents", "logs", f"python/{invocation_id}")


async def test_failure_after_the_first_byte_is_visible(daemon: Daemon, caller: aiohttp.ClientSession) -> None:
    """The body ends without its terminator: no client takes half an answer for a whole one."""
    source = "print('half an answer', flush=True); sys.exit(7)"
    async with caller.post(f"{daemon.url}/agents/python", data=source, headers=SOURCE) as answer:
        assert answer.status == 200
        with pytest.raises(aiohttp.ClientPayloadError):
            await answer.read()


async def test_agent_that_never_reads_stdin(daemon: Daemon, caller: aiohttp.ClientSession) -> None:
    async with caller.post(f"{daemon.url}/agents/deaf", data=io.BytesIO(bytes(8 * 2**20))) as answer:
        assert answer.status == 200
        assert await answer.read() == b"done\n"


async def test_agent_that_floods_stdout(daemon: Daemon, caller: aiohttp.ClientSession) -> None:
    """An endless answer is cut by the agent's timeout, visibly, and costs no memory on the way."""
    size = 0
    async with caller.post(f"{daemon.url}/agents/flood") as answer:
        assert answer.status == 200
        with pytest.raises(aiohttp.ClientPayloadError):  # noqa: PT012 - any of the reads
            while chunk := await answer.content.readany():
                size += len(chunk)
        invocation_id = answer.headers["X-Clrk-Invocation-ID"]
    assert size > 2**20
    spans = await asyncio.to_thread(daemon.spans_when_complete, invocation_id)
    (run,) = [span for span in spans if span["name"] == "invoke_agent flood"]
    assert run["attributes"]["clrk.exit_reason"] == "timeout"


async def test_timeout_with_nothing_written(daemon: Daemon, caller: aiohttp.ClientSession) -> None:
    async with caller.post(f"{daemon.url}/agents/sleepy") as answer:
        check_problem(answer, await answer.json(content_type=None), 504)


async def test_at_max_concurrent(daemon: Daemon, caller: aiohttp.ClientSession) -> None:
    async with caller.post(f"{daemon.url}/agents/single", data="print('on', flush=True); import time; time.sleep(3600)",
                           headers=SOURCE) as first:  # fmt: skip
        assert await first.content.readline() == b"on\n"
        async with caller.post(f"{daemon.url}/agents/single", data="print('off')", headers=SOURCE) as second:
            check_problem(second, await second.json(content_type=None), 429)
            assert int(second.headers["Retry-After"]) > 0
        first.close()


async def test_metadata_mode(daemon: Daemon, caller: aiohttp.ClientSession) -> None:
    """The posted answer goes out when it is posted; a second one is refused."""
    source = """
import os, urllib.error, urllib.request
url = os.environ['CLRK_METADATA_URL'] + '/v1/response'
def post(body):
    request = urllib.request.Request(url, body, {'content-type': 'text/x-answer', 'x-clrk-status': '418'})
    try:
        return urllib.request.urlopen(request).status
    except urllib.error.HTTPError as error:
        return error.code
print(post(b'tea'), post(b'more tea'), file=sys.stderr)
"""
    async with caller.post(f"{daemon.url}/agents/teapot", data=source, headers=SOURCE) as answer:
        assert (answer.status, await answer.read()) == (418, b"tea")
        assert answer.headers["content-type"] == "text/x-answer"
        invocation_id = answer.headers["X-Clrk-Invocation-ID"]
    await asyncio.to_thread(daemon.spans_when_complete, invocation_id)
    assert "204 409" in daemon.clrk("agents", "logs", f"teapot/{invocation_id}")


async def test_metadata_mode_without_an_answer(daemon: Daemon, caller: aiohttp.ClientSession) -> None:
    async with caller.post(f"{daemon.url}/agents/teapot", data="pass", headers=SOURCE) as answer:
        check_problem(answer, await answer.json(content_type=None), 502)


async def test_wrapped_answer(daemon: Daemon, caller: aiohttp.ClientSession) -> None:
    headers = SOURCE | {"accept": "application/cloudevents+json", "ce-id": "q-1"}
    async with caller.post(f"{daemon.url}/agents/python", data="print('hello')", headers=headers) as answer:
        assert answer.headers["content-type"].startswith("application/cloudevents+json")
        event = json.loads(await answer.read())
    assert (event["type"], event["id"], event["relationid"]) == (
        "dev.apoxy.clrk.taskagent.response", "q-1.response", "q-1",
    )  # fmt: skip
    assert event["data_base64"] == "aGVsbG8K"
