"""The resource kinds of this version (CONTRACT section 3), as pydantic models. Unknown fields are errors."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field, model_validator

from clrk.core.egress_resources import EgressGateway, EgressL4Route
from clrk.core.ids import agent_uid
from clrk.core.route_resources import AIProviderRoute, CredentialInjectionPolicy, MCPRoute
from clrk.core.values import (
    DnsLabel,
    GatewayRef,
    IdentityField,
    IdentityHeader,
    IpPort,
    JsonPath,
    Model,
    Resource,
    Schedule,
    Seconds,
    parse_quantity,
)

MAX_TIMEOUT_S: Final = 3600.0
MAX_BODY_BYTES: Final = 32 * 1024 * 1024


# --- Runtime --------------------------------------------------------------------------------------------------------


class Listener(Model):
    """One listening address."""

    listen: IpPort


class UidRange(Model):
    """Numeric uids (and equal gids) that belong to clrk: the first is the gateway's, the rest are the sandboxes'."""

    start: Annotated[int, Field(ge=1000, le=2**31)] = 2_000_000
    count: Annotated[int, Field(ge=2, le=65_536)] = 4096


class HostLimits(Model):
    """Ceilings of the whole host, and of each sandbox where the resources of an agent do not name one."""

    max_sandboxes: Annotated[int, Field(ge=1, le=4096)] = 256  # as many as the kernel map clrk_sandboxes holds
    max_open_files: Annotated[int, Field(ge=64, le=1_048_576)] = 4096  # of each process in a sandbox


class RuntimeSpec(Model):
    """The host daemon."""

    ingress: Listener = Listener(listen="127.0.0.1:8080")
    admin: Listener = Listener(listen="127.0.0.1:8081")
    state_dir: str = "/var/lib/clrk"
    uid_range: UidRange = UidRange()
    limits: HostLimits = HostLimits()
    retention: Seconds = 7 * 86_400.0


class Runtime(Resource):
    """At most one."""

    kind: Literal["Runtime"]
    spec: RuntimeSpec = RuntimeSpec()


# --- TaskAgent ------------------------------------------------------------------------------------------------------


class SecretKeyRef(Model):
    """One key of a Secret in the agent's namespace."""

    name: DnsLabel
    key: str


class ValueFrom(Model):
    """Where an environment value comes from."""

    secret_key_ref: SecretKeyRef


class EnvVar(Model):
    """One environment variable of the agent."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
    value: str | None = None
    value_from: ValueFrom | None = None

    @model_validator(mode="after")
    def _one_source(self) -> EnvVar:
        if (self.value is None) == (self.value_from is None):
            raise ValueError("give either value or valueFrom")
        return self


class Mount(Model):
    """A host path shown in the sandbox. A relative hostPath is relative to the file that declares it."""

    host_path: str
    path: Annotated[str, Field(pattern=r"^/")]
    read_only: bool = True


class TemplateSpec(Model):
    """What to run."""

    command: Annotated[list[str], Field(min_length=1)]
    args: list[str] = []
    env: list[EnvVar] = []
    workdir: Annotated[str, Field(pattern=r"^/")] = "/tmp"  # noqa: S108 - the sandbox's own
    rootfs: Annotated[str, Field(pattern=r"^/")] = "/"
    mounts: list[Mount] = []


class Template(Model):
    """Wrapper, as in Kubernetes."""

    spec: TemplateSpec


class Resources(Model):
    """cgroup limits of one sandbox. cpu in CPUs, memory in bytes."""

    cpu: Annotated[float, BeforeValidator(parse_quantity), Field(gt=0)] = 1.0
    memory: Annotated[float, BeforeValidator(parse_quantity), Field(ge=4 * 2**20)] = 512 * 2**20
    pids: Annotated[int, Field(ge=4)] = 256


class EgressRef(Model):
    """Which gateway carries the agent's calls."""

    gateway_ref: GatewayRef


class Delivery(Model):
    """How the agent gets the event and gives its answer (CONTRACT sections 5 to 7)."""

    mode: Literal["Stdin", "Metadata"] = "Stdin"
    content_type: str = "application/octet-stream"


class HeaderExtractor(Model):
    """Takes a request header's value; ce-* headers are the caller's word and are never an identity."""

    type: Literal["Header"]
    name: IdentityHeader
    field: IdentityField


class BodyExtractor(Model):
    """Takes the string, number or boolean that a JSONPath (RFC 9535) selects in a JSON body."""

    type: Literal["Body"]
    json_path: JsonPath
    field: IdentityField


class JwtExtractor(Model):
    """Takes a claim of the bearer token in `Authorization`; a token that does not verify is a 401.

    Shape: jwks is an https URL (http only to loopback), or a file relative to the declaring one.
    """

    type: Literal["JWT"]
    claim: Annotated[str, Field(min_length=1, max_length=256)]
    field: IdentityField
    jwks: Annotated[str, Field(min_length=1, max_length=4096)]
    issuer: Annotated[str, Field(min_length=1)]
    audience: Annotated[str, Field(min_length=1)]


