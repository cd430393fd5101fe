"""mcp.internal: an MCP server built with the official `mcp` package: Streamable HTTP at /mcp, HTTP+SSE at /sse."""

from __future__ import annotations

import anyio
from mcp.server import MCPServer
from mcp.server.mcpserver import Context
from mcp.server.transport_security import TransportSecuritySettings
from mcp_types import SamplingMessage, TextContent
from pydantic import BaseModel
from starlette.applications import Starlette

HOSTNAME = "mcp.internal"
_POLICIES = {"DE": "30 days, free return", "FR": "14 days, free return", "US": "30 days, customer pays the return"}


class Approval(BaseModel):
    """What a person is asked for."""

    approved: bool


def application() -> Starlette:
    """Return the ASGI app of mcp.internal."""
    server = MCPServer(name="support-tools", version="1.0.0", log_level="WARNING")
    _add_tools(server)
    _add_questions(server)

    @server.resource("orders://1042")
    def order() -> str:
        """An order."""
        return "one lamp"

    @server.prompt()
    def reply(tone: str) -> str:
        """How to write to a customer."""
        return f"Write a {tone} reply."

    security = TransportSecuritySettings(allowed_hosts=[HOSTNAME, f"{HOSTNAME}:443"])
    app = server.streamable_http_app(transport_security=security)
    app.router.routes.extend(server.sse_app(transport_security=security).routes)
    return app


def _add_tools(server: MCPServer) -> None:
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

    @server.tool()
    async def count(steps: int, ctx: Context) -> str:
        """Count, and say how far it got."""
        for step in range(steps):
            await ctx.report_progress(step + 1, steps)
            await anyio.sleep(0.05)
        return str(steps)


def _add_questions(server: MCPServer) -> None:
    """Tools that ask the client: its model, its user, its roots."""

    @server.tool()
    async def summarise(text: str, ctx: Context) -> str:
        """Summarise a text with the client's model."""
        message = SamplingMessage(role="user", content=TextContent(type="text", text=text))
        answer = await ctx.session.create_message([message], max_tokens=50)
        return str(answer.model)

    @server.tool()
    async def approve(ctx: Context) -> str:
        """Ask the client's user."""
        return (await ctx.elicit("Refund?", Approval)).action

    @server.tool()
    async def roots(ctx: Context) -> str:
        """List the client's roots."""
        return " ".join(str(root.uri) for root in (await ctx.session.list_roots()).roots)
