"""The same against Debian's tinyproxy, which nobody of us wrote."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket

import pytest
from egress_lab import laboratory, upstream
from proxied_lab import PROXY, hello, only_the_proxy
from tls_material import Authority


@contextlib.asynccontextmanager
async def tinyproxy(folder):
    """Debian's tinyproxy on a free port; yields the port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    lines = (f"Port {port}", "Listen 127.0.0.1", "Timeout 20", "MaxClients 10", "BasicAuth corp-user S3cret-word")
    (folder / "tinyproxy.conf").write_text("\n".join(lines) + "\n")
    process = await asyncio.create_subprocess_exec("tinyproxy", "-d", "-c", folder / "tinyproxy.conf", stdout=-3)
    try:
        async with asyncio.timeout(25):
            while True:
                with contextlib.suppress(ConnectionRefusedError):
                    socket.create_connection(("127.0.0.1", port)).close()
                    break
                await asyncio.sleep(0.02)
        yield port
    finally:
        process.terminate()
        await process.wait()


@pytest.mark.skipif(shutil.which("tinyproxy") is None, reason="no tinyproxy: apt-get install tinyproxy-bin")
async def test_against_tinyproxy(tmp_path):
    theirs = Authority("upstream CA")
    rules = [{"cidrs": ["127.0.0.1/32"]}]
    async with upstream(hello, theirs.server_context(["127.0.0.1"])) as port, tinyproxy(tmp_path) as proxy_port:
        gateway = {"upstreamProxy": {"url": f"http://{PROXY}:{proxy_port}", "secretRef": {"name": "proxy"}}}
        for password, status in (("S3cret-word", 200), ("wrong", 502)):
            secrets = {"default/proxy": {"username": "corp-user", "password": password}}
            async with laboratory(
                gateway=gateway, rules=rules, upstream_ca=theirs.cert_pem, resolver=only_the_proxy, secrets=secrets
            ) as lab:
                wire = await lab.dial_tls("127.0.0.1", port)
                request = f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n\r\n"
                raw = await wire.ask(request.encode())
                assert int(raw.split()[1]) == status
                span = (await lab.recorder.wait())[0]
                assert span.attributes.get("error.type") == (None if status == 200 else "proxy_authentication_required")
