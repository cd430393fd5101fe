"""clrk-gateway: started by clrk-runtime as root, drops everything, then serves what the control socket asks for."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from clrk.core.errors import ClrkError
from clrk.core.loading import loading
from clrk.gateway.lifeline import watch_lifeline
from clrk.gateway.privileges import drop_privileges, raise_open_files

_LOG: Final = logging.getLogger(__name__)
_LOG_FORMAT: Final = "%(levelname)s gateway %(name)s: %(message)s"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the gateway; returns the exit code.

    Privileges: see privileges.py. Everything is imported before they go, so that nothing is loaded afterwards.
    """
    options = _parse(argv)
    with loading():
        import uvloop

        from clrk.gateway.serve import serve
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
            reason = runner.run(serve(options.control_fd, options.state_dir))
    except ClrkError as exc:
        _LOG.critical("%s", exc)
        return 1
    _LOG.info("end: %s", reason)
    return 0


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
