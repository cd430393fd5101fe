"""The resource kinds that govern calls, AIProviderRoute, MCPRoute, CredentialInjectionPolicy (CONTRACT section 3)."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from clrk.core.values import DnsLabel, GatewayRef, HostPattern, Model, Regex, Resource, parse_whole_quantity

# Values of gen_ai.system (CONTRACT section 13), plus the servers that only speak a provider's language.
AI_PROVIDERS: Final = ("anthropic", "openai", "google_genai", "azure_openai", "aws_bedrock", "openai_compatible")
ProviderName = Literal["anthropic", "openai", "google_genai", "azure_openai", "aws_bedrock", "openai_compatible"]
Glob = Annotated[str, Field(min_length=1, max_length=256)]
PathGlob = Annotated[str, Field(pattern=r"^[/*][^?#]*$", max_length=256)]


def _parse_tokens(value: object) -> int:
    try:
        return parse_whole_quantity(value)
    except ValueError:
        raise ValueError(f"{value!r} is not a number of tokens; write for example 5000, 200k or 2M") from None


TokenCount = Annotated[int, BeforeValidator(_parse_tokens), Field(ge=0, le=2**53)]
Usd = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]
_FRAMING_HEADERS: Final = frozenset(
    "host content-length content-type content-encoding transfer-encoding connection keep-alive proxy-connection te "
    "trailer upgrade expect accept-encoding traceparent tracestate baggage".split()
)
HeaderName = Annotated[str, Field(pattern=r"^[!#$%&'*+.^_`|~0-9A-Za-z-]{1,256}$")]


# --- AIProviderRoute ------------------------------------------------------------------------------------------------


class TokenBudget(Model):
    """What may be spent (CONTRACT section 12). Days are UTC. A limit that is not given does not limit.

    Shape: key says who shares the daily limits: the agent, everybody who uses the route, or everybody with the same
        value of an identity field. max_output_tokens_per_request is of all choices together, and is given to requests
        that have no limit of their own; without it, those reserve as much as a model may generate, or all that is left.
    """

    max_tokens_per_day: TokenCount | None = None
    max_tokens_per_execution: TokenCount | None = None
    max_output_tokens_per_request: TokenCount | None = None
    max_usd_per_day: Usd | None = Field(default=None, alias="maxUSDPerDay")
    max_usd_per_execution: Usd | None = Field(default=None, alias="maxUSDPerExecution")
    key: Annotated[str, Field(pattern=r"^(agent|route|identity\.[a-z][a-z0-9_]{0,62})$")] = "agent"

    @model_validator(mode="after")
    def _some_limit(self) -> TokenBudget:
        if all(value is None for name, value in self if name != "key"):
            raise ValueError("give at least one limit, such as maxTokensPerDay")
        return self


class TokenBudgetFilter(Model):
    """Spends what the calls of a rule use."""

    type: Literal["TokenBudget"]
    token_budget: TokenBudget


class AIMatch(Model):
    """A call fits if everything that is given fits. hostnames of self-hosted servers make them the given provider.

    Shape: endpoints are globs of request paths, models of the requested model; `*` is any text.
    """

    provider: ProviderName | None = None
    hostnames: list[HostPattern] = []
    endpoints: list[PathGlob] = []
    models: list[Glob] = []


class BackendRef(Model):
    """Where the calls of a rule go instead of where the agent sent them."""

    hostname: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$", max_length=253)]
    port: Annotated[int, Field(ge=1, le=65_535)] = 443


class AIRule(Model):
    """The first rule whose matches fit a call is the call's; without matches it fits every LLM call."""

    matches: list[AIMatch] = []
    filters: Annotated[list[TokenBudgetFilter], Field(max_length=8)] = []
    backend_refs: Annotated[list[BackendRef], Field(max_length=1)] = []


class AIProviderRouteSpec(Model):
    """Rules for LLM calls of one gateway."""

    gateway_ref: GatewayRef = GatewayRef()
    rules: Annotated[list[AIRule], Field(min_length=1)]


class AIProviderRoute(Resource):
    """Governs LLM calls. Allows no destination: that is EgressL4Route's."""

    kind: Literal["AIProviderRoute"]
    spec: AIProviderRouteSpec


# --- MCPRoute -------------------------------------------------------------------------------------------------------


class ToolPolicy(Model):
    """Which tools may be called: denied ones never; where anything is allowed by name, only that; else the rest.

    Shape: regular expressions are RE2 and have to fit the whole name.
    """

    allowed_tools: list[str] | None = None
    denied_tools: list[str] = []
    allowed_tools_regex: Regex | None = None
    denied_tools_regex: Regex | None = None
    max_calls_per_execution: Annotated[int, Field(ge=0)] | None = None

    @field_validator("allowed_tools")
    @classmethod
    def _some_tool(cls, tools: list[str] | None) -> list[str] | None:
        if tools == []:
            raise ValueError("an empty list allows every tool; to allow none, give deniedToolsRegex '.*'")
        return tools