Extractor = Annotated[HeaderExtractor | BodyExtractor | JwtExtractor, Field(discriminator="type")]


class IdentitySpec(Model):
    """Who the caller is, taken from the request (CONTRACT section 12)."""

    extractors: Annotated[list[Extractor], Field(max_length=32)] = []

    @model_validator(mode="after")
    def _distinct_fields(self) -> IdentitySpec:
        fields = [extractor.field for extractor in self.extractors]
        if twice := next((field for field in fields if fields.count(field) > 1), None):
            raise ValueError(f"two extractors give the field {twice!r}")
        return self


class Streaming(Model):
    """Whether the answer leaves as it is written, or whole when the agent has ended."""

    enabled: bool = True


class State(Model):
    """A folder that outlives the run, one per agent. Runs that share it must not overlap: maxConcurrent is 1."""

    size_limit_mb: Annotated[int, Field(alias="sizeLimitMB", ge=2, le=1_048_576)] = 100  # less holds no journal
    mount_path: Annotated[str, Field(pattern=r"^/")] = "/var/clrk/state"


class AgentSpec(Model):
    """What both kinds of agent have."""

    template: Template
    resources: Resources = Resources()
    egress_refs: Annotated[list[EgressRef], Field(max_length=1)] = []


class TaskAgentSpec(AgentSpec):
    """One run per request."""

    timeout: Annotated[Seconds, Field(gt=0, le=MAX_TIMEOUT_S)] = 100.0
    max_concurrent: Annotated[int, Field(ge=0)] = 0
    warm_pool_size: Annotated[int, Field(ge=0, le=1024)] = 0
    warm_pool_idle_ttl: Annotated[Seconds, Field(gt=0, alias="warmPoolIdleTTL")] = 600.0
    schedule: Schedule | None = None
    schedule_input: Any = None
    identity: IdentitySpec = IdentitySpec()
    delivery: Delivery = Delivery()
    streaming: Streaming = Streaming()
    state: State | None = None

    @model_validator(mode="after")
    def _consistent(self) -> TaskAgentSpec:
        if self.schedule_input is not None and self.schedule is None:
            raise ValueError("scheduleInput without schedule: nothing would ever send it")
        if self.state is not None and self.max_concurrent != 1:
            raise ValueError("state needs maxConcurrent: 1, since two runs must not write one folder")
        return self


class DaemonAgentSpec(AgentSpec):
    """A long-lived agent. max_restarts 0: no limit; max_lifetime_seconds 0: for ever."""

    restart_policy: Literal["Always", "OnFailure", "Never"] = "Always"
    max_restarts: Annotated[int, Field(ge=0)] = 0
    max_lifetime_seconds: Annotated[int, Field(ge=0)] = 0


class AgentResource(Resource):
    """What both kinds of agent answer."""

    kind: str
    spec: AgentSpec

    @property
    def key(self) -> tuple[str, str]:
        """(namespace, name); both kinds share the names."""
        return self.metadata.namespace, self.metadata.name

    @property
    def uid(self) -> str:
        """Stable uid of the resource."""
        return agent_uid(self.kind, self.metadata.namespace, self.metadata.name)

    @property
    def revision(self) -> str:
        """First 12 hex digits of the SHA-256 of the spec: changes when, and only when, the spec does."""
        canonical = json.dumps(self.spec.model_dump(mode="json", by_alias=True), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:12]

    @property
    def gateway_name(self) -> str:
        """The EgressGateway that this agent uses, in its own namespace."""
        return self.spec.egress_refs[0].gateway_ref.name if self.spec.egress_refs else "default"


class TaskAgent(AgentResource):
    """An agent that runs once per request."""

    kind: Literal["TaskAgent"]
    spec: TaskAgentSpec


class DaemonAgent(AgentResource):
    """An agent that runs until it is told to stop."""

    kind: Literal["DaemonAgent"]
    spec: DaemonAgentSpec


Agent = TaskAgent | DaemonAgent


class Secret(Resource):
    """Values that are never printed and never in a sandbox unless valueFrom asks."""

    kind: Literal["Secret"]
    data: dict[str, str] = Field(default={}, repr=False)
    from_file: dict[str, str] = {}
    from_env: dict[str, str] = {}


AnyResource = Annotated[
    Runtime
    | TaskAgent
    | DaemonAgent
    | EgressGateway
    | EgressL4Route
    | AIProviderRoute
    | MCPRoute
    | CredentialInjectionPolicy
    | Secret,
    Field(discriminator="kind"),
]
KINDS: Final = (
    "Runtime",
    "TaskAgent",
    "DaemonAgent",
    "EgressGateway",
    "EgressL4Route",
    "AIProviderRoute",
    "MCPRoute",
    "CredentialInjectionPolicy",
    "Secret",
)

# Part of the contract, not of this version: named in the error so that nobody hunts for a typing mistake.
NOT_YET_FIELDS: Final[dict[str, tuple[str, ...]]] = {"Runtime": ("gateway.workers",)}
