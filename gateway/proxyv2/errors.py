"""What can be wrong with a PROXY v2 header."""

from __future__ import annotations

from clrk.core.errors import ProtocolError


class ProxyV2Error(ProtocolError):
    """A header that must not be believed; the connection it came on is to be closed.

    Shape: code is one of signature, version, command, family, length_over_cap, address_short, tlv_overrun,
    crc32c_length, crc32c_repeated, crc32c_mismatch, unique_id_length, ssl_short, ssl_overrun (parser);
    stamp_missing, stamp_repeated, stamp_value (Stamp); template, flow_family (expected_header).
    """
