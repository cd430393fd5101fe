"""What loading produces, and how its problems are collected."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path as FilePath

from clrk.core.egress_resources import EgressGateway, EgressL4Route
from clrk.core.printable import printable
from clrk.core.resources import DaemonAgent, RuntimeSpec, TaskAgent
from clrk.core.route_resources import AIProviderRoute, CredentialInjectionPolicy, MCPRoute
from clrk.core.values import Resource
from clrk.runtime.config.describe import format_path
from clrk.runtime.config.nodes import Document, Path

Key = tuple[str, str]  # namespace, name


@dataclass(frozen=True, slots=True)
class Resources:
    """Everything that was declared, checked and with its references resolved.

    Shape: keys are (namespace, name); secrets holds plain values and must never be printed or passed on whole;
        unread says of each key of a Secret that has no value why, without any value;
        upstream_ca_pem maps `namespace/name` of an EgressGateway to PEM text;
        jwks_files maps the file of a JwtExtractor to its text;
        environment_files maps the paths in OTEL_EXPORTER_OTLP_*CERTIFICATE and *CLIENT_KEY to their text.
    """

    runtime: RuntimeSpec
    agents: Mapping[Key, TaskAgent]
    daemons: Mapping[Key, DaemonAgent]
    gateways: Mapping[Key, EgressGateway]
    routes: Mapping[Key, EgressL4Route]
    secrets: Mapping[Key, Mapping[str, str]] = field(repr=False)
    upstream_ca_pem: Mapping[str, str] = field(repr=False)
    jwks_files: Mapping[str, str] = field(repr=False)
    environment_files: Mapping[str, str] = field(default_factory=dict, repr=False)
    ai_routes: Mapping[Key, AIProviderRoute] = field(default_factory=dict)
    mcp_routes: Mapping[Key, MCPRoute] = field(default_factory=dict)
    credential_policies: Mapping[Key, CredentialInjectionPolicy] = field(default_factory=dict)
    unread: Mapping[Key, Mapping[str, str]] = field(default_factory=dict)

    def with_runtime(self, runtime: RuntimeSpec) -> Resources:
        """Return these resources with another Runtime."""
        return replace(self, runtime=runtime)


@dataclass(frozen=True, slots=True)
class Declared:
    """One valid document and where it stands."""

    file: FilePath
    document: Document
    resource: Resource

    @property
    def key(self) -> Key:
        """(namespace, name)."""
        return self.resource.metadata.namespace, self.resource.metadata.name

    @property
    def kind(self) -> str:
        """The kind as written."""
        return type(self.resource).__name__


@dataclass(slots=True)
class Problems:
    """Collects findings as the lines of a ConfigError."""

    found: list[tuple[str, int, str]] = field(default_factory=list)  # file, line, rendered
    broken: set[tuple[str, str, str]] = field(default_factory=set)  # kind, namespace, name: not "missing" to others

    def add(self, file: FilePath, line: int, subject: str, path: Path, text: str) -> None:
        """Note one problem; the same line twice is noted once."""
        parts = [f"{file}:{line}", subject, format_path(path), text]
        rendered = printable(": ".join(part for part in parts if part))
        if (one := (str(file), line, rendered)) not in self.found:
            self.found.append(one)

    def add_file(self, file: FilePath, text: str) -> None:
        """Note that a file could not be used at all."""
        self.found.append((str(file), 0, printable(f"{file}: {text}")))

    def lines(self) -> tuple[str, ...]:
        """Return the problems by file, in the order the files were read, then by line."""
        files = list(dict.fromkeys(file for file, _, _ in self.found))
        return tuple(text for _, _, text in sorted(self.found, key=lambda one: (files.index(one[0]), one[1])))

    def add_at(self, declared: Declared, path: Path, text: str) -> None:
        """Note a problem of a valid document at path."""
        line = declared.document.line_of(path)
        self.add(declared.file, line, f"{declared.kind}/{declared.key[1]}", path, text)
