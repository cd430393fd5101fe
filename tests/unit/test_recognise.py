"""Which requests get an interpreter, and which stay plain HTTP."""

from __future__ import annotations

from dataclasses import replace

import pytest
from llm_exchange import JSON, post

from clrk.gateway.interpret import RequestHead, ResponseHead
from clrk.gateway.llm.anthropic import AnthropicMessages
from clrk.gateway.llm.interpreter import LlmInterpreter
from clrk.gateway.llm.openai_chat import OpenAiChat
from clrk.gateway.mcp.interpreter import McpInterpreter
from clrk.gateway.recognise import recognise

FORM = (("Content-Type", "application/x-www-form-urlencoded"),)
ACCEPT_BOTH = ("accept", "text/event-stream;q=0.9 , application/json")


@pytest.mark.parametrize(
    ("head", "dialect"),
    [
        (post("api.anthropic.com", "/v1/messages"), AnthropicMessages),
        (post("api.anthropic.com", "/v1/messages", *FORM), AnthropicMessages),
        (post("API.ANTHROPIC.COM.", "/v1/messages/"), AnthropicMessages),
        (post("llm.internal", "/anthropic/v1/messages"), AnthropicMessages),
        (post("api.openai.com", "/v1/chat/completions"), OpenAiChat),
        (post("api.openai.com", "/v1/chat/completions", ACCEPT_BOTH), OpenAiChat),
        (post("10.0.0.5", "/v1/chat/completions"), OpenAiChat),
        (post("me.openai.azure.com", "/openai/deployments/d/chat/completions"), OpenAiChat),
    ],
)
def test_llm_calls(head: RequestHead, dialect: type) -> None:
    interpreter = recognise(head)
    assert isinstance(interpreter, LlmInterpreter)
    assert isinstance(interpreter._dialect, dialect)


@pytest.mark.parametrize(
    "head",
    [
        post("h", "/mcp", *JSON, ("Accept", "application/json, text/event-stream")),
        post("h", "/mcp", *JSON, ACCEPT_BOTH),
        post("h", "/", *JSON, ("Accept", "application/json"), ("Accept", "text/event-stream")),
        post("h", "/mcp", *JSON, ("mcp-session-id", "x")),
        post("h", "/mcp", *JSON, ("MCP-PROTOCOL-VERSION", "2025-06-18")),
        post("api.openai.com", "/mcp", *JSON, ("Mcp-Method", "tools/call")),
    ],
)
def test_mcp_suspects(head: RequestHead) -> None:
    assert isinstance(recognise(head), McpInterpreter)


@pytest.mark.parametrize(
    "head",
    [
        post("tools.internal", "/v1/users"),
        post("tools.internal", "/v1/users", *JSON, ("Accept", "*/*")),
        post("tools.internal", "/v1/users", *JSON, ("Accept", "application/json")),
        post("tools.internal", "/events", *JSON, ("Accept", "text/event-stream")),
        post("tools.internal", "/mcp", *FORM, ("Accept", "application/json, text/event-stream")),
        post("tools.internal", "/mcp", *FORM, ("Mcp-Session-Id", "x")),
        post("tools.internal", "/v1/messages", *FORM),
        post("tools.internal", "/v1/chat/completions", *FORM),
        post("api.anthropic.com", "/v1/messages/count_tokens"),
        post("api.anthropic.com", "/v1/messages/batches"),
        post("api.openai.com", "/v1/chat/completions/abc"),
        post("api.openai.com", "/v1/embeddings"),
        replace(post("api.anthropic.com", "/v1/messages"), method="GET"),
        replace(post("h", "/mcp", *JSON, ("Mcp-Session-Id", "x")), method="DELETE"),
        replace(post("h", "/mcp", *JSON, ACCEPT_BOTH), method="GET"),
    ],
)
def test_plain_http(head: RequestHead) -> None:
    assert recognise(head) is None


def test_each_exchange_has_its_own_state() -> None:
    head = post("api.openai.com", "/v1/chat/completions")
    assert recognise(head) is not recognise(head)


def test_bytes_pass_an_interpreter_that_was_told_nothing() -> None:
    for head in (post("api.openai.com", "/v1/chat/completions"), post("h", "/mcp", *JSON, ("Mcp-Session-Id", "x"))):
        interpreter = recognise(head)
        assert interpreter is not None
        interpreter.facts()
        assert interpreter.rewrite_request(b"x") == b"x"
        assert interpreter.response_data(b"early", 0.1) == b"early"
        assert interpreter.response_end(complete=True) == b""
        interpreter.response_head(ResponseHead(200, ()), 0.1)
        assert interpreter.response_data(b"", 0.1) == b""
        interpreter.facts()
