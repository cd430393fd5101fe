"""What the page shows: every value escaped and visible, every fact in its place, however large the store is."""

import time

import pytest
from page_client import page_of
from page_samples import HOSTILE, PAYLOADS, fill, invocation_record, page_config, record_many, record_run
from span_samples import MS, identity, record

from clrk.core.messages import Counters
from clrk.core.printable import printable
from clrk.gateway.admin.page.details import ALONE, IN_WATERFALL, details_of
from clrk.gateway.admin.page.rendering import path, render, show_ago, show_bytes, show_moment
from clrk.gateway.health import DaemonHealth
from clrk.gateway.outcome import Phase
from clrk.gateway.telemetry.pipeline import Telemetry
from clrk.gateway.telemetry.spans import Component


@pytest.fixture
async def telemetry(tmp_path):
    opened = Telemetry.open(tmp_path, page_config())
    yield opened
    await opened.close()


@pytest.fixture
async def page(telemetry):
    async with page_of(telemetry) as served:
        yield served


def shown(payload):
    """Return how a payload reads where one line is shown."""
    return printable(payload)


# --- hostile content ---


async def test_every_view_is_harmless_with_hostile_content(page, telemetry):
    made = fill(telemetry)
    hostile = made["hostile"].invocation_id
    for address in ("/", "/?errors=true", f"/invocations/{hostile}", "/agents", "/agents/default/watcher", "/health",
                    "/budgets",
                    "/agents/default/support/logs", f"/traces/{made['hostile'].context.trace_id}",
                    f"/traces/{made['daemon'].context.trace_id}"):  # fmt: skip
        (await page.html(address)).assert_harmless()


async def test_every_payload_is_seen_as_text_wherever_it_can_stand(page, telemetry):
    who = fill(telemetry)["hostile"]
    seen = await page.html(f"/invocations/{who.invocation_id}")
    names = [data for tag, data in seen.texts if tag == "b"]
    for payload in PAYLOADS[:-1]:
        assert shown(payload)[:200].strip() in names  # span names
        keys = [data for tag, data in seen.texts if tag == "th"]
        assert shown(payload).strip() in keys  # attribute keys, header names
        cells = [data for tag, data in seen.texts if tag == "td"]
        assert cells.count(shown(payload).strip()) >= 8  # attributes, headers, logs
        bodies = [data for tag, data in seen.texts if tag == "pre"]
        assert any(printable(payload, keep="\n\t").strip() in body for body in bodies)
    facts = [data for tag, data in seen.texts if tag == "dd"]
    assert facts.count(shown(HOSTILE[:256]).strip()) >= 3  # trigger, caller, identity
    assert shown(HOSTILE)[:1000] in "\n".join(data for tag, data in seen.texts if tag == "p")  # the message
    assert "invalid \ufffd\ufffd utf-8" in seen.text
    listing = await page.html("/")
    assert shown(HOSTILE[:80]).strip() in [data for tag, data in listing.texts if tag == "td"]


async def test_the_query_and_the_address_are_hostile_too(page):
    for payload in PAYLOADS:
        quoted = path(payload)[1:]
        for address in (
            f"/?agent={quoted}", f"/?model={quoted}&system={quoted}", f"/?since={quoted}", f"/?before={quoted}",
            f"/?trigger={quoted}&phase={quoted}", f"/?{quoted}=1", f"/find?id={quoted}", f"/invocations/{quoted}",
            f"/agents/{quoted}/{quoted}", f"/agents/{quoted}/{quoted}/logs", f"/traces/{quoted}",
            f"/invocations/{quoted}/spans/{quoted}", f"/{quoted}",
        ):  # fmt: skip
            if len(address) > 8000:
                continue
            response = await page.get(address)
            assert response.status in (200, 400, 404), address
            text = await response.text()
            assert "<script>window" not in text
            assert "<img" not in text
            assert "<svg onload" not in text


async def test_a_field_keeps_what_was_typed(page):
    seen = await page.html("/?model=%22%3E%3Cb%3E&since=yesterday", 400)
    seen.assert_harmless()
    assert ("value", '"><b>') in seen.attributes
    assert "15m" in seen.text


