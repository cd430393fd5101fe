"""The egress tests run on both event loops: uvloop is what main.py uses, asyncio's shows what depends on it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import uvloop


def pytest_asyncio_loop_factories(item):
    """Run every async test of this folder twice."""
    if Path(__file__).parent not in item.path.parents:
        return None
    return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
