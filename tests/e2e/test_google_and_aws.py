"""The SDKs of Google and AWS, unmodified, in real sandboxes: what they got, and what the spans say about it."""

from __future__ import annotations

import hashlib
import json
import ssl
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from sdk_lab import lasted_s
from stack import Daemon, StandIn, invoke

pytestmark = [pytest.mark.kernel, pytest.mark.e2e]

AGENTS = Path(__file__).parent / "agents"
GEMINI, BEDROCK = "generativelanguage.googleapis.com", "bedrock-runtime.us-east-1.amazonaws.com"
HAIKU = "us.anthropic.claude-haiku-4-5-20251001-v1:0"
NOVA = "arn:aws:bedrock:us-east-1:123456789012:inference-profile/us.amazon.nova-lite-v1:0"
LLAMA = "meta.llama3-8b-instruct-v1:0"

Spans = list[dict[str, Any]]


async def run(daemon: Daemon, caller: aiohttp.ClientSession, agent: str, source: str) -> tuple[dict[str, Any], Spans]:
    """Run a source in a sandbox; return what it printed, and its calls in the order in which they began."""
    text, invocation = await invoke(caller, daemon, agent, source)
    spans = daemon.spans_when_complete(invocation)
    calls = [span for span in spans if span["kind"] == "SPAN_KIND_CLIENT"]
    return json.loads(text), sorted(calls, key=lambda span: span["start_time_unix_nano"])


def select(spans: Spans, name: str, host: str, *, stream: bool = False, errors: bool = False) -> Spans:
    return [
        span
        for span in spans
        if span["name"] == name
        and span["attributes"]["server.address"] == host
        and ("gen_ai.request.stream" in span["attributes"]) == stream
        and (span["status"]["code"] == "STATUS_CODE_ERROR") == errors
    ]


async def test_googles_sdk(daemon: Daemon, caller: aiohttp.ClientSession) -> None:
    said, spans = await run(daemon, caller, "models", (AGENTS / "google_sdk.py").read_text())
    assert all("gen_ai.system" in span["attributes"] for span in spans), [span["name"] for span in spans]
    for name, host, provider in (
        ("gemini", GEMINI, "gcp.gemini"),
        ("vertex", "us-central1-aiplatform.googleapis.com", "gcp.vertex_ai"),
        ("express", "aiplatform.googleapis.com", "gcp.vertex_ai"),
    ):
        plain = select(spans, "generate_content gemini-2.5-flash", host)[0]["attributes"]
        stream = select(spans, "generate_content gemini-2.5-flash", host, stream=True)[0]
        streamed = stream["attributes"]
        for attributes, kind in ((plain, "plain"), (streamed, "streamed")):
            check_gemini(attributes, provider, said[f"{name} {kind}"])
        assert 0 < streamed["gen_ai.response.time_to_first_chunk"] <= lasted_s(stream)
        assert "gen_ai.response.time_to_first_chunk" not in plain
    check_rest_of_gemini(said, spans)
    check_claude_on_vertex(said, spans)


def check_gemini(attributes: dict[str, Any], provider: str, said: dict[str, Any]) -> None:
    given, candidates, thoughts = said["usage"]
    assert attributes["gen_ai.provider.name"] == provider
    assert attributes["gen_ai.system"] == "google_genai"
    assert attributes["gen_ai.operation.name"] == "generate_content"
    assert attributes["gen_ai.request.model"] == attributes["gen_ai.response.model"] == "gemini-2.5-flash"
    assert attributes["gen_ai.request.max_tokens"] == 200
    assert attributes["gen_ai.request.temperature"] == 0.5
    assert attributes["gen_ai.request.top_k"] == 40.0
    assert attributes["gen_ai.response.id"] == said["id"]
    assert attributes["gen_ai.response.finish_reasons"] == ["STOP"]
    assert attributes["gen_ai.usage.input_tokens"] == given
    assert attributes["gen_ai.usage.output_tokens"] == candidates + thoughts
    assert attributes["gen_ai.usage.reasoning.output_tokens"] == thoughts
    # USD per million tokens: ai.google.dev/gemini-api/docs/pricing
    assert attributes["clrk.cost.usd"] == pytest.approx((given * 0.3 + (candidates + thoughts) * 2.5) / 1e6)


