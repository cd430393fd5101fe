"""The seam between what is exported and how it travels: one serialised OTLP request in, one judged answer out."""

from __future__ import annotations

import enum
import os
import ssl
from dataclasses import dataclass
from typing import Final, Protocol

from clrk.core.errors import ClrkError
from clrk.gateway.telemetry.export_target import ExportTarget

MAX_RETRY_AFTER_S: Final = 3600.0  # a backend that asks for more is asked again after this
_MAX_WORDS: Final = 200


class Verdict(enum.Enum):
    """What an answer means for what was sent."""

    TAKEN = "taken"  # by the backend, but for what `rejected` counts
    REFUSED = "refused"  # the request itself is at fault: the same again can not help
    DOUBTFUL = "doubtful"  # an error of the backend that may lie in what was sent: real collectors answer both so
    LATER = "later"  # not now


@dataclass(frozen=True, slots=True)
class Answer:
    """A backend's answer, or its absence. reason and message are cut and printable; rejected items were not taken.

    Units: retry_after_s is what the backend asks for, None when it says nothing.
    """

    verdict: Verdict
    reason: str = ""
    retry_after_s: float | None = None
    rejected: int = 0
    message: str = ""


class Transport(Protocol):
    """Sends requests of one signal to one target."""

    async def send(self, body: bytes) -> Answer:
        """Send a serialised Export…ServiceRequest. Never raises for anything the backend or the network does."""

    async def close(self) -> None:
        """Release connections and threads. Idempotent."""


class TlsMaterialError(ClrkError):
    """The operator's certificates or key can not be used."""


def words(text: str) -> str:
    """Return a stranger's text fit for a log line."""
    return "".join(char if char.isprintable() else "?" for char in text[:_MAX_WORDS])


def client_context(target: ExportTarget) -> ssl.SSLContext:
    """Return a verifying context. Cost: tens of milliseconds, call it in a thread.

    Raises: TlsMaterialError.
    """
    try:
        context = ssl.create_default_context(cadata=target.ca_pem) if target.only_ca else ssl.create_default_context()
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if target.ca_pem and not target.only_ca:
            context.load_verify_locations(cadata=target.ca_pem)
        if target.client_cert_pem:
            _load_client_cert(context, target)
    except (ssl.SSLError, ValueError) as exc:
        raise TlsMaterialError(f"certificates of the exporter can not be used: {words(str(exc))}") from exc
    return context


def _load_client_cert(context: ssl.SSLContext, target: ExportTarget) -> None:
    # The ssl module loads from paths only: an anonymous file keeps the key off every disk.
    fd = os.memfd_create("clrk-export", os.MFD_CLOEXEC)
    try:
        os.write(fd, f"{target.client_cert_pem}\n{target.client_key_pem}".encode())
        context.load_cert_chain(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)


def root_certificates(target: ExportTarget) -> bytes:
    """Return the PEM text of every certificate that the target trusts, for gRPC, which takes no context.

    Raises: TlsMaterialError.
    """
    if target.only_ca:
        return target.ca_pem.encode()
    paths = ssl.get_default_verify_paths()
    system = b""
    if paths.cafile is not None:
        try:
            with open(paths.cafile, "rb") as stream:
                system = stream.read()
        except OSError as exc:
            raise TlsMaterialError(f"system roots {paths.cafile}: {exc.strerror}") from exc
    if not system and not target.ca_pem:
        raise TlsMaterialError("this host has no file of root certificates; install ca-certificates")
    return system + b"\n" + target.ca_pem.encode()
