"""The metadata service (CONTRACT section 7), reached the way an agent reaches it, and its answers at the caller."""

import asyncio
import contextlib
import io
import json

import aiohttp
import pytest
from scripted_runtime import METADATA_HOST

CE = "application/cloudevents+json"


@contextlib.asynccontextmanager
async def sandbox(gateway, name, **kwargs):
    """Run an agent that waits at its gate; yields its two metadata URLs. Its caller's answer is awaited at the end."""
    call = asyncio.create_task(gateway.call(f"/agents/{name}", **kwargs))
    await gateway.runtime.until(lambda: gateway.runtime.egress.served)
    sockets = gateway.runtime.egress.served[-1].sockets
    port4, port6 = sockets.metadata_v4.getsockname()[1], sockets.metadata_v6.getsockname()[1]
    await gateway.runtime.until(lambda: gateway.runtime.runs)
    yield f"http://127.0.0.1:{port4}", f"http://[::1]:{port6}", call
    gateway.runtime.open_gate()
    with contextlib.suppress(aiohttp.ClientPayloadError):
        await call


async def ask(gateway, url, method="GET", headers=METADATA_HOST, **kwargs):
    async with gateway.client.request(method, url, headers=headers, **kwargs) as response:
        return response.status, response.headers, await response.read()


@pytest.mark.parametrize("name", ["probe", "probemeta"])
async def test_event_in_binary_mode_on_both_addresses_any_number_of_times(gateway, name):
    sent = {"ce-x-tenant-id": "a%20b", "Content-Type": "text/plain"}
    async with sandbox(gateway, name, data=b"hello", headers=sent) as (url4, url6, _):
        for url in (url4, url6, url4):
            status, headers, body = await ask(gateway, f"{url}/v1/event")
            assert (status, body, headers["Content-Type"]) == (200, b"hello", "text/plain")
            assert headers["ce-x-tenant-id"] == "a%20b"
            assert headers["ce-specversion"] == "1.0"
            assert headers["ce-subject"] == "http"


@pytest.mark.parametrize(
    ("accept", "structured"),
    [(CE, True), (f"{CE};q=0", False), (f"{CE};q=0.1, */*", False), ("*/*", False), (f"{CE}, */*;q=0.5", True)],
)
async def test_event_in_structured_mode(gateway, accept, structured):
    async with sandbox(gateway, "probe", json={"a": 1}) as (url, _, _):
        status, headers, body = await ask(gateway, f"{url}/v1/event", headers=METADATA_HOST | {"Accept": accept})
    assert status == 200
    assert headers["Content-Type"] == (CE if structured else "application/json")
    assert json.loads(body)["data" if structured else "a"] == ({"a": 1} if structured else 1)


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", "/", {}, 404),
        ("GET", "/v1/event/", {}, 404),
        ("GET", "/v1/events", {}, 404),
        ("GET", "/latest/meta-data/", {}, 404),
        ("GET", "/v1//event", {}, 404),
        ("POST", "/v1/event", {}, 405),
        ("HEAD", "/v1/event", {}, 405),
        ("GET", "/v1/response", {}, 405),
        ("PUT", "/v1/response", {}, 405),
        ("POST", "/v1/response", {}, 409),  # Stdin mode
        ("GET", "/v1/event", {"Host": "evil.example"}, 403),
        ("GET", "/v1/event", {"Host": "169.254.169.254.evil.example"}, 403),
        ("GET", "/v1/event", {"Host": "169.254.169.254:8080"}, 403),
        ("GET", "/v1/event", {"Host": ""}, 403),
        ("GET", "/v1/event", {"X-Forwarded-For": "10.0.0.1"}, 403),
        ("POST", "/v1/response", {"Host": "localhost"}, 403),
        ("GET", "/v1/event", {"Host": "169.254.169.254:80"}, 200),
        ("GET", "/v1/event", {"Host": "[fd00:ec2::254]"}, 200),
        ("GET", "/v1/event?x=1", {}, 200),
    ],
)
async def test_rules(gateway, method, path, headers, status):
    async with sandbox(gateway, "probe") as (url, _, _):
        got, answer, body = await ask(gateway, url + path, method, METADATA_HOST | headers)
    assert got == status
    assert (answer.get("Allow") is not None) == (status == 405)
    if status != 200 and method != "HEAD":
        assert answer["Content-Type"] == "application/problem+json"
        assert json.loads(body)["status"] == status


