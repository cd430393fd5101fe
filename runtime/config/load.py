"""From files to resources: all of them valid, or every problem at once."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any, Final

from pydantic import ValidationError

from clrk.core.egress_resources import EgressGateway, EgressL4Route
from clrk.core.errors import ConfigError
from clrk.core.jwks import is_url
from clrk.core.resources import (
    KINDS,
    DaemonAgent,
    Runtime,
    Secret,
    TaskAgent,
)
from clrk.core.route_resources import AIProviderRoute, CredentialInjectionPolicy, MCPRoute
from clrk.core.values import API_VERSIONS, Resource
from clrk.runtime.config.check import resolve
from clrk.runtime.config.declared import Declared, Key, Problems, Resources
from clrk.runtime.config.describe import describe_errors, describe_kind, nearest
from clrk.runtime.config.nodes import MAX_FILE_BYTES, Document, Finding, parse

_MODELS: Final[dict[str, type[Resource]]] = {
    model.__name__: model
    for model in (
        Runtime,
        TaskAgent,
        DaemonAgent,
        EgressGateway,
        EgressL4Route,
        AIProviderRoute,
        MCPRoute,
        CredentialInjectionPolicy,
        Secret,
    )
}
_HEAD_FIELDS: Final = ("apiVersion", "kind", "metadata")


def load(paths: Sequence[FilePath], environ: Mapping[str, str] = os.environ) -> Resources:
    """Read and check resources from files and folders (`*.yaml`, `*.yml`, sorted, not recursive).

    Raises: ConfigError with every problem found.
    """
    problems = Problems()
    declared = [one for file in _list_files(paths, problems) for one in _read_file(file, problems)]
    resources = resolve(declared, environ, problems)
    if problems.found:
        raise ConfigError(problems.lines())
    return resources


def _list_files(paths: Sequence[FilePath], problems: Problems) -> Iterable[FilePath]:
    files: dict[FilePath, None] = {}  # ordered; a file named twice is read once
    for path in paths:
        try:
            if path.is_dir():
                inside = sorted(entry for entry in path.iterdir() if entry.suffix in (".yaml", ".yml"))
                if not inside:
                    problems.add_file(path, "no *.yaml or *.yml file in this folder")
                files |= dict.fromkeys(inside)
            elif path.exists():
                files[path] = None
            else:
                problems.add_file(path, "no such file or folder; name your resources with -c PATH")
        except OSError as exc:
            problems.add_file(path, f"{exc.strerror}")
    return files


def _read_file(file: FilePath, problems: Problems) -> list[Declared]:
    try:
        with file.open("rb") as stream:  # a bounded read: it may be a device, or a pipe
            text = stream.read(4 * MAX_FILE_BYTES + 4).decode("utf-8-sig")
    except OSError as exc:
        problems.add_file(file, f"{exc.strerror}")
        return []
    except UnicodeDecodeError as exc:
        problems.add_file(file, f"not UTF-8 at byte {exc.start}")
        return []
    documents, findings = parse(text)
    declared = [one for document in documents if (one := _read_document(file, document, problems)) is not None]
    for finding in findings:
        problems.add(file, finding.line, "", finding.path, finding.text)
    return declared


def _read_document(file: FilePath, document: Document, problems: Problems) -> Declared | None:
    value = document.value
    subject = _subject(value)

    def note(findings: Iterable[Finding]) -> bool:
        found = list(findings)
        for finding in found:
            problems.add(file, finding.line, subject, finding.path, finding.text)
        return bool(found)

    if not isinstance(value, dict):
        note([*document.findings, Finding(document.line, (), "a resource is a mapping that begins with apiVersion")])
        return None
    if note(_check_head(document)):
        note(document.findings)
        return None
    bad = note(document.findings)
    model = _MODELS[value["kind"]]
    _make_paths_absolute(value, file.absolute().parent)
    try:
        resource = model.model_validate(_model_input(model, value), by_alias=True, by_name=False)
    except ValidationError as exc:
        bad = note(describe_errors(model, document, exc)) or bad
    else:
        if not bad:
            return Declared(file, document, resource)
    problems.broken.add((value["kind"], *_written_key(value)))
    return None


def _subject(value: Any) -> str:
    """Return `Kind/name` as far as the document says it."""
    if not isinstance(value, dict):
        return ""
    metadata = value.get("metadata")
    kind, name = value.get("kind"), metadata.get("name") if isinstance(metadata, dict) else None
    return "/".join(part for part in (kind, name) if isinstance(part, str) and part)


def _written_key(value: dict[str, Any]) -> Key:
    metadata = value.get("metadata")
    written = metadata if isinstance(metadata, dict) else {}
    return str(written.get("namespace", "default")), str(written.get("name"))


def _check_head(document: Document) -> Iterable[Finding]:
    """Check what decides how the rest is read."""
    value = document.value
    version, kind = value.get("apiVersion"), value.get("kind")
    if "apiVersion" not in value:
        yield Finding(document.line, ("apiVersion",), f"is missing; write apiVersion: {API_VERSIONS[0]}")
    elif version not in API_VERSIONS:
        hint = nearest(str(version), API_VERSIONS)
        yield Finding(document.line_of(("apiVersion",)), ("apiVersion",), f"{version!r} is not accepted{hint}")
    if "kind" not in value:
        yield Finding(document.line, ("kind",), f"is missing{nearest('', KINDS)}")
    elif not isinstance(kind, str) or kind not in _MODELS:
        yield Finding(document.line_of(("kind",)), ("kind",), describe_kind(str(kind)))


def _model_input(model: type[Resource], value: dict[str, Any]) -> dict[str, Any]:
    """Leave out `spec:` that is written but empty, where every field of it has a default."""
    empty_spec = value.get("spec", 0) is None and not model.model_fields["spec"].is_required()
    return {name: part for name, part in value.items() if not (name == "spec" and empty_spec)}


def _make_paths_absolute(value: dict[str, Any], base: FilePath) -> None:
    """Anchor the relative host paths of a document at the folder of its file."""
    for owner, name in _host_paths(value):
        if isinstance(written := owner.get(name), str) and written:
            owner[name] = os.path.normpath(base / written)


def _host_paths(value: dict[str, Any]) -> Iterable[tuple[dict[str, Any], str]]:
    match value:
        case {"kind": "TaskAgent", "spec": {"identity": {"extractors": list(extractors)}}}:
            named = (entry for entry in extractors if isinstance(entry, dict))
            yield from ((entry, "jwks") for entry in named if not is_url(str(entry.get("jwks"))))
        case _:
            pass
    match value:
        case {"kind": "TaskAgent" | "DaemonAgent", "spec": {"template": {"spec": {"mounts": list(mounts)}}}}:
            yield from ((mount, "hostPath") for mount in mounts if isinstance(mount, dict))
        case {"kind": "EgressGateway", "spec": {"upstreamTLS": dict(tls)}}:
            yield tls, "caFile"
        case {"kind": "Secret", "fromFile": dict(files)}:
            yield from ((files, name) for name in files)
        case {"kind": "Runtime", "spec": dict(spec)}:
            yield spec, "stateDir"
        case _:
            return
