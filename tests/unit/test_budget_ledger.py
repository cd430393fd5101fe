"""The ledger of budgets: atomic, exact, and not to be made to forget."""

import os
import signal
import sqlite3
import stat
import subprocess
import sys
import textwrap

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clrk.gateway import budget_ledger
from clrk.gateway.budget import MAX_COUNT, Account, Amount, Balance, Charge
from clrk.gateway.budget_ledger import BudgetLedger, LedgerError

DAY = Account("default/llm", "ab12", "agent:default/support", "2026-11-28")
RUN = Account("default/llm", "ab12", "agent:default/support", "run:0192")


@pytest.fixture
def ledger(tmp_path):
    made = BudgetLedger(tmp_path / "budgets.db")
    yield made
    made.close()


def _balance(ledger: BudgetLedger, account: Account) -> Balance:
    return ledger.balances([account]).get(account, Balance())


def test_a_reservation_becomes_what_was_used(ledger):
    assert ledger.reserve([Charge(DAY, 100)], Amount(60, 6)) is None
    assert _balance(ledger, DAY) == Balance(Amount(), Amount(60, 6))
    ledger.settle([DAY], Amount(60, 6), Amount(25, 2))
    assert _balance(ledger, DAY) == Balance(Amount(25, 2), Amount())


def test_what_does_not_fit_is_refused_and_reserves_nothing_anywhere(ledger):
    assert ledger.reserve([Charge(DAY, 1000), Charge(RUN, 10)], Amount(11)).account == RUN
    assert ledger.balances([DAY, RUN]) == {}
    assert ledger.reserve([Charge(DAY, 1000), Charge(RUN, 10)], Amount(10)) is None
    assert ledger.reserve([Charge(RUN, 100), Charge(DAY, 19)], Amount(10)).account == DAY
    assert _balance(ledger, RUN) == Balance(Amount(), Amount(10))


def test_a_gateway_that_only_watches_counts_what_is_over_the_limit(ledger):
    assert ledger.reserve([Charge(DAY, 10)], Amount(50), force=True).asked == 50
    assert _balance(ledger, DAY).reserved == Amount(50)


def test_what_was_used_beyond_the_reservation_counts(ledger):
    ledger.reserve([Charge(DAY, 100)], Amount(10))
    ledger.settle([DAY], Amount(10), Amount(400))
    assert _balance(ledger, DAY).used == Amount(400)
    assert ledger.reserve([Charge(DAY, 100)], Amount(1)).left == 0


def test_absurd_numbers_stop_at_what_a_column_holds(ledger):
    for _ in range(3):
        ledger.reserve([Charge(DAY)], Amount(MAX_COUNT, MAX_COUNT))
    ledger.settle([DAY], Amount(1, 1), Amount(MAX_COUNT, MAX_COUNT))
    ledger.settle([DAY], Amount(1, 1), Amount(MAX_COUNT, MAX_COUNT))
    assert _balance(ledger, DAY).used == Amount(MAX_COUNT, MAX_COUNT)
    assert ledger.reserve([Charge(DAY, MAX_COUNT)], Amount(1)) is not None


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60), st.booleans()), max_size=40), st.integers(0, 100))
def test_no_order_of_calls_passes_the_limit_when_usage_keeps_within_its_reservation(calls, limit):
    ledger, under_way = BudgetLedger(None), []
    for asked, used, ends in calls:
        if ledger.reserve([Charge(DAY, limit), Charge(RUN)], Amount(asked)) is None:
            under_way.append((asked, min(asked, used)))
        if ends and under_way:
            reserved, spent = under_way.pop(0)
            ledger.settle([DAY, RUN], Amount(reserved), Amount(spent))
        found = _balance(ledger, DAY)
        assert found.taken.tokens <= limit
        assert found.reserved.tokens == sum(asked for asked, _ in under_way)
    ledger.close()


