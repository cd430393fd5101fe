"""PROXY protocol v2: the strict parser, the typed view of our stamp, and the one header a connection must begin with.

Pure: bytes in, values out. Anybody in the gateway may import it; it imports clrk.core only.
"""

from clrk.gateway.proxyv2.errors import ProxyV2Error
from clrk.gateway.proxyv2.expect import expected_header
from clrk.gateway.proxyv2.parser import NEED_DATA, Command, Endpoint, Header, NeedData, Tlv, parse
from clrk.gateway.proxyv2.stamp import Connection, Stamp

__all__ = [
    "NEED_DATA",
    "Command",
    "Connection",
    "Endpoint",
    "Header",
    "NeedData",
    "ProxyV2Error",
    "Stamp",
    "Tlv",
    "expected_header",
    "parse",
]