def test_templates_escape_without_being_asked():
    for payload in PAYLOADS:
        html = render("problem.html", view="", title=payload, says=payload, choices=[payload])
        assert "<script>window" not in html
        assert "<img" not in html
        assert not set(html) & set("\x00\x1b\x9b\u202e\u2066\u200b\u2028")
        assert 'href="/invocations/' in html
        assert "1337" not in html


# --- the list ---


async def test_the_list_is_paged_without_losing_or_repeating_any(page, telemetry):
    now = time.time_ns()
    ids = []
    for number in range(130):
        who = identity()
        ids.append(who.invocation_id)
        created = now - number // 4 * MS  # four share each time
        telemetry.record_invocation(invocation_record(who, created_ns=created))
    found, address = [], "/"
    while address:
        seen = await page.html(address)
        found += [
            value.removeprefix("i-") for name, value in seen.attributes if name == "id" and value.startswith("i-")
        ]
        assert len(found) <= 130
        address = next((link for link in seen.links if "before=" in link), None)
    assert sorted(found) == sorted(ids)
    assert len(set(found)) == 130


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("agent=orders", {"orders"}),
        ("agent=team-b/orders", {"orders"}),
        ("agent=default/orders", set()),
        ("phase=Failed", {"flaky"}),
        ("trigger=cron", {"nightly"}),
        ("denied=true", {"denied"}),
        ("errors=true", {"denied", "erring", "flaky"}),
        ("model=claude-*", {"claude"}),
        ("system=openai", {"gpt"}),
        ("min_input_tokens=1000", {"gpt"}),
        ("min_input_tokens=5", {"gpt", "claude"}),
        ("since=2h&until=1h", {"early"}),
        ("until=3h", set()),
        ("agent=&since=&denied=", {"orders", "flaky", "nightly", "denied", "erring", "claude", "gpt", "early"}),
        ("phase=Succeeded&system=openai&agent=gpt&since=1h", {"gpt"}),
    ],
)
async def test_filters(page, telemetry, query, expected):
    now = time.time_ns()
    for name in ("orders", "flaky", "nightly", "denied", "erring", "claude", "gpt", "early"):
        who = identity(name, "team-b" if name == "orders" else "default")
        created = now - (5_400_000 if name == "early" else 1_000) * MS
        phase = Phase.FAILED if name == "flaky" else Phase.SUCCEEDED
        trigger = "cron" if name == "nightly" else "http"
        telemetry.record_invocation(invocation_record(who, created_ns=created, phase=phase, trigger=trigger))
        error = "failed" if name == "flaky" else ""
        record_run(telemetry, who, created, phase=phase.value, error=error)
        if name == "denied":
            record(
                telemetry, who, "egress.dial.denied", error="no", clrk__egress__deny_reason="no_rule", start_ns=created
            )
        if name == "erring":
            record(telemetry, who, error="500", start_ns=created)
        if name in ("claude", "gpt"):
            model, system, tokens = {"claude": ("claude-x", "anthropic", 10), "gpt": ("gpt-5", "openai", 2000)}[name]
            record(
                telemetry, who, f"chat {model}", start_ns=created, gen_ai__request__model=model,
                gen_ai__system=system, gen_ai__usage__input_tokens=tokens,
            )  # fmt: skip
    seen = await page.html(f"/?{query}")
    links = {link.rpartition("/")[2] for link in seen.links if link.startswith("/agents/") and link.count("/") == 3}
    assert links == expected


@pytest.mark.parametrize(
    ("query", "says"),
    [("since=yesterday", "15m"), ("agent=A%20b", "NAMESPACE/NAME"), ("phase=Done", "Succeeded"), ("limit=5", "limit"),
     ("min_input_tokens=-1", "number"), ("agnet=x", "agent"), ("before=1", "link"), ("denied=yes", "true or false"),
     ("before=" + "9" * 19 + "-01a2041e-8f1b-7215-bede-e5329b18fce0", "")],
)  # fmt: skip
async def test_a_mistake_is_named_beside_the_form(page, query, says):
    seen = await page.html(f"/?{query}", 400 if says else 200)
    if says:
        assert says in seen.text
        assert ("role", "alert") in seen.attributes


