"""Which governor a call gets: TokenBudgets for LLM calls, ToolPolicies for MCP (CONTRACT section 12). One per gateway.

What one run has used up so far is the run's own (`RunGovernance`); what is shared between runs belongs to Governance.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from clrk.core.egress_resources import EgressGateway
from clrk.core.gateway_config import GatewayConfig
from clrk.gateway.budget_ledger import BudgetLedger
from clrk.gateway.govern import Governor
from clrk.gateway.interpret import Interpreter, RequestHead
from clrk.gateway.joint import JointGovernor
from clrk.gateway.llm.budget_rules import compile_rules
from clrk.gateway.llm.budgets import Budgets, tunnel_rule
from clrk.gateway.mcp.governance import McpRun, named_host
from clrk.gateway.mcp.governor import McpRunState
from clrk.gateway.mcp.tool_policy import McpPolicy
from clrk.gateway.recognise import KnownHosts, find_error_writer
from clrk.gateway.run import Run


def is_http_only(config: GatewayConfig, gateway: EgressGateway, host: str) -> bool:
    """Say whether every exchange of a gateway's runs with a host has to be judged, so that nothing else may pass."""
    if gateway.spec.mode != "Enforce":
        return False
    if McpPolicy.compile(gateway, config.mcp_routes).of_host((host,), is_mcp=False) is not None:
        return True
    rules = compile_rules(gateway, config.ai_routes)
    return tunnel_rule(rules, KnownHosts(gateway, config.ai_routes).provider, host) is not None


class Governance:
    """What governs the calls of this gateway's runs."""

    def __init__(self, config: GatewayConfig, ledger: BudgetLedger | None = None) -> None:
        self._config = config
        self.budgets = Budgets(ledger or BudgetLedger(None), find_error_writer)

    def reconfigure(self, config: GatewayConfig) -> None:
        """Use another configuration for runs that begin from now on."""
        self._config = config

    def close(self) -> None:
        """Let go of what is kept on disk; every run has ended."""
        self.budgets.ledger.close()

    def report_budgets(self, day: str | None) -> dict[str, Any]:
        """Return what the budgets of the present configuration have spent. Raises: LedgerError."""
        return self.budgets.report(self._config.gateways, self._config.ai_routes, day)

    def end_run(self, run: Run) -> None:
        """Take note that a run is over. Idempotent."""
        self.budgets.end_run(run.identity)

    def of_run(self, run: Run, mcp_state: McpRunState | None = None) -> RunGovernance:
        """Return what governs one run; mcp_state is what the run keeps when its rules change."""
        return RunGovernance(self._config, run, self.budgets, mcp_state)


class RunGovernance:
    """Finds the governor of each exchange of one run."""

    def __init__(self, config: GatewayConfig, run: Run, budgets: Budgets, mcp_state: McpRunState | None = None) -> None:
        self.mcp = McpRun.of(config, run, mcp_state)
        self.budgets = budgets.of_run(run, config.ai_routes, KnownHosts(run.gateway, config.ai_routes).provider)

    def govern(self, head: RequestHead, interpreter: Interpreter | None) -> Governor | None:
        """Return the governor of an exchange; None when nothing governs it. interpreter is what understands it."""
        spends = self._spends(head, interpreter)
        calls_tools = self.mcp.govern(head, interpreter)
        if spends is not None and calls_tools is not None:
            return JointGovernor(calls_tools, spends)
        return spends if spends is not None else calls_tools

    def _spends(self, head: RequestHead, interpreter: Interpreter | None) -> Governor | None:
        """Ask the budgets. A plain connection to an address is served by the name in its Host header, so by both."""
        if self.budgets is None:
            return None
        found = self.budgets.govern(head, interpreter)
        if found is not None or head.scheme == "https" or (named := named_host(head)) in (None, head.host):
            return found
        return self.budgets.govern(replace(head, host=named or ""), interpreter)

    def is_mcp_host(self, host: str) -> bool:
        """Say whether an MCPRoute names a host: what is posted there is read as MCP, whatever its headers say."""
        return self.mcp.names_host(host)

    def http_only(self, *names: str | None) -> bool:
        """Say whether every exchange with a host, by any of its names, has to be judged; see Exit."""
        if self.mcp.enforces and self.mcp.names_host(*names):
            return True
        return self.budgets is not None and any(self.budgets.refuses_tunnel(name) for name in names if name)
