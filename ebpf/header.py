"""The header template of one sandbox, written by the C writer (CONTRACT section 9)."""

from __future__ import annotations

import errno
import importlib
from dataclasses import dataclass
from typing import Any, Final

from clrk.core import wire
from clrk.core.errors import HostError

_FIELD_OF_TLV: Final = {
    wire.TLV_AGENT_NAMESPACE: "namespace",
    wire.TLV_AGENT_NAME: "name",
    wire.TLV_AGENT_UID: "uid",
    wire.TLV_AGENT_REVISION: "revision",
    wire.TLV_INVOCATION_ID: "invocation_id",
    wire.TLV_SANDBOX_ID: "sandbox_id",
    wire.TLV_TRACEPARENT: "traceparent",
    wire.TLV_NETNS: "netns_name",
}


@dataclass(frozen=True, slots=True)
class HeaderFields:
    """What the runtime says about a sandbox; the kernel adds the connection's part.

    Shape: kind is wire.KIND_*. Text is UTF-8, not empty, and at most CLRK_MAX_* bytes long (core/wire.h); only
    invocation_id (a daemon has none) and traceparent may be None.
    """

    kind: int
    namespace: str
    name: str
    uid: str
    revision: str
    invocation_id: str | None
    sandbox_id: str
    netns_name: str
    traceparent: str | None


def build_headers(fields: HeaderFields) -> tuple[bytes, bytes]:
    """Return the templates for TCP over IPv4 and over IPv6.

    Shape: wire.HEADER_SIZE bytes each; addresses, ports and the 0xEB value are zero. TLVs: 0xEB, 0xE0 to 0xE5, 0xE7,
        0xE9, 0x30, NOOP.
    Raises: ValueError if a value does not fit its field (nothing is ever cut) or a required one is empty; HostError
        if the C extension was not built.
    """
    return _write(wire.FAMILY_V4, fields), _write(wire.FAMILY_V6, fields)


def load_extension() -> Any:
    """Return the cffi module `clrk.ebpf._stamp`; HostError says how to build it if it is missing."""
    try:
        return importlib.import_module("clrk.ebpf._stamp")
    except ImportError as exc:
        raise HostError(
            f"load the header writer clrk.ebpf._stamp: {exc}; build it with `make setup` or `pip install -e .`"
        ) from exc


def _write(family: int, fields: HeaderFields) -> bytes:
    extension = load_extension()
    ffi, lib = extension.ffi, extension.lib
    raw = ffi.new("struct clrk_header_fields *")
    raw.kind = _kind(fields.kind)
    borrowed = []  # cffi memory lives as long as its Python object
    for target, text in (
        (raw.agent_namespace, fields.namespace),
        (raw.name, fields.name),
        (raw.uid, fields.uid),
        (raw.revision, fields.revision),
        (raw.invocation_id, fields.invocation_id),
        (raw.sandbox_id, fields.sandbox_id),
        (raw.netns_name, fields.netns_name),
        (raw.traceparent, fields.traceparent),
    ):
        if text is not None:
            data = text.encode()
            borrowed.append(ffi.new("char[]", data))
            target.data, target.size = borrowed[-1], len(data)
    buf = ffi.new("__u8[]", wire.HEADER_SIZE)
    pos, bad_tlv = ffi.new("size_t *", 0), ffi.new("int *", 0)
    error = -lib.clrk_header_write(buf, wire.HEADER_SIZE, pos, family, raw, bad_tlv)
    if error:
        raise ValueError(_explain(error, bad_tlv[0]))
    return bytes(ffi.buffer(buf, pos[0]))


def _kind(kind: int) -> int:
    if not 0 <= kind <= 0xFF:  # cffi would raise OverflowError
        raise ValueError(f"header: kind {kind} is not one byte")
    return kind


def _explain(error: int, bad_tlv: int) -> str:
    field = _FIELD_OF_TLV.get(bad_tlv, "kind")
    what = "is too long" if error == errno.EMSGSIZE else "is missing, empty or unknown"
    return f"header: {field} {what} ({errno.errorcode.get(error, str(error))})"
