"""What tokens cost at a bundled price: each kind's own rate, learned from genai-prices once.

The library works a total out anew for each call, over all units that it knows: a fifth of all that a call costs the
gateway. For most calls it is a sum: as long as parts fit into their wholes, and within one band of the input (some
models cost more above 200,000 tokens), each kind of token has one rate. Whatever else is reported is the library's.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Final

from genai_prices import Usage
from genai_prices.types import ModelPrice, TieredPrices

# A count of each that is in band and fits, with one more of any of them as well.
_SAMPLE: Final = {
    "input_tokens": 10, "output_tokens": 10, "cache_read_tokens": 1, "cache_write_tokens": 2,
    "cache_write_1h_tokens": 1, "output_reasoning_tokens": 1,
}  # fmt: skip
_MAX_LEARNED: Final = 1024


@dataclass(frozen=True, slots=True)
class _Rates:
    """USD: of the call itself, and of one token of each kind."""

    fixed: Decimal
    each: tuple[tuple[str, Decimal], ...]


_LEARNED: Final[dict[tuple[int, frozenset[str], int], _Rates | None]] = {}


def total_usd(price: ModelPrice, counts: Mapping[str, int]) -> Decimal:
    """Return what price.calc_price says of the counts, which are positive; price is one that stays (bundled).

    Raises: as calc_price does, for counts that contradict each other.
    """
    rates = _find(price, counts) if _fit(counts) else None
    if rates is None:
        return price.calc_price(Usage(**counts))["total_price"]
    return sum((counts[kind] * rate for kind, rate in rates.each), rates.fixed)


def _fit(counts: Mapping[str, int]) -> bool:
    """Say whether all kinds are in _SAMPLE, and parts fit into their wholes."""
    read, written = counts.get("cache_read_tokens", 0), counts.get("cache_write_tokens", 0)
    return (
        counts.keys() <= _SAMPLE.keys()
        and read + written <= counts.get("input_tokens", 0)
        and counts.get("cache_write_1h_tokens", 0) <= written
        and counts.get("output_reasoning_tokens", 0) <= counts.get("output_tokens", 0)
    )


def _find(price: ModelPrice, counts: Mapping[str, int]) -> _Rates | None:
    starts = sorted({tier.start for one in vars(price).values() if isinstance(one, TieredPrices) for tier in one.tiers})
    band = bisect_left(starts, counts.get("input_tokens", 0))  # a tier begins above its start
    key = id(price), frozenset(counts), band
    if key not in _LEARNED:
        if len(_LEARNED) >= _MAX_LEARNED:
            _LEARNED.clear()
        _LEARNED[key] = _learn(price, frozenset(counts), [0, *starts][band], [*starts, None][band])
    return _LEARNED[key]


def _learn(price: ModelPrice, kinds: frozenset[str], above: int, up_to: int | None) -> _Rates | None:
    """Return the rates of a band of the input; None: it is too narrow to tell them."""
    sample = {kind: count for kind, count in _SAMPLE.items() if kind in kinds}
    if "input_tokens" in sample:
        sample["input_tokens"] += above
        if up_to is not None and sample["input_tokens"] >= up_to:
            return None
    total = price.calc_price(Usage(**sample))["total_price"]
    each = {
        kind: price.calc_price(Usage(**sample | {kind: count + 1}))["total_price"] - total
        for kind, count in sample.items()
    }
    return _Rates(total - sum(sample[kind] * rate for kind, rate in each.items()), tuple(each.items()))
