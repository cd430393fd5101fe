"""Which exchanges mean more than HTTP: one place that maps a request's host and shape to an interpreter.

A provider is a row: hosts it is known by and the path shapes of its APIs. A path shape on a host that nobody knows is
read in the dialect that invented it, without a price. Adding a provider is a dialect in gateway/llm and a row here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from clrk.gateway.interpret import Allowance, Interpreter, RequestHead
from clrk.gateway.llm.anthropic import AnthropicMessages
from clrk.gateway.llm.body import is_json, media_type
from clrk.gateway.llm.completion import Provider
from clrk.gateway.llm.dialect import Dialect
from clrk.gateway.llm.interpreter import LlmInterpreter
from clrk.gateway.llm.openai_chat import OpenAiChat
from clrk.gateway.mcp.interpreter import McpInterpreter


@dataclass(frozen=True, slots=True)
class Api:
    """One API by the end of its path; hosts that are known to serve it, `.x` standing for any name below x."""

    path_end: str
    dialect: Callable[[], Dialect]
    hosts: dict[str, Provider]
    elsewhere: Provider

    def fits_path(self, path: str) -> bool:
        """Say whether a request path is this API's; a base URL may put anything in front."""
        return path.rstrip("/").endswith(self.path_end)

    def provider(self, host: str) -> Provider | None:
        """Return the provider that a host is known to be."""
        name = host.lower().rstrip(".")
        if (known := self.hosts.get(name)) is not None:
            return known
        return next((found for suffix, found in self.hosts.items() if suffix[0] == "." and name.endswith(suffix)), None)


_ANTHROPIC: Final = Provider("anthropic", "anthropic", "anthropic")
_OPENAI: Final = Provider("openai", "openai", "openai", asks_usage=True)

# Values of gen_ai.provider.name: semconv 1.41.1; gen_ai.system: CONTRACT section 13, the protocol spoken.
APIS: Final = (
    Api(
        "/v1/messages",
        AnthropicMessages,
        {"api.anthropic.com": _ANTHROPIC},
        Provider("anthropic", "anthropic"),
    ),
    Api(
        "/chat/completions",
        OpenAiChat,
        {
            "api.openai.com": _OPENAI,
            "api.deepseek.com": Provider("deepseek", "openai", "deepseek"),
            "api.groq.com": Provider("groq", "openai", "groq"),
            "api.mistral.ai": Provider("mistral_ai", "openai", "mistral"),
            "api.perplexity.ai": Provider("perplexity", "openai", "perplexity"),
            "api.x.ai": Provider("x_ai", "openai", "x-ai"),
            ".openai.azure.com": Provider("azure.ai.openai", "azure_openai", "azure"),
        },
        Provider("openai", "openai"),
    ),
)


def recognise(head: RequestHead, allowance: Allowance | None = None) -> Interpreter | None:
    """Return the interpreter of an exchange, None when it is a plain HTTP call.

    Shape: allowance is the run's, shared by its exchanges.

    An MCP interpreter is a suspicion until the body has shown `"jsonrpc"`; without it its Facts have no name and no
    attributes, and the call stays plain HTTP. GET streams and DELETE of an MCP session are plain HTTP: they carry no
    request of the agent.
    """
    if head.method != "POST":
        return None
    allowance = allowance or Allowance()
    json_body = is_json(head.header("content-type"))
    for api in APIS:
        if not api.fits_path(head.path):
            continue
        provider = api.provider(head.host)
        if provider is not None or json_body:
            return LlmInterpreter(head, provider or api.elsewhere, api.dialect(), allowance)
    if json_body and _may_be_mcp(head):
        return McpInterpreter(head, allowance)
    return None


def _may_be_mcp(head: RequestHead) -> bool:
    """Streamable HTTP: a client MUST accept both kinds of answer, and names session and version in Mcp headers."""
    if any(name.lower().startswith("mcp-") for name, _ in head.headers):
        return True
    accepted = ",".join(value for name, value in head.headers if name.lower() == "accept")
    kinds = {media_type(item) for item in accepted.split(",")}
    return {"application/json", "text/event-stream"} <= kinds
