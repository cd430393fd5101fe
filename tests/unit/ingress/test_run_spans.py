"""Every run leaves exactly one `invoke_agent`, however it ends; what the agent writes is kept as well as answered."""

import asyncio

import pytest

from clrk.gateway.output_log import MAX_LINES


async def lines(gateway, agent, count):
    """Return (stream, line) of an agent once so many are kept."""
    telemetry, found = gateway.runtime.app._parts.telemetry, []
    async with asyncio.timeout(25):
        while len(found) < count:
            await telemetry.flush()
            found = await telemetry.store.logs(f"default/{agent}", tail=100_000)
    return found


@pytest.mark.parametrize(
    ("agent", "expected"),
    [
        ("silent", ("STATUS_CODE_UNSET", None, "exited", 0)),
        ("fails", ("STATUS_CODE_ERROR", "exit_code_3", "exited", 3)),
        ("crash", ("STATUS_CODE_ERROR", "exit_code_139", "exited", 139)),
        ("slow", ("STATUS_CODE_ERROR", "timeout", "timeout", 137)),
        ("unspawned", ("STATUS_CODE_ERROR", "sandbox_failed", None, None)),  # it had a sandbox, and no process
    ],
)
async def test_how_a_run_ended(gateway, agent, expected):
    _, headers, _ = await gateway.call(f"/agents/{agent}", json={})
    span = await gateway.span(headers["X-Clrk-Invocation-ID"], f"invoke_agent {agent}")
    attributes = span["attributes"]
    found = (span["status"]["code"], attributes.get("error.type"))
    assert (*found, attributes.get("clrk.exit_reason"), attributes.get("clrk.exit_code")) == expected
    assert attributes["clrk.sandbox.id"] == "0badcafe"
    assert ("clrk.cpu_time" in attributes) == (agent != "unspawned")


@pytest.mark.parametrize(("agent", "status"), [("poolless", 503), ("broken", 502), ("gone", 404)])
async def test_a_run_without_a_sandbox_is_in_dispatch_alone(gateway, agent, status):
    _, headers, _ = await gateway.call(f"/agents/{agent}", json={})
    dispatch = await gateway.span(headers["X-Clrk-Invocation-ID"], "ingress.dispatch")
    assert dispatch["attributes"]["http.response.status_code"] == status
    assert len(await gateway.spans(headers["X-Clrk-Invocation-ID"])) == 1


async def test_a_cancelled_run_has_its_span(gateway):
    reader, writer = await gateway.raw(b"POST /agents/forever HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
    head = await reader.readuntil(b"\r\n\r\n")
    invocation_id = head.decode().lower().partition("x-clrk-invocation-id: ")[2][:36]
    writer.close()
    span = await gateway.span(invocation_id, "invoke_agent forever")
    assert span["attributes"]["error.type"] == "cancelled"
    assert span["attributes"]["clrk.exit_reason"] == "stopped"


async def test_what_is_answered_is_logged_too(gateway):
    _, headers, body = await gateway.call("/agents/stderrflood", json={})
    await gateway.span(headers["X-Clrk-Invocation-ID"], "sandbox.teardown")  # by then both streams are at their end
    found = await lines(gateway, "stderrflood", 1)
    assert body == b"out\n"
    assert {entry.invocation_id for entry in found} == {headers["X-Clrk-Invocation-ID"]}
    assert ("stdout", "out") in {(entry.stream, entry.line) for entry in found}
    assert "".join(entry.line for entry in found if entry.stream == "stderr") == "x" * 300_000 + "ok"


async def test_a_flood_of_lines_reaches_its_caller_whole_and_the_log_bounded(gateway):
    _, _, body = await gateway.call("/agents/lines")
    assert len(body) == 2_000_000
    found = await lines(gateway, "lines", MAX_LINES)
    assert MAX_LINES <= len(found) <= MAX_LINES + 1
    assert found[-1].stream == "clrk"
