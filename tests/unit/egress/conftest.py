"""The egress tests run on both event loops: uvloop is what main.py uses, asyncio's shows what depends on it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import uvloop
from tls_material import Authority


def pytest_asyncio_loop_factories(item):
    """Run every async test of this folder twice."""
    if Path(__file__).parent not in item.path.parents:
        return None
    return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


@pytest.fixture(scope="session")
def nobodys_roots(tmp_path_factory):
    path = tmp_path_factory.mktemp("roots") / "ca.pem"
    path.write_bytes(Authority("nobody").pem)
    return str(path)


@pytest.fixture(autouse=True)
def no_roots_of_the_host(monkeypatch, nobodys_roots):
    """Upstreams here have CAs of their own; to read the host's takes each gateway a tenth of a second."""
    monkeypatch.setenv("SSL_CERT_FILE", nobodys_roots)


@pytest.fixture
def brief_linger(monkeypatch):
    """A refusal's connection closes soon, for agents that wait for that and have nothing more to say."""
    monkeypatch.setattr("clrk.gateway.egress.http.LINGER_IDLE_S", 0.1)
