"""What a call cost, from the prices bundled with genai-prices. No network: we never start its updater.

An unknown provider or model has no cost: absent, never guessed.
"""

from __future__ import annotations

from datetime import UTC, datetime
from functools import lru_cache

from genai_prices import Usage as PricedUsage
from genai_prices.data import providers
from genai_prices.types import ModelInfo
from genai_prices.types import Provider as PriceProvider

from clrk.gateway.llm.completion import Usage


@lru_cache(maxsize=1024)  # bounded, unlike the library's own lookup caches: agents choose the model names
def _find(price_id: str, model: str) -> tuple[PriceProvider, ModelInfo] | None:
    for provider in providers:
        if provider.id == price_id:
            info = provider.find_model(model, all_providers=providers)
            return (provider, info) if info is not None else None
    return None


def cost_usd(
    price_id: str | None, models: tuple[str | None, ...], usage: Usage, at: datetime | None = None
) -> float | None:
    """Return the price in USD of one call, None when any part of it is unknown.

    Shape: models in order of trust, normally the response's and then the request's; at defaults to now.
    """
    if price_id is None or not usage.is_whole:
        return None
    found = next((hit for model in models if model and (hit := _find(price_id, model)) is not None), None)
    if found is None:
        return None
    provider, info = found
    try:
        price = info.calc_price(_priced(usage), provider, genai_request_timestamp=at or datetime.now(tz=UTC))
        return float(price.total_price)
    except (ArithmeticError, LookupError, ValueError):
        return None  # counts that contradict each other, such as more cached than all tokens


def _priced(usage: Usage) -> PricedUsage:
    reported = {
        "input_tokens": usage.input_tokens,
        "output_tokens": usage.output_tokens,
        "cache_read_tokens": usage.cache_read,
        "cache_write_tokens": usage.cache_creation,
        "cache_write_1h_tokens": usage.cache_creation_1h,
        "input_audio_tokens": usage.input_audio,
        "output_audio_tokens": usage.output_audio,
    }
    return PricedUsage(**{key: value for key, value in reported.items() if value})
