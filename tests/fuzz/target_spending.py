"""What a request may spend: an estimate that holds, or no reading at all; a written limit that is read back."""

from __future__ import annotations

import json

from clrk.core.errors import ProtocolError
from clrk.gateway.llm.media_parts import find_media
from clrk.gateway.llm.spending import BASE_TOKENS, read_demand, write_limit

LIMIT = 77


def llm_spending(data: bytes) -> None:
    """A body that is read is one JSON object to others too, and says the same with a limit written into it."""
    try:
        demand = read_demand(data)
    except ProtocolError:
        return
    document = json.loads(data)
    assert list(document) == list(demand.members)
    assert demand.input_tokens >= BASE_TOKENS
    assert demand.choices >= 1
    assert sum(1 for _ in find_media(document)) <= len(data)
    if "max_tokens" in document and document["max_tokens"] is not None:
        assert demand.output_limit is not None
        return
    written = json.loads(write_limit(demand, "max_tokens", LIMIT))
    assert written.pop("max_tokens") == LIMIT
    document.pop("max_tokens", None)
    assert written == document


TARGETS = {"llm_spending": llm_spending}
