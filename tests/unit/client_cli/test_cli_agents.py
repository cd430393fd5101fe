"""`clrk agents list`, `get` and `invocations`: every form, every filter, and callers that are hostile."""

import json
import re
import time
from dataclasses import replace

import pytest
import yaml
from clrk_command import HOSTILE
from span_samples import identity, invocation_record, record, record_invocation

from clrk.gateway.outcome import Phase
from clrk.gateway.telemetry.daily_cost import DAY_NS

# --- agents ---------------------------------------------------------------------------------------------------------


async def test_agents_list_and_get_in_every_form(daemon):
    table = await daemon.clrk("agents", "list")
    assert table.code == 0
    assert re.search(r"default +support +TaskAgent +[0-9a-f]{12} +100s +0 running\n", table.out)
    assert "\x1b" not in table.out
    assert max(map(len, table.out.splitlines())) <= 80
    listed = json.loads((await daemon.clrk("agents", "list", "-o", "json")).out)
    assert [item["name"] for item in listed] == ["support", "watcher", "orders"]
    assert yaml.safe_load((await daemon.clrk("agents", "list", "-o", "yaml")).out) == listed
    one = json.loads((await daemon.clrk("agents", "get", "team-b/orders", "-o", "json")).out)
    assert one["spec"]["template"]["spec"]["command"] == ["/bin/agent"]
    facts = (await daemon.clrk("agents", "get", "support")).out
    assert re.search(r"command +\[\"/bin/agent\"\]\n", facts)
    assert re.search(r"maxConcurrent +unlimited\n", facts)
    assert re.search(r"timeout +100s\n", facts)


async def test_agents_list_says_how_they_stand(daemon):
    daemon.running.counts["default", "support"] = 3
    assert re.search(r"support .* 100s +3 running\n", (await daemon.clrk("agents", "list")).out)
    assert json.loads((await daemon.clrk("agents", "get", "support", "-o", "json")).out)["running"] == 3


async def test_agents_get_says_what_was_spent(daemon):
    noon_ns = time.time_ns() // DAY_NS * DAY_NS + DAY_NS // 2
    record_invocation(daemon.telemetry, identity(), start_ns=noon_ns)
    unpriced = {"gen_ai__system": "openai", "gen_ai__usage__input_tokens": 7, "clrk__cost__unknown": True}
    record(daemon.telemetry, identity(), "chat house-7b", start_ns=noon_ns, **unpriced)
    facts = (await daemon.clrk("agents", "get", "support")).out
    today = time.strftime("%Y-%m-%d", time.gmtime(noon_ns // 10**9))
    assert re.search(rf"{today} +2 +327 +85 +\$0\.002\d+ +1 calls\n", facts), facts
    (day,) = json.loads((await daemon.clrk("agents", "get", "support", "-o", "json")).out)["spending"]
    assert (day["day"], day["llmCalls"], day["unpricedCalls"]) == (today, 2, 1)
    assert "UNKNOWN" not in (await daemon.clrk("agents", "get", "watcher")).out


# --- invocations ----------------------------------------------------------------------------------------------------


async def test_invocations_in_every_form_the_newest_last(daemon):
    first, second = identity(), identity()
    daemon.telemetry.record_invocation(invocation_record(first, created_ns=time.time_ns() - 7_200 * 10**9))
    failed = invocation_record(second, phase=Phase.FAILED, exit_code=3, message="it exited with code 3", trigger="cron")
    daemon.telemetry.record_invocation(failed)
    record_invocation(daemon.telemetry, second)
    done = await daemon.clrk("agents", "invocations", "support")
    head, *lines = done.out.splitlines()
    assert head.split() == "TIME INVOCATION TRIGGER CALLER PHASE DURATION CALLS IN OUT COST DENIED WHY".split()
    assert re.search(
        rf"{second.invocation_id[:13]} +cron +203.0.113.7:40000 +Failed \(3\) +1.5 ?s +2 +320 +85 +", lines[1]
    )
    assert first.invocation_id[:13] in lines[0]
    printed = (await daemon.clrk("agents", "invocations", "default/support", "-o", "json")).out.splitlines()
    assert [json.loads(line)["invocation"] for line in printed] == [first.invocation_id, second.invocation_id]
    item = json.loads(printed[1])
    assert (item["phase"], item["exitCode"], item["inputTokens"], item["denials"]) == ("Failed", 3, 320, 1)
    assert item["costUsd"] == pytest.approx(0.0022)
    assert yaml.safe_load((await daemon.clrk("agents", "invocations", "support", "-o", "yaml")).out)[1] == item


async def test_who_asked_is_seen_where_one_looks(daemon):
    who = replace(identity(), caller_fields=(("user", "bob"), ("tenant", "acme")))
    daemon.telemetry.record_invocation(invocation_record(who, identity={"user": "bob", "tenant": "acme"}))
    record_invocation(daemon.telemetry, who)
    assert "tenant=acme, user=bob" in (await daemon.clrk("agents", "invocations", "support")).out
    assert re.search(r"^identity +tenant=acme, user=bob$", (await daemon.clrk("trace", who.invocation_id)).out, re.M)


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["--phase", "Failed"], 1),
        (["--phase", "Succeeded"], 1),
        (["--trigger", "cron"], 1),
        (["--denied"], 1),
        (["--model", "claude-*"], 1),
        (["--min-input-tokens", "321"], 0),
        (["--since", "1h"], 1),
        (["--until", "1h"], 1),
        (["--limit", "1"], 1),
        ([], 2),
    ],
)
async def test_filters_of_invocations(daemon, arguments, found):
    old, new = identity(), identity()
    daemon.telemetry.record_invocation(invocation_record(old, created_ns=time.time_ns() - 7_200 * 10**9))
    daemon.telemetry.record_invocation(invocation_record(new, phase=Phase.FAILED, trigger="cron"))
    record_invocation(daemon.telemetry, new)
    done = await daemon.clrk("agents", "invocations", "support", "-o", "json", *arguments)
    assert done.code == 0, done.err
    assert len(done.out.splitlines()) == found


