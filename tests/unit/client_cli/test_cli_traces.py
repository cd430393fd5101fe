"""`clrk traces` and `clrk trace`: what is drawn, what is printed in a pipe, and names that are hostile."""

import json
import re
import time
from dataclasses import replace

import pytest
import yaml
from clrk_command import HOSTILE, on_terminal
from span_samples import identity, invocation_record, record, record_invocation

from clrk.gateway.cli.facts import show_cost
from clrk.gateway.outcome import Phase
from clrk.gateway.telemetry import attributes as attr


async def test_traces_of_an_agent_and_of_one_invocation(daemon):
    who = identity()
    record_invocation(daemon.telemetry, who)
    record_invocation(daemon.telemetry, identity("orders", "team-b"))
    listed = await daemon.clrk("agents", "traces", "support", "--json", "--denied")
    assert [json.loads(line)["attributes"]["invocation.id"] for line in listed.out.splitlines()] == [who.invocation_id]
    tree = (await daemon.clrk("agents", "traces", f"support/{who.invocation_id}")).out
    assert tree == (await daemon.clrk("trace", who.invocation_id)).out


async def test_the_five_steps_of_the_debugging_session(daemon):
    who = identity(trace_id="4bf92f3577b34da6a3ce929d0e0e4736")
    record_invocation(daemon.telemetry, who, remote_parent="00f067aa0ba902b7")
    record_invocation(daemon.telemetry, identity("orders", "team-b"))

    table = (await daemon.clrk("traces", "--agent", "support", "--since", "15m")).out
    assert table.count(who.invocation_id) == 5
    assert re.search(
        r"support\s+chat claude-sonnet-5\s+320\s+85\s+\$0\.0022\s+200\s+900ms\s+" + who.invocation_id, table
    )
    assert re.search(r"egress\.dial\.denied\s+DELETE tools\.internal/orders/1042\s+denied", table)
    assert "hidden" not in table, "query strings may hold secrets"

    only_denied = (await daemon.clrk("traces", "--agent", "default/support", "--denied", "--json")).out
    (denied,) = [json.loads(line) for line in only_denied.splitlines()]
    invocation = denied["attributes"]["invocation.id"]
    assert invocation == who.invocation_id

    tree = (await daemon.clrk("trace", invocation)).out
    assert re.search(r"trigger\s+http, POST /agents/support", tree)
    assert re.search(r"caller\s+203\.0\.113\.7:40000, its span 00f067aa0ba902b7", tree)
    assert re.search(r"usage\s+1 LLM call, 320 tokens in, 85 out, \$0\.0022, 1 denied", tree)
    assert re.search(r"trace\s+4bf92f3577b34da6a3ce929d0e0e4736", tree)
    assert {name: depth for depth, name in drawn(tree)} == {
        "ingress.dispatch": 0,
        "invoke_agent support": 1,
        "chat claude-sonnet-5": 2,
        "tools/call refund_policy": 2,
        "egress.dial.denied": 2,
    }
    assert "DENIED no_rule: no rule allows it" in tree
    assert "python3[4711]" in tree
    assert "320 in, 85 out" in tree

    as_json = (await daemon.clrk("trace", invocation[:20], "--json")).out
    assert len([json.loads(line) for line in as_json.splitlines()]) == 5


async def test_filters_reach_the_daemon(daemon):
    record_invocation(daemon.telemetry, identity())
    for arguments, expected in (
        (["--model", "claude-*"], 1),
        (["--model", "gpt"], 0),
        (["--system", "anthropic", "--min-input-tokens", "320"], 1),
        (["--min-input-tokens", "321"], 0),
        (["--errors"], 1),
        (["--until", "1h"], 0),
        (["--limit", "2"], 2),
        ([], 5),
    ):
        done = await daemon.clrk("traces", "--json", *arguments)
        assert (done.code, len(done.out.splitlines())) == (0, expected), arguments
    bad = await daemon.clrk("traces", "--since", "yesterday")
    assert bad.code == 2
    assert "15m" in bad.err


async def test_nothing_found_is_said_on_stderr_only(daemon):
    for arguments in (["traces"], ["traces", "--json"], ["agents", "logs", "support"]):
        done = await daemon.clrk(*arguments)
        assert (done.code, done.out) == (0, "")
    missing = await daemon.clrk("trace", "ffffffff")
    assert (missing.code, missing.out) == (1, "")
    assert "no invocation ffffffff" in missing.err


