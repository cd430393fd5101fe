"""Credentials that an upstream repeats in the head of its answer, or in trailers: the agent is not to learn them. Pure.

A server that adds a slash to a path, or wants another host, sends the query back in Location: `?key=` among it. With a
placeholder in its place the agent follows as ever, since the gateway writes the value again where it belongs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Final

from clrk.gateway.credentials import Filled
from clrk.gateway.egress.http1 import Headers, Response
from clrk.gateway.redact import hide_values
from clrk.gateway.redact_values import HiddenValues

_FRAMING: Final = frozenset(("content-length", "transfer-encoding", "content-encoding", "connection", "upgrade"))


def withhold(response: Response, filled: Sequence[Filled]) -> Response:
    """Return the head without the values that went out with the request, in any form; the same object if it has none.

    Shape: headers that frame the answer are left alone.
    """
    fields = (("", response.reason), *response.headers)
    told = withhold_fields(fields, filled)
    return response if told is fields else Response(response.minor, response.status, told[0][1], told[1:])


def withhold_fields(fields: Headers, filled: Sequence[Filled]) -> Headers:
    """Return headers or trailers without those values; the same object if they have none."""
    if not filled or not fields:
        return fields
    values = _hidden(tuple(value for one in filled for value in one.values.values()))
    whole = "\n".join(value for _, value in fields)
    if hide_values(whole, values) is whole:  # as almost always
        return fields
    return tuple((name, value if name.lower() in _FRAMING else hide_values(value, values)) for name, value in fields)


@lru_cache(maxsize=64)
def _hidden(values: tuple[str, ...]) -> HiddenValues:
    return HiddenValues(values)
