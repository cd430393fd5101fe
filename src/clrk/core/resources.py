"""The resource kinds of this version (CONTRACT section 3), as pydantic models. Unknown fields are errors."""

from __future__ import annotations

import hashlib
import json
import re
from datetime import UTC, datetime
from ipaddress import IPv4Network, IPv6Network, ip_address
from typing import Annotated, Any, Final, Literal

from cronsim import CronSim, CronSimError
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic.alias_generators import to_camel

from clrk.core.ids import agent_uid
from clrk.core.json_path import compile_json_path

CRON_MNEMONICS: Final = {
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
    "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@hourly": "0 * * * *",
}
API_VERSIONS: Final = ("clrk/v1alpha1", "clrk.apoxy.dev/v1alpha1")
MAX_TIMEOUT_S: Final = 3600.0
MAX_BODY_BYTES: Final = 32 * 1024 * 1024

_SECRET_HEADERS: Final = ("authorization", "proxy-authorization", "cookie", "x-api-key", "api-key", "x-goog-api-key")
_DURATION: Final = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m(?!s))?(?:(\d+(?:\.\d+)?)s)?(?:(\d+)ms)?")
_LABEL: Final = re.compile(r"[a-z0-9_]([-a-z0-9_]{0,61}[a-z0-9_])?")
_QUANTITY: Final = re.compile(r"(\d+(?:\.\d+)?)(Ki|Mi|Gi|Ti|k|M|G|T|m)?")
_MAX_QUANTITY_CHARS: Final = 32  # far from where a float becomes infinite
_SCALE: Final = {
    "": 1.0, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12,
    "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40,
}  # fmt: skip


def parse_duration(value: object) -> float:
    """Return seconds of `90`, `90s`, `1m30s`, `250ms`, `1h`, `7d`.

    Raises: ValueError with the accepted forms.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, str) and value and (found := _DURATION.fullmatch(value)):
        days, hours, minutes, seconds, millis = (float(group or 0) for group in found.groups())
        return days * 86_400 + hours * 3600 + minutes * 60 + seconds + millis / 1000
    raise ValueError(f"{value!r} is not a duration; write for example 100s, 5m, 1h30m or 7d")


def parse_quantity(value: object) -> float:
    """Return the number of a Kubernetes quantity: `512Mi`, `1`, `500m`, `1.5`.

    Raises: ValueError with the accepted forms.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, str) and len(value) <= _MAX_QUANTITY_CHARS and (found := _QUANTITY.fullmatch(value)):
        return float(found[1]) * _SCALE[found[2] or ""]
    raise ValueError(f"{value!r} is not a quantity; write for example 512Mi, 1Gi, 500m or 2")


def parse_whole_quantity(value: object) -> int:
    """Return a quantity that must be whole: `65536`, `64Ki`.

    Raises: ValueError with the accepted forms.
    """
    number = parse_quantity(value)
    if number != int(number):
        raise ValueError(f"{value!r} is not a whole number")
    return int(number)


def _check_schedule(value: str) -> str:
    """Five cron fields or a mnemonic, in UTC."""
    if value in CRON_MNEMONICS:
        return value
    if len(value.split()) != 5:
        raise ValueError(f"{value!r} is not a schedule: write five fields, or one of {', '.join(CRON_MNEMONICS)}")
    try:
        CronSim(value, datetime(2026, 1, 1, tzinfo=UTC))
    except CronSimError as exc:
        raise ValueError(f"{value!r} is not a schedule: {exc}") from None
    return value


def _check_identity_header(value: str) -> str:
    if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,256}", value):
        raise ValueError(f"{value!r} is not a header name")
    if value.lower().startswith("ce-"):
        raise ValueError(f"{value!r}: ce-* headers say what the caller likes, so they are no identity")
    if value.lower() in _SECRET_HEADERS:
        raise ValueError(f"{value!r} holds a secret, which would be shown on every span; use a JWT extractor")
    return value


def _check_json_path(value: str) -> str:
    compile_json_path(value)
    return value