@pytest.mark.parametrize("form", ["table", "json"])
async def test_where_no_invocation_is_found_it_says_why(daemon, form):
    filtered = await daemon.clrk("agents", "invocations", "support", "-o", form)
    assert (filtered.code, filtered.out) == (0, "")
    assert "no invocation of support fits" in filtered.err
    missing = await daemon.clrk("agents", "invocations", "suport", "-o", form)
    assert (missing.code, missing.out) == (1, "")
    assert "no agent" in missing.err
    poller = await daemon.clrk("agents", "invocations", "watcher", "-o", form)
    assert (poller.code, poller.out) == (0, "")
    assert "is a DaemonAgent" in poller.err
    assert "clrk agents logs watcher" in poller.err


async def test_all_invocations_are_fetched_page_by_page(daemon):
    start_ns = time.time_ns()
    for number in range(2100):
        daemon.telemetry.record_invocation(invocation_record(identity(), created_ns=start_ns + number // 2))
    done = await daemon.clrk("agents", "invocations", "support", "-o", "json")
    ids = [json.loads(line)["invocation"] for line in done.out.splitlines()]
    assert len(ids) == len(set(ids)) == 2100
    table = await daemon.clrk("agents", "invocations", "support")
    assert len(table.out.splitlines()) == 51
    assert "only the newest 50 are shown" in table.err


async def test_a_hostile_caller_does_not_speak_to_the_terminal(daemon):
    daemon.telemetry.record_invocation(invocation_record(identity(), caller=HOSTILE, trigger=HOSTILE))
    done = await daemon.clrk("agents", "invocations", "support")
    assert len(done.out.splitlines()) == 2
    assert "\x1b" not in done.out
    assert "\u202e" not in done.out


@pytest.mark.parametrize("name", ["nobody", "a/b/c", "/", "", "default/../support", HOSTILE])
async def test_an_agent_that_does_not_exist(daemon, name):
    done = await daemon.clrk("agents", "get", name)
    assert done.code != 0
    assert done.out == ""
    assert done.err.startswith("clrk: ")
    assert "Traceback" not in done.err
    assert "\x1b" not in done.err