async def test_a_table_says_when_it_is_cut(daemon):
    who = identity()
    for index in range(250):
        record(daemon.telemetry, who, f"s{index}")
    done = await daemon.clrk("traces")
    assert "s249" in done.out
    assert not re.search(r"\bs49\b", done.out)
    assert "newest 200" in done.err
    assert len((await daemon.clrk("traces", "--json")).out.splitlines()) == 250


async def test_names_and_values_of_an_agent_do_not_reach_the_terminal(daemon):
    who = identity()
    start = time.time_ns()
    record(
        daemon.telemetry, who, f"chat {HOSTILE}", start_ns=start, error=HOSTILE, error__type=HOSTILE,
        gen_ai__request__model=HOSTILE, process__pid=1, process__executable__name=HOSTILE,
    )  # fmt: skip
    record(
        daemon.telemetry, who, "ingress.dispatch", start_ns=start, parent="", clrk__trigger=HOSTILE,
        user_agent__original=HOSTILE, client__address=HOSTILE, url__path=HOSTILE, http__request__method="GET",
    )  # fmt: skip
    record(daemon.telemetry, who, "x", http__request__method=HOSTILE, url__full="http://[broken" + HOSTILE)
    daemon.telemetry.record_log(who, "stdout", HOSTILE.encode(), start)
    for arguments in (
        ["traces", "--limit", "50"],
        ["traces", "-o", "yaml"],
        ["traces", "--json"],
        ["trace", who.invocation_id],
        ["trace", who.invocation_id, "-o", "yaml"],
    ):
        done = await daemon.clrk(*arguments)
        assert done.code == 0, done.err
        assert len(done.out.splitlines()) < 6 or arguments[0] == "trace" or "yaml" in arguments
        assert not set(done.out) & {"\x1b", "\x07", "\r", "\x7f", "\x9b", "\u202e"}, arguments
        if "--json" in arguments:
            assert any(
                HOSTILE in str(json.loads(line)) or HOSTILE in json.loads(line)["name"]
                for line in done.out.splitlines()
            )
        if arguments[-1] == who.invocation_id:
            assert "[bold red]x[/]" in done.out, "markup is text"
            assert "\\x1b[2J" in done.out
            assert "\nfake" not in done.out
    out = await on_terminal(daemon.path, "agents", "logs", "support", "-o", "json")
    assert not set(out.decode()) & {"\x1b", "\x07", "\x9b", "\u202e"}
    out = await on_terminal(daemon.path, "agents", "logs", "support")
    assert b"\\x1b[2J" in out
    assert b"\x1b]0" not in out
    assert b"\nfake" not in out


