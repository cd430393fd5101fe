"""What no document can know alone: names given twice, references, files and addresses."""

from __future__ import annotations

import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any, Final, TypeVar

from cryptography import x509

from clrk.core import jwks
from clrk.core.egress_resources import EgressGateway, EgressL4Route
from clrk.core.resources import (
    Agent,
    AgentSpec,
    DaemonAgent,
    JwtExtractor,
    Runtime,
    RuntimeSpec,
    Secret,
    TaskAgent,
)
from clrk.core.route_resources import AIProviderRoute, CredentialInjectionPolicy, MCPRoute
from clrk.core.values import Resource
from clrk.runtime.config.budgets import check_budgets
from clrk.runtime.config.declared import Declared, Key, Problems, Resources
from clrk.runtime.config.describe import nearest
from clrk.runtime.config.exporters import check_otlp, read_environment_files
from clrk.runtime.config.mounts import find_bad_mounts
from clrk.runtime.config.nodes import Path

MAX_READ_BYTES: Final = 1024 * 1024  # of a secret or a CA bundle

R = TypeVar("R", bound=Resource)


def resolve(declared: Iterable[Declared], environ: Mapping[str, str], problems: Problems) -> Resources:
    """Check the documents against each other and the host, and read the files they name. Findings go to problems."""
    unique = _drop_duplicates(declared, problems)
    gateways = _of_kind(unique, EgressGateway)
    read = {one.key: _read_secret(one, spec, environ, problems) for one, spec in _pairs(unique, Secret)}
    upstream_ca_pem = {}
    for one, gateway in _pairs(unique, EgressGateway):
        check_otlp(one, gateway, problems)
        if (pem := _read_ca(one, gateway, problems)) is not None:
            upstream_ca_pem["/".join(one.key)] = pem
    tasks, daemons = _of_kind(unique, TaskAgent), _of_kind(unique, DaemonAgent)
    agents: list[tuple[Declared, Agent]] = [*_pairs(unique, TaskAgent), *_pairs(unique, DaemonAgent)]
    for one, agent in agents:
        _check_agent(one, agent, gateways, read, problems)
        for where, text in find_bad_mounts(agent, (*tasks.values(), *daemons.values())):
            problems.add_at(one, where, text)
    referring: list[tuple[Declared, EgressL4Route | AIProviderRoute | MCPRoute]] = [
        *_pairs(unique, EgressL4Route), *_pairs(unique, AIProviderRoute), *_pairs(unique, MCPRoute)
    ]  # fmt: skip
    for one, route in referring:
        _check_gateway(one, ("spec", "gatewayRef", "name"), route.spec.gateway_ref.name, gateways, problems)
        if isinstance(route, AIProviderRoute):
            check_budgets(one, route, gateways.get((one.key[0], route.spec.gateway_ref.name)), problems)
    _check_credential_targets(unique, problems)
    return Resources(
        runtime=_the_runtime(unique, problems),
        agents=tasks,
        daemons=daemons,
        gateways=gateways,
        routes=_of_kind(unique, EgressL4Route),
        secrets={key: secret.values for key, secret in read.items()},
        unread={key: secret.unread for key, secret in read.items() if secret.unread},
        upstream_ca_pem=upstream_ca_pem,
        jwks_files=_read_key_sets(unique, problems),
        environment_files=read_environment_files(environ, problems),
        ai_routes=_of_kind(unique, AIProviderRoute),
        mcp_routes=_of_kind(unique, MCPRoute),
        credential_policies=_of_kind(unique, CredentialInjectionPolicy),
    )


def _pairs(declared: Iterable[Declared], kind: type[R]) -> list[tuple[Declared, R]]:
    return [(one, one.resource) for one in declared if isinstance(one.resource, kind)]


def _of_kind(declared: Iterable[Declared], kind: type[R]) -> dict[Key, R]:
    return {one.key: resource for one, resource in _pairs(declared, kind)}


def _drop_duplicates(declared: Iterable[Declared], problems: Problems) -> list[Declared]:
    first: dict[tuple[str, Key], Declared] = {}
    for one in declared:
        kind = "agent" if one.kind in ("TaskAgent", "DaemonAgent") else one.kind  # both share the names
        earlier = first.setdefault((kind, one.key), one)
        if earlier is not one:
            where = f"{earlier.file}:{earlier.document.line_of(('metadata', 'name'))}"
            namespace, name = one.key
            problems.add_at(one, ("metadata", "name"), f"{namespace}/{name} is already declared at {where}")
    return list(first.values())


# --- Runtime --------------------------------------------------------------------------------------------------------


