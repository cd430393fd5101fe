"""The page over a store, on a real listener: what the gateway serves, without the gateway."""

import contextlib
import socket
from html.parser import HTMLParser

import aiohttp
from aiohttp import web
from page_samples import Health, States, page_config

from clrk.gateway.admin.app import build_health_app
from clrk.gateway.admin.page.app import add_page
from clrk.gateway.admin.page.token import PageToken
from clrk.gateway.admin.page.views import PageSources
from clrk.gateway.agents import AgentTable

VOID = frozenset({"meta", "link", "input", "br", "img"})
ATTRIBUTES = frozenset(
    """lang charset name content rel href class for id type placeholder autocomplete spellcheck maxlength required
    action method role hidden src defer value list inputmode selected checked title scope datetime start viewBox
    preserveAspectRatio width height x y tabindex open""".split()
)


class Page:
    """Asks the page as a browser would."""

    def __init__(self, session, port, token):
        self.session = session
        self.port = port
        self.token = token

    async def get(self, path, method="GET", authorized=True, **headers):
        """Return the answer, with its text read. headers: `_` stands for `-`."""
        sent = {name.replace("_", "-"): value for name, value in headers.items() if value is not None}
        if authorized:
            sent.setdefault("Authorization", f"Bearer {self.token}")
        response = await self.session.request(method, path, headers=sent, allow_redirects=False)
        await response.read()
        return response

    async def html(self, path, status=200):
        """Return the parsed page; asserts that it is whole and holds nothing that a template has not put there."""
        response = await self.get(path)
        text = await response.text()
        assert response.status == status, text[:300]
        return Parsed(text)


class Parsed(HTMLParser):
    """The page as html.parser reads it: an opinion that is not the template's."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.stack = [], [], []
        self.texts = []
        self.feed(text)
        self.close()
        assert self.stack == [], "elements are left open"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.texts.append((self.stack[-1] if self.stack else "", data.strip()))

    @property
    def text(self):
        """All text, in order."""
        return "\n".join(data for _, data in self.texts)

    @property
    def links(self):
        """Every address in the page."""
        return [value for name, value in self.attributes if name in ("href", "src", "action")]

    def assert_harmless(self):
        """Only elements and attributes of ours, only addresses of ours, nothing unseen."""
        allowed = """html head meta title link script body a header nav form label input button main p h1 h2 h3 dl div
            dt dd span code table caption thead tbody tr th td time select option datalist section ul ol li svg rect
            details summary figure figcaption pre b"""
        assert set(self.tags) <= set(allowed.split())
        for name, _ in self.attributes:
            assert name in {n.lower() for n in ATTRIBUTES} or name.startswith(("data-", "aria-")), name
        assert all(link == "#main" or link[:1] == "/" != link[1:2] for link in self.links), self.links
        assert self.tags.count("script") <= 1
        for text in [data for _, data in self.texts] + [value or "" for _, value in self.attributes]:
            assert all(c.isprintable() or c in "\n\t" for c in text), repr(text)[:200]


@contextlib.asynccontextmanager
async def page_of(telemetry, *, health=None, token="t" * 43, address="127.0.0.1"):
    """Serve the page of a store."""
    app = build_health_app(lambda: True)
    sock = socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET)
    port = sock.getsockname()[1]
    sources = PageSources(telemetry.store, AgentTable(page_config()), States(), health or Health())
    add_page(app, sources, PageToken(token), port)
    app.router.add_get("/metrics", _metrics)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.SockSite(runner, sock).start()
    host = f"[{address}]" if ":" in address else address
    try:
        jar = aiohttp.DummyCookieJar()
        async with aiohttp.ClientSession(f"http://{host}:{port}", cookie_jar=jar) as session:
            yield Page(session, port, token)
    finally:
        await runner.cleanup()


async def _metrics(_request):
    return web.Response(text="clrk_up 1\n")
