"""What decides whether telemetry can be exported: endpoints and headers of EgressGateways, files named by OTEL_*."""

from __future__ import annotations

import re
import stat
from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Final
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from clrk.core.egress_resources import EgressGateway
from clrk.runtime.config.declared import Declared, Problems

MAX_PEM_BYTES: Final = 1024 * 1024
_PREFIX: Final = "OTEL_EXPORTER_OTLP_"
_SIGNALS: Final = ("", "TRACES_", "LOGS_", "METRICS_")
_CERTIFICATES: Final = ("CERTIFICATE", "CLIENT_CERTIFICATE")
_KEY: Final = "CLIENT_KEY"
_HEADER_NAME: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,256}")
_HEADER_VALUE: Final = re.compile(r"[\t\x20-\x7e]{0,8192}")
_HOST_PORT: Final = re.compile(r"(?:\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+):(\d{1,5})")


def check_otlp(one: Declared, gateway: EgressGateway, problems: Problems) -> None:
    """Check what the models can not: the endpoint by protocol, and headers that a request can carry."""
    otlp = gateway.spec.otlp
    if otlp is None:
        return
    grpc = otlp.protocol == "grpc"
    if not (_is_url(otlp.endpoint) or (grpc and _is_host_port(otlp.endpoint))):
        example = "http://127.0.0.1:4317, or host:4317 for TLS" if grpc else "http://127.0.0.1:4318"
        problems.add_at(one, ("spec", "otlp", "endpoint"), f"not a URL; write for example {example}")
    for name, value in otlp.headers.items():
        path = ("spec", "otlp", "headers", name)
        if not _HEADER_NAME.fullmatch(name) or (grpc and name.lower().startswith("grpc-")):
            problems.add_at(one, path, f"{name!r} can not be the name of a header")
        elif not _HEADER_VALUE.fullmatch(value):  # shown nowhere: it may be a credential
            problems.add_at(one, path, "the value holds a line break, or a character that no header can carry")


def _is_url(endpoint: str) -> bool:
    try:
        url = urlsplit(endpoint)
        return url.scheme in ("http", "https") and bool(url.hostname) and (url.port is None or url.port > 0)
    except ValueError:
        return False


def _is_host_port(endpoint: str) -> bool:
    found = _HOST_PORT.fullmatch(endpoint)
    return found is not None and 0 < int(found[1]) < 65_536


def read_environment_files(environ: Mapping[str, str], problems: Problems) -> dict[str, str]:
    """Return the text of each file that an OTEL_EXPORTER_OTLP_*CERTIFICATE or *CLIENT_KEY variable names, by path.

    The gateway sees no files of the host. What can not be used is noted below the variable's name.
    """
    found: dict[str, str] = {}
    for signal in _SIGNALS:
        named = {kind: environ.get(f"{_PREFIX}{signal}{kind}", "").strip() for kind in (*_CERTIFICATES, _KEY)}
        if bool(named[_KEY]) != bool(named["CLIENT_CERTIFICATE"]):
            given, missing = (_KEY, "CLIENT_CERTIFICATE") if named[_KEY] else ("CLIENT_CERTIFICATE", _KEY)
            problems.add_file(FilePath(f"{_PREFIX}{signal}{given}"), f"needs {_PREFIX}{signal}{missing}")
        for kind, path in named.items():
            if path and (text := _read_pem(f"{_PREFIX}{signal}{kind}", kind, FilePath(path), problems)) is not None:
                found[path] = text
    return found


def _read_pem(variable: str, kind: str, file: FilePath, problems: Problems) -> str | None:
    """Return the text of the file, or note what is wrong with it, without its content."""
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            problems.add_file(FilePath(variable), f"not a regular file: {file}")
            return None
        with file.open("rb") as stream:
            raw = stream.read(MAX_PEM_BYTES + 1)
    except OSError as exc:
        problems.add_file(FilePath(variable), f"{exc.strerror}: {file}")
        return None
    if len(raw) > MAX_PEM_BYTES:
        problems.add_file(FilePath(variable), f"over {MAX_PEM_BYTES // 2**20} MiB: {file}")
    elif not (_is_key(raw) if kind == _KEY else _is_certificate(raw)):
        what = "unencrypted PEM key" if kind == _KEY else "PEM certificate"
        problems.add_file(FilePath(variable), f"no {what} in {file}")
    else:
        return raw.decode("ascii", "replace")
    return None


def _is_certificate(raw: bytes) -> bool:
    try:
        return bool(x509.load_pem_x509_certificates(raw))
    except ValueError:
        return False


def _is_key(raw: bytes) -> bool:
    try:
        serialization.load_pem_private_key(raw, password=None)
    except (ValueError, TypeError):  # TypeError: it has a password, and nobody is there to enter it
        return False
    return True
