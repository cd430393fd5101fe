"""What a call cost: the operator's own prices, then those bundled with genai-prices. No network: no updater is started.

An unknown provider or model has no cost: absent, never guessed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Final

from genai_prices import Usage as PricedUsage
from genai_prices.data import providers
from genai_prices.types import ModelInfo
from genai_prices.types import Provider as PriceProvider

from clrk.core.egress_resources import ModelPrice
from clrk.gateway.llm.completion import Provider, Usage

_MILLION: Final = 1_000_000


@lru_cache(maxsize=1024)  # bounded, unlike the library's own lookup caches: agents choose the model names
def _find(price_id: str, model: str) -> tuple[PriceProvider, ModelInfo] | None:
    for provider in providers:
        if provider.id == price_id:
            info = provider.find_model(model, all_providers=providers)
            return (provider, info) if info is not None else None
    return None


@dataclass(frozen=True, slots=True)
class _OwnPrice:
    """One entry of EgressGateway.spec.prices."""

    provider: str
    model: re.Pattern[str]
    price: ModelPrice

    @classmethod
    def compile(cls, price: ModelPrice) -> _OwnPrice:
        text = ".*".join(re.escape(part) for part in price.model.lower().split("*"))
        return cls(price.provider, re.compile(text, re.DOTALL), price)

    def fits(self, provider: str, model: str) -> bool:
        return self.provider in ("", provider) and self.model.fullmatch(model.lower()) is not None


class PriceList:
    """The prices that hold for one gateway's calls."""

    def __init__(self, own: Sequence[ModelPrice] = ()) -> None:
        self._own = tuple(_OwnPrice.compile(price) for price in own)

    def cost_usd(
        self,
        provider: Provider,
        models: tuple[str | None, ...],
        usage: Usage,
        at: datetime | None = None,
        *,
        off_list: bool = False,
    ) -> float | None:
        """Return the price in USD of one call, None when any part of it is unknown.

        Shape: models in order of trust, normally the response's and then the request's; at defaults to now. The
        operator's price for any of them goes before bundled ones. off_list: the bundled ones do not hold.
        """
        if not usage.is_whole:
            return None
        for model in models:
            for own in self._own:
                if model and own.fits(provider.name, model):
                    return _own_cost(own.price, usage)
        return None if off_list else _bundled_cost(provider.price_id, models, usage, at)


BUNDLED: Final = PriceList()


def _own_cost(price: ModelPrice, usage: Usage) -> float | None:
    read, written = usage.cache_read or 0, usage.cache_creation or 0
    plain = (usage.input_tokens or 0) - read - written
    if plain < 0 or usage.web_searches or usage.storage_searches:
        return None  # counts that contradict each other; searches, whose price the operator can not give
    read_price = price.input if price.cache_read is None else price.cache_read
    write_price = price.input if price.cache_write is None else price.cache_write
    total = plain * price.input + read * read_price + written * write_price + (usage.output_tokens or 0) * price.output
    return total / _MILLION


def _bundled_cost(
    price_id: str | None, models: tuple[str | None, ...], usage: Usage, at: datetime | None
) -> float | None:
    if price_id is None:
        return None
    found = next((hit for model in models if model and (hit := _find(price_id, model)) is not None), None)
    if found is None:
        return None
    provider, info = found
    try:
        price = info.calc_price(_priced(usage), provider, genai_request_timestamp=at or datetime.now(tz=UTC))
        # The library takes what has no price for free.
        if any(used and getattr(price.model_price, key) is None for key, used in _extras(usage)):
            return None
        return float(price.total_price)
    except (ArithmeticError, LookupError, ValueError):
        return None  # counts that contradict each other, such as more cached than all tokens


def _extras(usage: Usage) -> tuple[tuple[str, int], ...]:
    return ("web_searches_kcount", usage.web_searches), ("storage_searches_kcount", usage.storage_searches)


def _priced(usage: Usage) -> PricedUsage:
    reported = {
        "input_tokens": usage.input_tokens,
        "output_tokens": usage.output_tokens,
        "cache_read_tokens": usage.cache_read,
        "cache_write_tokens": usage.cache_creation,
        "cache_write_1h_tokens": usage.cache_creation_1h,
        "input_audio_tokens": usage.input_audio,
        "output_audio_tokens": usage.output_audio,
        "input_image_tokens": usage.input_image,
        "output_image_tokens": usage.output_image,
        "input_video_tokens": usage.input_video,
        "output_video_tokens": usage.output_video,
        "output_reasoning_tokens": usage.reasoning,
        "web_searches": usage.web_searches,
        "storage_searches": usage.storage_searches,
    }
    known = {key: value for key, value in reported.items() if value}
    if usage.cache_audio is not None and {"cache_read_tokens", "input_audio_tokens"} <= known.keys():
        known["cache_audio_read_tokens"] = usage.cache_audio  # how far the two overlap: 0 says something too
    return PricedUsage(**known)
