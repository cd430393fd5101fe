"""`clrk budgets` against the admin API on a real socket."""

from __future__ import annotations

import json

import pytest
import yaml
from aiohttp import web
from budget_runs import Office, ai_route, budget_rule, openai_call, usage
from clrk_command import HOSTILE, run

from clrk.gateway.admin.app import build_admin_app
from clrk.gateway.budget_ledger import LedgerError


@pytest.fixture
async def serve(tmp_path):
    runners = []

    async def start(budgets) -> str:
        path = str(tmp_path / "budgets.sock")
        app = build_admin_app(
            store=None, catalogue=None, run_task=None, health=None, states=None, budgets=budgets
        )  # nothing else is asked for
        runners.append(web.AppRunner(app))
        await runners[-1].setup()
        await web.UnixSite(runners[-1], path).start()
        return path

    yield start
    for runner in runners:
        await runner.cleanup()


def _spent(office: Office):
    openai_call(office, office.run("support", tenant=HOSTILE), max_tokens=10).finish(**usage(100, 20))
    openai_call(office, office.run("other"), max_tokens=10).finish(**usage(5, 5))
    return lambda day: office.budgets.report([office.gateway], office.routes, day)


async def test_a_table_a_document_and_one_agent(serve):
    path = await serve(_spent(Office(ai_route(budget_rule({"maxTokensPerDay": 1_000})))))
    table = (await run(path, "budgets")).out.splitlines()
    assert table[0].split() == ["ROUTE", "KEY", "PERIOD", "UNIT", "USED", "RESERVED", "LIMIT", "LEFT", "RESETS"]
    assert [line.split()[2:] for line in table[1:] if "tokens" in line] == [
        ["agent:default/other", "2026-11-28", "tokens", "10", "0", "1000", "990", "2026-11-29T00:00Z"],
        ["agent:default/support", "2026-11-28", "tokens", "120", "0", "1000", "880", "2026-11-29T00:00Z"],
    ]
    items = json.loads((await run(path, "budgets", "-o", "json", "--agent", "support")).out)
    assert [item["tokens"]["left"] for item in items] == [880]
    assert yaml.safe_load((await run(path, "budgets", "-o", "yaml", "--agent", "default/other")).out)[0]["rule"] == 0
    assert json.loads((await run(path, "budgets", "-o", "json", "--day", "2026-11-27")).out)[0]["tokens"]["used"] == 0


async def test_an_agent_without_an_account_is_told_apart_from_no_budgets(serve):
    path = await serve(_spent(Office(ai_route(budget_rule({"maxTokensPerDay": 1_000})))))
    done = await run(path, "budgets", "--agent", "nobody")
    assert (done.code, done.out) == (0, "")
    assert "no account of default/nobody's own so far" in done.err
    path = await serve(lambda _: {"items": []})
    assert "no budgets; declare an AIProviderRoute" in (await run(path, "budgets", "--agent", "nobody")).err


async def test_what_callers_write_does_not_speak_to_the_terminal(serve):
    path = await serve(_spent(Office(ai_route(budget_rule({"maxTokensPerDay": 1_000, "key": "identity.tenant"})))))
    done = await run(path, "budgets")
    assert "identity.tenant:" in done.out
    assert "\x1b]0" not in done.out
    assert "\r" not in done.out


async def test_what_can_not_be_answered_is_said(serve):
    def broken(day):
        raise LedgerError("read the budget ledger: disk I/O error")

    path = await serve(broken)
    done = await run(path, "budgets")
    assert (done.code, done.out) == (1, "")
    assert "disk I/O error" in done.err
    done = await run(path, "budgets", "--day", "today")
    assert (done.code, done.out) == (2, "")
    assert "--day: write a UTC day" in done.err
    assert (await run(path, "budgets", "--day", "2026-02-30")).code == 2
    assert "RESERVED is held by calls under way" in " ".join((await run(path, "budgets", "--help")).out.split())
