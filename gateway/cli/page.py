"""`clrk page`."""

from __future__ import annotations

import argparse
import sys

from clrk.gateway.cli.connection import Admin


def show_page(admin: Admin, _args: argparse.Namespace) -> int:
    """Print the page's address. It holds the token: who has it sees every trace."""
    sys.stdout.write(f"{admin.get('page')['url']}\n")
    return 0
