"""Which governor a call gets: TokenBudgets for LLM calls, ToolPolicies for MCP (CONTRACT section 12). One per gateway.

What one run has used up so far is the run's own (`RunGovernance`); what is shared between runs belongs to Governance.
"""

from __future__ import annotations

from clrk.core.gateway_config import GatewayConfig
from clrk.gateway.govern import Governor
from clrk.gateway.interpret import Interpreter, RequestHead
from clrk.gateway.mcp.governance import McpRun
from clrk.gateway.run import Run


class Governance:
    """What governs the calls of this gateway's runs."""

    def __init__(self, config: GatewayConfig) -> None:
        self._config = config

    def reconfigure(self, config: GatewayConfig) -> None:
        """Use another configuration for runs that begin from now on."""
        self._config = config

    def of_run(self, run: Run) -> RunGovernance:
        """Return what governs one run."""
        return RunGovernance(self._config, run)


class RunGovernance:
    """Finds the governor of each exchange of one run."""

    def __init__(self, config: GatewayConfig, run: Run) -> None:
        self._config, self._run = config, run
        self.mcp = McpRun.of(config, run)

    def govern(self, head: RequestHead, interpreter: Interpreter | None) -> Governor | None:
        """Return the governor of an exchange; None when nothing governs it. interpreter is what understands it."""
        return self.mcp.govern(head, interpreter)

    def is_mcp_host(self, host: str) -> bool:
        """Say whether an MCPRoute names a host: what is posted there is read as MCP, whatever its headers say."""
        return self.mcp.names_host(host)

    def http_only(self, *names: str | None) -> bool:
        """Say whether every exchange with a host, by any of its names, has to be judged; see Exit."""
        return self.mcp.enforces and self.mcp.names_host(*names)
