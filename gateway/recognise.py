"""Which exchanges mean more than HTTP: one place that maps a request's host and shape to an interpreter.

Two tables. `PROVIDERS` says who a host is, `APIS` which path shapes are which API. An operator's AIProviderRoute says
who a self-hosted server is, and goes before the table. A path shape on a host that nobody knows is read in the dialect
that invented it, without a price, if the request is JSON and names a model. Adding a provider is a row (or a dialect in
gateway/llm and two rows).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Final

from clrk.core.egress_resources import EgressGateway
from clrk.core.route_resources import AIProviderRoute
from clrk.gateway.interpret import Allowance, Interpreter, RequestHead
from clrk.gateway.llm import bedrock_converse, bedrock_invoke, gemini, vertex
from clrk.gateway.llm.anthropic import AnthropicMessages
from clrk.gateway.llm.body import is_json, media_type
from clrk.gateway.llm.completion import Provider
from clrk.gateway.llm.cost import BUNDLED, PriceList
from clrk.gateway.llm.dialect import Dialect
from clrk.gateway.llm.interpreter import LlmInterpreter
from clrk.gateway.llm.ollama import OllamaChat, OllamaGenerate
from clrk.gateway.llm.openai_chat import OpenAiChat, OpenAiCompletions
from clrk.gateway.llm.openai_embeddings import OpenAiEmbeddings
from clrk.gateway.llm.openai_responses import OpenAiResponses
from clrk.gateway.mcp.conversations import Conversations
from clrk.gateway.mcp.interpreter import McpInterpreter, McpStream
from clrk.gateway.policy_names import HostPattern, normalise_name

# Values of gen_ai.provider.name: semconv 1.41.1; gen_ai.system: CONTRACT section 13, the protocol spoken.
_ANTHROPIC: Final = Provider("anthropic", "anthropic", "anthropic")
_OPENAI: Final = Provider("openai", "openai", "openai", asks_usage=True)
_AZURE: Final = Provider("azure.ai.openai", "azure_openai", "azure", asks_usage=True)
_COMPATIBLE: Final = Provider("openai_compatible", "openai", asks_usage=True)
_GEMINI: Final = Provider("gcp.gemini", "google_genai", "google", asks_usage=True)
_VERTEX: Final = Provider("gcp.vertex_ai", "google_genai", "google", asks_usage=True)
_BEDROCK: Final = Provider("aws.bedrock", "aws_bedrock", "aws", asks_usage=True)

# Who a host is; `.x` stands for any name below x.
PROVIDERS: Final[dict[str, Provider]] = {
    "api.anthropic.com": _ANTHROPIC,
    "api.openai.com": _OPENAI,
    "api.deepseek.com": Provider("deepseek", "openai", "deepseek"),
    "api.groq.com": Provider("groq", "openai", "groq"),
    "api.mistral.ai": Provider("mistral_ai", "openai", "mistral"),
    "api.perplexity.ai": Provider("perplexity", "openai", "perplexity"),
    "api.x.ai": Provider("x_ai", "openai", "x-ai"),
    ".openai.azure.com": _AZURE,
    ".cognitiveservices.azure.com": _AZURE,
    ".services.ai.azure.com": _AZURE,
    "generativelanguage.googleapis.com": _GEMINI,
    "aiplatform.googleapis.com": _VERTEX,
}

# Who a host is whose name has the region in it, in every form: FIPS, dual-stack, China, PrivateLink, multi-region.
_LABEL: Final = r"[a-z0-9-]+"
REGIONAL: Final[tuple[tuple[re.Pattern[str], Provider], ...]] = (
    (re.compile(rf"{_LABEL}-aiplatform\.(?:mtls\.)?googleapis\.com"), _VERTEX),
    (re.compile(rf"aiplatform\.{_LABEL}\.rep\.(?:mtls\.)?googleapis\.com"), _VERTEX),
    (
        re.compile(
            rf"bedrock-runtime(?:-fips)?\.{_LABEL}\.(?:amazonaws\.com(?:\.cn)?|api\.aws)"
            rf"|(?:{_LABEL}\.)?vpce-{_LABEL}\.bedrock-runtime(?:-fips)?\.{_LABEL}\.vpce\.amazonaws\.com"
        ),
        _BEDROCK,
    ),
    # Other providers' APIs with their own names of models, which do not say through which profile they are paid.
    (re.compile(rf"bedrock-mantle\.{_LABEL}\.api\.aws"), replace(_BEDROCK, price_id=None)),
)

# What an operator may call a host (core.route_resources.AI_PROVIDERS).
BY_OPERATOR: Final[dict[str, Provider]] = {
    "anthropic": _ANTHROPIC,
    "openai": _OPENAI,
    "azure_openai": _AZURE,
    "openai_compatible": _COMPATIBLE,
    "google_genai": _GEMINI,
    "aws_bedrock": _BEDROCK,
}


@dataclass(frozen=True, slots=True)
class Api:
    """One API: the shape of its paths (a base URL may put anything in front), and who is meant on unknown hosts.

    Shape: systems are the gen_ai.system values of the providers that serve it as their own. elsewhere None: only hosts
    that are known serve it, the path alone says too little.
    """

    path: re.Pattern[str]
    dialect: Callable[[RequestHead], Dialect]
    elsewhere: Provider | None
    systems: frozenset[str]

    def provider(self, known: Provider | None) -> Provider | None:
        """Return who serves this API: a known provider may speak another's too."""
        if known is None or known.system in self.systems:
            return known or self.elsewhere
        return replace(known, system=self.elsewhere.system if self.elsewhere is not None else min(self.systems))