def check_rest_of_gemini(said: dict[str, Any], spans: Spans) -> None:
    assert said["tool"] == ["refund_policy", {"country": "DE"}]
    assert said["missing"] == [404, "NOT_FOUND"]
    assert said["overloaded"] == said["broken off"] == [503, "UNAVAILABLE"]
    assert said["pieces before"] > 0
    _plain, tool, blocked = select(spans, "generate_content gemini-2.5-flash", GEMINI)
    assert tool["attributes"]["gen_ai.response.finish_reasons"] == ["STOP"]
    assert blocked["attributes"]["gen_ai.response.finish_reasons"] == [said["blocked"]] == ["PROHIBITED_CONTENT"]
    assert blocked["attributes"]["gen_ai.usage.output_tokens"] == 0
    (counted,) = select(spans, "count_tokens gemini-2.5-flash", GEMINI)
    assert not {key for key in counted["attributes"] if key.startswith(("gen_ai.usage.", "clrk.cost"))}
    (embedded,) = select(spans, "embeddings gemini-embedding-001", GEMINI)
    assert embedded["attributes"]["gen_ai.operation.name"] == "embeddings"
    (missing,) = select(spans, "generate_content nobody-knows-it", GEMINI, errors=True)
    assert missing["attributes"]["error.type"] == "NOT_FOUND"
    (overloaded,) = select(spans, "generate_content gemini-2.5-flash", GEMINI, errors=True)
    (broken_off,) = select(spans, "generate_content gemini-2.5-flash", GEMINI, stream=True, errors=True)
    assert overloaded["attributes"]["http.response.status_code"] == 503
    assert broken_off["attributes"]["http.response.status_code"] == 200
    for span in (overloaded, broken_off):
        assert span["attributes"]["error.type"] == "UNAVAILABLE"
        assert span["status"]["message"].startswith("The model is overloaded.")


def check_claude_on_vertex(said: dict[str, Any], spans: Spans) -> None:
    host = "us-east5-aiplatform.googleapis.com"
    (plain,) = select(spans, "chat claude-sonnet-4@20250514", host)
    (streamed,) = select(spans, "chat claude-haiku-4-5@20251001", host, stream=True)
    for span in (plain, streamed):
        assert span["attributes"]["gen_ai.provider.name"] == "gcp.vertex_ai"
        assert span["attributes"]["gen_ai.system"] == "anthropic"
        assert span["attributes"]["gen_ai.response.finish_reasons"] == ["end_turn"]
    message_id, given, produced = said["claude"]
    assert plain["attributes"]["gen_ai.response.id"] == message_id
    assert plain["attributes"]["gen_ai.usage.input_tokens"] == given
    assert plain["attributes"]["clrk.cost.usd"] == pytest.approx((given * 3 + produced * 15) / 1e6)
    assert streamed["attributes"]["clrk.cost.unknown"] is True  # in a region: more than the list says
    assert said["claude streamed"].endswith("Here is what I found.")


async def test_awss_sdk(daemon: Daemon, caller: aiohttp.ClientSession) -> None:
    said, spans = await run(daemon, caller, "models", (AGENTS / "aws_sdk.py").read_text())
    assert {span["attributes"]["gen_ai.system"] for span in spans} == {"aws_bedrock"}
    assert {span["attributes"]["gen_ai.provider.name"] for span in spans} == {"aws.bedrock"}
    assert all(span["attributes"]["aws.request_id"] for span in spans)
    plain, tool, claude = (span["attributes"] for span in select(spans, f"chat {HAIKU}", BEDROCK))
    stream = select(spans, f"chat {NOVA}", BEDROCK, stream=True)[0]
    streamed = stream["attributes"]
    for attributes, (_, usage) in ((plain, said["converse"]), (streamed, said["converse streamed"])):
        assert attributes["gen_ai.operation.name"] == "chat"
        assert attributes["gen_ai.request.max_tokens"] == 200
        assert attributes["gen_ai.response.finish_reasons"] == ["end_turn"]
        cached = usage["cacheReadInputTokens"]
        assert attributes["gen_ai.usage.input_tokens"] == usage["inputTokens"] + cached
        assert attributes["gen_ai.usage.cache_read.input_tokens"] == cached
        assert attributes["gen_ai.usage.output_tokens"] == usage["outputTokens"]
    usage = said["converse"][1]
    assert plain["clrk.cost.usd"] == pytest.approx(
        (usage["inputTokens"] * 1.1 + 12 * 0.11 + usage["outputTokens"] * 5.5) / 1e6
    )
    usage = said["converse streamed"][1]
    assert streamed["clrk.cost.usd"] == pytest.approx(
        (usage["inputTokens"] * 0.06 + 12 * 0.015 + usage["outputTokens"] * 0.24) / 1e6
    )
    assert 0 < streamed["gen_ai.response.time_to_first_chunk"] <= lasted_s(stream)
    assert said["tool"] == ["tool_use", {"country": "DE"}]
    assert tool["gen_ai.response.finish_reasons"] == ["tool_use"]
    assert claude["gen_ai.response.id"] == said["claude"]["id"]
    (counted,) = select(spans, f"count_tokens {HAIKU}", BEDROCK)
    assert not {key for key in counted["attributes"] if key.startswith(("gen_ai.usage.", "clrk.cost"))}
    check_failures(said, spans)
    check_invocations(said, spans)


def check_failures(said: dict[str, Any], spans: Spans) -> None:
    assert said["throttled"] == ["ThrottlingException", 429]
    assert said["broken off"] == "throttlingException"
    assert said["events before"] > 0
    (throttled,) = select(spans, f"chat {HAIKU}", BEDROCK, errors=True)
    (broken_off,) = select(spans, f"chat {HAIKU}", BEDROCK, stream=True, errors=True)
    assert throttled["attributes"]["http.response.status_code"] == 429
    assert broken_off["attributes"]["http.response.status_code"] == 200
    for span in (throttled, broken_off):
        assert span["attributes"]["error.type"] == "ThrottlingException"
        assert span["status"]["message"].startswith("Too many requests")


