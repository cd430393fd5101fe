"""The gateway with everything in it, as it runs on a host."""

from __future__ import annotations

import asyncio
import signal
import socket
from functools import partial
from pathlib import Path

from clrk.core.gateway_config import GatewayConfig
from clrk.gateway.app import App, EgressSide
from clrk.gateway.budget_ledger import BudgetLedger
from clrk.gateway.egress.service import EgressService
from clrk.gateway.sandbox_run import TelemetrySink


async def serve(control_fd: int, state_dir: Path) -> str:
    """Serve what the runtime at the other end of the control socket asks for; return why the end came."""
    app = App(socket.socket(fileno=control_fd), state_dir, partial(_make_egress, state_dir))
    loop = asyncio.get_running_loop()
    # Ctrl-C reaches the whole foreground group, but when to stop is the runtime's decision.
    loop.add_signal_handler(signal.SIGINT, lambda: None)
    loop.add_signal_handler(signal.SIGTERM, lambda: app.drain(then_exit=True))
    return await app.run()


def _make_egress(state_dir: Path, config: GatewayConfig, flows_fd: int, recorder: TelemetrySink) -> EgressSide:
    ledger = BudgetLedger(state_dir / "budgets.db")
    return EgressService(config=config, flows_fd=flows_fd, recorder=recorder, ledger=ledger)