def _the_runtime(declared: Iterable[Declared], problems: Problems) -> RuntimeSpec:
    found = _pairs(declared, Runtime)
    for one, _ in found[1:]:
        first = found[0][0]
        where = f"{first.file}:{first.document.line}"
        problems.add_at(one, ("kind",), f"a host has one Runtime; the other is at {where}")
    if not found:
        return RuntimeSpec()
    one, runtime = found[0]
    if runtime.spec.ingress.listen == runtime.spec.admin.listen:
        text = f"the same address as spec.ingress.listen: {runtime.spec.ingress.listen}"
        problems.add_at(one, ("spec", "admin", "listen"), text)
    return runtime.spec


# --- TaskAgent ------------------------------------------------------------------------------------------------------


def _check_agent(
    one: Declared,
    agent: Agent,
    gateways: Mapping[Key, EgressGateway],
    secrets: Mapping[Key, ReadSecret],
    problems: Problems,
) -> None:
    for index, ref in enumerate(agent.spec.egress_refs):  # without egressRefs: "default", or everything is denied
        ref_path = ("spec", "egressRefs", index, "gatewayRef", "name")
        _check_gateway(one, ref_path, ref.gateway_ref.name, gateways, problems)
    _check_env(one, agent.spec, secrets, problems)
    template: Path = ("spec", "template", "spec")
    if not FilePath(agent.spec.template.spec.rootfs).is_dir():
        problems.add_at(one, (*template, "rootfs"), f"no such folder: {agent.spec.template.spec.rootfs}")
    taken: dict[str, int] = {}
    for index, mount in enumerate(agent.spec.template.spec.mounts):
        path: Path = (*template, "mounts", index)
        if not FilePath(mount.host_path).exists():
            problems.add_at(one, (*path, "hostPath"), f"no such file or folder: {mount.host_path}")
        if ".." in FilePath(mount.path).parts or mount.path == "/":
            problems.add_at(one, (*path, "path"), f"{mount.path!r} can not be a mount point; name a folder below /")
        if (other := taken.setdefault(mount.path, index)) != index:
            problems.add_at(one, (*path, "path"), f"{mount.path} is already taken by mounts[{other}]")


def _check_env(one: Declared, spec: AgentSpec, secrets: Mapping[Key, ReadSecret], problems: Problems) -> None:
    namespace = one.key[0]
    taken: dict[str, int] = {}
    for index, variable in enumerate(spec.template.spec.env):
        path: Path = ("spec", "template", "spec", "env", index)
        if variable.name.startswith("CLRK_"):
            problems.add_at(one, (*path, "name"), "names that begin with CLRK_ are set by the runtime")
        if (other := taken.setdefault(variable.name, index)) != index:
            problems.add_at(one, (*path, "name"), f"{variable.name} is already set by env[{other}]")
        if "\0" in (variable.value or ""):
            problems.add_at(one, (*path, "value"), "holds a NUL character")
        if variable.value_from is None:
            continue
        ref, path = variable.value_from.secret_key_ref, (*path, "valueFrom", "secretKeyRef")
        secret = secrets.get((namespace, ref.name))
        if secret is None and ("Secret", namespace, ref.name) in problems.broken:
            continue
        if secret is None:
            names = [name for space, name in secrets if space == namespace]
            text = f"no Secret {ref.name!r} in namespace {namespace!r}{nearest(ref.name, names)}"
            problems.add_at(one, (*path, "name"), text)
        elif (why := secret.unread.get(ref.key)) is not None:
            problems.add_at(one, (*path, "key"), f"Secret {ref.name!r} has no value of {ref.key!r}: {why}")
        elif ref.key not in secret.values:
            text = f"Secret {ref.name!r} has no key {ref.key!r}{nearest(ref.key, secret.values)}"
            problems.add_at(one, (*path, "key"), text)


def _read_key_sets(declared: Iterable[Declared], problems: Problems) -> dict[str, str]:
    """Return the text of every key set in a file, by its path; URLs are the gateway's to fetch."""
    found: dict[str, str] = {}
    for one, agent in _pairs(declared, TaskAgent):
        for index, extractor in enumerate(agent.spec.identity.extractors):
            path = ("spec", "identity", "extractors", index, "jwks")
            if not isinstance(extractor, JwtExtractor):
                continue
            if jwks.is_url(extractor.jwks):
                if (wrong := jwks.check_url(extractor.jwks)) is not None:
                    problems.add_at(one, path, wrong)
            elif extractor.jwks not in found and (text := _read_text(one, path, FilePath(extractor.jwks), problems)):
                found[extractor.jwks] = text
                if (wrong := _wrong_with_keys(text)) is not None:
                    problems.add_at(one, path, f"{wrong}: {extractor.jwks}")
    return found