def check_invocations(said: dict[str, Any], spans: Spans) -> None:
    """Every model in its own words: the same counts in a document and in a stream."""
    counts = {
        HAIKU: said["claude"]["usage"],
        NOVA: {
            "input_tokens": said["nova"]["usage"]["inputTokens"] + said["nova"]["usage"]["cacheReadInputTokenCount"],
            "output_tokens": said["nova"]["usage"]["outputTokens"],
        },
        LLAMA: {
            "input_tokens": said["llama"]["prompt_token_count"],
            "output_tokens": said["llama"]["generation_token_count"],
        },
    }
    for model, wanted in counts.items():
        for stream in (False, True):
            attributes = select(spans, f"chat {model}", BEDROCK, stream=stream)[-1]["attributes"]
            assert attributes["gen_ai.usage.input_tokens"] == wanted["input_tokens"], (model, stream)
            assert attributes["gen_ai.usage.output_tokens"] == wanted["output_tokens"], (model, stream)
            assert attributes["clrk.cost.usd"] > 0
            assert ("gen_ai.response.time_to_first_chunk" in attributes) == stream
    assert len(select(spans, f"chat {HAIKU}", BEDROCK, stream=True)) == 2  # boto3's, and Anthropic's own client
    assert said["anthropic"].endswith("Here is what I found.")
    assert "amazon-bedrock-invocationMetrics" in said["llama streamed"][-1]


SIGNED = {
    "Authorization": "AWS4-HMAC-SHA256 Credential=AKIAPLACEHOLDER00000/20261128/us-east-1/bedrock/aws4_request",
    "Content-Type": "application/json",
}
KEYED = {"X-Goog-Api-Key": "placeholder", "Content-Type": "application/json"}
CONTENTS = json.dumps({"contents": [{"parts": [{"text": "Where is my lamp?"}]}]})
MESSAGES = json.dumps({"messages": [{"role": "user", "content": [{"text": "Where is my lamp?"}]}]})
CLAUDE = json.dumps(
    {"anthropic_version": "2026-10-21", "max_tokens": 99, "messages": [{"role": "user", "content": "Where?"}]}
)
EXCHANGES = [
    (GEMINI, "/v1beta/models/gemini-2.5-flash:streamGenerateContent?alt=sse", KEYED, CONTENTS),
    (GEMINI, "/v1beta/models/gemini-2.5-flash:streamGenerateContent", KEYED, CONTENTS),
    (GEMINI, "/v1beta/models/gemini-2.5-flash:generateContent", KEYED | {"Accept-Encoding": "gzip"}, CONTENTS),
    (GEMINI, "/v1beta/models/gemini-2.5-flash:streamGenerateContent", KEYED, "{}"),
    (BEDROCK, f"/model/{HAIKU.replace(':', '%3A')}/converse-stream", SIGNED, MESSAGES),
    (BEDROCK, f"/model/{HAIKU.replace(':', '%3A')}/invoke-with-response-stream", SIGNED, CLAUDE),
    (BEDROCK, f"/model/{HAIKU.replace(':', '%3A')}/converse-stream", SIGNED, MESSAGES.replace("lamp", "[throttled]")),
]
FETCH = """
import hashlib, http.client, json, os, ssl
context = ssl.create_default_context(cafile=os.environ["SSL_CERT_FILE"])
said = []
for host, target, headers, body in json.loads(EXCHANGES):
    connection = http.client.HTTPSConnection(host, context=context)
    connection.request("POST", target, body, headers)
    answer = connection.getresponse()
    raw = answer.read()
    said.append([answer.status, answer.getheader("content-type"), len(raw), hashlib.sha256(raw).hexdigest()])
print(json.dumps(said))
"""


async def test_the_bytes_are_the_providers(daemon: Daemon, providers: StandIn, caller: aiohttp.ClientSession) -> None:
    """What a sandbox gets through the gateway is what anybody gets from the provider, byte for byte."""
    source = f"EXCHANGES = {json.dumps(EXCHANGES)!r}\n{FETCH}"
    said, spans = await run(daemon, caller, "python", source)
    assert len(spans) == len(EXCHANGES)
    assert all("gen_ai.system" in span["attributes"] for span in spans)
    context = ssl.create_default_context(cafile=providers.ca_file)
    for (host, target, headers, body), got in zip(EXCHANGES, said, strict=True):
        async with caller.post(
            f"https://{providers.tls}{target}", data=body, ssl=context, server_hostname=host,
            headers={"Accept-Encoding": "identity"} | headers | {"Host": host},
        ) as answer:  # fmt: skip
            raw = await answer.read()
        direct = [answer.status, answer.headers["content-type"], len(raw), hashlib.sha256(raw).hexdigest()]
        assert got == direct, target
