"""Prices: bundled, offline, and never guessed."""

from __future__ import annotations

import subprocess
import sys
from datetime import UTC, datetime

import pytest
from genai_prices.data import providers

from clrk.gateway.llm.anthropic import AnthropicMessages
from clrk.gateway.llm.completion import NO_USAGE, Usage
from clrk.gateway.llm.cost import cost_usd
from clrk.gateway.recognise import APIS

USAGE = Usage(input_tokens=1_000_000, output_tokens=100_000)
AT = datetime(2026, 11, 1, tzinfo=UTC)


def test_prices_of_known_models() -> None:
    assert cost_usd("openai", ("gpt-4o-2024-08-06",), USAGE, AT) == pytest.approx(2.5 + 1.0)
    assert cost_usd("anthropic", (None, "claude-3-5-haiku-latest"), USAGE, AT) == pytest.approx(0.8 + 0.4)
    # The first model that has a price counts; a served model nobody knows falls back on the requested one.
    assert cost_usd("openai", ("in-house", "gpt-4o"), USAGE, AT) == pytest.approx(3.5)


@pytest.mark.parametrize(
    ("price_id", "models", "usage"),
    [
        (None, ("gpt-4o",), USAGE),
        ("nobody", ("gpt-4o",), USAGE),
        ("openai", (), USAGE),
        ("openai", (None, ""), USAGE),
        ("openai", ("gpt-9-imaginary",), USAGE),
        ("anthropic", ("gpt-4o",), USAGE),
        ("openai", ("gpt-4o",), NO_USAGE),
        ("openai", ("gpt-4o",), Usage(input_tokens=5)),
        ("openai", ("gpt-4o",), Usage(output_tokens=5)),
        ("openai", ("gpt-4o",), Usage(input_tokens=5, output_tokens=1, cache_read=6)),
    ],
)
def test_no_price_is_guessed(price_id: str | None, models: tuple[str | None, ...], usage: Usage) -> None:
    assert cost_usd(price_id, models, usage, AT) is None


def test_every_provider_that_we_price_is_in_the_bundle() -> None:
    known = {provider.id for provider in providers}
    priced = {provider.price_id for api in APIS for provider in api.hosts.values()}
    assert priced <= known
    assert all(api.elsewhere.price_id is None for api in APIS)


def test_only_openai_withholds() -> None:
    assert not AnthropicMessages().usage_due
    assert [host for api in APIS for host, found in api.hosts.items() if found.asks_usage] == ["api.openai.com"]


def test_pricing_opens_no_socket_and_starts_no_thread() -> None:
    """In a process of its own, where any use of the network is an error."""
    code = """
import socket, threading
def refuse(*args, **kwargs):
    raise SystemExit("a socket was opened")
socket.socket.__init__ = refuse
socket.getaddrinfo = refuse
from clrk.gateway.llm.completion import Usage
from clrk.gateway.llm.cost import cost_usd
assert cost_usd("openai", ("gpt-4o",), Usage(input_tokens=10, output_tokens=1)) > 0
assert threading.active_count() == 1, threading.enumerate()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
