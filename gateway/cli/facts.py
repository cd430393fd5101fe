"""What the client shows of a span: short facts for people, read from its JSON. Pure; nothing here is printable yet."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from urllib.parse import urlsplit

from clrk.gateway.telemetry import attributes as attr

_DENIED_NAMES: Final = frozenset({attr.SPAN_EGRESS_DIAL_DENIED, attr.SPAN_EGRESS_DNS_DENIED})
_ERROR: Final = "STATUS_CODE_ERROR"


@dataclass(frozen=True, slots=True)
class SpanFacts:
    """One span; raw is its JSON document."""

    raw: dict[str, Any]

    def get(self, name: str) -> Any:
        """Return an attribute, or None."""
        return self.raw["attributes"].get(name)

    @property
    def name(self) -> str:
        """Name of the span."""
        return str(self.raw["name"])

    @property
    def start_ns(self) -> int:
        """Start, CLOCK_REALTIME."""
        return int(self.raw["start_time_unix_nano"])

    @property
    def end_ns(self) -> int:
        """End, CLOCK_REALTIME."""
        return int(self.raw["end_time_unix_nano"])

    @property
    def agent(self) -> str:
        """namespace/name, without the namespace `default`."""
        namespace, name = self.get(attr.AGENT_NAMESPACE), self.get(attr.AGENT_NAME)
        return f"{name}" if namespace == "default" else f"{namespace}/{name}"

    @property
    def invocation(self) -> str:
        """Invocation id; empty for a daemon's."""
        return str(self.get(attr.INVOCATION_ID) or "")

    @property
    def denied(self) -> bool:
        """Policy or a budget refused it."""
        return (
            self.name in _DENIED_NAMES
            or self.get(attr.CLRK_EGRESS_DENY_REASON) is not None
            or self.get(attr.CLRK_BUDGET_DENIED) is True
        )

    @property
    def failed(self) -> bool:
        """Status Error."""
        return bool(self.raw["status"]["code"] == _ERROR)

    @property
    def is_whole_run(self) -> bool:
        """The invocation itself, as opposed to something that it did."""
        return self.get(attr.CLRK_PHASE) is not None

    @property
    def is_llm_call(self) -> bool:
        """A call to a model, as opposed to a run of an agent or a tool."""
        return self.get(attr.GEN_AI_REQUEST_MODEL) is not None or self.get(attr.GEN_AI_RESPONSE_MODEL) is not None

    @property
    def status(self) -> str:
        """denied, the error's type, the HTTP status, or ok; and whether Enforce would have denied it."""
        if self.denied:
            return "denied"
        said = f"error {self.get(attr.ERROR_TYPE) or ''}".rstrip() if self.failed else ""
        said = said or str(self.get(attr.HTTP_RESPONSE_STATUS_CODE) or "ok")
        return f"{said}, would deny" if self.would_deny else said

    @property
    def would_deny(self) -> str:
        """Why a gateway that enforces would have denied what went out; empty where it would not."""
        return str(self.get(attr.CLRK_EGRESS_WOULD_DENY) or "")

    @property
    def rule_to_add(self) -> str:
        """The item of EgressL4Route spec.rules that would allow it, in one line; empty where none would."""
        lines = str(self.get(attr.CLRK_EGRESS_ADD_RULE) or "").splitlines()
        fields = [line.removeprefix("- ").strip() for line in lines if not line.startswith("#")]
        return f"- {{{', '.join(fields)}}}" if fields else ""

    @property
    def tokens_in(self) -> int | None:
        """Input tokens, cached ones included."""
        value = self.get(attr.GEN_AI_USAGE_INPUT_TOKENS)
        return value if isinstance(value, int) else None

    @property
    def tokens_out(self) -> int | None:
        """Output tokens, reasoning included."""
        value = self.get(attr.GEN_AI_USAGE_OUTPUT_TOKENS)
        return value if isinstance(value, int) else None

    @property
    def cost_usd(self) -> float | None:
        """Cost of the call."""
        value = self.get(attr.CLRK_COST_USD)
        return float(value) if isinstance(value, int | float) else None

    @property
    def request_line(self) -> str:
        """METHOD host/path of an HTTP call, else empty. The query may hold secrets and is left out."""
        method = self.get(attr.HTTP_REQUEST_METHOD)
        if method is None or self.name == attr.SPAN_INGRESS_DISPATCH:
            return ""
        host = self.get(attr.SERVER_ADDRESS) or self.get(attr.CLRK_DST_NAME) or ""
        return f"{method} {host}{self._path}"

    @property
    def _path(self) -> str:
        url = self.get(attr.URL_FULL)
        if isinstance(url, str):
            try:
                return urlsplit(url).path
            except ValueError:
                return ""
        return str(self.get(attr.URL_PATH) or "")

    @property
    def destination(self) -> str:
        """Where a connection went, by name if there is one."""
        host = self.get(attr.CLRK_DST_NAME) or self.get(attr.SERVER_ADDRESS) or self.get(attr.NETWORK_PEER_ADDRESS)
        port = self.get(attr.SERVER_PORT) or self.get(attr.NETWORK_PEER_PORT)
        if host is None:
            return str(self.get(attr.DNS_QUESTION_NAME) or "")
        return f"{host}:{port}" if port else str(host)

    @property
    def target(self) -> str:
        """The model, tool or resource, the request line, or the destination."""
        for name in (
            attr.GEN_AI_REQUEST_MODEL,
            attr.GEN_AI_RESPONSE_MODEL,
            attr.GEN_AI_TOOL_NAME,
            attr.MCP_RESOURCE_URI,
        ):
            if (value := self.get(name)) is not None:
                return str(value)
        if self.name == attr.SPAN_INGRESS_DISPATCH:
            return f"{self.get(attr.HTTP_REQUEST_METHOD) or ''} {self._path}".strip()
        return self.request_line or self.destination

    @property
    def title(self) -> str:
        """The name, and what it does not say of the target. What was refused is said best by its message."""
        target = self.target
        if self.denied and not self.request_line:
            target = self.message or target
        if not target or target in self.name:
            return self.name
        return target if target.startswith(self.name) else f"{self.name} {target}"

    @property
    def message(self) -> str:
        """Message of the status; only failed spans have one."""
        return str(self.raw["status"]["message"])

    @property
    def process(self) -> str:
        """executable[pid] as the kernel saw it."""
        pid, executable = self.get(attr.PROCESS_PID), self.get(attr.PROCESS_EXECUTABLE_NAME)
        if pid is None and executable is None:
            return ""
        return f"pid {pid}" if executable is None else f"{executable}[{pid or '?'}]"


def show_time(ns: int) -> str:
    """Return local wall-clock time with milliseconds and the date."""
    moment = datetime.fromtimestamp(ns / 1e9).astimezone()
    return f"{moment:%m-%d %H:%M:%S}.{moment.microsecond // 1000:03d}"


def show_duration(ns: int) -> str:
    """Return a duration in three significant digits."""
    seconds = ns / 1e9
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f}µs"
    if seconds < 1:
        return f"{seconds * 1e3:.3g}ms"
    if seconds < 100:
        return f"{seconds:.3g}s"
    return f"{seconds // 60:.0f}m{seconds % 60:02.0f}s"


def show_cost(usd: float | None) -> str:
    """Return dollars with as many digits as small amounts need."""
    if usd is None:
        return ""
    if usd >= 0.001 or usd <= 0:
        return f"${usd:.4f}"
    return f"${usd:.{1 - math.floor(math.log10(usd))}f}"