async def test_a_browser_that_has_seen_this_state_gets_304(page, telemetry):
    who = identity()
    telemetry.record_invocation(invocation_record(who, created_ns=time.time_ns()))
    for address in ("/", f"/invocations/{who.invocation_id}"):
        response = await page.get(address)
        tag = response.headers["ETag"]
        assert (await page.get(address, If_None_Match=tag)).status == 304
        record(telemetry, who)
        await telemetry.flush()
        again = await page.get(address, If_None_Match=tag)
        assert (again.status, again.headers["ETag"] != tag) == (200, True)
    tag = (await page.get("/?since=15m")).headers["ETag"]
    assert (await page.get("/?since=15m", If_None_Match=tag)).status == 200  # the window has moved


# --- one invocation ---


async def test_the_facts_of_an_invocation(page, telemetry):
    who = fill(telemetry)["plain"]
    seen = await page.html(f"/invocations/{who.invocation_id}")
    seen.assert_harmless()
    text = " ".join(data for _, data in seen.texts)
    for part in ("Succeeded", who.invocation_id, who.context.trace_id, "203.0.113.7:40112", "code 0", "HTTP 200",
                 "2,474 in, 300 out", "$0.0090", "1 denied", "1 failed", "acme", "jane@acme.example", "[redacted]",
                 "Where is order 1042?", "data: {\"type\":\"message_stop\"}", "gen_ai.first_chunk", "+220ms",
                 "step 39: looked at order 1039", "stderr", "/agents/support"):  # fmt: skip
        assert part in text, part
    order = [data for tag, data in seen.texts if tag == "b"]
    assert order == [
        "ingress.dispatch", "invoke_agent support", "sandbox.acquire", "sandbox.spawn", "answer_ticket",
        "chat claude-sonnet-5", "tools/call lookup_order", "GET tools.internal", "chat gpt-5-mini",
        "egress.dial.denied", "sandbox.teardown",
    ]  # fmt: skip


async def test_ten_thousand_spans_are_paged_in_the_order_of_the_tree(page, telemetry):
    who = record_many(telemetry, 10_000)
    await telemetry.flush()
    names, address = [], f"/invocations/{who.invocation_id}"
    for _ in range(3):
        seen = await page.html(address)
        names += [data for tag, data in seen.texts if tag == "b"]
        address = next(link for link in seen.links if link.endswith(f"offset={len(names)}"))
        assert f"{10_005 - len(names):,} more" in seen.text
    steps = [int(name.removeprefix("step ")) for name in names if name.startswith("step")]
    assert len(steps) == len(set(steps)) == 600 - 4
    assert (await page.get(f"/invocations/{who.invocation_id}?offset=999999999")).status == 200
    assert (await page.get(f"/invocations/{who.invocation_id}?offset=-1")).status == 200


async def test_a_span_on_a_page_of_its_own_is_whole(page, telemetry):
    who = identity()
    telemetry.record_invocation(invocation_record(who, created_ns=time.time_ns()))
    record(telemetry, who, span_id="1234567890abcdef", long="x" * 3000, component=Component.AGENT)
    seen = await page.html(f"/invocations/{who.invocation_id}")
    assert "x" * 400 in seen.text
    assert "x" * 401 not in seen.text
    assert "2,600 more characters" in seen.text
    alone = await page.html(f"/invocations/{who.invocation_id}/spans/1234567890abcdef")
    alone.assert_harmless()
    assert "x" * 3000 in alone.text
    assert "clrk.component" in alone.text
    assert (await page.get(f"/traces/{who.context.trace_id}/spans/1234567890abcdef")).status == 200
    for wrong in ("1234567890abcdee", "x", "1234567890ABCDEF"):
        assert (await page.get(f"/invocations/{who.invocation_id}/spans/{wrong}")).status == 404


async def test_an_invocation_without_a_span_or_without_a_record(page, telemetry):
    pending = identity()
    telemetry.record_invocation(invocation_record(pending, phase=Phase.PENDING, created_ns=time.time_ns()))
    seen = await page.html(f"/invocations/{pending.invocation_id}")
    assert "No spans yet" in seen.text
    assert ("data-live", "2000") in seen.attributes
    assert (await page.get(f"/invocations/{identity().invocation_id}")).status == 404


