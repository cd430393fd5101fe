"""Rates learned from the bundled prices: the same total, to the last digit, as the library works out by itself."""

from __future__ import annotations

import random
from decimal import Decimal

import pytest
from cost import assert_cheap
from genai_prices import Usage
from genai_prices.data import providers
from genai_prices.types import ModelPrice, Tier, TieredPrices

from clrk.gateway.llm import rates
from clrk.gateway.llm.rates import total_usd

PRICES = [
    (f"{provider.id}/{model.id}/{number}", price)
    for provider in providers
    for model in provider.models
    for number, price in enumerate(
        [model.prices] if isinstance(model.prices, ModelPrice) else [one.prices for one in model.prices]
    )
]
EDGES = [1, 2, 11, 127_999, 128_000, 128_001, 200_000, 200_001, 272_001, 1_000_000]


def library(price: ModelPrice, counts: dict[str, int]) -> Decimal | type[Exception]:
    try:
        return price.calc_price(Usage(**counts))["total_price"]
    except (ArithmeticError, LookupError, ValueError) as exc:
        return type(exc)


def ours(price: ModelPrice, counts: dict[str, int]) -> Decimal | type[Exception]:
    try:
        return total_usd(price, counts)
    except (ArithmeticError, LookupError, ValueError) as exc:
        return type(exc)


def some_counts(chance: random.Random) -> dict[str, int]:
    """Return a usage: mostly one that adds up, at times one that does not, or has what is not learned."""
    whole, made = chance.choice(EDGES), chance.choice(EDGES)
    counts = {"input_tokens": whole, "output_tokens": made}
    if chance.random() < 0.5:
        counts["cache_read_tokens"] = chance.randint(0, whole)
    if chance.random() < 0.4:
        counts["cache_write_tokens"] = chance.randint(0, whole - counts.get("cache_read_tokens", 0))
        counts["cache_write_1h_tokens"] = chance.randint(0, counts["cache_write_tokens"])
    if chance.random() < 0.4:
        counts["output_reasoning_tokens"] = chance.randint(0, made)
    if chance.random() < 0.1:
        counts[chance.choice(["input_audio_tokens", "output_audio_tokens", "web_searches"])] = chance.randint(1, 50)
    if chance.random() < 0.1:
        counts[chance.choice(list(counts))] = chance.choice(EDGES)
    if chance.random() < 0.1:
        del counts[chance.choice(list(counts))]
    return {kind: count for kind, count in counts.items() if count}


def test_every_bundled_price_comes_to_what_the_library_says() -> None:
    chance = random.Random(4)
    for name, price in PRICES:
        for counts in [{}, {"input_tokens": 1}, {"output_tokens": 1}, *(some_counts(chance) for _ in range(3))]:
            assert ours(price, counts) == library(price, counts), (name, counts)


def test_a_band_that_is_too_narrow_is_the_librarys() -> None:
    tiers = [Tier(start=5, price=Decimal(3)), Tier(start=1000, price=Decimal(7))]
    price = ModelPrice(input_mtok=TieredPrices(base=Decimal(2), tiers=tiers), output_mtok=Decimal(1))
    for count in (1, 5, 6, 14, 15, 1000, 1001, 5000):
        counts = {"input_tokens": count, "output_tokens": 3}
        assert total_usd(price, counts) == library(price, counts)


def test_what_is_learned_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "_MAX_LEARNED", 10)
    for _, price in PRICES[:40]:
        ours(price, {"input_tokens": 20, "output_tokens": 3})
        assert len(rates._LEARNED) <= 10


def test_a_total_costs_a_small_part_of_the_librarys() -> None:
    price = next(price for name, price in PRICES if name.startswith("anthropic/claude-haiku-4-5/"))
    counts = {"input_tokens": 5000, "output_tokens": 300, "cache_read_tokens": 4000}

    def often(total: object) -> None:
        for _ in range(500):
            total(price, counts)  # type: ignore[operator]

    assert_cheap(lambda: often(total_usd), lambda: often(library), at_most=0.25)
