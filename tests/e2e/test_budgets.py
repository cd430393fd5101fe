"""Budgets with the real daemon, real sandboxes and the official SDKs; nothing that is spent is forgotten."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest
from instances import DEADLINE_S, instance
from span_contract import violations
from stack import ROOT, RUN_PYTHON, Daemon, StandIn, agent, document, egress, invoke, stand_in

pytestmark = [pytest.mark.kernel, pytest.mark.e2e]

REFUSED = """
import anthropic, openai
hi = [{"role": "user", "content": "hi"}]
def show(error):
    headers = error.response.headers
    print(json.dumps([type(error).__name__, error.status_code, error.message, headers.get("retry-after"),
                      headers.get("x-should-retry")]))
try:
    anthropic.Anthropic().messages.create(model="claude-none", max_tokens=100, messages=hi)
except anthropic.RateLimitError as error:
    show(error)
try:
    openai.OpenAI().chat.completions.create(model="none", max_tokens=100, messages=hi)
except openai.RateLimitError as error:
    show(error)
try:
    openai.OpenAI().images.generate(model="dall-e-3", prompt="a cat")
except openai.PermissionDeniedError as error:
    show(error)
"""
CUT = """
import openai
seen, asked = 0, [{"role": "user", "content": "[long]"}]
try:
    for chunk in openai.OpenAI().chat.completions.create(model="cut", stream=True, messages=asked):
        seen += len(chunk.choices[0].delta.content or "") if chunk.choices else 0
except openai.APIError as error:
    print(json.dumps([type(error).__name__, error.message, seen]))
"""
# All but the last byte of each request goes out one connection after the other: on a busy host a hundred handshakes at
# once do not end in time, neither the gateway's nor the client's. The last bytes come at once.
CROWD = """
import concurrent.futures, http.client, ssl
context = ssl.create_default_context()
body = json.dumps({"model": "crowd", "max_tokens": 300, "messages": [{"role": "user", "content": "hi"}]}).encode()
headers = {"Content-Type": "application/json", "Authorization": "Bearer placeholder", "Content-Length": len(body)}
def begun():
    line = http.client.HTTPSConnection("api.openai.com", context=context, timeout=240)
    line.putrequest("POST", "/v1/chat/completions")
    for name, value in headers.items():
        line.putheader(name, value)
    line.endheaders(body[:-1])
    return line
def call(line):
    line.send(body[-1:])
    answer = line.getresponse()
    answer.read()
    return answer.status
lines = [begun() for _ in range(100)]
with concurrent.futures.ThreadPoolExecutor(100) as pool:
    print(json.dumps(list(pool.map(call, lines))))
"""
ONE = """
import openai
hi = [{"role": "user", "content": "hi"}]
answer = openai.OpenAI(max_retries=0).chat.completions.create(model="day", max_tokens=50, messages=hi)
print(answer.usage.total_tokens)
"""
HANGING = """
import openai, time
stream = openai.OpenAI(max_retries=0).chat.completions.create(
    model="day", max_tokens=16000, stream=True, messages=[{"role": "user", "content": "[long]"}])
next(iter(stream))
time.sleep(3600)
"""


def rule(models: str, **budget: object) -> dict[str, object]:
    return {"matches": [{"models": [models]}], "filters": [{"type": "TokenBudget", "tokenBudget": budget}]}


def make_daemon(folder: Path, providers: StandIn, tag: str = "bu") -> Daemon:
    keys = {"ANTHROPIC_API_KEY": "placeholder", "OPENAI_API_KEY": "placeholder"}
    rules = [
        rule("*none", maxTokensPerDay=20),
        rule("cut", maxTokensPerExecution=2_000),
        rule("crowd", maxTokensPerDay=4_000, key="route"),
        rule("day", maxTokensPerDay=100_000),
    ]
    documents = [
        *egress(providers),
        document("AIProviderRoute", "llm", rules=rules),
        agent(
            "sdk",
            ["/agent/venv/bin/python", "-I", "-c", RUN_PYTHON],
            mounts={"/agent/venv": ROOT / ".venv"},
            env=keys,
            timeout="280s",
        ),
    ]
    return Daemon(folder, instance(tag), documents)


@pytest.fixture(scope="module")
def spending(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    folder = tmp_path_factory.mktemp("budgets")
    with stand_in(folder / "standin") as providers:
        running = make_daemon(folder, providers)
        running.start()
        yield running
        assert running.stop() == 0, running.log()


def account(daemon: Daemon, key: str = "agent:default/sdk", rule_number: int = 3) -> dict[str, int]:
    """The day's tokens of one rule."""
    items = json.loads(daemon.clrk("budgets", "-o", "json"))
    found = [one for one in items if (one["rule"], one["key"], one["execution"]) == (rule_number, key, None)]
    return found[0]["tokens"] if found else {"used": 0, "reserved": 0}


