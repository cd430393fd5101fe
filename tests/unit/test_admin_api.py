"""The admin API over a real unix socket."""

import asyncio
import json
import time

import aiohttp
import pytest
from aiohttp import web
from span_samples import (
    admin_sources,
    agent,
    config,
    gateway,
    identity,
    invocation_record,
    record,
    record_invocation,
)

from clrk.gateway.admin.app import build_admin_app, build_health_app
from clrk.gateway.admin.parameters import ParameterError, parse_filter, parse_time
from clrk.gateway.agents import AgentTable
from clrk.gateway.outcome import Phase
from clrk.gateway.telemetry.pipeline import Telemetry


@pytest.fixture
async def telemetry(tmp_path):
    opened = Telemetry.open(tmp_path / "state", config())
    yield opened
    await opened.close()


@pytest.fixture
async def api(tmp_path, telemetry):
    async def run_task(request, namespace, name):
        return web.json_response({"ran": f"{namespace}/{name}", "body": (await request.read()).decode()})

    catalogue = AgentTable(config([gateway()], [agent(), agent("orders", "team-b")]))
    app = build_admin_app(store=telemetry.store, catalogue=catalogue, run_task=run_task, **admin_sources(telemetry))
    runner = web.AppRunner(app)
    await runner.setup()
    path = str(tmp_path / "admin.sock")
    await web.UnixSite(runner, path).start()
    async with aiohttp.ClientSession("http://clrk", connector=aiohttp.UnixConnector(path)) as session:
        yield session
    await runner.cleanup()


async def lines(response):
    assert response.status == 200, await response.text()
    assert response.content_type == "application/x-ndjson"
    return [json.loads(line) for line in (await response.text()).splitlines()]


async def problem(response):
    assert response.content_type == "application/problem+json"
    document = await response.json()
    assert document["status"] == response.status
    return response.status, document["detail"]


async def test_agents_are_listed_and_read_without_the_values_of_their_environment(api):
    listing = await (await api.get("/v1/agents")).json()
    assert [(item["namespace"], item["name"]) for item in listing["items"]] == [
        ("default", "support"), ("team-b", "orders"),
    ]  # fmt: skip
    text = await (await api.get("/v1/agents/default/support")).text()
    assert json.loads(text)["revision"] == agent().revision
    assert '"KEY"' in text
    assert "s3cret" not in text
    assert (await problem(await api.get("/v1/agents/default/nobody")))[0] == 404


async def test_run_is_handed_on_with_its_body(api):
    answer = await (await api.post("/v1/agents/team-b/orders/run", data=b"hello")).json()
    assert answer == {"ran": "team-b/orders", "body": "hello"}


async def test_traces_stream_as_lines_and_filter(api, telemetry):
    who = identity()
    record_invocation(telemetry, who)
    record_invocation(telemetry, identity("orders", "team-b"))
    spans = await lines(await api.get("/v1/traces"))
    assert len(spans) == 10
    assert set(spans[0]) == {
        "trace_id", "span_id", "parent_span_id", "name", "kind", "start_time_unix_nano", "end_time_unix_nano",
        "status", "attributes", "events", "resource",
    }  # fmt: skip
    assert [span["start_time_unix_nano"] for span in spans] == sorted(span["start_time_unix_nano"] for span in spans)
    (denied,) = await lines(await api.get("/v1/traces", params={"agent": "support", "denied": "true", "since": "1h"}))
    assert denied["attributes"]["invocation.id"] == who.invocation_id
    newest = await lines(await api.get("/v1/traces", params={"limit": "3"}))
    assert newest == spans[-3:]
    assert await lines(await api.get("/v1/traces", params={"until": "1h"})) == []
    assert await lines(await api.get("/v1/traces", params={"limit": "0"})) == []
    for early, late in (("9" * 400 + "d", "0s"), ("0001-01-01T00:00:00Z", "9999-12-31T00:00:00Z")):
        assert len(await lines(await api.get("/v1/traces", params={"since": early, "until": late}))) == 10


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"since": "yesterday"}, "15m"),
        ({"until": "9999-99-99"}, "no time"),
        ({"agnet": "x"}, "agent"),
        ({"agent": "a b"}, "NAMESPACE/NAME"),
        ({"denied": "yes"}, "true or false"),
        ({"min_input_tokens": "-1"}, "number"),
        ({"min_input_tokens": "1" * 30}, "number"),
        ({"min_input_tokens": "²"}, "number"),
        ({"limit": "10001"}, "10000"),
    ],
)
async def test_bad_parameters_are_400_and_say_what_to_write(api, params, says):
    status, detail = await problem(await api.get("/v1/traces", params=params))
    assert status == 400
    assert says in detail


