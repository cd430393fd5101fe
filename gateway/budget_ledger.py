"""The ledger of budgets: what was used and what is reserved, in a SQLite file that outlives every process.

Theory of operation: one gateway writes, in short synchronous transactions on the event loop (tests/bench/budget.py says
how short), so a decision and its record are one step that no other call can come between. A reservation is committed
before the request goes out: a gateway that is killed leaves it behind, and the next one counts it as spent, since
nobody can say any more what the call used. The file is locked for as long as it is open. It fails closed: without a
ledger nothing can be reserved, and a damaged one is not replaced by an empty one, which would have forgotten.

The page cache keeps what is committed when a process dies; a power cut may cost the last moments (synchronous=NORMAL).
"""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final

from clrk.core.errors import ClrkError
from clrk.gateway.budget import (
    MAX_COUNT,
    Account,
    Amount,
    Balance,
    Charge,
    Shortage,
    find_left,
    find_shortage,
    is_run,
)

_LOG: Final = logging.getLogger(__name__)
SCHEMA_VERSION: Final = 1
KEPT_DAYS: Final = 35  # days in the ledger, not days ago: a clock that leaps may forget one day's worth, never today
KEPT_RUNS: Final = 20_000
_PURGE_EVERY: Final = 2_000  # reservations
_LOCK_WAIT_S: Final = 2.0  # a predecessor that is still closing

_SCHEMA: Final = """
CREATE TABLE accounts (
    id INTEGER PRIMARY KEY,
    route TEXT NOT NULL,
    rule TEXT NOT NULL,
    key TEXT NOT NULL,
    window TEXT NOT NULL,
    used_tokens INTEGER NOT NULL DEFAULT 0,
    used_nano_usd INTEGER NOT NULL DEFAULT 0,
    reserved_tokens INTEGER NOT NULL DEFAULT 0,
    reserved_nano_usd INTEGER NOT NULL DEFAULT 0,
    agent TEXT NOT NULL DEFAULT '',
    UNIQUE (window, route, rule, key)
);
"""
_READ: Final = (
    "SELECT used_tokens, used_nano_usd, reserved_tokens, reserved_nano_usd FROM accounts "
    "WHERE window = ? AND route = ? AND rule = ? AND key = ?"
)
_RESERVE: Final = """
INSERT INTO accounts (window, route, rule, key, reserved_tokens, reserved_nano_usd, agent) VALUES (?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (window, route, rule, key) DO UPDATE SET
    reserved_tokens = min(reserved_tokens + excluded.reserved_tokens, ?),
    reserved_nano_usd = min(reserved_nano_usd + excluded.reserved_nano_usd, ?)
"""
_SETTLE: Final = """
UPDATE accounts SET
    reserved_tokens = max(0, reserved_tokens - ?), reserved_nano_usd = max(0, reserved_nano_usd - ?),
    used_tokens = min(used_tokens + ?, ?), used_nano_usd = min(used_nano_usd + ?, ?)
WHERE window = ? AND route = ? AND rule = ? AND key = ?
"""
_SPEND_LOST: Final = """
UPDATE accounts SET
    used_tokens = min(used_tokens + reserved_tokens, ?), used_nano_usd = min(used_nano_usd + reserved_nano_usd, ?),
    reserved_tokens = 0, reserved_nano_usd = 0
WHERE reserved_tokens OR reserved_nano_usd
"""
# Both count rows and labels, not time: a clock that leaps forward and back must not make room by forgetting today.
_PURGE_DAYS: Final = """
DELETE FROM accounts WHERE window NOT LIKE 'run:%' AND reserved_tokens = 0 AND reserved_nano_usd = 0 AND window NOT IN
    (SELECT DISTINCT window FROM accounts WHERE window NOT LIKE 'run:%' ORDER BY window DESC LIMIT ?) AND window != ?
"""
_OLD_RUNS: Final = """
SELECT id, window FROM accounts WHERE window LIKE 'run:%' AND reserved_tokens = 0 AND reserved_nano_usd = 0
ORDER BY id DESC LIMIT -1 OFFSET ?
"""


