"""`clrk` as a user runs it: against the real admin API on a real unix socket, with the samples of the unit tests."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest
from aiohttp import web
from clrk_command import Daemon
from page_samples import daemon_agent
from span_samples import admin_sources, agent, config, gateway

from clrk.gateway.admin.app import build_admin_app
from clrk.gateway.agents import AgentTable
from clrk.gateway.egress.addresses import AddressGuard
from clrk.gateway.policy_explain import explain
from clrk.gateway.telemetry.pipeline import Telemetry


@pytest.fixture
async def daemon(tmp_path):
    telemetry = Telemetry.open(tmp_path / "state", config())
    this = Daemon(str(tmp_path / "admin.sock"), telemetry, [])

    async def run_task(request, namespace, name):
        body = await request.read()
        this.requests.append((namespace, name, request.headers, body))
        return await this.answer(request)

    resources = config([gateway()], [agent(), agent("orders", "team-b")])
    resources.daemons.append(daemon_agent())
    catalogue = AgentTable(resources)

    def explain_call(namespace, name, call):
        found = catalogue.find(namespace, name)
        guard = AddressGuard((), lambda _: False)
        return explain(resources, catalogue.gateway_of(found), call, guard.refusal) if found is not None else None

    app = build_admin_app(
        store=telemetry.store, catalogue=catalogue, run_task=run_task, explain=explain_call,
        **admin_sources(telemetry, this.news, this.running),
    )  # fmt: skip
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    await web.UnixSite(runner, this.path).start()
    yield this
    await runner.cleanup()
    await telemetry.close()