_SPEAK_OPENAI: Final = frozenset(("openai", "azure_openai"))
_LIKE_OPENAI: Final = Provider("openai", "openai")
_SPEAK_OLLAMA: Final = frozenset(("ollama",))

APIS: Final = (
    Api(
        re.compile(r"/v1/messages/?$"),
        AnthropicMessages,
        Provider("anthropic", "anthropic"),
        frozenset(("anthropic",)),
    ),
    Api(re.compile(r"/chat/completions/?$"), OpenAiChat, _LIKE_OPENAI, _SPEAK_OPENAI),
    Api(re.compile(r"(?<!/chat)/completions/?$"), OpenAiCompletions, _LIKE_OPENAI, _SPEAK_OPENAI),
    Api(re.compile(r"/responses/?$"), OpenAiResponses, _LIKE_OPENAI, _SPEAK_OPENAI),
    Api(re.compile(r"/embeddings/?$"), OpenAiEmbeddings, _LIKE_OPENAI, _SPEAK_OPENAI),
    Api(re.compile(r"/api/chat/?$"), OllamaChat, None, _SPEAK_OLLAMA),
    Api(re.compile(r"/api/generate/?$"), OllamaGenerate, None, _SPEAK_OLLAMA),
    Api(gemini.PATH, gemini.GeminiContent, Provider("gcp.gen_ai", "google_genai"), frozenset(("google_genai",))),
    Api(gemini.PREDICT_PATH, gemini.GeminiContent, None, frozenset(("google_genai",))),
    Api(
        vertex.ANTHROPIC_PATH,
        vertex.VertexAnthropic,
        Provider("anthropic", "anthropic"),
        frozenset(("anthropic",)),
    ),
    Api(vertex.OPENAI_PATH, vertex.VertexOpenAi, _LIKE_OPENAI, _SPEAK_OPENAI),
    Api(
        bedrock_converse.PATH,
        bedrock_converse.BedrockConverse,
        Provider("aws.bedrock", "aws_bedrock"),
        frozenset(("aws_bedrock",)),
    ),
    Api(bedrock_invoke.PATH, bedrock_invoke.BedrockInvoke, None, frozenset(("aws_bedrock",))),
)


class KnownHosts:
    """Who a host is, by the operator's word and by the table."""

    def __init__(self, gateway: EgressGateway | None = None, routes: Sequence[AIProviderRoute] = ()) -> None:
        """Take the routes of a gateway, in their order; those of others are passed over."""
        self._own = tuple(
            (HostPattern.compile(host), BY_OPERATOR[match.provider])
            for route in routes
            if gateway is not None
            and route.spec.gateway_ref.name == gateway.metadata.name
            and route.metadata.namespace == gateway.metadata.namespace
            for rule in route.spec.rules
            for match in rule.matches
            if match.provider in BY_OPERATOR
            for host in match.hostnames
        )

    def provider(self, host: str) -> Provider | None:
        """Return the provider that a host is known to be."""
        name = normalise_name(host) or host.lower()
        for pattern, provider in self._own:
            if pattern.matches(name):
                return provider
        if (known := PROVIDERS.get(name)) is not None:
            return known
        for suffix, provider in PROVIDERS.items():
            if suffix[0] == "." and name.endswith(suffix):
                return provider
        return next((provider for shape, provider in REGIONAL if shape.fullmatch(name)), None)