def _wrong_with_keys(text: str) -> str | None:
    try:
        jwks.parse_jwks(text)
    except ValueError as exc:
        return str(exc)
    return "holds a key to sign with; keep public keys here only" if jwks.holds_private_key(text) else None


# --- Egress ---------------------------------------------------------------------------------------------------------


def _check_gateway(one: Declared, path: Path, name: str, gateways: Mapping[Key, Any], problems: Problems) -> None:
    namespace = one.key[0]
    if (namespace, name) not in gateways and ("EgressGateway", namespace, name) not in problems.broken:
        names = [other for space, other in gateways if space == namespace]
        problems.add_at(one, path, f"no EgressGateway {name!r} in namespace {namespace!r}{nearest(name, names)}")


def _check_credential_targets(declared: Iterable[Declared], problems: Problems) -> None:
    """Require that targetRefs exist. A missing Secret is no mistake here: its calls fail, each with a 502."""
    unique = list(declared)
    there = {(one.kind, *one.key) for one in unique}
    for one, policy in _pairs(unique, CredentialInjectionPolicy):
        namespace = one.key[0]
        for index, ref in enumerate(policy.spec.target_refs):
            key = (ref.kind, namespace, ref.name)
            if key not in there and key not in problems.broken:
                names = [name for kind, space, name in there if (kind, space) == (ref.kind, namespace)]
                text = f"no {ref.kind} {ref.name!r} in namespace {namespace!r}{nearest(ref.name, names)}"
                problems.add_at(one, ("spec", "targetRefs", index, "name"), text)


def _read_ca(one: Declared, gateway: EgressGateway, problems: Problems) -> str | None:
    if gateway.spec.upstream_tls.ca_file is None:
        return None
    path = ("spec", "upstreamTLS", "caFile")
    pem = _read_text(one, path, FilePath(gateway.spec.upstream_tls.ca_file), problems)
    if pem is None:
        return None
    try:
        certificates = x509.load_pem_x509_certificates(pem.encode())
    except ValueError:
        certificates = []
    if not certificates:
        problems.add_at(one, path, f"no PEM certificate in {gateway.spec.upstream_tls.ca_file}")
        return None
    return pem


# --- Secret ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ReadSecret:
    """The values of a Secret, and of each key that has none: where it should come from, and why it does not."""

    values: dict[str, str] = field(repr=False)
    unread: dict[str, str]


def _read_secret(one: Declared, secret: Secret, environ: Mapping[str, str], problems: Problems) -> ReadSecret:
    """Read the values of a Secret. What is not there is no mistake: it fails the calls that need it (CONTRACT 12)."""
    values, unread = dict(secret.data), dict[str, str]()
    for source, written in (("fromFile", secret.from_file), ("fromEnv", secret.from_env)):
        for key, name in written.items():
            if key in values or key in unread:
                problems.add_at(one, (source, key), "this key is already given")
                continue
            try:
                # An editor ends a file with a newline, which is never meant to be part of a token.
                read = environ[name] if source == "fromEnv" else _read_file(FilePath(name)).removesuffix("\n")
            except KeyError:
                unread[key] = f"{source}.{key}: the runtime's environment has no {name}"
            except OSError as exc:
                unread[key] = f"{source}.{key}: {exc.strerror}: {name}"
            except ValueError as exc:
                problems.add_at(one, (source, key), f"{exc}: {name}")
            else:
                values[key] = read
    for key, value in values.items():
        if (what := _unusable(value)) is not None:
            source = next(name for name in ("data", "fromFile", "fromEnv") if one.document.value.get(name, {}).get(key))
            problems.add_at(one, (source, key), what)
    return ReadSecret(values, unread)


def _unusable(value: str) -> str | None:
    """Say why a value is none that anybody could be given; None when it is one."""
    if "\0" in value:
        return "holds a NUL character"
    # The bytes of an environment that are no text stand there as single surrogates.
    return "not UTF-8 text" if any("\ud800" <= char <= "\udfff" for char in value) else None


def _read_text(one: Declared, path: Path, file: FilePath, problems: Problems) -> str | None:
    """Return the text of a file; what is wrong with it is noted without its content."""
    try:
        return _read_file(file)
    except OSError as exc:
        problems.add_at(one, path, f"{exc.strerror}: {file}")
    except ValueError as exc:
        problems.add_at(one, path, f"{exc}: {file}")
    return None


def _read_file(file: FilePath) -> str:
    """Return the text of a regular file of at most 1 MiB. Raises: OSError; ValueError that says what it is instead."""
    if not stat.S_ISREG(file.stat().st_mode):
        raise ValueError("not a regular file")
    if file.stat().st_size > MAX_READ_BYTES:
        raise ValueError(f"over {MAX_READ_BYTES // 2**20} MiB")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError("not UTF-8 text") from None
