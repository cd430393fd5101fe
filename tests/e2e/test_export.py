"""The real gateway exports what is in its store: over gRPC with TLS as OTEL_* says, over HTTP as its resources say."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from cryptography.x509.oid import ExtendedKeyUsageOID
from instances import DEADLINE_S, instance
from otlp_receiver import Receiver, Tls, attributes
from stack import Daemon, agent, document
from tls_material import Authority

pytestmark = pytest.mark.e2e

HELLO = ["/bin/bash", "-c", "echo out; echo err >&2"]
EXPECTED = {"ingress.dispatch", "invoke_agent", "sandbox.acquire", "sandbox.spawn", "sandbox.teardown"}


@dataclass
class Exporting:
    """A daemon and its two backends."""

    daemon: Daemon
    standard: Receiver
    own: Receiver

    async def call(self, caller: aiohttp.ClientSession, name: str) -> str:
        async with caller.post(f"{self.daemon.url}/agents/{name}") as response:
            assert await response.read() == b"out\n"
            return response.headers["X-Clrk-Invocation-ID"]

    async def exported(self, receiver: Receiver, invocation: str) -> list[dict[str, object]]:
        """Return the spans of an invocation that a backend has, once they are complete."""

        def found() -> list[dict[str, object]]:
            return [one for one in receiver.documents() if one["attributes"].get("invocation.id") == invocation]

        await receiver.wait(lambda: {one["name"].split(" ")[0] for one in found()} >= EXPECTED)
        return found()


@pytest_asyncio.fixture
async def exporting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Exporting]:
    """Start everything. The gateway `default` has no `otlp`: its spans go where OTEL_* says."""
    servers, clients = Authority(), Authority("clients")
    certificate, key = servers.issue()
    client_certificate, client_key = clients.issue("clrk", ExtendedKeyUsageOID.CLIENT_AUTH)
    for name, text in (("ca", servers.pem), ("cert", client_certificate), ("key", client_key)):
        (tmp_path / f"{name}.pem").write_bytes(text)
        (tmp_path / f"{name}.pem").chmod(0o600)  # root's: the gateway could not read them
    async with (
        Receiver("grpc", tls=Tls(certificate, key, clients.pem)) as standard,
        Receiver("http/protobuf") as own,
    ):
        for name, value in {
            "ENDPOINT": f"https://localhost:{standard.port}",
            "PROTOCOL": "grpc",
            "CERTIFICATE": str(tmp_path / "ca.pem"),
            "CLIENT_CERTIFICATE": str(tmp_path / "cert.pem"),
            "CLIENT_KEY": str(tmp_path / "key.pem"),
            "HEADERS": "authorization=Bearer%20of-the-environment",
        }.items():
            monkeypatch.setenv(f"OTEL_EXPORTER_OTLP_{name}", value)
        monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "200")
        otlp = {"endpoint": own.endpoint, "headers": {"x-tenant": "of-the-gateway"}}
        documents = [
            document("EgressGateway", "default"),
            document("EgressGateway", "own", otlp=otlp),
            agent("plain", HELLO),
            agent("other", HELLO, egressRefs=[{"gatewayRef": {"name": "own"}}]),
        ]
        daemon = Daemon(tmp_path, instance("ex"), documents)
        await asyncio.to_thread(daemon.start)
        try:
            yield Exporting(daemon, standard, own)
        finally:
            assert await asyncio.to_thread(daemon.stop) == 0, daemon.log()
        assert "of-the-" not in daemon.log_path.read_text()


async def test_backends_get_what_the_store_has_and_nobody_elses(
    exporting: Exporting, caller: aiohttp.ClientSession
) -> None:
    plain, other = await exporting.call(caller, "plain"), await exporting.call(caller, "other")
    for receiver, invocation, secret in (
        (exporting.standard, plain, "Bearer of-the-environment"), (exporting.own, other, "of-the-gateway"),
    ):  # fmt: skip
        found = await exporting.exported(receiver, invocation)
        stored = await asyncio.to_thread(exporting.daemon.spans_when_complete, invocation)
        assert sorted(found, key=lambda one: one["span_id"]) == sorted(stored, key=lambda one: one["span_id"])
        assert {one["attributes"]["invocation.id"] for one in receiver.documents()} == {invocation}
        assert [value for value in receiver.requests[0].metadata.values() if "of-the-" in value] == [secret]
        await receiver.wait(lambda receiver=receiver: {"out", "err"} <= lines_of(receiver).keys())
        run = next(one for one in found if one["name"].startswith("invoke_agent"))
        lines = lines_of(receiver)
        assert {log.trace_id.hex() for log in lines.values()} == {run["trace_id"]}
        assert {log.span_id.hex() for log in lines.values()} == {run["span_id"]}
        assert attributes(lines["err"])["log.iostream"] == "stderr"
    await _metrics_are_there(exporting, caller)


def lines_of(receiver: Receiver) -> dict[str, Any]:
    """What the agent printed, each line with its record."""
    return {log.body.string_value: log for log in receiver.logs}


async def test_a_dead_backend_and_a_killed_gateway_lose_nothing(
    exporting: Exporting, caller: aiohttp.ClientSession
) -> None:
    first = await exporting.call(caller, "plain")
    await exporting.exported(exporting.standard, first)
    await exporting.standard.stop()
    during = [await exporting.call(caller, "plain") for _ in range(3)]
    for invocation in during:
        await asyncio.to_thread(exporting.daemon.spans_when_complete, invocation)
    before = exporting.daemon.gateway_pid()
    assert exporting.daemon.kill_gateway()
    async with asyncio.timeout(DEADLINE_S):
        while True:
            try:
                during.append(await exporting.call(caller, "plain"))
                break
            except (aiohttp.ClientError, AssertionError, KeyError):
                await asyncio.sleep(0.05)
    assert exporting.daemon.gateway_pid() != before
    await exporting.standard.start()
    for invocation in during:
        found = await exporting.exported(exporting.standard, invocation)
        stored = await asyncio.to_thread(exporting.daemon.spans_when_complete, invocation)
        assert {one["span_id"] for one in found} >= {one["span_id"] for one in stored}


async def _metrics_are_there(exporting: Exporting, caller: aiohttp.ClientSession) -> None:
    """At the backend of the environment, and as text."""
    wanted = {"clrk.sandbox.spawn.duration", "clrk.kernel.events", "clrk.export.items"}
    await exporting.standard.wait(lambda: wanted <= {metric.name for metric in exporting.standard.metrics})
    async with caller.get(f"http://127.0.0.1:{exporting.daemon.admin_port}/metrics") as response:
        assert response.status == 200
        assert response.headers["Content-Type"].startswith("text/plain; version=")
        text = await response.text()
    assert 'clrk_sandbox_spawn_duration_seconds_count{agent_name="plain"' in text
    assert 'clrk_kernel_events_total{clrk_kernel_counter="refused_udp"}' in text
    assert 'clrk_sandboxes{clrk_sandbox_state="ready"}' in text
    assert 'clrk_export_items_total{clrk_export_signal="traces",clrk_exporter="environment"}' in text
