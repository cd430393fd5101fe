"""The smallest rules that allow what an agent was seen to do: spans in, an EgressL4Route as YAML out. Pure.

What is generalised: a host is allowed with the ports that were seen; with `paths`, also with methods and paths, where
segments that look like ids (numbers, UUIDs, hex, tokens) and hidden secrets become `*`, which stands for any
characters, and a path allows what is below it, as in every rule. Nothing else: no host for another, no port for
another.

Names and paths were written by the agent. In YAML they stand in JSON strings; in comments they do not stand at all.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from ipaddress import ip_network
from typing import Any, Final

from clrk.core.egress_resources import find_path_fault, is_rule_method
from clrk.core.url_paths import path_readings
from clrk.gateway.names import TOO_MANY_NAMES
from clrk.gateway.policy import HTTP_NOT_ALLOWED, HTTP_ONLY, NO_RULE, PORT_NOT_ALLOWED
from clrk.gateway.policy_names import normalise_name, parse_ip
from clrk.gateway.policy_paths import PathPattern
from clrk.gateway.telemetry import attributes as attr

_LACKED_A_RULE: Final = frozenset((NO_RULE, PORT_NOT_ALLOWED, HTTP_NOT_ALLOWED, HTTP_ONLY))
_MAX_PATHS: Final = 100  # of one host and port: more are no list that somebody reads
_MAX_URL_CHARS: Final = 4096  # egress/record.py cuts url.full there
_ID: Final = re.compile(
    r"\d+|[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}"
    r"|(?=[a-f0-9]*\d)[a-f0-9]{8,}|(?=[A-F0-9]*\d)[A-F0-9]{8,}"
    r"|(?=[^A-Z]*[A-Z])(?=[^a-z]*[a-z])(?=[^0-9]*[0-9])[A-Za-z0-9_-]{12,}|.*REDACTED.*|.*\[redacted\].*"
)


@dataclass(slots=True)
class _Seen:
    """What was seen of one host and port. A call without a path was a tunnel."""

    calls: int = 0
    denied: int = 0  # or would have been
    tunnels: int = 0
    odd: int = 0  # with a method or path that no rule can name
    requests: set[tuple[str, str]] = field(default_factory=set)  # method, pattern


@dataclass(slots=True)
class Recorded:
    """What an agent did, gathered from its spans. Shape: hosts by what clrk.dst.name has, and port."""

    hosts: dict[tuple[str, int], _Seen] = field(default_factory=dict)
    names: Counter[str] = field(default_factory=Counter)  # that were asked for and denied: no port is known
    skipped: int = 0  # calls to what is no host name

    def add(self, span: dict[str, Any]) -> None:
        """Take one span as `clrk traces --json` prints it; what is no call of clrk's own word does not count."""
        found = span["attributes"]
        if span["resource"].get(attr.CLRK_COMPONENT) != "gateway":
            return
        host, port, reason = found.get(attr.CLRK_DST_NAME), found.get(attr.SERVER_PORT), _reason(found)
        if span["name"] == attr.SPAN_EGRESS_DNS_DENIED:
            if isinstance(host, str) and normalise_name(host) == host and reason != TOO_MANY_NAMES:
                self.names[host] += 1
            return
        if not isinstance(host, str) or not isinstance(port, int) or span["name"] == attr.SPAN_EGRESS_PROXY_MALFORMED:
            return
        if reason is not None and reason not in _LACKED_A_RULE and attr.CLRK_EGRESS_WOULD_DENY not in found:
            return  # no rule would help, or none should: the host itself, what could be smuggled, a budget
        if parse_ip(host) is None and normalise_name(host) != host:
            self.skipped += 1
            return
        seen = self.hosts.setdefault((host, port), _Seen())
        seen.calls += 1
        seen.denied += reason is not None
        self._add_request(seen, found)

    def _add_request(self, seen: _Seen, found: dict[str, Any]) -> None:
        method = found.get(attr.HTTP_REQUEST_METHOD_ORIGINAL) or found.get(attr.HTTP_REQUEST_METHOD)
        if method is None:
            seen.tunnels += 1
            return
        pattern = generalise(_path_of(str(found.get(attr.URL_FULL, ""))))
        if pattern is None or not isinstance(method, str) or not is_rule_method(method):
            seen.odd += 1
        else:
            seen.requests.add((method, pattern))


def _reason(found: dict[str, Any]) -> str | None:
    reason = found.get(attr.CLRK_EGRESS_DENY_REASON, found.get(attr.CLRK_EGRESS_WOULD_DENY))
    return reason if isinstance(reason, str) else None


def _path_of(url: str) -> str:
    """Return the path of a url.full; one that may have been cut ends in `*`."""
    rest = url.partition("://")[2]
    path = rest[rest.find("/") :] if "/" in rest else ""
    plain = path.partition("?")[0]
    return plain + "*" if len(url) >= _MAX_URL_CHARS and plain == path else plain


def generalise(path: str) -> str | None:
    """Return the pattern that stands for a path; None when no pattern can: it has more than one meaning."""
    readings = path_readings(path)
    if not readings:
        return None
    general = "/".join("*" if _ID.fullmatch(segment) else segment for segment in path.split("/"))
    for pattern in (general, path):
        if not find_path_fault(pattern) and PathPattern.compile(pattern).matches(readings):
            return pattern
    return None