async def test_an_id_is_found_by_its_beginning(page, telemetry):
    first = "01a2041e-8f1b-7215-bede-e5329b18fce0"
    for invocation in (first, "01a2041e-8f1b-7999-bede-e5329b18fce0"):
        telemetry.record_invocation(invocation_record(identity(invocation_id=invocation), created_ns=time.time_ns()))
    response = await page.get("/find?id=%2001A2041E-8f1b-72%20")
    assert (response.status, response.headers["Location"]) == (303, f"/invocations/{first}")
    several = await page.html("/find?id=01a2041e", 300)
    assert first in several.text
    await page.html("/find?id=ffff", 404)
    await page.html("/find?id=xyz", 400)


# --- agents, health ---


async def test_agents_and_their_states(page):
    seen = await page.html("/agents")
    text = " ".join(data for _, data in seen.texts)
    for part in (
        "watcher",
        "DaemonAgent",
        "BackOff",
        "3 restarts",
        "exited with code 1",
        "nightly-report",
        "in 59 min",
    ):
        assert part in text, part
    assert "/?agent=team-b%2Forders" in seen.links
    assert "/agents/team-b/orders/logs" in seen.links


async def test_an_agents_environment_is_not_shown(page):
    seen = await page.html("/agents/default/support")
    assert '"KEY"' in seen.text
    assert "s3cret" not in seen.text


async def test_a_daemons_calls_lead_to_their_traces(page, telemetry):
    who = fill(telemetry)["daemon"]
    seen = await page.html("/agents/default/watcher")
    assert f"/traces/{who.context.trace_id}" in seen.links
    assert "GET tools.internal" in (await page.html(f"/traces/{who.context.trace_id}")).text
    assert "watching the queue" in (await page.html("/agents/default/watcher/logs")).text


async def test_health(page, telemetry):
    fill(telemetry)
    seen = await page.html("/health")
    text = " ".join(data for _, data in seen.texts)
    for part in ("agents.yaml:14", "refused", "1,204", "failing", "503 Service Unavailable", "stamp_pushed", "18,233",
                 "running", "default/support", "traces.db", "readable", "spans"):  # fmt: skip
        assert part in text, part


async def test_health_without_anything_to_tell(telemetry):
    class Quiet:
        async def health(self):
            return DaemonHealth(ready=False, started_ns=0, counters=Counters({}))

    async with page_of(telemetry, health=Quiet()) as page:
        seen = await page.html("/health")
        assert "draining" in seen.text
        assert "No problems" in seen.text
        assert "None is configured" in seen.text


async def test_a_store_that_can_not_be_read_is_said(page, telemetry):
    await telemetry.close()
    telemetry.store.path.unlink()
    for address in (
        "/",
        "/agents/default/watcher",
        "/agents/default/support/logs",
        f"/invocations/{identity().invocation_id}",
    ):
        seen = await page.html(address, 503)
        assert "traces.db" in seen.text
    assert "unreadable" in (await page.html("/health")).text
    assert (await page.get("/agents")).status == 200


# --- words ---


def test_times_and_sizes():
    assert show_moment(1_795_317_240_123_456_789) == "2026-11-22 03:14:00.123"
    assert show_moment(0) == "1970-01-01 00:00:00.000"
    assert show_moment(2**63 - 1) == "2262-04-11 23:47:16.854"
    assert show_moment(10**30).endswith("ns")
    assert [show_ago(0, seconds * 10**9) for seconds in (0, 59, 60, 7200, 90_000, -5)] == [
        "0 s ago", "59 s ago", "1 min ago", "2 h ago", "1 d ago", "in 5 s",
    ]  # fmt: skip
    assert [show_bytes(size) for size in (0, 1023, 1536, 5 * 2**30, 2**50)] == [
        "0 B", "1023 B", "1.5 KiB", "5 GiB", "1.02e+03 TiB",
    ]  # fmt: skip


def test_what_is_shown_of_a_span_is_bounded():
    attributes = {f"key{number}": "v" * 1000 for number in range(500)}
    events = [{"name": "e", "time_unix_nano": 1, "attributes": attributes}] * 500
    span = {"attributes": attributes, "events": events, "start_time_unix_nano": 5}
    it = details_of(span, IN_WATERFALL)
    assert (len(it.attributes), it.attributes_left, len(it.events), it.events_left) == (64, 436, 64, 436)
    assert it.events[0].offset == "-0µs"
    assert {(len(value.text), value.left) for _, value in it.attributes} == {(400, 600)}
    assert details_of(span, ALONE).attributes_left == 0
