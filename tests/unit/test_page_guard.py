"""Who may see the page: token, Host, other sites, methods, headers."""

import os
import stat

import pytest
from page_client import page_of
from page_samples import page_config

from clrk.gateway.admin.page.app import page_url
from clrk.gateway.admin.page.guard import HEADERS
from clrk.gateway.admin.page.token import FILE_NAME, PageToken
from clrk.gateway.telemetry.pipeline import Telemetry

PATHS = (
    "/",
    "/agents",
    "/health",
    "/budgets",
    "/invocations/x",
    "/find?id=1",
    "/traces/x",
    "/agents/default/support/logs",
    "/none",
)


@pytest.fixture
async def page(tmp_path):
    telemetry = Telemetry.open(tmp_path, page_config())
    await telemetry.flush()
    async with page_of(telemetry) as served:
        yield served
    await telemetry.close()


@pytest.mark.parametrize("path", PATHS)
async def test_nothing_is_shown_without_the_token(page, path):
    for authorization in (None, "Bearer", "Bearer ", "Bearer wrong", f"Basic {page.token}", f"Bearer {page.token}x"):
        response = await page.get(path, authorized=False, Authorization=authorization)
        assert response.status == 401
        assert "clrk page" in await response.text()
        assert response.headers["WWW-Authenticate"].startswith("Bearer")
        assert "Set-Cookie" not in response.headers
    assert (await page.get(path, authorized=False, Authorization=f"bearer {page.token}")).status != 401


async def test_the_token_becomes_a_cookie_and_a_clean_address(page):
    response = await page.get(f"/?token={page.token}", authorized=False)
    assert (response.status, response.headers["Location"]) == (303, "/")
    cookie = response.headers["Set-Cookie"]
    name, _, value = cookie.partition(";")[0].partition("=")
    assert name == f"clrk-page-{page.port}"
    assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= {part.strip() for part in cookie.split(";")}
    for cookies in (
        f"{name}={value}",
        f"other=1; {name}={value}",
        f'odd="; {name}={value}; x[]=1',
        f"{name}=x; {name}={value}",
    ):
        assert (await page.get("/", authorized=False, Cookie=cookies)).status == 200
    for cookies in (f"{name}=", f"{name}={value[:-1]}", f"x{name}={value}", f"clrk-page-1={value}", f"{name}=é{value}"):
        assert (await page.get("/", authorized=False, Cookie=cookies)).status == 401
    for query in ("token=", "token=wrong", f"token={page.token}x", f"tokens={page.token}", "token=%ff%00"):
        response = await page.get(f"/?{query}", authorized=False)
        assert (response.status, "Set-Cookie" in response.headers) == (401, False)
    assert (await page.get(f"/agents?token={page.token}", authorized=False)).status == 401


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:{port}", "localhost", "localhost:1", "127.0.0.1", "127.0.0.2:{port}", "[::2]:{port}",
     "localhost.:{port}", "localhost:{port}.evil", "127.0.0.1:{port}@evil.example", "::1:{port}", "2130706433:{port}",
     "127.1:{port}", "", ":{port}", "[::1]", "localhost:0{port}0", "localhost:²"],
)  # fmt: skip
async def test_a_foreign_host_is_403_also_for_metrics(page, host):
    for path in (*PATHS, "/metrics", "/static/page.js", f"/?token={page.token}"):
        response = await page.get(path, Host=host.format(port=page.port))
        assert response.status == 403
        assert "clrk page" in await response.text()
    assert (await page.get("/healthz", Host=host.format(port=page.port))).status == 200


@pytest.mark.parametrize("host", ["localhost:{port}", "LOCALHOST:{port}", "127.0.0.1:{port}", "[::1]:{port}"])
async def test_the_own_names_are_served(page, host):
    assert (await page.get("/agents", Host=host.format(port=page.port))).status == 200


async def test_the_address_that_was_connected_to_is_an_own_name(tmp_path):
    telemetry = Telemetry.open(tmp_path, page_config())
    async with page_of(telemetry, address="127.0.0.9") as page:
        assert (await page.get("/agents")).status == 200
        assert (await page.get("/agents", Host=f"127.0.0.10:{page.port}")).status == 403
    async with page_of(telemetry, address="::1") as page:
        assert (await page.get("/agents")).status == 200
    await telemetry.close()


@pytest.mark.parametrize(
    "headers",
    [{"Sec_Fetch_Site": "cross-site"}, {"Sec_Fetch_Site": "same-site"}, {"Sec_Fetch_Site": "anything"},
     {"Sec_Fetch_Site": ""}, {"Origin": "null"}, {"Origin": "http://evil.example"}, {"Origin": ""},
     {"Origin": "https://127.0.0.1:{port}"}, {"Origin": "http://127.0.0.1"}, {"Origin": "http://localhost:{port}"}],
)  # fmt: skip
async def test_another_sites_request_is_403(page, headers):
    headers = {name: value.format(port=page.port) for name, value in headers.items()}
    for path in ("/", "/metrics", "/static/page.css", f"/?token={page.token}"):
        assert (await page.get(path, **headers)).status == 403