async def test_an_invocation_is_found_by_the_beginning_of_its_id(api, telemetry):
    first = identity(invocation_id="01a2041e-8f1b-7215-bede-e5329b18fce0")
    second = identity(invocation_id="01a2041e-8f1b-7999-bede-e5329b18fce0")
    for who in (first, second):
        record_invocation(telemetry, who)
    for text in (first.invocation_id, "01a2041e-8f1b-72"):
        spans = await lines(await api.get(f"/v1/traces/{text}"))
        assert {span["attributes"]["invocation.id"] for span in spans} == {first.invocation_id}
    status, detail = await problem(await api.get("/v1/traces/01a2041e"))
    assert status == 409
    assert first.invocation_id in detail
    assert second.invocation_id in detail
    for number in range(3, 10):
        record_invocation(telemetry, identity(invocation_id=f"01a2041e-8f1b-7{number}00-bede-e5329b18fce0"))
    detail = (await problem(await api.get("/v1/traces/01a2041e")))[1]
    assert detail.startswith("01a2041e is the beginning of 01a2041e-8f1b-7")
    assert detail.endswith(", …; write more of it")
    assert detail.count("bede") == 4
    assert (await problem(await api.get("/v1/traces/ffff")))[0] == 404
    for text in ("%25", "XYZ", "a" * 37, "'--"):
        assert (await problem(await api.get(f"/v1/traces/{text}")))[0] == 400


async def test_the_outcome_of_an_invocation_is_waited_for(api, telemetry):
    who = identity()
    url = f"/v1/invocations/{who.invocation_id}"
    telemetry.record_invocation(invocation_record(who, phase=Phase.RUNNING, ended_ns=0, exit_code=None))
    running = await (await api.get(url)).json()
    assert (running["phase"], running["exitCode"], running["endTimeUnixNano"]) == ("Running", None, None)
    waiting = asyncio.create_task(api.get(url, params={"wait": "20"}))
    await telemetry.flush()
    assert not waiting.done()
    telemetry.record_invocation(invocation_record(who, phase=Phase.TIMEOUT, exit_code=137))
    outcome = await (await waiting).json()
    assert (outcome["phase"], outcome["exitCode"], outcome["agent"]) == ("Timeout", 137, "support")
    assert (await problem(await api.get(f"/v1/invocations/{identity().invocation_id}")))[0] == 404
    assert (await problem(await api.get(url, params={"wait": "61"})))[0] == 400
    assert (await problem(await api.get(url, params={"wait": "nan"})))[0] == 400


async def test_the_memory_of_the_gateway_comes_before_the_store(tmp_path, telemetry):
    known = invocation_record(identity(), phase=Phase.FAILED, exit_code=3, message="why")
    app = build_admin_app(
        store=telemetry.store, catalogue=AgentTable(config()), run_task=None, recall={"i": known}.get,
        **admin_sources(telemetry),
    )  # fmt: skip
    runner = web.AppRunner(app)
    await runner.setup()
    await web.UnixSite(runner, str(tmp_path / "s")).start()
    connector = aiohttp.UnixConnector(str(tmp_path / "s"))
    async with aiohttp.ClientSession("http://clrk", connector=connector) as session:
        outcome = await (await session.get("/v1/invocations/i")).json()
    assert (outcome["phase"], outcome["exitCode"], outcome["message"]) == ("Failed", 3, "why")
    await runner.cleanup()


