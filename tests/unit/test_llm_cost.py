"""Prices: bundled, offline, and never guessed."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from genai_prices.data import providers

from clrk.core.egress_resources import ModelPrice
from clrk.gateway.llm.completion import NO_USAGE, Provider, Usage
from clrk.gateway.llm.cost import BUNDLED, PriceList
from clrk.gateway.recognise import APIS, BY_OPERATOR, PROVIDERS

USAGE = Usage(input_tokens=1_000_000, output_tokens=100_000)
AT = datetime(2026, 11, 1, tzinfo=UTC)


def cost_usd(price_id: str | None, models: tuple[str | None, ...], usage: Usage, at: datetime | None) -> float | None:
    return BUNDLED.cost_usd(Provider("x", "openai", price_id), models, usage, at)


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
    priced = {provider.price_id for provider in (*PROVIDERS.values(), *BY_OPERATOR.values())} - {None}
    assert priced <= known
    assert all(api.elsewhere is None or api.elsewhere.price_id is None for api in APIS)


def test_who_is_asked_for_usage() -> None:
    azure = [".openai.azure.com", ".cognitiveservices.azure.com", ".services.ai.azure.com"]
    google = ["generativelanguage.googleapis.com", "aiplatform.googleapis.com"]
    assert [host for host, found in PROVIDERS.items() if found.asks_usage] == ["api.openai.com", *azure, *google]
    asked = [name for name, found in BY_OPERATOR.items() if found.asks_usage]
    assert asked == ["openai", "azure_openai", "openai_compatible", "google_genai", "aws_bedrock"]
    assert not any(api.elsewhere.asks_usage for api in APIS if api.elsewhere is not None)


def test_what_the_list_does_not_know_is_not_taken_for_free() -> None:
    """The library skips what a model has no price for; and tiers, fast mode and regions have prices of their own."""
    claude = Provider("anthropic", "anthropic", "anthropic")
    searched = Usage(1_000_000, 0, web_searches=100)
    assert BUNDLED.cost_usd(claude, ("claude-haiku-4-5",), searched, AT) == pytest.approx(1 + 1)
    assert cost_usd("deepseek", ("deepseek-chat",), Usage(1_000, 1, web_searches=1), AT) is None
    assert BUNDLED.cost_usd(claude, ("claude-haiku-4-5",), USAGE, AT, off_list=True) is None
    assert PriceList(OWN).cost_usd(Provider("x", "x"), ("house-1",), USAGE, AT, off_list=True) == pytest.approx(12)


@pytest.mark.parametrize(
    ("price_id", "model", "usage", "usd"),
    [
        # gpt-5: $1.25 in, $0.125 cached, $10 out, reasoning among it.
        ("openai", "gpt-5", Usage(1_000_000, 200_000, cache_read=400_000, reasoning=150_000), 0.75 + 0.05 + 2.0),
        # claude-sonnet-4-5: over 200,000 tokens of input all of it is at the higher tier.
        ("anthropic", "claude-sonnet-4-5", Usage(200_000, 10_000), 0.6 + 0.15),
        ("anthropic", "claude-sonnet-4-5", Usage(300_000, 10_000, cache_read=100_000), 1.2 + 0.06 + 0.225),
        ("anthropic", "claude-haiku-4-5", Usage(100_000, 0, cache_creation=60_000, cache_creation_1h=20_000), 0.13),
        ("openai", "text-embedding-3-small", Usage(1_000_000, generates=False), 0.02),
        # sonar: $1 in, $1 out, and $12 for a thousand requests.
        ("perplexity", "sonar", Usage(1_000, 1_000), 0.002 + 0.012),
    ],
)
def test_prices_computed_by_hand(price_id: str, model: str, usage: Usage, usd: float) -> None:
    assert cost_usd(price_id, (model,), usage, AT) == pytest.approx(usd)


def test_prices_by_the_hour() -> None:
    """deepseek-chat costs half outside 00:30 to 16:30 UTC."""
    day, night = datetime(2026, 11, 1, 12, tzinfo=UTC), datetime(2026, 11, 1, 20, tzinfo=UTC)
    by_day = cost_usd("deepseek", ("deepseek-chat",), Usage(1_000_000, 0), day)
    assert by_day == pytest.approx(0.27)
    assert cost_usd("deepseek", ("deepseek-chat",), Usage(1_000_000, 0), night) == pytest.approx(0.135)


OWN = [
    ModelPrice(provider="openai", model="gpt-4o*", input=1, output=2, cacheRead=0.5),
    ModelPrice(model="house-*", input=10, output=20, cacheWrite=30),
    ModelPrice(model="*", provider="vllm", input=0, output=0),
]


@pytest.mark.parametrize(
    ("provider", "models", "usage", "usd"),
    [
        ("openai", ("gpt-4o-2024-08-06",), Usage(1_000_000, 100_000, cache_read=200_000), 0.8 + 0.1 + 0.2),
        ("openai", ("GPT-4O",), Usage(1_000_000, 0), 1.0),
        ("openai", ("unheard-of", "gpt-4o"), Usage(1_000_000, 0), 1.0),
        ("openai", ("my-gpt-4o",), Usage(1_000_000, 0), None),
        ("azure.ai.openai", ("gpt-4o",), Usage(1_000_000, 0), 2.5),
        ("anyone", ("house-7b",), Usage(1_000_000, 1_000_000, cache_creation=100_000), 9 + 3 + 20),
        ("anyone", ("house-7b",), Usage(10, 1, cache_read=11), None),
        ("anyone", ("house-7b",), Usage(10), None),
        ("vllm", ("qwen",), Usage(10, 1), 0.0),
        ("vllm", (None,), Usage(10, 1), None),
    ],
)
def test_the_operators_prices_go_first(
    provider: str, models: tuple[str | None, ...], usage: Usage, usd: float | None
) -> None:
    price_id = "azure" if provider.startswith("azure") else "openai" if provider == "openai" else None
    found = PriceList(OWN).cost_usd(Provider(provider, "openai", price_id), models, usage, AT)
    assert found == (pytest.approx(usd) if usd is not None else None)


def test_a_search_has_no_price_of_the_operators() -> None:
    prices = PriceList([ModelPrice(model="*", input=1, output=1)])
    who = Provider("openai", "openai", "openai")
    assert prices.cost_usd(who, ("gpt-4o",), USAGE, AT) is not None
    assert prices.cost_usd(who, ("gpt-4o",), replace(USAGE, web_searches=1), AT) is None


def test_pricing_opens_no_socket_and_starts_no_thread() -> None:
    """In a process of its own, where any use of the network is an error."""
    code = """
import socket, threading
def refuse(*args, **kwargs):
    raise SystemExit("a socket was opened")
socket.socket.__init__ = refuse
socket.getaddrinfo = refuse
from clrk.gateway.llm.completion import Provider, Usage
from clrk.gateway.llm.cost import BUNDLED
openai = Provider("openai", "openai", "openai")
assert BUNDLED.cost_usd(openai, ("gpt-4o",), Usage(input_tokens=10, output_tokens=1)) > 0
assert threading.active_count() == 1, threading.enumerate()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
