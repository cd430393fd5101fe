"""The typed view of our stamp in a parsed header (CONTRACT section 9).

For foreign receivers, tools and tests. The gateway itself never believes a stamp that it reads: it knows the sandbox
from the listener and compares bytes (expect.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from clrk.core import wire
from clrk.gateway.proxyv2.errors import ProxyV2Error
from clrk.gateway.proxyv2.parser import Header, Tlv

_KINDS: Final = {wire.KIND_DAEMON_AGENT: "DaemonAgent", wire.KIND_TASK_AGENT: "TaskAgent"}
_TYPES: Final = frozenset(
    {
        wire.TLV_AGENT_KIND,
        wire.TLV_AGENT_NAMESPACE,
        wire.TLV_AGENT_NAME,
        wire.TLV_AGENT_UID,
        wire.TLV_AGENT_REVISION,
        wire.TLV_INVOCATION_ID,
        wire.TLV_SANDBOX_ID,
        wire.TLV_NETNS,
        wire.TLV_TRACEPARENT,
        wire.TLV_CONNECTION,
    }
)


@dataclass(frozen=True, slots=True)
class Connection:
    """The 0xEB value. Units: connect_ns is CLOCK_BOOTTIME in ns; comm is raw, without trailing NULs."""

    cookie: int
    connect_ns: int
    tgid: int
    uid: int
    comm: bytes


@dataclass(frozen=True, slots=True)
class Stamp:
    """Who made a connection. invocation_id is None for a DaemonAgent, and only then."""

    agent_kind: str
    agent_namespace: str
    agent_name: str
    agent_uid: str
    agent_revision: str
    invocation_id: str | None
    sandbox_id: str
    netns: str
    traceparent: str | None
    connection: Connection

    @classmethod
    def of(cls, header: Header) -> Stamp:
        """Read the stamp of a header.

        Raises: ProxyV2Error(stamp_missing | stamp_repeated | stamp_value).
        """
        found = _index(header)
        kind = _agent_kind(found)
        daemon = kind == _KINDS[wire.KIND_DAEMON_AGENT]
        if daemon and wire.TLV_INVOCATION_ID in found:
            raise ProxyV2Error("stamp_value", "a daemon has no invocation", found[wire.TLV_INVOCATION_ID].offset)
        return cls(
            agent_kind=kind,
            agent_namespace=_text(found, wire.TLV_AGENT_NAMESPACE),
            agent_name=_text(found, wire.TLV_AGENT_NAME),
            agent_uid=_text(found, wire.TLV_AGENT_UID),
            agent_revision=_text(found, wire.TLV_AGENT_REVISION),
            invocation_id=None if daemon else _text(found, wire.TLV_INVOCATION_ID),
            sandbox_id=_text(found, wire.TLV_SANDBOX_ID),
            netns=_text(found, wire.TLV_NETNS),
            traceparent=_text(found, wire.TLV_TRACEPARENT) if wire.TLV_TRACEPARENT in found or not daemon else None,
            connection=_connection(found),
        )


def _index(header: Header) -> dict[int, Tlv]:
    found: dict[int, Tlv] = {}
    for tlv in header.tlvs:
        if tlv.type in found:
            raise ProxyV2Error("stamp_repeated", f"TLV {tlv.type:#04x} stands there twice", tlv.offset)
        if tlv.type in _TYPES:
            found[tlv.type] = tlv
    return found


def _take(found: Mapping[int, Tlv], kind: int) -> Tlv:
    tlv = found.get(kind)
    if tlv is None:
        raise ProxyV2Error("stamp_missing", f"TLV {kind:#04x} is missing")
    return tlv


def _text(found: Mapping[int, Tlv], kind: int) -> str:
    tlv = _take(found, kind)
    try:
        text = tlv.value.decode()
    except UnicodeDecodeError as exc:
        raise ProxyV2Error("stamp_value", f"TLV {kind:#04x} is not UTF-8", tlv.offset) from exc
    if not text or not text.isprintable():
        raise ProxyV2Error("stamp_value", f"TLV {kind:#04x} is empty or not printable", tlv.offset)
    return text


def _agent_kind(found: Mapping[int, Tlv]) -> str:
    tlv = _take(found, wire.TLV_AGENT_KIND)
    kind = _KINDS.get(tlv.value[0]) if len(tlv.value) == 1 else None
    if kind is None:
        raise ProxyV2Error("stamp_value", "unknown agent kind", tlv.offset)
    return kind


def _connection(found: Mapping[int, Tlv]) -> Connection:
    tlv = _take(found, wire.TLV_CONNECTION)
    if len(tlv.value) != wire.CONN_VALUE_SIZE:
        raise ProxyV2Error("stamp_value", f"connection value of {len(tlv.value)} bytes", tlv.offset)
    cookie, connect_ns, tgid, uid, comm = wire.CONNECTION_VALUE.unpack(tlv.value)
    return Connection(cookie, connect_ns, tgid, uid, comm.rstrip(b"\0"))