_TABLE: Final = KnownHosts()
_MAX_CACHED_PATH: Final = 256


def _apis_at(path: str) -> tuple[Api, ...]:
    """Return the APIs that have such a path. Nearly all calls are of few paths, and most are of no API."""
    return _find_apis(path) if len(path) <= _MAX_CACHED_PATH else _find_apis.__wrapped__(path)


@lru_cache(maxsize=512)
def _find_apis(path: str) -> tuple[Api, ...]:
    return tuple(api for api in APIS if api.path.search(path) is not None)


def _no_host(host: str) -> bool:
    return False


@dataclass(frozen=True, slots=True)
class KnownMcp:
    """What is known of MCP beforehand: hosts that serve it, by the operator's word, and what the run said so far."""

    is_host: Callable[[str], bool] = _no_host
    conversations: Conversations = field(default_factory=Conversations)


def recognise(
    head: RequestHead,
    allowance: Allowance | None = None,
    hosts: KnownHosts = _TABLE,
    prices: PriceList = BUNDLED,
    mcp: KnownMcp | None = None,
) -> Interpreter | None:
    """Return the interpreter of an exchange, None when it is a plain HTTP call.

    Shape: allowance, hosts, prices and mcp are the run's, shared by its exchanges.

    An MCP interpreter is a suspicion until the body has shown `"jsonrpc"`; without it its Facts have no name and no
    attributes, and the call stays plain HTTP. GET streams and DELETE of an MCP session are plain HTTP by their names:
    they carry no request of the agent.
    """
    allowance, mcp = allowance or Allowance(), mcp or KnownMcp()
    if head.method != "POST":
        return McpStream(head, allowance, mcp.conversations) if _may_be_mcp_stream(head) else None
    if mcp.is_host(head.host) or mcp.conversations.is_endpoint(head):
        return McpInterpreter(head, allowance, mcp.conversations, sure=True)
    json_body = is_json(head.header("content-type"))
    for api in _apis_at(head.path):
        known = hosts.provider(head.host)
        provider = api.provider(known)
        if provider is not None and (known is not None or json_body):
            dialect = api.dialect(head)
            return LlmInterpreter(head, provider, dialect, allowance, prices=prices, sure=known is not None)
    if json_body and _may_be_mcp(head):
        return McpInterpreter(head, allowance, mcp.conversations)
    return None


def _may_be_mcp_stream(head: RequestHead) -> bool:
    """A GET that asks for events (what they are shows whether it is MCP), or the end of a session."""
    if head.method == "GET":
        return any(name.lower() == "accept" and "text/event-stream" in value.lower() for name, value in head.headers)
    return head.method == "DELETE" and head.header("mcp-session-id") is not None


def find_client_errors(head: RequestHead, hosts: KnownHosts = _TABLE) -> Dialect:
    """Return who words errors for the SDK that sent a request, by its host or path; OpenAI's dialect otherwise."""
    provider = hosts.provider(head.host)
    if provider is None and (apis := [api for api in _apis_at(head.path) if api.elsewhere is not None]):
        return apis[0].dialect(head)
    return find_error_writer(provider, head)


def find_error_writer(provider: Provider | None, head: RequestHead) -> Dialect:
    """Return who words a provider's errors; for one that is not known, OpenAI's dialect does."""
    spoken = (provider.system if provider is not None else "", "openai")
    return next(api for system in spoken for api in APIS if system in api.systems).dialect(head)


def _may_be_mcp(head: RequestHead) -> bool:
    """Streamable HTTP: a client MUST accept both kinds of answer, and names session and version in Mcp headers."""
    if any(name.lower().startswith("mcp-") for name, _ in head.headers):
        return True
    accepted = ",".join(value for name, value in head.headers if name.lower() == "accept")
    kinds = {media_type(item) for item in accepted.split(",")}
    return {"application/json", "text/event-stream"} <= kinds
