"""What budgets have spent, over the admin API and for the page."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import date
from typing import Any

from aiohttp import web

from clrk.gateway.admin.parameters import ParameterError

ReadBudgets = Callable[[str | None], dict[str, Any]]


def no_budgets(day: str | None) -> dict[str, Any]:
    """Return the report of a gateway that has none."""
    return {"day": day or "", "items": []}


def parse_day(query: Mapping[str, str]) -> str | None:
    """Return the UTC day that is asked for, None: today. Raises: ParameterError."""
    for name in query:
        if name != "day":
            raise ParameterError(f"{name[:40]!r} is no parameter; there is day")
    text = query.get("day") or None
    if text is not None and not _is_day(text):
        raise ParameterError(f"day: write a UTC day such as 2026-11-28, not {text[:40]!r}")
    return text


def _is_day(text: str) -> bool:
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


class BudgetsView:
    """`GET /v1/budgets`: `{"day": …, "items": […]}` (llm/budget_report.py)."""

    def __init__(self, read: ReadBudgets) -> None:
        self._read = read

    async def __call__(self, request: web.Request) -> web.Response:
        """Answer. Raises: ParameterError, LedgerError."""
        return web.json_response(self._read(parse_day(request.query)))
