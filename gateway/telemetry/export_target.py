"""Where telemetry is exported to: one target per signal, from an EgressGateway or from the standard variables. Pure.

The two never mix: the variables (and the credentials in them) belong to the exporter `environment` alone.
Sources: OpenTelemetry specification, configuration/sdk-environment-variables.md and protocol/exporter.md.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal
from urllib.parse import unquote, urlsplit, urlunsplit

from clrk.core.egress_resources import Otlp
from clrk.gateway.telemetry.outbox import SIGNALS, Signal

_log = logging.getLogger(__name__)

Protocol = Literal["http/protobuf", "grpc"]

DEFAULT_TIMEOUT_S: Final = 10.0
DEFAULT_METRIC_INTERVAL_S: Final = 60.0
_PREFIX: Final = "OTEL_EXPORTER_OTLP_"
_SIGNAL_PATH: Final = re.compile(r"/v1/(traces|logs|metrics)$")
_HEADER_NAME: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,256}")
_HEADER_VALUE: Final = re.compile(r"[\t\x20-\x7e]{0,8192}")


@dataclass(frozen=True, slots=True)
class ExportTarget:
    """Where and how to send one signal. Headers and the key are credentials: never logged.

    Shape: endpoint is the URL to post to, for gRPC host:port. ca_pem is trusted beside the system's roots, and with
    only_ca instead of them; client_cert_pem and client_key_pem prove who we are.
    """

    signal: Signal
    protocol: Protocol
    endpoint: str = field(repr=False)  # may hold userinfo
    secure: bool
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    timeout_s: float = DEFAULT_TIMEOUT_S
    gzip: bool = False
    ca_pem: str = field(default="", repr=False)
    only_ca: bool = False
    client_cert_pem: str = field(default="", repr=False)
    client_key_pem: str = field(default="", repr=False)


Targets = dict[Signal, ExportTarget]


def signal_url(endpoint: str, signal: Signal) -> str:
    """Return the URL of a signal: a base endpoint gets `/v1/<signal>`; one that names a signal gets its sibling.

    Source: protocol/exporter.md, "Endpoint URLs for OTLP/HTTP".
    """
    parts = urlsplit(endpoint)
    base = _SIGNAL_PATH.sub("", parts.path.rstrip("/"))
    return urlunsplit(parts._replace(path=f"{base}/v1/{signal}"))


def grpc_authority(endpoint: str, *, insecure: bool = False) -> tuple[str, bool]:
    """Return (host:port, secure) of `http://…`, `https://…` or `host:port`; insecure counts for the last form only."""
    if "://" not in endpoint:
        return endpoint, not insecure
    parts = urlsplit(endpoint)
    authority = parts.netloc.rpartition("@")[2]
    if parts.port is None:
        authority = f"{authority.rstrip(':')}:{443 if parts.scheme == 'https' else 80}"
    return authority, parts.scheme == "https"


def shown_endpoint(target: ExportTarget) -> str:
    """Return where the target is, without what may be a secret in its URL."""
    if target.protocol == "grpc":
        return target.endpoint
    parts = urlsplit(target.endpoint)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def gateway_targets(otlp: Otlp, ca_pem: str = "") -> Targets:
    """Return the targets of an EgressGateway's `otlp`; ca_pem is the text of its upstreamTLS.caFile."""
    return {signal: _gateway_target(otlp, ca_pem, signal) for signal in SIGNALS}


def _gateway_target(otlp: Otlp, ca_pem: str, signal: Signal) -> ExportTarget:
    if otlp.protocol == "grpc":
        endpoint, secure = grpc_authority(otlp.endpoint)
    else:
        endpoint, secure = signal_url(otlp.endpoint, signal), otlp.endpoint.lower().startswith("https://")
    return ExportTarget(
        signal=signal,
        protocol=otlp.protocol,
        endpoint=endpoint,
        secure=secure,
        headers=tuple(otlp.headers.items()),
        timeout_s=otlp.timeout,
        gzip=otlp.compression == "gzip",
        ca_pem=ca_pem,
    )


def environment_targets(environment: Mapping[str, str], files: Mapping[str, str]) -> Targets:
    """Return what the standard variables ask for, for telemetry of gateways without `otlp`.

    Shape: files maps the paths in *_CERTIFICATE and *_CLIENT_KEY to their text. A signal whose variables can not be
    honoured is not exported, and the log says why: sending it otherwise than asked for would be worse.
    """
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return {}
    return {
        signal: target for signal in SIGNALS if (target := _Variables(environment, files, signal).target()) is not None
    }