async def test_the_sdks_raise_what_they_raise_for_a_provider_that_refuses(
    spending: Daemon, caller: aiohttp.ClientSession
) -> None:
    text, invocation = await invoke(caller, spending, "sdk", REFUSED)
    claude, gpt, image = [json.loads(line) for line in text.splitlines()[:3]]
    for name, status, message, retry_after, should_retry in (claude, gpt):
        assert (name, status, should_retry) == ("RateLimitError", 429, "false")
        assert "maxTokensPerDay is 20, 0 used, 20 left" in message
        assert 0 < int(retry_after) <= 86_400
    assert image[:2] == ["PermissionDeniedError", 403]
    assert "can not be metered" in image[2]
    spans = spending.spans_when_complete(invocation)
    assert list(violations(spans)) == []
    denied = [span for span in spans if span["attributes"].get("clrk.budget.denied")]
    # Each was tried once: the SDKs were told that there is no use in trying again.
    assert [span["name"] for span in denied] == ["chat claude-none", "chat none", "POST api.openai.com"]
    assert denied[0]["attributes"]["clrk.budget.route"] == "default/llm"
    assert (denied[0]["attributes"]["clrk.budget.daily_used"], denied[0]["attributes"]["clrk.budget.daily_max"]) == (
        0,
        20,
    )
    listed = [json.loads(line) for line in spending.clrk("traces", "--denied", "--json").splitlines()]
    assert {span["span_id"] for span in denied} <= {span["span_id"] for span in listed}
    records = [json.loads(line) for line in spending.clrk("agents", "invocations", "sdk", "-o", "json").splitlines()]
    (record,) = [one for one in records if one["invocation"] == invocation]
    assert (record["denials"], record["llmCalls"], record["inputTokens"]) == (3, 0, 0)
    async with caller.get(f"http://127.0.0.1:{spending.admin_port}/metrics") as metrics:
        lines = [line for line in (await metrics.text()).splitlines() if line.startswith("clrk_egress_denied")]
    assert sum(float(line.rpartition(" ")[2]) for line in lines if "budget_exceeded" in line) == 2
    assert sum(float(line.rpartition(" ")[2]) for line in lines if "budget_unmetered" in line) == 1


async def test_a_stream_that_overruns_is_cut_and_the_sdk_raises(
    spending: Daemon, caller: aiohttp.ClientSession
) -> None:
    text, invocation = await invoke(caller, spending, "sdk", CUT)
    name, message, seen = json.loads(text)
    assert name == "APIError"
    assert "maxTokensPerExecution is reached in the midst of this answer" in message
    assert 4_000 < seen < 40_000  # of 60,000 characters; what comes at once is judged at once
    (call,) = [span for span in spending.spans_when_complete(invocation) if span["name"] == "chat cut"]
    assert call["attributes"]["error.type"] == "budget_exceeded"
    assert "clrk.budget.denied" not in call["attributes"]


async def test_a_hundred_calls_at_once_do_not_pass_the_limit(spending: Daemon, caller: aiohttp.ClientSession) -> None:
    await within_one_day()
    text, invocation = await invoke(caller, spending, "sdk", CROWD)
    statuses = json.loads(text)
    assert len(statuses) == 100
    assert 200 in statuses
    assert set(statuses) <= {200, 429}
    spans = [span["attributes"] for span in spending.spans_when_complete(invocation) if span["name"] == "chat crowd"]
    assert len(spans) == 100
    used = sum(
        found["gen_ai.usage.input_tokens"] + found["gen_ai.usage.output_tokens"]
        for found in spans
        if "gen_ai.usage.input_tokens" in found
    )
    counted = account(spending, "route", 2)
    assert (counted["used"], counted["reserved"]) == (used, 0)
    assert used <= counted["limit"] == 4_000
    assert sum(found.get("clrk.budget.denied", False) for found in spans) == statuses.count(429)


async def test_kill_9_of_gateway_and_runtime_forgets_nothing(tmp_path: Path, caller: aiohttp.ClientSession) -> None:
    await within_one_day()
    with stand_in(tmp_path / "standin") as providers:
        daemon = make_daemon(tmp_path, providers, "bk")
        daemon.start()
        try:
            text, _ = await invoke(caller, daemon, "sdk", ONE)
            used = account(daemon)["used"]
            assert used == int(text)
            hanging = asyncio.ensure_future(invoke(caller, daemon, "sdk", HANGING))
            await until(lambda: account(daemon)["reserved"] > 16_000, daemon)
            reserved = account(daemon)["reserved"]
            before = daemon.gateway_pid()
            assert daemon.kill_gateway()
            with pytest.raises(aiohttp.ClientError):
                await hanging
            await until(lambda: daemon.gateway_pid() not in (None, before) and is_up(daemon), daemon)
            found = account(daemon)
            assert (found["used"], found["reserved"]) == (used + reserved, 0)  # what was under way counts as spent
            daemon.kill()
            daemon.start()
            assert account(daemon)["used"] == used + reserved
            more, _ = await invoke(caller, daemon, "sdk", ONE)
            assert account(daemon)["used"] == used + reserved + int(more)
        finally:
            daemon.stop()


async def within_one_day() -> None:
    """Return when midnight (UTC) is some time away: a day's budget begins again then."""
    left_s = 86_400 - time.time() % 86_400
    if left_s < 2 * DEADLINE_S:
        await asyncio.sleep(left_s)


def is_up(daemon: Daemon) -> bool:
    try:
        daemon.clrk("status")
    except AssertionError:
        return False
    return True


async def until(holds, daemon: Daemon) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not holds():
        assert time.monotonic() < deadline, daemon.log()
        await asyncio.sleep(0.2)