async def test_two_hosts_are_foreign(gateway):
    async with sandbox(gateway, "probe") as (url, _, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
        writer.write(b"GET /v1/event HTTP/1.1\r\nHost: 169.254.169.254\r\nHost: evil.example\r\n\r\n")
        assert (await reader.readline()).split()[1] in (b"400", b"403")
        writer.close()


async def test_the_answer_goes_out_when_it_is_posted(gateway):
    async with sandbox(gateway, "probemeta") as (url, _, call):
        headers = METADATA_HOST | {"X-Clrk-Status": "418", "Content-Type": "text/x-tea"}
        status, _, body = await ask(gateway, f"{url}/v1/response", "POST", headers, data=b"short and stout")
        assert (status, body) == (204, b"")
        status, answer, body = await asyncio.wait_for(call, 10)  # while the agent still runs
        assert (status, answer["Content-Type"], body) == (418, "text/x-tea", b"short and stout")
        assert gateway.runtime.runs
        assert gateway.phase(answer["X-Clrk-Invocation-ID"]) == "Running"
        assert (await ask(gateway, f"{url}/v1/response", "POST", data=b"again"))[0] == 409
        assert (await ask(gateway, f"{url}/v1/event"))[0] == 200
    run = await gateway.span(answer["X-Clrk-Invocation-ID"], "invoke_agent probemeta")
    assert run["attributes"]["clrk.phase"] == "Succeeded"


@pytest.mark.parametrize("status", ["199", "600", "20", "2000", "abc", "", "+200", "٢٠٠"])
async def test_status_must_be_one(gateway, status):
    async with sandbox(gateway, "probemeta") as (url, _, _):
        headers = METADATA_HOST | {"X-Clrk-Status": status}
        assert (await ask(gateway, f"{url}/v1/response", "POST", headers))[0] == 400
        assert (await ask(gateway, f"{url}/v1/response", "POST"))[0] == 204  # a refused one does not count


async def test_answer_over_the_limit(gateway):
    async with sandbox(gateway, "probemeta") as (url, _, call):
        over = io.BytesIO(b"\0" * (32 * 1024 * 1024 + 1))
        assert (await ask(gateway, f"{url}/v1/response", "POST", data=over))[0] == 413
        full = io.BytesIO(b"\0" * (32 * 1024 * 1024))
        assert (await ask(gateway, f"{url}/v1/response", "POST", data=full))[0] == 204
        assert len((await call)[2]) == 32 * 1024 * 1024


async def test_an_answer_that_breaks_off_does_not_count(gateway):
    async with sandbox(gateway, "probemeta") as (url, _, call):
        _, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
        writer.write(b"POST /v1/response HTTP/1.1\r\nHost: 169.254.169.254\r\nContent-Length: 9\r\n\r\nhalf")
        await writer.drain()
        async with asyncio.timeout(25):  # one answer is read at a time
            while (await ask(gateway, f"{url}/v1/response", "POST", METADATA_HOST | {"X-Clrk-Status": "0"}))[0] != 409:
                await asyncio.sleep(0.005)
        writer.transport.abort()
        async with asyncio.timeout(25):
            while (await ask(gateway, f"{url}/v1/response", "POST", data=b"whole"))[0] != 204:
                await asyncio.sleep(0.005)
        assert (await call)[2] == b"whole"


async def test_connections_are_few(gateway):
    async with sandbox(gateway, "probe") as (url, _, _):
        port = int(url.rsplit(":", 1)[1])
        opened = [await asyncio.open_connection("127.0.0.1", port) for _ in range(64)]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        with contextlib.suppress(ConnectionResetError):
            assert (await asyncio.wait_for(reader.read(), 10)).startswith(b"HTTP/1.1 503 ")
        for _, opened_writer in [*opened, (reader, writer)]:
            opened_writer.close()


async def test_real_agents_post(gateway):
    status, headers, body = await gateway.call("/agents/post")
    assert (status, headers["Content-Type"], body) == (201, "application/json", b"{}")
    assert (await gateway.call("/agents/post204"))[0::2] == (204, b"")
    status, headers, body = await gateway.call("/agents/post", headers={"Accept": CE, "ce-id": "7"})
    assert (status, headers["Content-Type"]) == (201, CE)
    assert json.loads(body)["data"] == {}


async def test_a_failure_after_the_answer_shows_in_the_trace_only(gateway):
    status, headers, body = await gateway.call("/agents/postlate")
    assert (status, body) == (200, b"early")
    gateway.runtime.open_gate()
    run = await gateway.span(headers["X-Clrk-Invocation-ID"], "invoke_agent postlate")
    assert (run["status"]["code"], run["attributes"]["clrk.exit_code"]) == ("STATUS_CODE_ERROR", 5)
    await gateway.span(headers["X-Clrk-Invocation-ID"], "sandbox.teardown")
    store = gateway.runtime.app._parts.telemetry.store
    await store.flush()
    lines = await store.logs("default/postlate", invocation_id=headers["X-Clrk-Invocation-ID"], tail=10)
    assert [(line.stream, line.line) for line in lines] == [("stdout", "late")]


@pytest.mark.parametrize(
    ("name", "status", "code"), [("postnone", 502, "0"), ("postfails", 502, "6"), ("postslow", 504, None)]
)
async def test_no_answer_posted(gateway, name, status, code):
    got, headers, _ = await gateway.call(f"/agents/{name}")
    assert (got, headers.get("X-Clrk-Exit-Code")) == (status, code)


async def test_the_listeners_are_closed_with_the_run(gateway):
    async with sandbox(gateway, "probe") as (url, url6, _):
        pass
    await gateway.runtime.until(lambda: gateway.runtime.egress.closed)
    await gateway.runtime.until(lambda: not gateway.runtime.app._parts.invocations._live)
    for address in (url, url6):
        with pytest.raises(aiohttp.ClientConnectorError):
            await ask(gateway, f"{address}/v1/event")