async def test_logs_of_an_agent_and_of_one_invocation(api, telemetry):
    first, second = identity(), identity()
    now = time.time_ns()
    telemetry.record_log(first, "stdout", b"one", now)
    telemetry.record_log(second, "stderr", b"\x1b[31mtwo\xff", now)
    record(telemetry, first)
    record(telemetry, second)
    found = await lines(await api.get("/v1/agents/default/support/logs"))
    assert [(line["stream"], line["line"]) for line in found] == [("stdout", "one"), ("stderr", "\x1b[31mtwo\ufffd")]
    params = {"invocation": first.invocation_id}
    (line,) = await lines(await api.get("/v1/agents/default/support/logs", params=params))
    assert line["line"] == "one"
    (line,) = await lines(await api.get("/v1/agents/default/support/logs", params={"tail": "1"}))
    assert line["invocation_id"] == second.invocation_id
    assert await lines(await api.get("/v1/agents/team-b/support/logs")) == []


async def test_status_shows_the_store_and_what_was_dropped(api, telemetry):
    telemetry.store.set_cursor("default/default", "traces", 2)
    record_invocation(telemetry, identity())
    await telemetry.flush()
    endpoint = "http://user:hidden@127.0.0.1:1/?key=hidden"
    telemetry.reconfigure(config([gateway(endpoint, headers={"authorization": "hidden"})]))
    async with asyncio.timeout(25):
        while not telemetry.store.counters["export_failures"]:
            await asyncio.sleep(0.01)
    response = await api.get("/v1/status")
    document = await response.json()
    assert document["agents"] == 2
    assert document["store"]["counters"]["spans"] == 5
    logs, metrics, traces = document["exporters"]
    assert (logs["name"], metrics["name"]) == ("default/default logs", "default/default metrics")
    assert (traces["name"], traces["behind"]) == ("default/default traces", 3)
    assert traces["endpoint"] == "http://127.0.0.1:1/v1/traces"
    assert traces["failingSinceUnixNano"] > 0
    assert "hidden" not in await response.text()


async def test_a_store_that_can_not_be_read_is_503_and_the_rest_works(api, telemetry):
    await telemetry.close()
    telemetry.store.path.unlink()
    status, detail = await problem(await api.get("/v1/traces"))
    assert status == 503
    assert "traces.db" in detail
    assert (await api.get("/v1/agents")).status == 200


async def test_wrong_methods_and_paths_are_problems(api):
    response = await api.delete("/v1/agents")
    assert response.headers["Allow"] == "GET,HEAD"
    assert (await problem(response))[0] == 405
    assert (await problem(await api.get("/nowhere")))[0] == 404


async def test_the_tcp_side_serves_health_and_nothing_else():
    ready = []
    runner = web.AppRunner(build_health_app(lambda: bool(ready)))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    port = runner.addresses[0][1]
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
        assert (await session.get("/healthz")).status == 200
        assert (await session.get("/readyz")).status == 503
        ready.append(True)
        assert (await session.get("/readyz")).status == 200
        for path in ("/", "/v1/traces", "/v1/agents", "/v1/status", "/metrics"):
            assert (await session.get(path)).status == 404
    await runner.cleanup()


@pytest.mark.parametrize(
    ("text", "ns"),
    [
        ("15m", 10**18 - 900 * 10**9),
        ("90s", 10**18 - 90 * 10**9),
        ("2026-11-22T03:14:00Z", 1_795_317_240 * 10**9),
        ("2026-11-22T04:14:00+01:00", 1_795_317_240 * 10**9),
        ("2026-11-22T03:14:00", 1_795_317_240 * 10**9),
        ("2026-11-22T03:14:00.000001Z", 1_795_317_240 * 10**9 + 1000),
    ],
)
def test_times(text, ns):
    assert parse_time(text, 10**18) == ns


@pytest.mark.parametrize("text", ["", "m", "now", "15 m", "-5m", "2026-13-01T00:00:00Z"])
def test_what_is_no_time(text):
    with pytest.raises(ParameterError):
        parse_time(text, 10**18)


def test_an_empty_query_filters_nothing():
    wanted, limit = parse_filter({}, 0)
    assert limit is None
    assert wanted == type(wanted)()
