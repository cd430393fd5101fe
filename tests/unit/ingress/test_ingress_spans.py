"""The spans of a request from outside, and of `clrk agents run-task` over the admin socket."""

import asyncio
import json

import aiohttp

from clrk.core.messages import StopRun

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


async def test_the_span_tree(gateway):
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=x", "ce-x-tenant-id": "acme"}
    status, answer, body = await gateway.call("/agents/echo?secret=1", headers=headers)
    assert status == 200
    invocation_id = answer["X-Clrk-Invocation-ID"]
    await gateway.span(invocation_id, "sandbox.teardown")
    spans = {span["name"]: span for span in await gateway.spans(invocation_id)}
    assert set(spans) == {
        "ingress.dispatch",
        "invoke_agent echo",
        "sandbox.acquire",
        "sandbox.spawn",
        "sandbox.teardown",
    }
    dispatch, run = spans["ingress.dispatch"], spans["invoke_agent echo"]
    assert {span["trace_id"] for span in spans.values()} == {TRACE}
    assert dispatch["parent_span_id"] == PARENT
    assert run["parent_span_id"] == dispatch["span_id"]
    for name in ("sandbox.acquire", "sandbox.spawn", "sandbox.teardown"):
        assert spans[name]["parent_span_id"] == run["span_id"]
        assert spans[name]["attributes"]["clrk.sandbox.warm"] is True
        assert spans[name]["attributes"]["clrk.sandbox.id"] == "0badcafe"
    event = json.loads(body)
    assert event["traceparent"] == f"00-{TRACE}-{run['span_id']}-01"
    assert event["tracestate"] == "vendor=x"
    assert (dispatch["kind"], run["kind"]) == ("SPAN_KIND_SERVER", "SPAN_KIND_INTERNAL")
    assert (
        dispatch["attributes"].items()
        >= {
            "invocation.id": invocation_id,
            "agent.kind": "TaskAgent",
            "agent.namespace": "default",
            "agent.name": "echo",
            "clrk.trigger": "http",
            "clrk.phase": "Succeeded",
            "http.request.method": "POST",
            "http.response.status_code": 200,
            "http.route": "/agents/{name}",
            "url.path": "/agents/echo",
            "url.scheme": "http",
            "client.address": "127.0.0.1",
            "server.address": "127.0.0.1",
            "server.port": gateway.runtime.ingress_port,
        }.items()
    )
    assert (
        run["attributes"].items()
        >= {
            "gen_ai.operation.name": "invoke_agent",
            "gen_ai.agent.name": "echo",
            "clrk.exit_code": 0,
            "clrk.exit_reason": "exited",
            "clrk.phase": "Succeeded",
        }.items()
    )
    for span in spans.values():
        assert "acme" not in json.dumps(span)
        assert "secret" not in json.dumps(span)
        assert span["start_time_unix_nano"] <= span["end_time_unix_nano"]


async def test_a_secret_in_a_path_reaches_the_agent_and_no_span(gateway):
    path = "/agents/echo/hooks/ghp_aB3dE5gH7jK9mN1pQ3sT5vX7zA9cE1gH3jL5"
    _, answer, body = await gateway.call(path)
    dispatch = await gateway.span(answer["X-Clrk-Invocation-ID"], "ingress.dispatch")
    assert json.loads(body)["httpurl"] == path
    assert dispatch["attributes"]["url.path"] == "/agents/echo/hooks/REDACTED"


async def test_a_trace_without_a_caller(gateway):
    _, answer, body = await gateway.call("/agents/env", headers={"X-Clrk-Trigger": "cron", "traceparent": "nonsense"})
    invocation_id = answer["X-Clrk-Invocation-ID"]
    dispatch = await gateway.span(invocation_id, "ingress.dispatch")
    assert dispatch["parent_span_id"] == ""
    assert dispatch["attributes"]["clrk.trigger"] == "cron"
    run = await gateway.span(invocation_id, "invoke_agent env")
    assert body.decode().split() == [f"00-{run['trace_id']}-{run['span_id']}-01", invocation_id]


async def test_an_unsampled_parent_stays_unsampled(gateway):
    _, _, body = await gateway.call("/agents/echo", headers={"traceparent": f"00-{TRACE}-{PARENT}-00"})
    assert json.loads(body)["traceparent"].endswith("-00")


async def test_a_failed_run_is_an_error_in_both_spans(gateway):
    _, headers, _ = await gateway.call("/agents/fails")
    run = await gateway.span(headers["X-Clrk-Invocation-ID"], "invoke_agent fails")
    assert (run["status"]["code"], run["attributes"]["error.type"]) == ("STATUS_CODE_ERROR", "exit_code_3")
    dispatch = await gateway.span(headers["X-Clrk-Invocation-ID"], "ingress.dispatch")
    assert (dispatch["status"]["code"], dispatch["attributes"]["error.type"]) == ("STATUS_CODE_ERROR", "500")


async def test_a_refused_request_has_a_span_without_error(gateway):
    _, headers, _ = await gateway.call("/agents/echo", headers={"ce-note": "%"})
    dispatch = await gateway.span(headers["X-Clrk-Invocation-ID"], "ingress.dispatch")
    assert dispatch["attributes"]["http.response.status_code"] == 400
    assert dispatch["status"]["code"] == "STATUS_CODE_UNSET"  # semconv: 4xx is the client's fault


async def test_an_unknown_method_is_other(gateway):
    _, headers, _ = await gateway.call("/agents/echo", "PURGE")
    attributes = (await gateway.span(headers["X-Clrk-Invocation-ID"], "ingress.dispatch"))["attributes"]
    assert attributes["http.request.method"] == "_OTHER"
    assert attributes["http.request.method_original"] == "PURGE"


# --- run-task ---------------------------------------------------------------------------------------------------------


async def test_run_task_over_the_admin_socket(gateway):
    connector = aiohttp.UnixConnector(str(gateway.runtime.state_dir / "admin.sock"))
    async with aiohttp.ClientSession(connector=connector) as client:
        url = "http://clrk/v1/agents/default/echo/run"
        async with client.post(url, data=b"hi", headers={"ce-k": "v", "Content-Type": "text/plain"}) as response:
            event = await response.json()
            invocation_id = response.headers["X-Clrk-Invocation-ID"]
        async with client.get(f"http://clrk/v1/invocations/{invocation_id}") as response:
            assert (await response.json())["phase"] == "Succeeded"
        async with client.post("http://clrk/v1/agents/default/mute/run", headers={"X-Clrk-Timeout": "0.2"}) as response:
            assert response.status == 504
        async with client.post("http://clrk/v1/agents/default/nobody/run") as response:
            assert response.status == 404
    assert (event["subject"], event["k"], event["data"], event["httpurl"]) == ("cli", "v", "hi", "/agents/default/echo")
    attributes = (await gateway.span(invocation_id, "ingress.dispatch"))["attributes"]
    assert attributes["clrk.trigger"] == "cli"
    assert attributes["clrk.caller.uid"] == 0 or attributes["clrk.caller.uid"] > 0
    assert "client.address" not in attributes


async def test_run_task_is_cancelled_with_its_caller(gateway):
    _, writer = await asyncio.open_unix_connection(str(gateway.runtime.state_dir / "admin.sock"))
    writer.write(b"POST /v1/agents/default/mute/run HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
    await gateway.runtime.until(lambda: gateway.runtime.runs)
    writer.transport.abort()
    await gateway.runtime.until(lambda: not gateway.runtime.runs)
    assert isinstance(gateway.runtime.received[-1], StopRun)
