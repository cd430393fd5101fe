"""Header names as servers may read them. Pure."""

from __future__ import annotations


def fold_header(name: str) -> str:
    """Return what two header names have in common that a server may take for one: CGI knows neither case nor `-`."""
    return name.lower().replace("-", "_")