class LedgerError(ClrkError):
    """The ledger can not be read or written; nothing was reserved."""


@dataclass(frozen=True, slots=True)
class Entry:
    """An account as `clrk budgets` shows it. agent is who was charged first; "" for what several share."""

    account: Account
    balance: Balance
    agent: str


class BudgetLedger:
    """Used by one thread. Side effects: creates `path` (mode 0600) and SQLite's -wal beside it; path None: memory only.

    Shape: is_live says whether a run's window may still be charged, so that its row must stay.
    """

    def __init__(self, path: Path | None, is_live: Callable[[str], bool] = lambda _: False) -> None:
        self.path = path
        self.is_live = is_live
        self._connection: sqlite3.Connection | None = None
        self._reserved = 0
        self._today = ""  # the last day that was charged
        self._recovered = False  # what a predecessor left behind was counted

    def reserve(
        self, charges: Sequence[Charge], amount: Amount, *, agent: str = "", force: bool = False
    ) -> Shortage | None:
        """Reserve the amount in every account, or in none and return what was short.

        Shape: force reserves whatever is short (a gateway that only watches), and still returns the shortage.
        Raises: LedgerError; then nothing was reserved.
        """
        self._reserved += 1
        if self._reserved % _PURGE_EVERY == 0:
            self.purge()  # before, so that whoever is told of an error has nothing reserved
        connection = self._open()
        try:
            with connection:
                connection.execute("BEGIN IMMEDIATE")
                shortage = find_shortage(charges, self._read(connection, charges), amount)
                if shortage is None or force:
                    connection.executemany(
                        _RESERVE,
                        [
                            (*_row_key(charge.account), amount.tokens, amount.nano_usd, agent, MAX_COUNT, MAX_COUNT)
                            for charge in charges
                        ],
                    )
        except (sqlite3.Error, OSError) as exc:
            raise self._broken("reserve", exc) from exc
        self._today = next((one.account.window for one in charges if not is_run(one.account.window)), self._today)
        return shortage

    def settle(self, accounts: Iterable[Account], reserved: Amount, used: Amount) -> None:
        """Exchange a reservation for what was used. Raises: LedgerError; then the reservation stays."""
        connection = self._open()
        try:
            with connection:
                connection.execute("BEGIN IMMEDIATE")
                connection.executemany(
                    _SETTLE,
                    [
                        (
                            reserved.tokens, reserved.nano_usd, used.tokens, MAX_COUNT, used.nano_usd, MAX_COUNT,
                            *_row_key(account),
                        )
                        for account in accounts
                    ],
                )  # fmt: skip
        except (sqlite3.Error, OSError) as exc:
            raise self._broken("settle", exc) from exc

    def left(self, charges: Sequence[Charge]) -> tuple[int | None, int | None]:
        """Return how many tokens and nano-dollars every account still has; None: not limited. Raises: LedgerError."""
        return find_left(charges, self.balances([charge.account for charge in charges]))

    def balances(self, accounts: Iterable[Account]) -> dict[Account, Balance]:
        """Return what stands in some accounts. Raises: LedgerError."""
        connection = self._open()
        try:
            return self._read(connection, [Charge(account) for account in accounts])
        except sqlite3.Error as exc:
            raise self._broken("read", exc) from exc

    def entries(self, day: str, limit: int) -> list[Entry]:
        """Return the accounts of a UTC day, and of runs that may still be charged. Raises: LedgerError."""
        connection = self._open()
        sql = (
            "SELECT route, rule, key, window, used_tokens, used_nano_usd, reserved_tokens, reserved_nano_usd, agent "
            "FROM accounts WHERE {} ORDER BY id DESC"
        )
        try:
            days = connection.execute(sql.format("window = ?") + " LIMIT ?", (day, limit)).fetchall()
            runs = connection.execute(sql.format("window LIKE 'run:%'"))
            going = list(islice((row for row in runs if row[6] or row[7] or self.is_live(row[3])), limit))
        except sqlite3.Error as exc:
            raise self._broken("read", exc) from exc
        return [
            Entry(Account(*row[:4]), Balance(Amount(*row[4:6]), Amount(*row[6:8])), row[8]) for row in (*days, *going)
        ]

    def purge(self) -> None:
        """Forget old days and ended runs; never what may still be charged. Raises: LedgerError."""
        connection = self._open()
        try:
            with connection:
                connection.execute("BEGIN IMMEDIATE")
                connection.execute(_PURGE_DAYS, (KEPT_DAYS, self._today))
                old = connection.execute(_OLD_RUNS, (KEPT_RUNS,)).fetchall()
                gone = [(row_id,) for row_id, window in old if not self.is_live(window)]
                connection.executemany("DELETE FROM accounts WHERE id = ?", gone)
        except sqlite3.Error as exc:
            raise self._broken("purge", exc) from exc

    def close(self) -> None:
        """Let go of the file. Idempotent."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    # --- the file ---------------------------------------------------------------------------------------------------

    @staticmethod
    def _read(connection: sqlite3.Connection, charges: Iterable[Charge]) -> dict[Account, Balance]:
        found: dict[Account, Balance] = {}
        for charge in charges:
            row = connection.execute(_READ, _row_key(charge.account)).fetchone()
            if row is not None:
                found[charge.account] = Balance(Amount(row[0], row[1]), Amount(row[2], row[3]))
        return found

    def _open(self) -> sqlite3.Connection:
        if self._connection is not None:
            return self._connection
        try:
            if self.path is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                os.close(os.open(self.path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
            connection = sqlite3.connect(self.path or ":memory:", isolation_level=None, timeout=_LOCK_WAIT_S)
        except (sqlite3.Error, OSError) as exc:
            raise self._broken("open", exc) from exc
        try:
            _prepare(connection)
            if not self._recovered:  # later, they would be our own
                _spend_lost(connection)
        except sqlite3.Error as exc:
            connection.close()
            raise self._broken("open", exc) from exc
        self._connection, self._recovered = connection, True
        return connection

    def _broken(self, what: str, exc: Exception) -> LedgerError:
        """Close, so that the next call tries again with a fresh connection, and an open transaction is undone."""
        if self.path is not None:
            self.close()
        elif self._connection is not None and self._connection.in_transaction:
            self._connection.rollback()  # closing it would forget everything
        _LOG.error("budget ledger %s: %s: %s; calls with a budget are refused meanwhile", self.path, what, exc)
        return LedgerError(f"{what} the budget ledger {self.path}: {exc}")


def _row_key(account: Account) -> tuple[str, str, str, str]:
    return account.window, account.route, account.rule, account.key


def _prepare(connection: sqlite3.Connection) -> None:
    """Lock the file and make its table. Raises: sqlite3.Error."""
    connection.execute("PRAGMA locking_mode = EXCLUSIVE")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")
    with connection:
        connection.execute("BEGIN IMMEDIATE")
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version == 0:
            for statement in _SCHEMA.strip().rstrip(";").split(";"):
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        elif version != SCHEMA_VERSION:
            raise sqlite3.DatabaseError(f"schema version {version}, this clrk reads {SCHEMA_VERSION}")
        connection.execute("DROP INDEX IF EXISTS accounts_reserved")  # of files by older ones: a quarter of each call


def _spend_lost(connection: sqlite3.Connection) -> None:
    """Count as spent what a predecessor had reserved: nobody can say any more what it used."""
    lost = connection.execute(_SPEND_LOST, (MAX_COUNT, MAX_COUNT)).rowcount
    if lost:
        _LOG.warning("budget ledger: reservations in %d accounts outlived their gateway: they count as spent", lost)