def render(recorded: Recorded, *, agent: str, namespace: str, gateway: str, paths: bool) -> str:
    """Return the route as YAML, with comments that count. agent, namespace and gateway are names of resources."""
    rules = _rules(recorded, paths=paths)
    lines = [f"# What {namespace}/{agent} did, as far as the store remembers. Read it before it is applied."]
    if recorded.skipped:
        lines.append(f"# {recorded.skipped} calls went to what is no host name: no rule can allow them.")
    if not rules:
        lines.append("# Nothing was recorded: let the agent work, with mode Record in its EgressGateway.")
    lines += ["apiVersion: clrk/v1alpha1" if rules else "", "kind: EgressL4Route"] if rules else []
    if rules:
        lines += ["metadata:", f"  name: {agent[:53]}-recorded", f"  namespace: {namespace}", "spec:"]
        lines += [f"  gatewayRef: {{name: {gateway}}}", "  rules:"]
        lines += [f"    {line}" for rule in rules for line in rule]
    names = [name for name in sorted(recorded.names) if not any(name == host for host, _ in recorded.hosts)]
    if names:
        lines.append(
            "# Names that were asked for and denied; nobody knows with which port they would have been dialled:"
        )
        lines += [f"#   - hostnames: [{json.dumps(name)}]" for name in names]
    return "\n".join(lines) + "\n"


def _rules(recorded: Recorded, *, paths: bool) -> list[list[str]]:
    """Return the lines of each rule: hosts that need the same are in one rule."""
    alike: dict[tuple[tuple[int, ...], tuple[Any, ...]], list[str]] = {}
    by_host: dict[str, dict[int, tuple[Any, ...]]] = {}
    for (host, port), seen in recorded.hosts.items():
        by_host.setdefault(host, {})[port] = _narrowed(seen) if paths else ((),)
    for host, ports in sorted(by_host.items()):
        for needs in sorted(set(ports.values()), key=repr):
            same = tuple(sorted(port for port in ports if ports[port] == needs))
            alike.setdefault((same, needs), []).append(host)
    found: list[list[str]] = []
    for (same, needs), hosts in sorted(alike.items(), key=lambda item: item[1]):
        all_seen = [recorded.hosts[host, port] for host in hosts for port in same]
        found += [_rule(hosts, same, need, _comment(all_seen, narrowed=paths)) for need in needs]
    return found


def _narrowed(seen: _Seen) -> tuple[Any, ...]:
    """Return (methods, paths) of each rule that a host needs, () for one that is not narrowed."""
    if seen.tunnels or len(seen.requests) > _MAX_PATHS:
        return ((),)
    methods: dict[str, set[str]] = {}
    for method, pattern in seen.requests:
        methods.setdefault(pattern, set()).add(method)
    grouped: dict[tuple[str, ...], set[str]] = {}
    for pattern, used in methods.items():
        grouped.setdefault(tuple(sorted(used)), set()).add(pattern)
    return tuple((used, _without_covered(patterns)) for used, patterns in sorted(grouped.items()))


def _without_covered(patterns: set[str]) -> tuple[str, ...]:
    kept: list[str] = []
    for pattern in sorted(patterns, key=lambda text: ("*" in text, len(text), text)):
        covered = "*" not in pattern and any(PathPattern.compile(one).matches(path_readings(pattern)) for one in kept)
        if not covered:
            kept.append(pattern)
    return tuple(kept)


def _rule(hosts: list[str], ports: tuple[int, ...], need: tuple[Any, ...], comment: str) -> list[str]:
    names = [host for host in hosts if parse_ip(host) is None]
    cidrs = [str(ip_network(address)) for host in hosts if (address := parse_ip(host)) is not None]
    lines = [f"# {comment}"]
    fields = [f"{key}: {json.dumps(values)}" for key, values in (("hostnames", names), ("cidrs", cidrs)) if values]
    fields.append(f"ports: {json.dumps(list(ports))}")
    if need:
        fields.append(f"http: {{methods: {json.dumps(list(need[0]))}, paths: {json.dumps(list(need[1]))}}}")
    return lines + [("- " if at == 0 else "  ") + one for at, one in enumerate(fields)]


def _comment(seen: list[_Seen], *, narrowed: bool) -> str:
    calls, denied, odd = (sum(getattr(one, name) for one in seen) for name in ("calls", "denied", "odd"))
    text = f"{calls} call{'' if calls == 1 else 's'}"
    if denied:
        text += f", {denied} denied now or when enforced"
    if narrowed and any(len(one.requests) > _MAX_PATHS for one in seen):
        text += f"; over {_MAX_PATHS} different requests: not narrowed"
    return text + (f"; {odd} with a path or method that no rule can name are left out" if narrowed and odd else "")


def gather(spans: Iterable[dict[str, Any]]) -> Recorded:
    """Return what spans tell."""
    recorded = Recorded()
    for span in spans:
        recorded.add(span)
    return recorded
