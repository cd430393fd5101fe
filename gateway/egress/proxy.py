"""The proxy between this host and upstreams (`upstreamProxy`): what goes through it, what it is asked. Pure.

Source: RFC 9110, sections 9.3.6 (CONNECT) and 11.7 (Proxy-Authorization); RFC 7617 (Basic).
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from ipaddress import ip_address
from typing import Final
from urllib.parse import urlsplit

from clrk.core.egress_resources import UpstreamProxy
from clrk.core.errors import ProtocolError
from clrk.core.wire import IPAddress, map_address, unmap
from clrk.gateway.egress.failure import DialFailedError
from clrk.gateway.egress.http1 import parse_response, render_head
from clrk.gateway.policy import IPNetwork
from clrk.gateway.policy_names import HostPattern

_DEFAULT_PORTS: Final = {"http": 80, "https": 443}
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")
_WRONG: Final = ("proxy_authentication_required", "check username and password in the Secret that secretRef names")
_REFUSALS: Final = {
    401: _WRONG,  # tinyproxy, when they are wrong
    403: ("proxy_forbidden", "its rules do not allow the destination"),
    407: _WRONG,
    502: ("proxy_bad_gateway", "it could not reach the destination either"),
    503: ("proxy_bad_gateway", "it could not reach the destination either"),
    504: ("proxy_bad_gateway", "it could not reach the destination either"),
}


@dataclass(frozen=True, slots=True)
class Proxy:
    """One gateway's proxy. host is a name or an address; secret names its credentials, "" without."""

    host: str
    port: int
    is_tls: bool
    direct_hosts: tuple[HostPattern, ...]
    direct_networks: tuple[IPNetwork, ...]
    secret: str

    @classmethod
    def compile(cls, spec: UpstreamProxy, namespace: str) -> Proxy:
        """Read what core.egress_resources has checked."""
        url = urlsplit(spec.url)
        return cls(
            host=url.hostname or "",
            port=url.port or _DEFAULT_PORTS[url.scheme],
            is_tls=url.scheme == "https",
            direct_hosts=tuple(HostPattern.compile(item) for item in spec.no_proxy if isinstance(item, str)),
            direct_networks=tuple(item for item in spec.no_proxy if not isinstance(item, str)),
            secret=f"{namespace}/{spec.secret_ref.name}" if spec.secret_ref is not None else "",
        )

    @property
    def label(self) -> str:
        """Return host:port for people; there is no userinfo in it."""
        return f"{_bracket(self.host)}:{self.port}"

    def carries(self, name: str | None, address: IPAddress) -> bool:
        """Say whether a destination goes through the proxy: a name by noProxy's names, an address by its networks."""
        if name is not None:
            return not any(host.matches(name) for host in self.direct_hosts)
        plain = unmap(map_address(address))
        return not any(plain in network for network in self.direct_networks)

    def authorization(self, secrets: Mapping[str, Mapping[str, str]]) -> str:
        """Return the value of Proxy-Authorization, "" when the proxy asks for none.

        Raises: DialFailedError(proxy_credentials_missing): nothing goes out then.
        """
        if not self.secret:
            return ""
        values = secrets.get(self.secret)
        if values is None or not {"username", "password"} <= values.keys():
            lack = "there is no such Secret" if values is None else "it has to have `username` and `password`"
            raise DialFailedError("proxy_credentials_missing", f"Secret {self.secret} for {self.label}: {lack}")
        user, password = values["username"], values["password"]
        if ":" in user or _CONTROL.search(user + password) is not None:
            message = f"Secret {self.secret} for {self.label}: a colon in the username, or a control character"
            raise DialFailedError("proxy_credentials_missing", message)
        return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode("ascii")


def authority(host: str, port: int) -> str:
    """Return the target of CONNECT (RFC 9112, section 3.2.3)."""
    return f"{_bracket(host)}:{port}"


def render_connect(target: str, authorization: str) -> bytes:
    """Return the whole request."""
    headers = [("Host", target)]
    if authorization:
        headers.append(("Proxy-Authorization", authorization))
    return render_head(f"CONNECT {target} HTTP/1.1", headers)


def check_answer(head: bytes, proxy: Proxy, target: str) -> None:
    """Read the head of the proxy's answer to CONNECT; any 2xx is a tunnel, whatever its framing headers say.

    Nothing that the proxy wrote is repeated: it has seen the credentials. Raises: DialFailedError(proxy_…).
    """
    try:
        status = parse_response(head).status
    except ProtocolError as exc:
        raise DialFailedError("proxy_bad_response", f"proxy {proxy.label}: no HTTP answer: {exc}") from exc
    if 200 <= status < 300:
        return
    kind, why = _REFUSALS.get(status, ("proxy_refused", "it makes no tunnel there"))
    phrase = HTTPStatus(status).phrase if status in set(HTTPStatus) else "unknown status"
    raise DialFailedError(kind, f"proxy {proxy.label}: CONNECT {target}: {status} {phrase}; {why}")


def _bracket(host: str) -> str:
    try:
        return f"[{host}]" if ip_address(host).version == 6 else host
    except ValueError:
        return host
