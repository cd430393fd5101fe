"""The page on the admin's TCP listener: guard, token, headers, and the views behind them."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Final

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from clrk.gateway.admin.page.guard import HEADERS, NEEDS_TOKEN, Guard, Refusal
from clrk.gateway.admin.page.rendering import STATIC, render
from clrk.gateway.admin.page.token import PageToken
from clrk.gateway.admin.page.views import PageSources, Views, not_found, unreadable
from clrk.gateway.telemetry.store import StoreError

_COOKIE_AGE_S: Final = 30 * 86_400


def page_url(listen: tuple[str, int], token: PageToken) -> str:
    """Return what `clrk page` prints; listen is the socket's; one for all addresses shows as loopback."""
    address = ip_address(listen[0])
    if address.is_unspecified:
        address = ip_address("::1" if address.version == 6 else "127.0.0.1")
    host = f"[{address}]" if address.version == 6 else str(address)
    return f"http://{host}:{listen[1]}/?token={token.text}"


def add_page(app: web.Application, sources: PageSources, token: PageToken, port: int) -> None:
    """Put the page into the application of the TCP listener, and its guard before everything that is there.

    /healthz, /readyz and /metrics stay without a token. Shape: port is the listener's own.
    """
    guard = Guard(token, port)
    app.middlewares.append(_guarded(guard))
    app.middlewares.append(_problems)

    def index(request: web.Request) -> web.Response | None:
        """`/?token=…` becomes a cookie and a clean address: tokens do not stay in histories and bookmarks."""
        if "token" not in request.query:
            return None
        response = web.Response(status=303, headers={"Location": "/"})
        response.set_cookie(
            guard.cookie_name, token.text, max_age=_COOKIE_AGE_S, path="/", httponly=True, samesite="Strict"
        )
        return response

    Views(sources).add_to(app.router, index)
    app.router.add_get("/static/{name}", _static)
    app.router.add_get("/favicon.ico", _no_icon)


def _guarded(guard: Guard) -> Middleware:
    @web.middleware
    async def judge(request: web.Request, handler: Handler) -> web.StreamResponse:
        local = request.transport.get_extra_info("sockname") if request.transport is not None else None
        refusal = guard.judge(request.method, request.path, request.headers, local[0] if local else "")
        if refusal is NEEDS_TOKEN and request.path == "/" and guard.accepts(request.query.get("token", "")):
            refusal = None
        try:
            response = await handler(request) if refusal is None else _refuse(refusal)
        except web.HTTPException as exc:
            exc.headers.update(HEADERS)
            raise
        response.headers.update(HEADERS)
        return response

    return judge


def _refuse(refusal: Refusal) -> web.Response:
    response = web.Response(
        status=refusal.status, text=render("refusal.html", refusal=refusal, view=""), content_type="text/html"
    )
    if refusal.status == 401:
        response.headers["WWW-Authenticate"] = 'Bearer realm="clrk page"'
    if refusal.status == 405:
        response.headers["Allow"] = "GET, HEAD"
    return response


@web.middleware
async def _problems(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except StoreError as exc:
        return await unreadable(exc)
    except web.HTTPNotFound:
        return await not_found()


async def _static(request: web.Request) -> web.Response:
    if (found := STATIC.get(request.match_info["name"])) is None:
        return await not_found()
    return web.Response(body=found[0], content_type=found[1], charset="utf-8")


async def _no_icon(_request: web.Request) -> web.Response:
    return web.Response(status=204)
