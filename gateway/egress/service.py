"""The egress side of the gateway: one object per process, one RunEgress per sandbox."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final

from clrk.core import wire
from clrk.core.egress_resources import EgressGateway
from clrk.core.errors import ConfigError
from clrk.core.gateway_config import GatewayConfig
from clrk.gateway._aio import spawn
from clrk.gateway.budget_ledger import BudgetLedger
from clrk.gateway.ca import Issuers
from clrk.gateway.credential_hosts import compile_credentials, update_values
from clrk.gateway.dns import SandboxResolver
from clrk.gateway.egress.accept import Acceptor, EgressCounters
from clrk.gateway.egress.addresses import AddressGuard
from clrk.gateway.egress.capture import MAX_KEPT_BYTES, Capture
from clrk.gateway.egress.flows import FlowMap, FlowSource
from clrk.gateway.egress.origin import Exit, Recognise
from clrk.gateway.egress.proxy import Proxy
from clrk.gateway.egress.record import EgressSpans
from clrk.gateway.egress.resolve import Resolver, system_resolver
from clrk.gateway.egress.tls import upstream_context
from clrk.gateway.egress.tunnels import OpenTunnels
from clrk.gateway.egress.upstream import Upstream, is_local_address
from clrk.gateway.governance import Governance
from clrk.gateway.interpret import Allowance
from clrk.gateway.llm.cost import BUNDLED, PriceList
from clrk.gateway.mcp.conversations import Conversations
from clrk.gateway.mcp.governor import McpRunState
from clrk.gateway.names import NameTable
from clrk.gateway.policy import EgressPolicy
from clrk.gateway.recognise import KnownHosts, KnownMcp, find_client_errors, recognise
from clrk.gateway.redact import Redactor
from clrk.gateway.run import Run
from clrk.gateway.secret_values import SecretValues
from clrk.gateway.telemetry.spans import Recorder

_NO_GATEWAY_TIMEOUT_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class _Kept:
    """What a run keeps when its rules change."""

    allowance: Allowance = field(default_factory=Allowance)
    captured: Allowance = field(default_factory=lambda: Allowance(MAX_KEPT_BYTES))
    conversations: Conversations = field(default_factory=Conversations)
    mcp: McpRunState = field(default_factory=McpRunState)
    tunnels: OpenTunnels = field(default_factory=OpenTunnels)


class EgressService:
    """Carries what agents send out.

    Shape: flows_fd is the kernel's map of flow records, kept by the caller. flows, resolver and recognise replace the
    real ones. ledger keeps what budgets have spent, and is closed with the service; without one, memory does.
    """

    def __init__(
        self,
        *,
        config: GatewayConfig,
        flows_fd: int,
        recorder: Recorder,
        flows: FlowSource | None = None,
        resolver: Resolver = system_resolver,
        recognise: Recognise | None = None,
        ledger: BudgetLedger | None = None,
    ) -> None:
        self._flows = flows or FlowMap(flows_fd)
        self._recorder = recorder
        self._resolver = resolver
        self._recognise = recognise
        self._runs: set[RunEgress] = set()
        self._contexts: dict[str | None, ssl.SSLContext] = {}
        self.counters = EgressCounters()
        self._issuers = Issuers()
        self._secret_values = SecretValues()
        self._governance = Governance(config, ledger)
        self._apply(config)

    def reconfigure(self, config: GatewayConfig) -> None:
        """Use a new configuration for runs that begin from now on. Raises: ConfigError; then the old one stays."""
        self._apply(config)

    def serve(self, run: Run) -> RunEgress:
        """Answer DNS and carry connections of one sandbox until the returned object is closed.

        Side effects: uses run.sockets' egress and dns sockets, which stay the caller's to close afterwards.
        """
        kept = _Kept()
        way_out = self._way_out(run, run.gateway, kept)
        acceptor = Acceptor(
            run=run,
            flows=self._flows,
            names=NameTable(),
            issuer=self._issuers.of(run.ca_id),
            way_out=way_out,
            counters=self.counters,
        )
        serving = RunEgress(
            run,
            acceptor=acceptor,
            recorder=self._recorder,
            remake=lambda gateway: self._way_out(run, gateway, kept),
            conversations=kept.conversations,
            siblings=self._runs,
            ended=partial(self._governance.end_run, run),
        )
        self._runs.add(serving)
        return serving

    def _way_out(self, run: Run, gateway: EgressGateway | None, kept: _Kept) -> Exit:
        """Return the way out of a run as the configuration of now has it; `kept` is the same for all of a run."""
        policy = EgressPolicy.compile(gateway, self._config.routes)
        upstream = Upstream(
            policy=policy,
            guard=AddressGuard(self._config.host_addresses, is_local_address),
            context=self._contexts[self._ca_pem(gateway)],
            resolver=self._resolver,
            proxy=_proxy(gateway),
            secrets=lambda: self._config.secrets,
        )
        timeout_s = gateway.spec.request_timeout if gateway is not None else _NO_GATEWAY_TIMEOUT_S
        credentials = compile_credentials(gateway, self._config, self._secret_values)
        patterns = gateway.spec.redact.patterns if gateway is not None else ()
        redactor = Redactor(patterns, lambda: self._secret_values.known, credentials.secret_headers)
        governing = self._governance.of_run(replace(run, gateway=gateway), kept.mcp)
        hosts = KnownHosts(gateway, self._config.ai_routes)
        known = partial(
            recognise,
            allowance=kept.allowance,
            hosts=hosts,
            prices=PriceList(gateway.spec.prices) if gateway is not None else BUNDLED,
            mcp=KnownMcp(governing.is_mcp_host, kept.conversations),
        )
        return Exit(
            policy,
            upstream,
            EgressSpans(run.identity, self._recorder, redactor, timeout_s),
            self._recognise or known,
            timeout_s,
            kept.allowance,
            _new_capture(gateway, redactor, kept.captured),
            governing.govern,
            credentials,
            governing.http_only,
            kept.tunnels,
            partial(find_client_errors, hosts=hosts),
        )

    def report_budgets(self, day: str | None) -> dict[str, Any]:
        """Return what budgets have spent on a UTC day, None: today. Raises: LedgerError."""
        return self._governance.report_budgets(day)

    async def close(self) -> None:
        """Close every run."""
        await asyncio.gather(*(serving.close() for serving in list(self._runs)))
        self._governance.close()

    def _apply(self, config: GatewayConfig) -> None:
        contexts: dict[str | None, ssl.SSLContext] = {}
        for name, pem in [("", None), *config.upstream_ca_pem.items()]:
            try:
                contexts[pem] = self._contexts.get(pem) or upstream_context(pem)
            except ssl.SSLError as exc:
                raise ConfigError(
                    (f"EgressGateway/{name}: spec.upstreamTLS.caFile: no usable certificate: {exc}",)
                ) from exc
        self._issuers.reconfigure(config)
        self._contexts = contexts
        self._config = config
        self._governance.reconfigure(config)
        update_values(self._secret_values, config)

    def _ca_pem(self, gateway: EgressGateway | None) -> str | None:
        if gateway is None:
            return None
        return self._config.upstream_ca_pem.get(f"{gateway.metadata.namespace}/{gateway.metadata.name}")


def _proxy(gateway: EgressGateway | None) -> Proxy | None:
    spec = gateway.spec.upstream_proxy if gateway is not None else None
    return Proxy.compile(spec, gateway.metadata.namespace) if gateway is not None and spec is not None else None


def _new_capture(
    gateway: EgressGateway | None, redactor: Redactor, allowance: Allowance
) -> Callable[[], Capture] | None:
    otlp = gateway.spec.otlp if gateway is not None else None
    if otlp is None or otlp.capture_body is None:
        return None
    return partial(Capture, otlp.capture_body, allowance, redactor)


class RunEgress:
    """Egress and DNS of one run, until closed."""

    def __init__(
        self,
        run: Run,
        *,
        acceptor: Acceptor,
        recorder: Recorder,
        remake: Callable[[EgressGateway | None], Exit],
        conversations: Conversations,
        siblings: set[RunEgress],
        ended: Callable[[], None],
    ) -> None:
        self._acceptor, self._remake, self._siblings = acceptor, remake, siblings
        self._conversations, self._ended = conversations, ended
        self._resolver = resolver = SandboxResolver(
            identity=run.identity,
            policy=lambda: acceptor.way_out.policy,
            names=acceptor.names,
            recorder=recorder,
            redactor=lambda: acceptor.way_out.spans.redactor,
        )
        sockets, label = run.sockets, run.identity.sandbox_id
        resolver.start(sockets.dns_udp, sockets.dns_tcp)
        self._accepting = [
            spawn(acceptor.accept_forever(sockets.egress_v4, wire.FAMILY_V4), name=f"egress-accept-v4-{label}"),
            spawn(acceptor.accept_forever(sockets.egress_v6, wire.FAMILY_V6), name=f"egress-accept-v6-{label}"),
        ]

    def reconfigure(self, gateway: EgressGateway | None) -> None:
        """Judge names, connections and requests by the configuration of now, and end tunnels that it does not allow.

        What is under way goes on by the rules that it began with; connections stay, upstream ones are not kept idle.
        """
        before = self._acceptor.way_out
        self._acceptor.use(self._remake(gateway))
        before.upstream.close()

    async def close(self) -> None:
        """Stop accepting, abort what is open, and record the spans of what was in flight. Idempotent."""
        self._siblings.discard(self)
        for task in self._accepting:
            task.cancel()
        await asyncio.gather(*self._accepting, return_exceptions=True)
        await self._acceptor.close()
        self._conversations.close()
        await self._resolver.close()
        self._acceptor.way_out.upstream.close()
        self._ended()
