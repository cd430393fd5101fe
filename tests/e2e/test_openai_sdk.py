"""The official `openai` package of Python, unmodified, in a sandbox: what it gets, and what its calls' spans say."""

from __future__ import annotations

import aiohttp
import pytest
from sdk_lab import attributes, lasted_s, run, tokens
from stack import Daemon

pytestmark = [pytest.mark.kernel, pytest.mark.e2e]

START = """
import asyncio, json, sys
import openai
from openai import AsyncOpenAI, AzureOpenAI, OpenAI
client = OpenAI(max_retries=0)
said = []
def user(text): return [{"role": "user", "content": text}]
TOOL = {"type": "function", "function": {"name": "count", "parameters": {"type": "object", "properties": {}}}}
"""
END = "\nprint(json.dumps(said))"


async def python(daemon: Daemon, caller: aiohttp.ClientSession, source: str):
    return await run(daemon, caller, "py", START + source + END)


async def test_chat_plain_streamed_and_with_tools(sdks: Daemon, caller: aiohttp.ClientSession) -> None:
    said, spans = await python(sdks, caller, """
plain = client.chat.completions.create(model="gpt-4.1", messages=user("Is it [cached] green?"), temperature=0, n=2)
said.append([plain.usage.prompt_tokens, plain.usage.completion_tokens, len(plain.choices)])
chunks = list(client.chat.completions.create(model="gpt-4.1", messages=user("Is it green?"), stream=True, max_tokens=9))
said.append(["".join(c.choices[0].delta.content or "" for c in chunks), all(c.usage is None for c in chunks)])
asked = list(client.chat.completions.create(
    model="gpt-4.1", messages=user("x"), stream=True, stream_options={"include_usage": True}))
said.append([asked[-1].usage.prompt_tokens, asked[-1].usage.completion_tokens])
called = client.chat.completions.create(model="gpt-4.1", messages=user("one two"), tools=[TOOL])
call = called.choices[0].message.tool_calls[0]
said.append(json.loads(call.function.arguments))
streamed = client.chat.completions.create(model="gpt-4.1", messages=user("one two three"), tools=[TOOL], stream=True)
said.append(json.loads("".join(
    t.function.arguments or "" for c in streamed if c.choices for t in c.choices[0].delta.tool_calls or [])))
result = [*user("one two"), called.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "2"}]
said.append(client.chat.completions.create(model="gpt-4.1", messages=result, tools=[TOOL]).choices[0].finish_reason)
""")  # fmt: skip
    plain, streamed, asked, called, called_streamed, answered = spans
    assert {span["name"] for span in spans} == {"chat gpt-4.1"}
    assert [tokens(plain), tokens(asked)] == [said[0][:2], said[2]]
    assert said[0][2] == plain["attributes"]["gen_ai.request.choice.count"] == 2
    assert attributes(plain, "gen_ai.provider.name", "gen_ai.system", "openai.api.type", "gen_ai.response.model") == [
        "openai", "openai", "chat_completions", "gpt-4.1-2025-04-14",
    ]  # fmt: skip
    assert attributes(plain, "gen_ai.request.temperature", "gen_ai.response.finish_reasons") == [0.0, ["stop", "stop"]]
    given, made = tokens(plain)
    cached = plain["attributes"]["gen_ai.usage.cache_read.input_tokens"]
    assert cached == given // 2
    # gpt-4.1: $2 in, $0.50 cached, $8 out, per million.
    want = ((given - cached) * 2 + cached * 0.5 + made * 8) / 1e6
    assert plain["attributes"]["clrk.cost.usd"] == pytest.approx(want)
    # The agent that did not ask for usage got no chunk of it, and the span has it all the same.
    assert said[1][1] is True
    assert attributes(streamed, "gen_ai.request.stream", "clrk.body.request_rewritten") == [True, True]
    assert streamed["attributes"]["gen_ai.request.max_tokens"] == 9
    assert streamed["attributes"]["gen_ai.usage.output_tokens"] == -(-len(said[1][0]) // 4)
    assert 0 < streamed["attributes"]["gen_ai.response.time_to_first_chunk"] <= lasted_s(streamed)
    assert "clrk.body.request_rewritten" not in asked["attributes"]
    assert said[3:] == [{"words": 2}, {"words": 3}, "stop"]
    for span in (called, called_streamed):
        assert span["attributes"]["gen_ai.response.finish_reasons"] == ["tool_calls"]
    assert answered["attributes"]["gen_ai.response.finish_reasons"] == ["stop"]


async def test_responses(sdks: Daemon, caller: aiohttp.ClientSession) -> None:
    said, spans = await python(sdks, caller, """
first = client.responses.create(model="gpt-5", input="Is it green?", reasoning={"effort": "low"})
said.append([first.usage.input_tokens, first.usage.output_tokens, first.output_text, first.id])
events = list(client.responses.create(model="gpt-5", input="And now?", previous_response_id=first.id, stream=True))
said.append([events[-1].type, "".join(e.delta for e in events if e.type == "response.output_text.delta")])
short = client.responses.create(model="gpt-5", input="Is it green?", max_output_tokens=3)
said.append(short.incomplete_details.reason)
TOOL = {"type": "function", "name": "count", "parameters": {"type": "object", "properties": {}}, "strict": False}
with client.responses.stream(model="gpt-5", input="one two", tools=[TOOL]) as stream:
    said.append([json.loads(item.arguments) for item in stream.get_final_response().output])
failed = list(client.responses.create(model="gpt-5", input="[fail]", stream=True))
said.append(failed[-1].response.error.code)
""")  # fmt: skip
    first, second, short, called, failed = spans
    assert {span["name"] for span in spans} == {"chat gpt-5"}
    assert {span["attributes"]["openai.api.type"] for span in spans} == {"responses"}
    assert tokens(first) == said[0][:2]
    assert attributes(first, "gen_ai.response.id", "gen_ai.usage.reasoning.output_tokens") == [said[0][3], 64]
    given, made = tokens(first)
    assert first["attributes"]["clrk.cost.usd"] == pytest.approx((given * 1.25 + made * 10) / 1e6)
    assert said[1][0] == "response.completed"
    assert said[1][1].startswith("You asked in 2 words")
    assert attributes(second, "gen_ai.request.previous_response.id", "gen_ai.request.stream") == [said[0][3], True]
    assert second["attributes"]["gen_ai.usage.cache_read.input_tokens"] > 0
    assert said[2] == "max_output_tokens"
    assert short["attributes"]["gen_ai.response.finish_reasons"] == ["max_output_tokens"]
    assert said[3] == [{"words": 2}]
    assert called["attributes"]["gen_ai.response.finish_reasons"] == ["completed"]
    assert said[4] == failed["attributes"]["error.type"] == "server_error"
    assert failed["status"] == {"code": "STATUS_CODE_ERROR", "message": "The model failed."}


async def test_completions_and_embeddings(sdks: Daemon, caller: aiohttp.ClientSession) -> None:
    said, spans = await python(sdks, caller, """
MODEL = "gpt-3.5-turbo-instruct"
text = client.completions.create(model=MODEL, prompt="Is it green?", max_tokens=5)
said.append([text.usage.prompt_tokens, text.usage.completion_tokens, text.choices[0].finish_reason])
chunks = list(client.completions.create(model=MODEL, prompt="Is it green?", stream=True))
said.append([all(chunk.choices for chunk in chunks)])
short = client.embeddings.create(model="text-embedding-3-small", input=["one", "two"], dimensions=8)
said.append([short.usage.prompt_tokens, [len(found.embedding) for found in short.data]])
plain = client.embeddings.create(model="text-embedding-3-small", input="one", encoding_format="float")
said.append(len(plain.data[0].embedding))
""")  # fmt: skip
    text, streamed, short, plain = spans
    assert [text["name"], short["name"]] == [
        "text_completion gpt-3.5-turbo-instruct",
        "embeddings text-embedding-3-small",
    ]
    assert tokens(text) == said[0][:2]
    assert said[0][2] == "length"
    assert said[1] == [True]
    assert streamed["attributes"]["clrk.body.request_rewritten"] is True
    assert streamed["attributes"]["gen_ai.usage.output_tokens"] > 1
    assert tokens(short) == [said[2][0], None]
    # The package asks for base64 by itself, and decodes it.
    assert attributes(short, "gen_ai.embeddings.dimension.count", "gen_ai.request.encoding_formats") == [8, ["base64"]]
    assert said[2][1] == [8, 8]
    assert short["attributes"]["clrk.cost.usd"] == pytest.approx(said[2][0] * 0.02 / 1e6)
    assert plain["attributes"]["gen_ai.request.encoding_formats"] == ["float"]
    assert said[3] == 1536


async def test_azure_and_a_server_of_ones_own(sdks: Daemon, caller: aiohttp.ClientSession) -> None:
    said, spans = await python(sdks, caller, """
azure = AzureOpenAI(azure_endpoint="https://standin.openai.azure.com", api_version="2024-10-21", max_retries=0)
said.append(azure.chat.completions.create(model="gpt-4o", messages=user("Is it green?")).usage.completion_tokens)
newer = OpenAI(base_url="https://standin.openai.azure.com/openai/v1/", max_retries=0)
said.append(len(list(newer.responses.create(model="gpt-4o", input="Is it green?", stream=True))) > 5)
own = OpenAI(base_url="https://llm.internal/v1", api_key="none", max_retries=0)
chunks = list(own.chat.completions.create(model="house-7b", messages=user("Is it green?"), stream=True))
said.append([all(chunk.choices for chunk in chunks)])
own.chat.completions.create(model="unpriced-7b", messages=user("Is it green?"))
""")  # fmt: skip
    deployment, newer, own, unpriced = spans
    assert deployment["name"] == "chat gpt-4o"
    assert deployment["attributes"]["url.full"].split("?")[0].endswith("/openai/deployments/gpt-4o/chat/completions")
    for span in (deployment, newer):
        assert attributes(span, "gen_ai.provider.name", "gen_ai.system") == ["azure.ai.openai", "azure_openai"]
        assert span["attributes"]["clrk.cost.usd"] > 0
    assert tokens(deployment)[1] == said[0]
    assert said[1] is True
    assert attributes(own, "gen_ai.provider.name", "gen_ai.system") == ["openai_compatible", "openai"]
    given, made = tokens(own)
    assert own["attributes"]["clrk.cost.usd"] == pytest.approx((given * 2 + made * 4) / 1e6)  # the operator's price
    assert said[2] == [True]
    assert attributes(unpriced, "clrk.cost.usd", "clrk.cost.unknown") == [None, True]
    assert tokens(unpriced)[1] > 0


async def test_errors_and_refusals(sdks: Daemon, caller: aiohttp.ClientSession) -> None:
    said, spans = await python(sdks, caller, """
try:
    client.chat.completions.create(model="gpt-4.1", messages=user("[busy]"))
except openai.RateLimitError as error:
    said.append([error.status_code, error.code])
try:
    OpenAI(max_retries=0).post("/chat/completions", body={"model": "gpt-4.1"}, cast_to=object)
except openai.BadRequestError as error:
    said.append([error.code, error.param])
refused = client.chat.completions.create(model="gpt-4.1", messages=user("[refuse]"))
said.append(refused.choices[0].message.refusal)
""")  # fmt: skip
    busy, bad, refused = spans
    assert said[0] == [429, "rate_limit_exceeded"]
    assert attributes(busy, "error.type", "http.response.status_code") == ["rate_limit_exceeded", 429]
    assert busy["status"]["code"] == "STATUS_CODE_ERROR"
    assert said[1] == [bad["attributes"]["error.type"], "messages"]
    assert said[2]
    assert attributes(refused, "clrk.gen_ai.refused", "error.type") == [True, None]
    assert "clrk.cost.unknown" not in busy["attributes"]


async def test_streams_that_end_in_their_middle(sdks: Daemon, caller: aiohttp.ClientSession) -> None:
    said, spans = await python(sdks, caller, """
import httpx
try:
    for chunk in client.chat.completions.create(model="gpt-4.1", messages=user("say [broken] now"), stream=True):
        said.append(chunk.choices[0].delta.content)
except (openai.APIError, httpx.HTTPError) as error:
    said.append("broken")
stream = client.chat.completions.create(model="gpt-4.1", messages=user("say [endless] now"), stream=True)
for chunk in stream:
    if "[endless]" in (chunk.choices[0].delta.content or ""):
        stream.close()
        break
client.completions.create(model="gpt-3.5-turbo-instruct", prompt="x")  # by its answer the gateway has seen us leave
""")  # fmt: skip
    broken, left, _ = spans
    assert said[-1] == "broken"
    assert "".join(said[:-1]).endswith("[broken]")
    for span in (broken, left):
        assert span["name"] == "chat gpt-4.1"
        assert span["status"]["code"] == "STATUS_CODE_ERROR"
        assert attributes(span, "gen_ai.response.model", "clrk.body.usage_visible") == ["gpt-4.1-2025-04-14", False]
        assert attributes(span, "clrk.cost.usd", "clrk.cost.unknown") == [None, True]
        assert span["attributes"]["gen_ai.response.time_to_first_chunk"] > 0
    assert left["attributes"]["error.type"] == "agent_disconnected"
    assert broken["attributes"]["error.type"] not in (None, "agent_disconnected")


async def test_many_at_once(sdks: Daemon, caller: aiohttp.ClientSession) -> None:
    said, spans = await python(sdks, caller, """
many = AsyncOpenAI(max_retries=0)
async def one(number):
    stream = await many.chat.completions.create(
        model="gpt-4.1", messages=user("word " * number), stream=True, seed=number)
    return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
async def all_of_them():
    return await asyncio.gather(*map(one, range(1, 25)))
said = asyncio.run(all_of_them())
""")  # fmt: skip
    assert len(spans) == len(said) == 24
    by_seed = {span["attributes"]["gen_ai.request.seed"]: span for span in spans}
    for number, text in enumerate(said, 1):
        assert text.startswith(f"You asked in {number} words")
        assert tokens(by_seed[number])[1] == -(-len(text) // 4)
