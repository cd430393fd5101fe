"""The official `anthropic` package of Python, unmodified, in a sandbox: what it gets, and what its calls' spans say."""

from __future__ import annotations

import aiohttp
import pytest
from sdk_lab import attributes, run, tokens
from stack import Daemon

pytestmark = [pytest.mark.kernel, pytest.mark.e2e]

START = """
import asyncio, json, sys
import anthropic
client = anthropic.Anthropic(max_retries=0)
said = []
def ask(text, **more):
    messages = text if isinstance(text, list) else [{"role": "user", "content": text}]
    return {"model": "claude-haiku-4-5", "max_tokens": 256, "messages": messages} | more
TOOL = {"name": "count", "input_schema": {"type": "object", "properties": {}}}
"""
END = "\nprint(json.dumps(said))"


async def python(daemon: Daemon, caller: aiohttp.ClientSession, source: str):
    return await run(daemon, caller, "py", START + source + END)


async def test_messages_plain_streamed_with_tools_and_thinking(sdks: Daemon, caller: aiohttp.ClientSession) -> None:
    said, spans = await python(sdks, caller, """
sampling = {"temperature": 0.5, "top_k": 3}  # the package has no such parameters any more, the API has
plain = client.messages.create(**ask("Is it [cached] green?", stop_sequences=["END"], extra_body=sampling))
usage = plain.usage
said.append([usage.input_tokens, usage.cache_read_input_tokens, usage.output_tokens])
with client.messages.stream(**ask("Is it green?")) as stream:
    said.append([stream.get_final_text(), stream.get_final_message().usage.output_tokens])
called = client.messages.create(**ask("one two", tools=[TOOL]))
said.append(called.content[0].input)
with client.messages.stream(**ask("one two three", tools=[TOOL])) as stream:
    said.append([block.input for block in stream.get_final_message().content])
result = {"type": "tool_result", "tool_use_id": called.content[0].id, "content": "2"}
history = [{"role": "user", "content": "one two"}, {"role": "assistant", "content": called.content},
           {"role": "user", "content": [result]}]
said.append(client.messages.create(**ask(history, tools=[TOOL])).stop_reason)
thinking = {"type": "enabled", "budget_tokens": 1024}
with client.messages.stream(**ask("Is it green?", max_tokens=2048, thinking=thinking)) as stream:
    said.append([block.type for block in stream.get_final_message().content])
""")  # fmt: skip
    plain, streamed, called, called_streamed, answered, thought = spans
    assert {span["name"] for span in spans} == {"chat claude-haiku-4-5"}
    given, cached, made = said[0]
    assert tokens(plain) == [given + cached, made]
    assert plain["attributes"]["gen_ai.usage.cache_read.input_tokens"] == cached > 0
    # claude-haiku-4-5: $1 in, $0.10 cached, $5 out, per million.
    assert plain["attributes"]["clrk.cost.usd"] == pytest.approx((given + cached * 0.1 + made * 5) / 1e6)
    names = ("gen_ai.request.temperature", "gen_ai.request.top_k", "gen_ai.request.max_tokens")
    assert attributes(plain, *names) == [0.5, 3.0, 256]
    assert attributes(plain, "gen_ai.request.stop_sequences", "clrk.gen_ai.response.service_tier") == [
        ["END"],
        "standard",
    ]
    assert attributes(plain, "gen_ai.provider.name", "gen_ai.system") == ["anthropic", "anthropic"]
    assert said[1][0].startswith("You asked in 3 words")
    assert tokens(streamed)[1] == said[1][1]
    assert attributes(streamed, "gen_ai.request.stream", "gen_ai.response.finish_reasons") == [True, ["end_turn"]]
    assert streamed["attributes"]["gen_ai.response.time_to_first_chunk"] > 0
    assert said[2:5] == [{"words": 2}, [{"words": 3}], "end_turn"]
    for span in (called, called_streamed):
        assert span["attributes"]["gen_ai.response.finish_reasons"] == ["tool_use"]
    assert answered["attributes"]["gen_ai.response.finish_reasons"] == ["end_turn"]
    assert said[5] == ["thinking", "text"]
    assert thought["attributes"]["gen_ai.request.max_tokens"] == 2048


async def test_errors_refusals_and_counting(sdks: Daemon, caller: aiohttp.ClientSession) -> None:
    said, spans = await python(sdks, caller, """
for call in (lambda: client.messages.create(**ask("[overloaded]")),
             lambda: list(client.messages.create(**ask("It is [overloaded] now", stream=True)))):
    try:
        call()
    except anthropic.APIStatusError as error:
        said.append(error.body["error"]["type"])
said.append(client.messages.create(**ask("[refuse]")).stop_reason)
request = ask("How long is this?")
del request["max_tokens"]
said.append(client.messages.count_tokens(**request).input_tokens > 0)
""")  # fmt: skip
    overloaded, broken, refused, counted = spans
    assert said == ["overloaded_error", "overloaded_error", "refusal", True]
    assert attributes(overloaded, "error.type", "http.response.status_code") == ["overloaded_error", 529]
    assert attributes(broken, "error.type", "http.response.status_code") == ["overloaded_error", 200]
    assert {span["status"]["code"] for span in (overloaded, broken)} == {"STATUS_CODE_ERROR"}
    assert tokens(broken)[0] > 0
    assert broken["attributes"]["clrk.cost.unknown"] is True
    assert attributes(refused, "clrk.gen_ai.refused", "gen_ai.response.finish_reasons") == [True, ["refusal"]]
    # Counting is free and generates nothing: it is a plain call, and no tokens are summed up for it.
    assert counted["name"] == "POST api.anthropic.com"
    assert tokens(counted) == [None, None]


async def test_many_at_once(sdks: Daemon, caller: aiohttp.ClientSession) -> None:
    said, spans = await python(sdks, caller, """
many = anthropic.AsyncAnthropic(max_retries=0)
async def one(number):
    async with many.messages.stream(**ask("word " * number, max_tokens=1000 + number)) as stream:
        return await stream.get_final_text()
async def all_of_them():
    return await asyncio.gather(*map(one, range(1, 25)))
said = asyncio.run(all_of_them())
""")  # fmt: skip
    assert len(spans) == len(said) == 24
    by_number = {span["attributes"]["gen_ai.request.max_tokens"] - 1000: span for span in spans}
    for number, text in enumerate(said, 1):
        assert text.startswith(f"You asked in {number} words")
        assert tokens(by_number[number])[1] == -(-len(text) // 4)