def drawn(output):
    """Return depth and name of every line of the tree, which stands below an empty line."""
    tree = output.split("\n\n", 1)[1].splitlines()
    plain = [re.sub(r"^[│├└─\s]+", "", line) for line in tree]
    return [((len(line) - len(rest)) // 4, rest.split("  ")[0]) for line, rest in zip(tree, plain, strict=True)]


async def test_broken_parents_and_cycles_are_drawn_once(daemon):
    who = identity()
    record(daemon.telemetry, who, "a", span_id="a" * 16, parent="b" * 16)
    record(daemon.telemetry, who, "b", span_id="b" * 16, parent="a" * 16)
    record(daemon.telemetry, who, "self", span_id="c" * 16, parent="c" * 16)
    record(daemon.telemetry, who, "orphan", parent="d" * 16)
    parent = "e" * 16
    for index in range(1500):
        record(daemon.telemetry, who, f"deep{index}", span_id=f"{index + 1:016x}", parent=parent)
        parent = f"{index + 1:016x}"
    done = await daemon.clrk("trace", who.invocation_id)
    assert done.code == 0, done.err
    assert sorted(name for _, name in drawn(done.out)) == sorted(
        ["a", "b", "self", "orphan", *(f"deep{index}" for index in range(1500))]
    )


async def test_colour_on_a_terminal_only_and_never_with_no_color(daemon):
    record_invocation(daemon.telemetry, identity())
    assert b"\x1b[" in await on_terminal(daemon.path, "traces")
    # NO_COLOR (no-color.org) forbids colours; bold and dim are none.
    plain = await on_terminal(daemon.path, "traces", NO_COLOR="1")
    assert not re.search(rb"\x1b\[[0-9;]*3[0-9]", plain)
    assert "\x1b" not in (await daemon.clrk("traces")).out


async def test_the_reason_of_an_end_is_shown(daemon):
    """A refused request leaves one span, which may not say why; the record does."""
    who = identity()
    record(daemon.telemetry, who, "ingress.dispatch", http__response__status_code=400)
    daemon.telemetry.record_invocation(
        invocation_record(who, phase=Phase.REJECTED, exit_code=None, message=f"ce-type: must not be empty{HOSTILE}")
    )
    for command in (["trace", who.invocation_id], ["agents", "invocations", "support"]):
        shown = (await daemon.clrk(*command)).out
        assert "Rejected" in shown
        assert "ce-type: must not be empty" in shown
        assert "\x1b" not in shown


async def test_a_daemons_call_is_of_no_invocation(daemon):
    record(daemon.telemetry, replace(identity(), agent_kind="DaemonAgent", invocation_id=""))
    (_, row) = (await daemon.clrk("traces")).out.splitlines()
    assert "None" not in row


async def test_the_rule_to_add_stands_beside_what_was_denied_or_would_be(daemon):
    who = identity()
    rule = '- hostnames: ["api.test"]\n  ports: [443]\n  http: {methods: ["GET"], paths: ["/v1"]}\n'
    call = {"http__request__method": "GET", "url__full": "https://api.test/v1", "server__address": "api.test"}
    record(
        daemon.telemetry, who, attr.SPAN_EGRESS_DIAL_DENIED, error="GET api.test:443 is not allowed (no_rule)",
        clrk__egress__deny_reason="no_rule", clrk__egress__add_rule=rule, **call,
    )  # fmt: skip
    record(
        daemon.telemetry, who, "GET api.test", http__response__status_code=200,
        clrk__egress__would_deny="port_not_allowed", clrk__egress__add_rule=rule, **call,
    )  # fmt: skip
    record(
        daemon.telemetry, who, attr.SPAN_EGRESS_DIAL_DENIED, error="no way", clrk__egress__deny_reason="no_rule",
        clrk__egress__add_rule="# no rule can allow this path\n",
    )  # fmt: skip
    drawn_tree = (await daemon.clrk("trace", who.invocation_id)).out
    pasted = '- {hostnames: ["api.test"], ports: [443], http: {methods: ["GET"], paths: ["/v1"]}}'
    assert yaml.safe_load(pasted) == yaml.safe_load(rule)
    assert f"DENIED GET api.test:443 is not allowed (no_rule)  {pasted}" in drawn_tree
    assert f"200  WOULD DENY port_not_allowed  {pasted}" in drawn_tree
    assert "# no rule" not in drawn_tree
    assert "200, would deny" in (await daemon.clrk("traces")).out
    for command in (("traces",), ("agents", "traces", "support")):
        (would,) = (await daemon.clrk(*command, "--would-deny", "--json")).out.splitlines()
        assert json.loads(would)["attributes"]["clrk.egress.would_deny"] == "port_not_allowed"
        denied = (await daemon.clrk(*command, "--denied", "--json")).out
        assert "would_deny" not in denied
        assert len(denied.splitlines()) == 2


async def test_a_model_call_that_was_denied_is_no_call_of_a_model(daemon):
    who = identity()
    record_invocation(daemon.telemetry, who)
    record(
        daemon.telemetry, who, "chat claude-opus-4-5", error="over", gen_ai__request__model="claude-opus-4-5",
        clrk__budget__denied=True,
    )  # fmt: skip
    assert "1 LLM call, 320 tokens in, 85 out, $0.0022, 2 denied" in (await daemon.clrk("trace", who.invocation_id)).out


@pytest.mark.parametrize(
    ("usd", "shown"),
    [(None, ""), (0.0, "$0.0000"), (0.001, "$0.0010"), (7e-5, "$0.000070"), (3e-9, "$0.0000000030")],
)  # fmt: skip
def test_small_costs_have_digits_and_no_exponents(usd, shown):
    assert show_cost(usd) == shown
