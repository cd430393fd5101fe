"""The page of a real daemon: `clrk page` opens it, and it shows what was run."""

import http.client
import os
import stat
from urllib.parse import urlsplit

import pytest
from instances import DEADLINE_S
from stack import invoke

pytestmark = pytest.mark.e2e


def get(daemon, path, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", daemon.admin_port, timeout=DEADLINE_S)
    try:
        connection.request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        return response.status, dict(response.getheaders()), response.read().decode()
    finally:
        connection.close()


async def test_clrk_page_opens_the_page(daemon, caller):
    source = "import sys; print('<b>out</b>'); print('<i>err</i>', file=sys.stderr)"
    _, invocation = await invoke(caller, daemon, "python", source)
    daemon.spans_when_complete(invocation)

    address = urlsplit(daemon.clrk("page").strip())
    assert address.netloc == f"127.0.0.1:{daemon.admin_port}"
    status, headers, _ = get(daemon, f"/?{address.query}")
    assert (status, headers["Location"]) == (303, "/")
    cookie = headers["Set-Cookie"].partition(";")[0]

    status, _, listing = get(daemon, "/", Cookie=cookie)
    assert status == 200
    assert f'href="/invocations/{invocation}"' in listing
    status, _, page = get(daemon, f"/invocations/{invocation}", Cookie=cookie)
    assert status == 200
    for part in ("ingress.dispatch", "invoke_agent python", "sandbox.spawn", "Succeeded", "&lt;i&gt;err&lt;/i&gt;"):
        assert part in page, part
    assert "<i>err" not in page
    for view in ("/agents", "/agents/default/python", "/agents/default/python/logs", "/health"):
        assert get(daemon, view, Cookie=cookie)[0] == 200
    assert "running" in get(daemon, "/health", Cookie=cookie)[2]


async def test_nobody_else_sees_it(daemon):
    assert get(daemon, "/")[0] == 401
    assert get(daemon, "/", Host="evil.example")[0] == 403
    assert get(daemon, "/metrics", Host="evil.example")[0] == 403
    assert get(daemon, "/metrics")[0] == 200
    assert get(daemon, "/healthz", Host="evil.example")[0] == 200
    kept = daemon.state_dir / "gateway/page.token"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert kept.stat().st_uid != os.getuid()
    assert kept.read_text().strip() in daemon.clrk("page")
    assert kept.read_text().strip() not in daemon.log()