def test_a_restart_forgets_nothing(tmp_path):
    first = BudgetLedger(tmp_path / "budgets.db")
    first.reserve([Charge(DAY, 100), Charge(RUN, 100)], Amount(40, 7))
    first.settle([DAY, RUN], Amount(40, 7), Amount(30, 5))
    first.close()
    second = BudgetLedger(tmp_path / "budgets.db")
    assert _balance(second, DAY) == _balance(second, RUN) == Balance(Amount(30, 5))
    assert second.reserve([Charge(DAY, 100)], Amount(71)).used == 30
    second.close()


def test_what_a_killed_gateway_had_reserved_counts_as_spent(tmp_path):
    """SIGKILL right after the reservation: no close, no checkpoint, nothing flushed by us."""
    path = tmp_path / "budgets.db"
    program = f"""
        import os, pathlib, signal
        from clrk.gateway.budget import Account, Amount, Charge
        from clrk.gateway.budget_ledger import BudgetLedger
        ledger = BudgetLedger(pathlib.Path({str(path)!r}))
        account = Account(*{(DAY.route, DAY.rule, DAY.key, DAY.window)!r})
        for number in range(50):
            assert ledger.reserve([Charge(account, 10**6)], Amount(100, 3)) is None
            if number % 2:
                ledger.settle([account], Amount(100, 3), Amount(10, 1))
        os.kill(os.getpid(), signal.SIGKILL)
    """
    ended = subprocess.run([sys.executable, "-P", "-c", textwrap.dedent(program)], check=False, timeout=50)
    assert ended.returncode == -signal.SIGKILL
    successor = BudgetLedger(path)
    assert _balance(successor, DAY) == Balance(Amount(25 * 100 + 25 * 10, 25 * 3 + 25 * 1))
    successor.close()


def test_an_error_in_between_does_not_count_live_reservations_as_lost(ledger, monkeypatch):
    ledger.reserve([Charge(DAY, 100)], Amount(40))
    monkeypatch.setattr(budget_ledger, "_SETTLE", "UPDATE no_such_table SET x = 1")
    with pytest.raises(LedgerError, match="settle"):
        ledger.settle([DAY], Amount(40), Amount(5))
    monkeypatch.undo()
    assert _balance(ledger, DAY) == Balance(Amount(), Amount(40))  # read over a fresh connection: still reserved
    ledger.settle([DAY], Amount(40), Amount(5))
    assert _balance(ledger, DAY) == Balance(Amount(5))


def test_a_second_writer_is_kept_out(tmp_path, monkeypatch):
    monkeypatch.setattr(budget_ledger, "_LOCK_WAIT_S", 0.05)
    first = BudgetLedger(tmp_path / "budgets.db")
    first.reserve([Charge(DAY, 100)], Amount(10))
    second = BudgetLedger(tmp_path / "budgets.db")
    with pytest.raises(LedgerError, match="locked"):
        second.reserve([Charge(DAY, 100)], Amount(10))
    first.close()
    assert second.reserve([Charge(DAY, 100)], Amount(10)) is None
    second.close()


def test_a_damaged_file_is_an_error_and_not_an_empty_ledger(tmp_path):
    path = tmp_path / "budgets.db"
    path.write_bytes(b"not a database at all, but long enough to be looked at " * 40)
    ledger = BudgetLedger(path)
    with pytest.raises(LedgerError, match="not a database"):
        ledger.reserve([Charge(DAY, 100)], Amount(10))
    assert path.read_bytes().startswith(b"not a database")


def test_a_file_of_another_version_is_left_alone(tmp_path):
    path = tmp_path / "budgets.db"
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(LedgerError, match="version 99"):
        BudgetLedger(path).reserve([Charge(DAY)], Amount(1))