class ToolPolicyFilter(Model):
    """Judges the calls of a rule."""

    type: Literal["ToolPolicy"]
    tool_policy: ToolPolicy


class MCPMatch(Model):
    """A message fits if everything that is given fits. methods and resources are globs with `*`."""

    tools: list[str] = []
    tools_regex: Regex | None = None
    methods: list[Glob] = []
    resources: list[Glob] = []


class MCPRule(Model):
    """The first rule whose matches fit a message is the message's; without matches it fits every one."""

    matches: list[MCPMatch] = []
    filters: Annotated[list[ToolPolicyFilter], Field(max_length=8)] = []


class MCPRouteSpec(Model):
    """Rules for the MCP servers at hostnames."""

    gateway_ref: GatewayRef = GatewayRef()
    hostnames: list[HostPattern] = []
    rules: Annotated[list[MCPRule], Field(min_length=1)]


class MCPRoute(Resource):
    """Governs MCP calls. Allows no destination: that is EgressL4Route's."""

    kind: Literal["MCPRoute"]
    spec: MCPRouteSpec


# --- CredentialInjectionPolicy --------------------------------------------------------------------------------------


class TargetRef(Model):
    """A route of the same namespace: its hosts get the credential."""

    kind: Literal["EgressL4Route", "AIProviderRoute", "MCPRoute"]
    name: DnsLabel


class SecretRef(Model):
    """Names a Secret of the same namespace."""

    name: DnsLabel


def _check_free_header(value: str) -> str:
    if value.lower() in _FRAMING_HEADERS:
        raise ValueError(f"{value!r} says how the request is carried, which is not a credential's to change")
    return value


class HeaderTarget(Model):
    """The header is overwritten with prefix and secret; the prefix is taken to the letter, `Bearer ` with its blank."""

    type: Literal["Header"]
    header_name: Annotated[HeaderName, AfterValidator(_check_free_header)] = "Authorization"
    prefix: Annotated[str, Field(pattern=r"^[\t\x20-\x7e]*$", max_length=256)] = ""


class QueryParamTarget(Model):
    """The parameter of the query is overwritten with the secret."""

    type: Literal["QueryParam"]
    query_param_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._~-]{1,128}$")]


AWS_KEYS: Final = ("accessKeyId", "secretAccessKey")
AWS_SESSION_KEY: Final = "sessionToken"  # temporary keys have one


class AwsSigV4Target(Model):
    """The request is signed anew (AWS Signature Version 4).

    Shape: the Secret holds accessKeyId, secretAccessKey and, for temporary ones, sessionToken; secretKey is not used.
        region empty: taken from the host name, as in bedrock-runtime.eu-central-1.amazonaws.com.
    """

    type: Literal["AwsSigV4"]
    service: Annotated[str, Field(pattern=r"^[a-z0-9-]{1,64}$")] = "bedrock"
    region: Annotated[str, Field(pattern=r"^([a-z0-9-]{1,32})?$")] = ""


CredentialTarget = Annotated[HeaderTarget | QueryParamTarget | AwsSigV4Target, Field(discriminator="type")]


class CredentialInjectionPolicySpec(Model):
    """Puts a secret into requests on their way out, over TLS and to these hosts only.

    Shape: hostnames narrow what targetRefs name, or name hosts by themselves.
    """

    target_refs: list[TargetRef] = []
    hostnames: list[HostPattern] = []
    secret_ref: SecretRef
    secret_key: str = "token"  # noqa: S105 - the name of a key in a Secret
    target: CredentialTarget

    @model_validator(mode="after")
    def _some_host(self) -> CredentialInjectionPolicySpec:
        if not self.target_refs and not self.hostnames:
            raise ValueError("give targetRefs or hostnames; a policy without either would reach no host")
        return self

    @property
    def required_keys(self) -> tuple[str, ...]:
        """Return the keys that the Secret has to have, each with a value."""
        return AWS_KEYS if isinstance(self.target, AwsSigV4Target) else (self.secret_key,)

    @property
    def optional_keys(self) -> tuple[str, ...]:
        """Return the keys that are used where they are there."""
        return (AWS_SESSION_KEY,) if isinstance(self.target, AwsSigV4Target) else ()


class CredentialInjectionPolicy(Resource):
    """Keeps a credential out of the sandbox."""

    kind: Literal["CredentialInjectionPolicy"]
    spec: CredentialInjectionPolicySpec