def _check_dns_label(value: str) -> str:
    if len(value) > 63 or not re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", value):
        raise ValueError(f"{value!r} is not a DNS label: a-z, 0-9 and -, at most 63 characters")
    return value


def _check_host_pattern(value: str) -> str:
    """`example.com`, `*.example.com` (one label) or `**.example.com` (any depth)."""
    labels = re.sub(r"^\*\*?\.", "", value).split(".")
    if len(value) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise ValueError(f"{value!r} is not a host name; write it lower-case, no scheme, no port; *.x and **.x allowed")
    return value


def _check_ip_port(value: str) -> str:
    host, sep, port = value.rpartition(":")
    try:
        ip_address(host.removeprefix("[").removesuffix("]"))
        if not sep or not 0 < int(port) < 65_536:
            raise ValueError
    except ValueError:
        raise ValueError(f"{value!r} is not ip:port; write for example 127.0.0.1:8080 or [::1]:8080") from None
    return value


Seconds = Annotated[float, BeforeValidator(parse_duration), Field(ge=0)]
ByteCount = Annotated[float, BeforeValidator(parse_quantity), Field(ge=0)]
DnsLabel = Annotated[str, AfterValidator(_check_dns_label)]
HostPattern = Annotated[str, AfterValidator(_check_host_pattern)]
IpPort = Annotated[str, AfterValidator(_check_ip_port)]
Port = Annotated[int, Field(ge=1, le=65_535)]
Schedule = Annotated[str, AfterValidator(_check_schedule)]
IdentityField = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,62}$")]


class Model(BaseModel):
    """Base of every resource part: camelCase in YAML, unknown fields refused, immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, alias_generator=to_camel, populate_by_name=True)


class Metadata(Model):
    """Name of a resource."""

    name: DnsLabel
    namespace: DnsLabel = "default"
    labels: dict[str, str] = {}


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


class Resource(Model):
    """Common head of every document."""

    api_version: Literal["clrk/v1alpha1", "clrk.apoxy.dev/v1alpha1"] = "clrk/v1alpha1"
    metadata: Metadata


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


class GatewayRef(Model):
    """Names an EgressGateway of the same namespace."""

    name: DnsLabel = "default"


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
    name: Annotated[str, AfterValidator(_check_identity_header)]
    field: IdentityField


class BodyExtractor(Model):
    """Takes the string, number or boolean that a JSONPath (RFC 9535) selects in a JSON body."""

    type: Literal["Body"]
    json_path: Annotated[str, Field(pattern=r"^\$", max_length=1024), AfterValidator(_check_json_path)]
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


# --- Egress ---------------------------------------------------------------------------------------------------------


class HostAlias(Model):
    """The operator's word on where a name lives; exempt from the address refusals of CONTRACT section 10."""

    hostnames: Annotated[list[HostPattern], Field(min_length=1)]
    address: IpPort


class TlsSpec(Model):
    """Which TLS connections are opened and read."""

    mode: Literal["Intercept", "Passthrough"] = "Intercept"
    passthrough_hosts: list[HostPattern] = []


class UpstreamTls(Model):
    """Extra roots, beside the system's, for verifying upstreams (PEM file, relative to the declaring file)."""

    ca_file: str | None = None


class CaptureBody(Model):
    """Keep headers and bodies of calls as span events, up to maxBytes each; secrets are redacted.

    Shape: include_content_types are media types or `type/*`; empty: JSON, text, form and event streams.
    """

    max_bytes: Annotated[int, BeforeValidator(parse_whole_quantity), Field(ge=1, le=4 * 2**20)] = 65_536
    include_content_types: list[Annotated[str, Field(pattern=r"^[a-z0-9.+-]+/([a-z0-9.+-]+|\*)$")]] = []


class Otlp(Model):
    """Where telemetry is exported, beside the embedded store. Every OTLP server takes gzip."""

    endpoint: str
    protocol: Literal["http/protobuf", "grpc"] = "http/protobuf"
    headers: dict[str, str] = Field(default={}, repr=False)
    timeout: Annotated[Seconds, Field(gt=0)] = 10.0
    compression: Literal["none", "gzip"] = "gzip"
    capture_body: CaptureBody | None = None