def test_a_disk_that_takes_nothing_refuses(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(LedgerError, match="open"):
        BudgetLedger(blocked / "budgets.db").reserve([Charge(DAY)], Amount(1))


def test_nobody_else_reads_the_file(ledger):
    ledger.reserve([Charge(DAY, 100)], Amount(10))
    mode = stat.S_IMODE(os.stat(ledger.path).st_mode)
    assert mode == 0o600


def test_old_days_and_ended_runs_go_and_nothing_else_does(tmp_path, monkeypatch):
    monkeypatch.setattr(budget_ledger, "KEPT_RUNS", 5)
    ledger = BudgetLedger(tmp_path / "budgets.db", is_live=lambda window: window == "run:daemon")
    daemon, pending = Account("r", "a", "k", "run:daemon"), Account("r", "a", "k", "run:pending")
    ledger.reserve([Charge(daemon)], Amount(1))
    ledger.settle([daemon], Amount(1), Amount(1))
    ledger.reserve([Charge(pending)], Amount(9))
    days = [Account("r", "a", "k", f"2026-{month:02}-{day:02}") for month in (9, 10) for day in range(1, 29)]
    runs = [Account("r", "a", "k", f"run:{number}") for number in range(20)]
    for account in [*days, *runs]:
        ledger.reserve([Charge(account)], Amount(1))
        ledger.settle([account], Amount(1), Amount(1))
    ledger.purge()
    kept = set(ledger.balances([daemon, pending, *days, *runs]))
    assert kept == {daemon, pending, *days[-budget_ledger.KEPT_DAYS :], *runs[-5:]}
    ledger.close()


def test_a_clock_that_leapt_years_ahead_and_back_does_not_make_today_forgotten(ledger):
    ledger.reserve([Charge(DAY, 100)], Amount(80))
    ledger.settle([DAY], Amount(80), Amount(80))
    for year in range(2030, 2030 + 2 * budget_ledger.KEPT_DAYS):
        leapt = Account("default/llm", "ab12", "agent:default/support", f"{year}-01-01")
        ledger.reserve([Charge(leapt, 100)], Amount(1))
        ledger.settle([leapt], Amount(1), Amount(1))
    assert ledger.reserve([Charge(DAY, 100)], Amount(10)) is None  # today again, and used: 10 of 20
    ledger.settle([DAY], Amount(10), Amount(10))
    ledger.purge()
    assert _balance(ledger, DAY).used == Amount(90)


def test_what_is_shown_is_the_day_and_what_runs(tmp_path):
    ledger = BudgetLedger(tmp_path / "budgets.db", is_live=lambda window: window == "run:alive")
    alive, ended = Account("r", "a", "k", "run:alive"), Account("r", "a", "k", "run:ended")
    yesterday = Account("r", "a", "k", "2026-11-27")
    for account in (yesterday, DAY, alive, ended):
        ledger.reserve([Charge(account)], Amount(2), agent="default/support")
        ledger.settle([account], Amount(2), Amount(1))
    shown = ledger.entries("2026-11-28", 100)
    assert [entry.account for entry in shown] == [DAY, alive]
    assert shown[0].agent == "default/support"
    assert [entry.account for entry in ledger.entries("2026-11-27", 100)] == [yesterday, alive]
    ledger.close()


def test_a_run_that_goes_on_is_shown_however_many_came_after_it(tmp_path):
    ledger = BudgetLedger(tmp_path / "budgets.db", is_live=lambda window: window == "run:daemon")
    for window in ("run:daemon", *(f"run:{number}" for number in range(20))):
        account = Account("r", "a", "k", window)
        ledger.reserve([Charge(account)], Amount(1))
        ledger.settle([account], Amount(1), Amount(1))
    assert [entry.account.window for entry in ledger.entries("2026-11-28", 5)] == ["run:daemon"]
    ledger.close()


def test_whoever_is_told_of_an_error_has_nothing_reserved(ledger, monkeypatch):
    monkeypatch.setattr(budget_ledger, "_PURGE_EVERY", 1)
    monkeypatch.setattr(budget_ledger, "_PURGE_DAYS", "no sql")
    with pytest.raises(LedgerError):
        ledger.reserve([Charge(DAY, 100)], Amount(10))
    assert _balance(ledger, DAY).reserved == Amount()
