"""Identifiers and how they are made."""

from __future__ import annotations

import os
import re
import secrets
import time
import uuid
from typing import Final, NewType

InvocationId = NewType("InvocationId", str)  # lower-case UUID version 7
SandboxId = NewType("SandboxId", str)  # 8 lower-case hex digits
NetnsName = NewType("NetnsName", str)  # "<instance>-<sandbox id>"
TraceId = NewType("TraceId", str)  # 32 lower-case hex digits, not all zero
SpanId = NewType("SpanId", str)  # 16 lower-case hex digits, not all zero

_INVOCATION_ID: Final = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_AGENT_NAMESPACE: Final = uuid.UUID("2f2a2d0c-6d0e-5b2c-9c55-0e6c4f1a7b10")  # arbitrary, fixed for ever


def new_invocation_id() -> InvocationId:
    """Return a fresh UUID version 7 (RFC 9562, section 5.7): 48 bits of wall-clock ms, 74 random bits."""
    unix_ms = time.time_ns() // 1_000_000
    random = int.from_bytes(os.urandom(10), "big")
    value = (unix_ms & (2**48 - 1)) << 80 | 0x7 << 76 | (random >> 68 & 0xFFF) << 64 | 0b10 << 62 | random & (2**62 - 1)
    return InvocationId(str(uuid.UUID(int=value)))


def is_invocation_id(text: str) -> bool:
    """Say whether text is a canonical lower-case UUID (any version; CONTRACT section 4)."""
    return _INVOCATION_ID.fullmatch(text) is not None


def new_sandbox_id() -> SandboxId:
    """Return 8 random hex digits; the caller checks that no live sandbox has them."""
    return SandboxId(secrets.token_hex(4))


def new_trace_id() -> TraceId:
    """Return a random W3C trace id."""
    return TraceId(f"{int.from_bytes(os.urandom(16), 'big') or 1:032x}")


def new_span_id() -> SpanId:
    """Return a random W3C span id."""
    return SpanId(f"{int.from_bytes(os.urandom(8), 'big') or 1:016x}")


def agent_uid(kind: str, namespace: str, name: str) -> str:
    """Return the agent's stable uid: the same resource has the same uid on every host and start."""
    return str(uuid.uuid5(_AGENT_NAMESPACE, f"{kind}/{namespace}/{name}"))