class EgressGatewaySpec(Model):
    """How agents reach the outside."""

    default_policy: Literal["deny-all", "allow-all"] = "deny-all"
    tls: TlsSpec = TlsSpec()
    otlp: Otlp | None = None
    upstream_tls: UpstreamTls = Field(default=UpstreamTls(), alias="upstreamTLS")
    host_aliases: list[HostAlias] = []
    request_timeout: Seconds = 300.0


class EgressGateway(Resource):
    """An exit for agents."""

    kind: Literal["EgressGateway"]
    spec: EgressGatewaySpec = EgressGatewaySpec()


class HttpMatch(Model):
    """Narrows an HTTP host: methods upper-case, paths are prefixes or globs with `*`."""

    methods: list[Annotated[str, Field(pattern=r"^[A-Z]+$")]] = []
    paths: list[Annotated[str, Field(pattern=r"^/")]] = []


class L4Rule(Model):
    """Matches if (host or CIDR) and port match; with http, the request must match it too."""

    cidrs: list[IPv4Network | IPv6Network] = []
    hostnames: list[HostPattern] = []
    ports: list[Port] = []
    protocols: list[Literal["TCP"]] = ["TCP"]
    http: HttpMatch | None = None

    @model_validator(mode="after")
    def _some_destination(self) -> L4Rule:
        if not self.cidrs and not self.hostnames:
            raise ValueError("give hostnames or cidrs; a rule without either would match nothing")
        return self


class EgressL4RouteSpec(Model):
    """Allow rules of one gateway."""

    gateway_ref: GatewayRef = GatewayRef()
    rules: Annotated[list[L4Rule], Field(min_length=1)]


class EgressL4Route(Resource):
    """Allows destinations."""

    kind: Literal["EgressL4Route"]
    spec: EgressL4RouteSpec


class Secret(Resource):
    """Values that are never printed and never in a sandbox unless valueFrom asks."""

    kind: Literal["Secret"]
    data: dict[str, str] = Field(default={}, repr=False)
    from_file: dict[str, str] = {}
    from_env: dict[str, str] = {}


AnyResource = Annotated[
    Runtime | TaskAgent | DaemonAgent | EgressGateway | EgressL4Route | Secret, Field(discriminator="kind")
]
KINDS: Final = ("Runtime", "TaskAgent", "DaemonAgent", "EgressGateway", "EgressL4Route", "Secret")

# Part of the contract, not of this version: named in the error so that nobody hunts for a typing mistake.
NOT_YET_KINDS: Final = ("AIProviderRoute", "MCPRoute", "CredentialInjectionPolicy")
NOT_YET_FIELDS: Final[dict[str, tuple[str, ...]]] = {
    "Runtime": ("gateway.workers",),
    "EgressGateway": ("upstreamProxy", "mode"),
}


class GatewayConfig(Model):
    """What the runtime hands to the gateway: no secrets of agents, no commands it could run.

    Shape: ca_cert_pem and ca_key_pem are the per-host CA; upstream_ca_pem maps namespace/name of an EgressGateway to
    the PEM text of its upstreamTLS.caFile, jwks_files a JwtExtractor's file to its text, environment_files the path in
    an OTEL_EXPORTER_OTLP_*CERTIFICATE or *CLIENT_KEY variable to its text (all read by the runtime, since the gateway
    sees no host files).
    """

    runtime: RuntimeSpec
    agents: list[TaskAgent]
    daemons: list[DaemonAgent] = []
    gateways: list[EgressGateway]
    routes: list[EgressL4Route]
    ca_cert_pem: str
    ca_key_pem: str = Field(repr=False)
    upstream_ca_pem: dict[str, str] = {}
    jwks_files: dict[str, str] = {}
    host_addresses: list[str] = []
    environment: dict[str, Any] = Field(default={}, repr=False)
    environment_files: dict[str, str] = Field(default={}, repr=False)
