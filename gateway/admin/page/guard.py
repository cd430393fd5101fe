"""Who may see the page: every request to the admin's TCP listener passes here first. Pure but for the token.

In this order: the name it was called by (a foreign `Host` is DNS rebinding), the method (nothing can be changed here),
where it comes from (another site's page must not even load an image), and the token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Final

from multidict import CIMultiDictProxy

from clrk.gateway.admin.page.token import PageToken

HEADERS: Final = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self';"
        " frame-ancestors 'none'; base-uri 'none'; form-action 'self'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Server": "clrk",
}

_HEALTH: Final = frozenset({"/healthz", "/readyz"})  # say nothing but ok: any prober may ask by any name
_NO_TOKEN: Final = _HEALTH | {"/metrics", "/favicon.ico", "/static/page.css", "/static/page.js"}
_OWN_SITES: Final = frozenset({"same-origin", "none"})  # `same-site` is another port of this host: another program
_MAX_COOKIES: Final = 4096


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request is not served."""

    status: int
    title: str
    says: str


NEEDS_TOKEN: Final = Refusal(401, "Token needed", "This page needs its token.")


class Guard:
    """Judges requests. cookie_name is of this listener alone: cookies know hosts, but no ports."""

    def __init__(self, token: PageToken, port: int) -> None:
        self._token = token
        self._port = port
        self.cookie_name = f"clrk-page-{port}"

    def judge(
        self, method: str, path: str, headers: CIMultiDictProxy[str], local_address: str
    ) -> Refusal | None:  # fmt: skip
        """Return why the request is refused, or None. local_address: the IP address that the client connected to."""
        if path in _HEALTH:
            return None
        hosts = headers.getall("Host", [])
        if len(hosts) != 1 or not self._is_own(hosts[0], local_address):
            return Refusal(
                403, "Foreign host", "The page answers to its own address only: open what `clrk page` prints."
            )
        if method not in ("GET", "HEAD"):
            return Refusal(405, "Read only", "Nothing can be changed here: GET and HEAD only.")
        if self._is_cross_site(headers, hosts[0]):
            return Refusal(403, "Cross-site request", "Another site asked for this. Enter the address yourself.")
        if path in _NO_TOKEN or self._has_token(headers):
            return None
        return NEEDS_TOKEN

    def accepts(self, candidate: str) -> bool:
        """Say whether this is the token."""
        return self._token.fits(candidate)

    def _is_own(self, host: str, local_address: str) -> bool:
        name, port = _split_host(host)
        if port != self._port:
            return False
        if name.lower() == "localhost":
            return True
        try:
            address = ip_address(name)
            local = ip_address(local_address)
        except ValueError:
            return False
        # An address can not be rebound as a name can: the one that was connected to is ours (0.0.0.0 listens on many).
        return str(address) in ("127.0.0.1", "::1") or address in (local, getattr(local, "ipv4_mapped", None))

    @staticmethod
    def _is_cross_site(headers: CIMultiDictProxy[str], host: str) -> bool:
        sites = headers.getall("Sec-Fetch-Site", [])
        if any(site not in _OWN_SITES for site in sites):
            return True
        return any(origin != f"http://{host}" for origin in headers.getall("Origin", []))

    def _has_token(self, headers: CIMultiDictProxy[str]) -> bool:
        for value in headers.getall("Authorization", []):
            scheme, _, credential = value.partition(" ")
            if scheme.lower() == "bearer" and self.accepts(credential.strip()):
                return True
        return any(self.accepts(value) for value in _cookies(headers.getall("Cookie", []), self.cookie_name))


def _split_host(host: str) -> tuple[str, int]:
    """Return name and port of a Host header; port 80 where it names none, -1 where it is none."""
    name, colon, port = host.rpartition(":")
    if not colon or port.endswith("]"):
        name, port = host, "80"
    if name.startswith("[") and name.endswith("]"):
        name = name[1:-1]
    elif ":" in name:
        return "", -1
    return name, int(port) if port.isascii() and port.isdecimal() and len(port) <= 5 else -1


def _cookies(headers: Sequence[str], name: str) -> list[str]:
    """Return the values of one cookie. http.cookies gives up at the first odd cookie of somebody else on this host."""
    pairs = (pair.partition("=") for header in headers for pair in header[:_MAX_COOKIES].split(";"))
    return [value.strip() for key, _, value in pairs if key.strip() == name]
