"""Which requests get an interpreter, and which stay plain HTTP."""

from __future__ import annotations

from dataclasses import replace

import pytest
from llm_exchange import JSON, post

from clrk.core.egress_resources import EgressGateway
from clrk.core.route_resources import AIProviderRoute
from clrk.gateway.interpret import RequestHead, ResponseHead
from clrk.gateway.llm.anthropic import AnthropicMessages
from clrk.gateway.llm.interpreter import LlmInterpreter
from clrk.gateway.llm.openai_chat import OpenAiChat, OpenAiCompletions
from clrk.gateway.llm.openai_embeddings import OpenAiEmbeddings
from clrk.gateway.llm.openai_responses import OpenAiResponses
from clrk.gateway.mcp.interpreter import McpInterpreter, McpStream
from clrk.gateway.recognise import KnownHosts, KnownMcp, recognise

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
        (post("api.openai.com", "/v1/completions"), OpenAiCompletions),
        (post("api.openai.com", "/v1/responses"), OpenAiResponses),
        (post("me.openai.azure.com", "/openai/v1/responses"), OpenAiResponses),
        (post("me.cognitiveservices.azure.com", "/openai/responses/"), OpenAiResponses),
        (post("10.0.0.5", "/v1/embeddings"), OpenAiEmbeddings),
    ],
)
def test_llm_calls(head: RequestHead, dialect: type) -> None:
    interpreter = recognise(head)
    assert isinstance(interpreter, LlmInterpreter)
    assert type(interpreter.dialect) is dialect


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
        post("api.openai.com", "/v1/responses/resp_1/cancel"),
        post("api.openai.com", "/v1/batches"),
        post("stranger.test", "/api/chat"),
        replace(post("api.anthropic.com", "/v1/messages"), method="GET"),
        replace(post("h", "/mcp", *JSON), method="DELETE"),
        replace(post("h", "/mcp", *JSON, ("Mcp-Session-Id", "x")), method="GET"),
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


ROUTE = {
    "apiVersion": "clrk/v1alpha1",
    "kind": "AIProviderRoute",
    "metadata": {"name": "self-hosted"},
    "spec": {
        "rules": [
            {"matches": [{"provider": "openai_compatible", "hostnames": ["llm.internal", "*.gpu.internal"]}]},
            {"matches": [{"provider": "anthropic", "hostnames": ["api.openai.com", "10.0.0.5"]}]},
            {"matches": [{"hostnames": ["nobody.internal"]}, {"provider": "openai"}]},
        ]
    },
}


def known_hosts(gateway: str = "default", namespace: str = "default") -> KnownHosts:
    route = AIProviderRoute.model_validate(ROUTE)
    meta = {"name": gateway, "namespace": namespace}
    return KnownHosts(
        EgressGateway.model_validate({"apiVersion": "clrk/v1alpha1", "kind": "EgressGateway", "metadata": meta}),
        [route],
    )


@pytest.mark.parametrize(
    ("host", "provider"),
    [
        ("llm.internal", "openai_compatible"),
        ("LLM.internal.", "openai_compatible"),
        ("a.gpu.internal", "openai_compatible"),
        ("a.b.gpu.internal", None),
        ("api.openai.com", "anthropic"),
        ("10.0.0.5", "anthropic"),
        ("nobody.internal", None),
        ("me.openai.azure.com", "azure.ai.openai"),
        ("openai.azure.com", None),
        ("api.anthropic.com.evil.test", None),
        ("evil-api.anthropic.com", None),
    ],
)
def test_who_a_host_is(host: str, provider: str | None) -> None:
    found = known_hosts().provider(host)
    assert (found.name if found is not None else None) == provider


@pytest.mark.parametrize(("gateway", "namespace"), [("other", "default"), ("default", "other")])
def test_routes_of_other_gateways_say_nothing(gateway: str, namespace: str) -> None:
    assert known_hosts(gateway, namespace).provider("llm.internal") is None


def test_a_known_provider_may_speak_anothers_protocol() -> None:
    interpreter = recognise(post("llm.internal", "/v1/messages", *FORM), hosts=known_hosts())
    assert isinstance(interpreter, LlmInterpreter)
    assert (interpreter.provider.name, interpreter.provider.system) == ("openai_compatible", "anthropic")
    ollama = recognise(post("llm.internal", "/api/chat", *FORM), hosts=known_hosts())
    assert isinstance(ollama, LlmInterpreter)
    assert (ollama.provider.name, ollama.provider.system) == ("openai_compatible", "ollama")
    claude = recognise(post("api.anthropic.com", "/v1/chat/completions"))
    assert isinstance(claude, LlmInterpreter)
    assert (claude.provider.name, claude.provider.system) == ("anthropic", "openai")
    azure = recognise(post("me.openai.azure.com", "/openai/v1/chat/completions"))
    assert isinstance(azure, LlmInterpreter)
    assert (azure.provider.name, azure.provider.system) == ("azure.ai.openai", "azure_openai")


@pytest.mark.parametrize(
    ("host", "body", "name"),
    [
        ("stranger.test", b'{"answers": [1]}', ""),
        ("stranger.test", b"not json", ""),
        ("stranger.test", b'{"model": "m"}', "chat m"),
        ("api.openai.com", b"not json", "chat"),
    ],
)
def test_on_an_unknown_host_the_request_has_to_name_a_model(host: str, body: bytes, name: str) -> None:
    interpreter = recognise(post(host, "/v1/chat/completions"))
    assert interpreter is not None
    interpreter.request_data(body)
    interpreter.request_end()
    assert interpreter.facts().name == name


def test_what_an_mcp_session_is_besides_posts() -> None:
    for method, header in (("DELETE", ("Mcp-Session-Id", "x")), ("GET", ACCEPT_BOTH)):
        assert isinstance(recognise(replace(post("h", "/mcp", header), method=method)), McpStream)


def test_a_host_that_an_mcp_route_names_needs_no_headers() -> None:
    known = KnownMcp(lambda host: host == "h")
    assert isinstance(recognise(post("h", "/x", *FORM), mcp=known), McpInterpreter)
    assert recognise(post("other", "/x", *FORM), mcp=known) is None
