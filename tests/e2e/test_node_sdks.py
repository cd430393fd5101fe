"""The official SDKs of Node, `openai` and `@anthropic-ai/sdk`, unmodified, in a sandbox (tests/node/sdk_agent.mjs)."""

from __future__ import annotations

import aiohttp
import pytest
from sdk_lab import attributes, run, tokens
from stack import Daemon

pytestmark = [pytest.mark.kernel, pytest.mark.e2e]


async def test_openai(sdks: Daemon, caller: aiohttp.ClientSession) -> None:
    said, spans = await run(sdks, caller, "node", "openai")
    plain, streamed, called, response, embedded, busy = spans
    assert [span["name"] for span in spans] == [
        *["chat gpt-4.1"] * 3,
        "chat gpt-5",
        "embeddings text-embedding-3-small",
        "chat gpt-4.1",
    ]
    assert tokens(plain) == [said["plain"]["prompt_tokens"], said["plain"]["completion_tokens"]]
    assert plain["attributes"]["process.executable.name"].startswith(("node", "MainThread"))
    assert said["chunksOfUsage"] == 0
    assert streamed["attributes"]["clrk.body.request_rewritten"] is True
    assert tokens(streamed)[1] == -(-len(said["streamed"]) // 4)
    assert said["called"] == '{"words": 2}'
    assert called["attributes"]["gen_ai.response.finish_reasons"] == ["tool_calls"]
    assert said["response"].startswith("You asked in 3 words")
    assert response["attributes"]["openai.api.type"] == "responses"
    assert said["dimensions"] == 1536
    assert tokens(embedded) == [1, None]
    assert said["busy"] == [429, "rate_limit_exceeded"]
    assert busy["attributes"]["error.type"] == "rate_limit_exceeded"
    assert all(span["attributes"]["clrk.cost.usd"] > 0 for span in spans[:5])


async def test_anthropic(sdks: Daemon, caller: aiohttp.ClientSession) -> None:
    said, spans = await run(sdks, caller, "node", "anthropic")
    plain, streamed, called, broken = spans
    assert tokens(plain) == [said["plain"]["input_tokens"], said["plain"]["output_tokens"]]
    assert tokens(streamed)[1] == -(-len(said["streamed"]) // 4)
    assert said["called"] == {"words": 2}
    assert called["attributes"]["gen_ai.response.finish_reasons"] == ["tool_use"]
    assert said["broken"] == broken["attributes"]["error.type"] == "overloaded_error"
    assert attributes(plain, "gen_ai.provider.name", "gen_ai.system") == ["anthropic", "anthropic"]
    assert all(span["attributes"]["clrk.cost.usd"] > 0 for span in spans[:3])


async def test_many_at_once(sdks: Daemon, caller: aiohttp.ClientSession) -> None:
    said, spans = await run(sdks, caller, "node", "parallel")
    by_seed = {span["attributes"]["gen_ai.request.seed"]: span for span in spans}
    assert len(by_seed) == len(said) == 24
    for number, text in enumerate(said, 1):
        assert text.startswith(f"You asked in {number} words")
        assert tokens(by_seed[number])[1] == -(-len(text) // 4)
