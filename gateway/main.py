"""clrk-gateway: started by clrk-runtime as root, drops everything, then serves what the control socket asks for."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Final

import uvloop

from clrk.core.errors import ClrkError
from clrk.core.gateway_config import GatewayConfig
from clrk.gateway.app import App, EgressSide
from clrk.gateway.budget_ledger import BudgetLedger
from clrk.gateway.egress.service import EgressService
from clrk.gateway.lifeline import watch_lifeline
from clrk.gateway.privileges import drop_privileges, raise_open_files
from clrk.gateway.sandbox_run import TelemetrySink

_LOG: Final = logging.getLogger(__name__)
_LOG_FORMAT: Final = "%(levelname)s gateway %(name)s: %(message)s"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the gateway; returns the exit code.

    Privileges: see privileges.py. Everything is imported before they go, so that nothing is loaded afterwards.
    """
    options = _parse(argv)
    logging.basicConfig(
        stream=sys.stderr,
        level=os.environ.get("CLRK_GATEWAY_LOG_LEVEL", "INFO").upper(),
        format=_LOG_FORMAT if "JOURNAL_STREAM" in os.environ else f"%(asctime)s {_LOG_FORMAT}",
    )
    logging.getLogger("aiohttp.server").setLevel(logging.ERROR)  # its warnings are what strangers send
    try:
        raise_open_files()
        drop_privileges(options.uid, options.gid)
        watch_lifeline(options.control_fd)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            reason = runner.run(_serve(options.control_fd, options.state_dir))
    except ClrkError as exc:
        _LOG.critical("%s", exc)
        return 1
    _LOG.info("end: %s", reason)
    return 0


async def _serve(control_fd: int, state_dir: Path) -> str:
    app = App(socket.socket(fileno=control_fd), state_dir, partial(_make_egress, state_dir))
    loop = asyncio.get_running_loop()
    # Ctrl-C reaches the whole foreground group, but when to stop is the runtime's decision.
    loop.add_signal_handler(signal.SIGINT, lambda: None)
    loop.add_signal_handler(signal.SIGTERM, lambda: app.drain(then_exit=True))
    return await app.run()


def _make_egress(state_dir: Path, config: GatewayConfig, flows_fd: int, recorder: TelemetrySink) -> EgressSide:
    ledger = BudgetLedger(state_dir / "budgets.db")
    return EgressService(config=config, flows_fd=flows_fd, recorder=recorder, ledger=ledger)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="clrk-gateway", description="Started by clrk-runtime; there is no use in starting it by hand."
    )
    parser.add_argument("--uid", type=int, required=True)
    parser.add_argument("--gid", type=int, required=True)
    parser.add_argument("--control-fd", type=int, required=True)
    parser.add_argument("--state-dir", type=Path, required=True)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
