"""mcp.internal: an MCP server built with the official `mcp` package, over Streamable HTTP at /mcp."""

from __future__ import annotations

from mcp.server import MCPServer
from mcp.server.transport_security import TransportSecuritySettings
from starlette.applications import Starlette

HOSTNAME = "mcp.internal"
_POLICIES = {"DE": "30 days, free return", "FR": "14 days, free return", "US": "30 days, customer pays the return"}


def application() -> Starlette:
    """Return the ASGI app of mcp.internal."""
    server = MCPServer(name="support-tools", version="1.0.0", log_level="WARNING")

    @server.tool()
    def refund_policy(country: str) -> str:
        """Return the refund policy of a country (two-letter code)."""
        if country not in _POLICIES:
            raise ValueError(f"no policy for {country!r}")
        return _POLICIES[country]

    @server.tool()
    def open_ticket(order: str, reason: str) -> dict[str, str]:
        """Open a support ticket for an order."""
        return {"ticket": f"T-{order}", "order": order, "reason": reason}

    return server.streamable_http_app(
        transport_security=TransportSecuritySettings(allowed_hosts=[HOSTNAME, f"{HOSTNAME}:443"])
    )