def metric_interval_s(environment: Mapping[str, str]) -> float:
    """Return OTEL_METRIC_EXPORT_INTERVAL (milliseconds) in seconds."""
    raw = environment.get("OTEL_METRIC_EXPORT_INTERVAL", "").strip()
    return int(raw) / 1000 if raw.isascii() and raw.isdigit() and int(raw) > 0 else DEFAULT_METRIC_INTERVAL_S


class _Variables:
    """The variables of one signal; its own win over the general ones, and empty means unset."""

    def __init__(self, environment: Mapping[str, str], files: Mapping[str, str], signal: Signal) -> None:
        self._environment = environment
        self._files = files
        self._signal = signal

    def target(self) -> ExportTarget | None:
        if not self._wanted():
            return None
        protocol = self._get("PROTOCOL") or "http/protobuf"
        if protocol not in ("http/protobuf", "grpc"):
            self._refuse("PROTOCOL", f"{protocol[:40]!r} is not supported; use http/protobuf or grpc")
            return None
        pems = {name: self._file(name) for name in ("CERTIFICATE", "CLIENT_CERTIFICATE", "CLIENT_KEY")}
        if missing := next((name for name, text in pems.items() if text is None), None):
            self._refuse(missing, "the runtime has not read this file")
            return None
        endpoint, secure = self._endpoint(protocol)
        if not endpoint:
            self._refuse("ENDPOINT", "not an endpoint; write for example http://127.0.0.1:4318")
            return None
        return ExportTarget(
            signal=self._signal,
            protocol="grpc" if protocol == "grpc" else "http/protobuf",
            endpoint=endpoint,
            secure=secure,
            headers=tuple(self._headers()),
            timeout_s=self._timeout_s(),
            gzip=self._gzip(),
            ca_pem=pems["CERTIFICATE"] or "",
            only_ca=bool(pems["CERTIFICATE"]),
            client_cert_pem=pems["CLIENT_CERTIFICATE"] or "",
            client_key_pem=pems["CLIENT_KEY"] or "",
        )

    def _wanted(self) -> bool:
        """An endpoint asks for export; without one, only OTEL_<SIGNAL>_EXPORTER=otlp in so many words does."""
        exporters = [word.strip() for word in self._raw(f"OTEL_{self._signal.upper()}_EXPORTER").split(",")]
        if exporters != [""]:
            return "otlp" in exporters
        return bool(self._get("ENDPOINT"))

    def _raw(self, name: str) -> str:
        return self._environment.get(name, "").strip()

    def _get(self, name: str) -> str:
        return self._raw(f"{_PREFIX}{self._signal.upper()}_{name}") or self._raw(_PREFIX + name)

    def _refuse(self, name: str, why: str) -> None:
        _log.error("%s%s for %s: %s; this signal is not exported", _PREFIX, name, self._signal, why)

    def _file(self, name: str) -> str | None:
        path = self._get(name)
        return self._files.get(path) if path else ""

    def _endpoint(self, protocol: str) -> tuple[str, bool]:
        own = self._raw(f"{_PREFIX}{self._signal.upper()}_ENDPOINT")
        general = self._raw(_PREFIX + "ENDPOINT") or f"http://localhost:{4317 if protocol == 'grpc' else 4318}"
        try:
            if protocol == "grpc":
                return grpc_authority(own or general, insecure=self._get("INSECURE").lower() == "true")
            scheme = urlsplit(own or general).scheme
            if scheme not in ("http", "https"):
                return "", False
            return own or signal_url(general, self._signal), scheme == "https"  # the signal's own is taken as it is
        except ValueError:
            return "", False

    def _headers(self) -> Iterable[tuple[str, str]]:
        for pair in self._get("HEADERS").split(","):
            name, equals, value = (part.strip() for part in pair.partition("="))
            if not pair.strip():
                continue
            name, value = unquote(name).lower(), unquote(value)
            if equals and _HEADER_NAME.fullmatch(name) and _HEADER_VALUE.fullmatch(value):
                yield name, value
            else:
                _log.error("%sHEADERS for %s: an entry that is not name=value is left out", _PREFIX, self._signal)

    def _timeout_s(self) -> float:
        """Milliseconds, as the specification says of every duration."""
        raw = self._get("TIMEOUT")
        return int(raw) / 1000 if raw.isascii() and raw.isdigit() and int(raw) > 0 else DEFAULT_TIMEOUT_S

    def _gzip(self) -> bool:
        compression = self._get("COMPRESSION") or "none"
        if compression not in ("gzip", "none"):
            _log.error("%sCOMPRESSION for %s: write gzip or none; using none", _PREFIX, self._signal)
        return compression == "gzip"