async def test_the_pages_own_requests_are_served(page):
    own = f"http://127.0.0.1:{page.port}"
    for headers in ({"Sec_Fetch_Site": "same-origin", "Origin": own}, {"Sec_Fetch_Site": "none"}, {"Origin": own}):
        assert (await page.get("/agents", **headers)).status == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "PROPFIND"])
async def test_nothing_can_be_changed(page, method):
    for path in ("/", "/agents", "/none", "/metrics", f"/?token={page.token}"):
        response = await page.get(path, method=method)
        assert (response.status, response.headers["Allow"]) == (405, "GET, HEAD")
    assert (await page.get("/healthz", method=method)).status in (405, 403)


async def test_head_is_get_without_a_body(page):
    response = await page.get("/agents", method="HEAD")
    assert (response.status, await response.read()) == (200, b"")


async def test_every_answer_has_the_headers(page):
    answers = [
        await page.get(path, authorized=authorized, method=method, Host=host)
        for path in (
            *PATHS,
            "/?since=x",
            "/metrics",
            "/favicon.ico",
            "/static/page.js",
            "/static/page.css",
            "/static/x",
        )
        for authorized in (True, False)
        for method in ("GET", "HEAD", "POST")
        for host in (None, "evil.example")
    ]
    assert {response.status for response in answers} == {200, 204, 400, 401, 403, 404, 405}
    for response in answers:
        assert {name: response.headers.get(name) for name in HEADERS} == dict(HEADERS), response
    policy = HEADERS["Content-Security-Policy"]
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy


async def test_health_and_metrics_need_no_token(page):
    for path, text in (("/healthz", "ok\n"), ("/readyz", "ready\n"), ("/metrics", "clrk_up 1\n")):
        response = await page.get(path, authorized=False)
        assert (response.status, await response.text()) == (200, text)


async def test_static_files_are_there_and_nothing_else(page):
    types = {"page.css": "text/css", "page.js": "text/javascript"}
    for name, content_type in types.items():
        assert (await page.get(f"/static/{name}", authorized=False)).content_type == content_type
    assert (await page.get("/favicon.ico", authorized=False)).status == 204
    for name in ("app.py", "..%2fapp.py", "%2e%2e/app.py", "page.css%00", ""):
        assert (await page.get(f"/static/{name}")).status == 404


# --- the token ---


def test_the_token_is_made_once_and_is_ours_alone(tmp_path):
    first = PageToken.of(tmp_path)
    assert len(first.text) == 43
    assert PageToken.of(tmp_path).text == first.text
    assert stat.S_IMODE((tmp_path / FILE_NAME).stat().st_mode) == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == [FILE_NAME]
    assert first.fits(first.text)
    for wrong in ("", first.text[:-1], first.text + "x", "\udcff", "é" * 43):
        assert not first.fits(wrong)


@pytest.mark.parametrize("content", [b"", b"short", b"x" * 43 + b"\nmore", b"!" * 43, b"\xff" * 43, b"x" * 200])
def test_a_spoilt_token_is_replaced(tmp_path, content):
    (tmp_path / FILE_NAME).write_bytes(content)
    (tmp_path / FILE_NAME).chmod(0o600)
    made = PageToken.of(tmp_path)
    assert len(made.text) == 43
    assert PageToken.of(tmp_path).text == made.text


def test_a_token_that_others_can_read_or_that_is_a_link_is_replaced(tmp_path):
    theirs = tmp_path / "theirs"
    theirs.write_text("a" * 43)
    theirs.chmod(0o600)
    path = tmp_path / FILE_NAME
    path.symlink_to(theirs)
    assert PageToken.of(tmp_path).text != "a" * 43
    assert not path.is_symlink()
    path.write_text("b" * 43)
    path.chmod(0o640)
    assert PageToken.of(tmp_path).text != "b" * 43
    path.unlink()
    os.mkfifo(path, 0o600)
    assert len(PageToken.of(tmp_path).text) == 43


def test_without_a_folder_to_write_the_token_is_still_asked_for(tmp_path, caplog):
    (tmp_path / "file").touch()
    first, second = PageToken.of(tmp_path / "file"), PageToken.of(tmp_path / "file")
    assert first.text != second.text
    assert "can not be kept" in caplog.text


@pytest.mark.parametrize(
    ("listen", "origin"),
    [(("127.0.0.1", 8081), "http://127.0.0.1:8081"), (("0.0.0.0", 81), "http://127.0.0.1:81"),
     (("::", 81), "http://[::1]:81"), (("::1", 8081), "http://[::1]:8081"), (("192.0.2.7", 80), "http://192.0.2.7:80")],
)  # fmt: skip
def test_the_address_that_clrk_page_prints(listen, origin):
    assert page_url(listen, PageToken("x" * 43)) == f"{origin}/?token={'x' * 43}"
