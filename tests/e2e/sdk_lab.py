"""Agents that run official SDKs as they are, and a daemon for them: the stand-in is behind the providers' names."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import aiohttp
import pytest
from instances import instance
from span_contract import violations
from stack import ROOT, RUN_PYTHON, Daemon, StandIn, agent, document, invoke

AZURE, SELF_HOSTED = "standin.openai.azure.com", "llm.internal"
HOSTS = ["api.anthropic.com", "api.openai.com", AZURE, SELF_HOSTED]
KEYS = {"ANTHROPIC_API_KEY": "placeholder", "OPENAI_API_KEY": "placeholder", "AZURE_OPENAI_API_KEY": "placeholder"}
OWN_PRICE = {"provider": "openai_compatible", "model": "house-*", "input": 2.0, "output": 4.0}


@pytest.fixture(scope="session")
def sdks(tmp_path_factory: pytest.TempPathFactory, providers: StandIn) -> Iterator[Daemon]:
    """A daemon with the agents `py` and `node`; their event's data says what to do. Of tests/e2e/conftest.py."""
    alias = {"hostnames": HOSTS, "address": providers.tls}
    self_hosted = {"matches": [{"provider": "openai_compatible", "hostnames": [SELF_HOSTED]}]}
    documents = [
        document(
            "EgressGateway", "default", hostAliases=[alias], upstreamTLS={"caFile": providers.ca_file},
            prices=[OWN_PRICE],
        ),
        document("EgressL4Route", "models", rules=[{"hostnames": HOSTS, "ports": [443]}]),
        document("AIProviderRoute", "self-hosted", rules=[self_hosted]),
        agent(
            "py", ["/agent/venv/bin/python", "-I", "-c", RUN_PYTHON], mounts={"/agent/venv": ROOT / ".venv"}, env=KEYS
        ),
        agent(
            "node", ["/usr/bin/node", "/agent/code/sdk_agent.mjs"], mounts={"/agent/code": ROOT / "tests/node"},
            env=KEYS,
        ),
    ]  # fmt: skip
    running = Daemon(tmp_path_factory.mktemp("sdks"), instance("sd"), documents)
    running.start()
    yield running
    spans = [json.loads(line) for line in running.clrk("traces", "--json").splitlines()]
    assert running.stop() == 0, running.log()
    assert sorted(set(violations(spans))) == []


async def run(daemon: Daemon, caller: aiohttp.ClientSession, name: str, data: str) -> tuple[Any, list[dict[str, Any]]]:
    """Run an agent, which prints JSON; return that, and the spans of its calls in their order."""
    text, invocation = await invoke(caller, daemon, name, data)
    spans = daemon.spans_when_complete(invocation)
    calls = [span for span in spans if span["kind"] == "SPAN_KIND_CLIENT"]
    return json.loads(text), sorted(calls, key=lambda span: int(span["start_time_unix_nano"]))


def attributes(span: dict[str, Any], *names: str) -> list[Any]:
    """Return the values of attributes, None for those that are not there."""
    return [span["attributes"].get(name) for name in names]


def lasted_s(span: dict[str, Any]) -> float:
    """Return how long a call took."""
    return (span["end_time_unix_nano"] - span["start_time_unix_nano"]) / 1e9


def tokens(span: dict[str, Any]) -> list[Any]:
    """Return the counts of input and output."""
    return attributes(span, "gen_ai.usage.input_tokens", "gen_ai.usage.output_tokens")
