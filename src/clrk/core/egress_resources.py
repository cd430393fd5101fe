"""The resource kinds of the way out, EgressGateway and EgressL4Route (CONTRACT section 3). Unknown fields: errors."""

from __future__ import annotations

import re
from ipaddress import IPv4Network, IPv6Network
from typing import Annotated, Final, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from clrk.core.url_paths import path_readings
from clrk.core.values import (
    DialledHost,
    DialledName,
    DnsLabel,
    GatewayRef,
    HostPattern,
    IpPort,
    Model,
    Port,
    Regex,
    Resource,
    Seconds,
    parse_whole_quantity,
)


class HostAlias(Model):
    """The operator's word on where a name lives; exempt from the address refusals of CONTRACT section 10."""

    hostnames: Annotated[list[DialledName], Field(min_length=1)]
    address: IpPort


class TlsSpec(Model):
    """Which TLS connections are opened and read."""

    mode: Literal["Intercept", "Passthrough"] = "Intercept"
    passthrough_hosts: list[DialledHost] = []


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


class ProxyCredentials(Model):
    """Names a Secret whose `username` and `password` go to the proxy (RFC 7617)."""

    name: DnsLabel


def _check_proxy_url(value: str) -> str:
    try:
        url = urlsplit(value)
        usable = bool(url.hostname) and url.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise ValueError(f"{value!r} is not the URL of a proxy; write for example http://proxy.corp.example:3128")
    return value


class UpstreamProxy(Model):
    """A proxy between this host and upstreams: every upstream connection is a CONNECT through it (RFC 9110, 9.3.6).

    Shape: url is http://host[:port] or https://host[:port]; without a port 80 or 443. noProxy is what is dialled
        directly, beside the names of hostAliases: host patterns for names, networks for addresses that an agent dials.
    """

    url: Annotated[str, Field(pattern=r"^https?://[^/?#@\s]+/?$"), AfterValidator(_check_proxy_url)]
    secret_ref: ProxyCredentials | None = None
    no_proxy: list[Annotated[IPv4Network | IPv6Network | HostPattern, Field(union_mode="left_to_right")]] = []


UsdPerMillion = Annotated[float, Field(ge=0, le=1_000_000, allow_inf_nan=False)]


class ModelPrice(Model):
    """What a model costs, in USD per million tokens: goes before the bundled prices.

    Shape: provider is a gen_ai.provider.name, empty for any; model is a glob with `*`. Without a price of their own,
        cached tokens cost what other input tokens do.
    """

    provider: str = ""
    model: Annotated[str, Field(min_length=1, max_length=256)]
    input: UsdPerMillion
    output: UsdPerMillion
    cache_read: UsdPerMillion | None = None
    cache_write: UsdPerMillion | None = None


class Redact(Model):
    """What else is secret in this company, beside the known shapes: RE2 patterns, each match becomes `[redacted]`."""

    patterns: Annotated[list[Regex], Field(max_length=64)] = []


class EgressGatewaySpec(Model):
    """How agents reach the outside.

    Shape: mode Enforce denies what no rule allows; Shadow lets it go and says so; Record lets it go and keeps it for
        `clrk policy suggest`. None of them opens the host itself, nor lets ambiguous requests pass.
    """

    mode: Literal["Enforce", "Shadow", "Record"] = "Enforce"

    default_policy: Literal["deny-all", "allow-all"] = "deny-all"
    tls: TlsSpec = TlsSpec()
    otlp: Otlp | None = None
    upstream_tls: UpstreamTls = Field(default=UpstreamTls(), alias="upstreamTLS")
    host_aliases: list[HostAlias] = []
    request_timeout: Seconds = 300.0
    upstream_proxy: UpstreamProxy | None = None
    prices: Annotated[list[ModelPrice], Field(max_length=1024)] = []
    redact: Redact = Redact()


class EgressGateway(Resource):
    """An exit for agents."""

    kind: Literal["EgressGateway"]
    spec: EgressGatewaySpec = EgressGatewaySpec()


METHOD_PATTERN: Final = "[A-Z]+(?:-[A-Z]+)*"  # of those that are registered, and of every other that anybody uses

MAX_METHOD: Final = 32  # characters that the gateway takes for a method
_NO_METHOD: Final = "CONNECT"


def is_rule_method(method: str) -> bool:
    """Say whether a rule can name a method."""
    return len(method) <= MAX_METHOD and method != _NO_METHOD and re.fullmatch(METHOD_PATTERN, method) is not None


def _check_method(value: str) -> str:
    if value == _NO_METHOD:
        raise ValueError("CONNECT is never served, since the gateway is no proxy: a rule without http allows a tunnel")
    return value


def find_path_fault(path: str) -> str:
    """Return why a pattern fits no request, empty when one may: the readings of both are compared."""
    if " " in path:
        return "holds a blank, which no request has: write %20"
    if not path_readings(path):
        text = "so no request fits it: write it plainly, without `..`, control characters, or escapes of escapes"
        return f"can be read in more than one way, {text}"
    return ""


def _check_path(value: str) -> str:
    if fault := find_path_fault(value):
        raise ValueError(f"{value!r} {fault}")
    return value


class HttpMatch(Model):
    """Narrows an HTTP host: methods upper-case, paths are prefixes or globs with `*`; a query is no part of a path."""

    methods: list[
        Annotated[str, Field(pattern=f"^{METHOD_PATTERN}$", max_length=MAX_METHOD), AfterValidator(_check_method)]
    ] = []
    paths: list[Annotated[str, Field(pattern=r"^/[^?#]*$"), AfterValidator(_check_path)]] = []


def _check_no_number(value: object) -> object:
    if isinstance(value, int):  # IPv4Network(1) is 0.0.0.1/32
        raise ValueError(f"{value} is not a network; write for example 10.0.0.0/8 or fd00::/8")
    return value


class L4Rule(Model):
    """Matches if (host or CIDR) and port match; with http, the request must match it too."""

    cidrs: list[Annotated[IPv4Network | IPv6Network, BeforeValidator(_check_no_number)]] = []
    hostnames: list[DialledHost] = []
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
