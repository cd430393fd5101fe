"""What an agent's traceback shows when its call is refused: the official SDKs tell the reason and the rule to add."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import anthropic
import boto3
import botocore.config
import openai
import pytest
from botocore.exceptions import ClientError
from egress_lab import aliased, laboratory, upstream
from google import genai
from google.genai.errors import APIError as GoogleApiError
from google.genai.errors import ClientError as GoogleError
from test_egress_governor import Judge

from clrk.gateway.govern import Govern

pytestmark = pytest.mark.usefixtures("brief_linger")

MESSAGES = [{"role": "user", "content": "hi"}]
BEDROCK = "bedrock-runtime.us-east-1.amazonaws.com"
MODELS = "generativelanguage.googleapis.com"


def _openai(url: str) -> None:
    openai.OpenAI(api_key="x", base_url=f"{url}/v1", max_retries=0).models.list()


def _self_hosted(url: str) -> None:
    client = openai.OpenAI(api_key="x", base_url=f"{url}/v1", max_retries=0)
    client.chat.completions.create(model="house-1", messages=MESSAGES)


def _anthropic(url: str) -> None:
    client = anthropic.Anthropic(api_key="x", base_url=url, max_retries=0)
    client.messages.create(model="claude-sonnet-5", max_tokens=9, messages=MESSAGES)


def _google(url: str) -> None:
    client = genai.Client(api_key="x", http_options={"base_url": url})
    client.models.generate_content(model="gemini-2.5-flash", contents="hi")


def _bedrock(url: str) -> None:
    client = boto3.client(
        "bedrock-runtime", region_name="us-east-1", endpoint_url=url, aws_access_key_id="x", aws_secret_access_key="x",
        config=botocore.config.Config(retries={"total_max_attempts": 1}),
    )  # fmt: skip
    client.converse(modelId="m-1", messages=[{"role": "user", "content": [{"text": "hi"}]}])


CLIENTS = [
    pytest.param("api.openai.com", "GET /v1/models", _openai, openai.PermissionDeniedError, id="openai"),
    pytest.param(
        "llm.internal", "POST /v1/chat/completions", _self_hosted, openai.PermissionDeniedError, id="openai-self-hosted"
    ),
    pytest.param("api.anthropic.com", "POST /v1/messages", _anthropic, anthropic.PermissionDeniedError, id="anthropic"),
    pytest.param(
        MODELS, "POST /v1beta/models/gemini-2.5-flash:generateContent", _google, GoogleError, id="google-genai"
    ),
    pytest.param(BEDROCK, "POST /model/m-1/converse", _bedrock, ClientError, id="boto3"),
]


async def _refusal(
    host: str, line: str, rules: list[dict[str, Any]], gateway: dict[str, Any], govern: Govern | None = None
) -> bytes:
    """Return the gateway's own answer to a request over TLS."""
    async with laboratory(gateway=gateway, rules=rules, recognise="real", govern=govern) as lab:
        wire = await lab.dial_tls(host)
        head = f"{line} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n"
        return await wire.ask(head.encode() + b"{}")


async def _raised(raw: bytes, client: Callable[[str], None], error: Any) -> Exception:
    """Return what an SDK raises when it gets an answer."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(raw)
        await writer.drain()

    async with upstream(serve) as port:
        with pytest.raises(error) as raised:
            await asyncio.to_thread(client, f"http://127.0.0.1:{port}")
    return raised.value


@pytest.mark.parametrize(("host", "line", "client", "error"), CLIENTS)
async def test_the_sdks_exception_shows_the_rule_to_add(host, line, client, error):
    raw = await _refusal(host, line, [{"hostnames": [host], "http": {"paths": ["/other"]}}], {})
    said = str(await _raised(raw, client, error)).replace("\\n", "\n").replace('\\"', '"')
    rule = json.loads(raw.partition(b"\r\n\r\n")[2])["add_rule"]
    assert host in rule
    assert f"clrk: {line.partition(' ')[0]} {host}:443 is not allowed (http_not_allowed)" in said
    assert rule.strip() in said


@pytest.mark.parametrize(("host", "line", "client", "error"), CLIENTS)
async def test_it_is_a_problem_document_as_well(host, line, client, error):
    raw = await _refusal(host, line, [{"hostnames": [host], "http": {"paths": ["/other"]}}], {})
    head, _, body = raw.partition(b"\r\n\r\n")
    assert b"\r\nContent-Type: application/problem+json\r\n" in head
    found = json.loads(body)
    assert (found["status"], found["reason"]) == (403, "http_not_allowed")
    assert found["detail"]
    assert found["invocation_id"]


async def test_an_upstream_that_is_down_is_said_in_the_sdks_exception():
    async with upstream(lambda *_: asyncio.sleep(0)) as port:
        pass  # nobody listens there now
    raw = await _refusal(
        "api.openai.com", "GET /v1/models", [{"hostnames": ["api.openai.com"]}], aliased(port, "api.openai.com")
    )
    said = str(await _raised(raw, _openai, openai.InternalServerError))
    assert said.startswith("Error code: 502 - clrk: connect to api.openai.com:443: connection_refused")
    assert json.loads(raw.partition(b"\r\n\r\n")[2])["reason"] == "connection_refused"


async def test_a_host_that_nobody_declared_is_answered_in_words_that_openais_sdk_shows():
    """Which SDK asks a host that is no known provider, and not by the path of an API of models, nothing says."""
    raw = await _refusal("llm.internal", "GET /v1/models", [{"hostnames": ["llm.internal"], "ports": [80]}], {})
    found = json.loads(raw.partition(b"\r\n\r\n")[2])
    said = str(await _raised(raw, _openai, openai.PermissionDeniedError))
    assert said.startswith("Error code: 403 - clrk: GET llm.internal:443 is not allowed (port_not_allowed)")
    assert found["add_rule"] in said
    assert {"type", "title", "status", "detail", "reason", "invocation_id"} < set(found)


_ANY_STATUS = (openai.APIStatusError, anthropic.APIStatusError, GoogleApiError, ClientError)


def _broken(*_: object) -> None:
    raise ValueError("a bug of ours")


@pytest.mark.parametrize(
    "govern",
    [
        pytest.param(_broken, id="finding"),
        pytest.param(lambda *_: Judge(fails="judge"), id="judging"),
        pytest.param(lambda *_: Judge(fails="rewrite_request"), id="rewriting"),
    ],
)
@pytest.mark.parametrize(("host", "line", "client", "_error"), CLIENTS)
async def test_the_sdks_exception_says_that_a_governor_broke(host, line, client, _error, govern):
    raw = await _refusal(host, line, [{"hostnames": [host]}], {}, govern)
    assert raw.startswith(b"HTTP/1.1 503 ")
    found = json.loads(raw.partition(b"\r\n\r\n")[2])
    assert found["reason"] == "governor_failed"
    said = str(await _raised(raw, client, _ANY_STATUS))
    assert f"clrk: {found['detail']}" in said
