"""Which exchanges the MCPRoutes govern: one McpGovernance per gateway configuration, one McpRun per run."""

from __future__ import annotations

from dataclasses import dataclass, field

from clrk.core.errors import ProtocolError
from clrk.core.gateway_config import GatewayConfig
from clrk.gateway.egress.forward import split_host
from clrk.gateway.interpret import Interpreter, RequestHead
from clrk.gateway.mcp.governor import McpGovernor, McpRunState
from clrk.gateway.mcp.interpreter import McpInterpreter, McpStream
from clrk.gateway.mcp.tool_policy import McpPolicy
from clrk.gateway.run import Run


@dataclass(frozen=True, slots=True)
class McpRun:
    """What the MCPRoutes say for one run."""

    policy: McpPolicy
    enforces: bool
    state: McpRunState = field(default_factory=McpRunState)

    @classmethod
    def of(cls, config: GatewayConfig, run: Run, state: McpRunState | None = None) -> McpRun:
        """Compile what holds for a run; state is what it keeps when its rules change."""
        policy = McpPolicy.compile(run.gateway, config.mcp_routes)
        enforces = run.gateway is not None and run.gateway.spec.mode == "Enforce"
        return cls(policy, enforces, state or McpRunState())

    def govern(self, head: RequestHead, interpreter: Interpreter | None) -> McpGovernor | None:
        """Return the governor of an exchange, None when no MCPRoute governs it."""
        if not self.policy.routes:
            return None
        is_mcp = isinstance(interpreter, McpInterpreter | McpStream)
        found = self.policy.of_host((head.host, named_host(head)), is_mcp=is_mcp)
        return None if found is None else McpGovernor(found, self.state, head, enforces=self.enforces)

    def names_host(self, *names: str | None) -> bool:
        """Say whether a route names the host: whatever goes there is HTTP, or it is not let through."""
        return bool(self.policy.routes) and self.policy.of_host(names, is_mcp=False) is not None


def named_host(head: RequestHead) -> str | None:
    """Return the name in the Host header: a plain connection to an address is served by it."""
    try:
        return split_host(head.header("host") or "")[0]
    except ProtocolError:
        return None
