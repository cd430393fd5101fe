"""HTTP over the admin's unix socket, with the standard library: `clrk` has to start fast."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlencode

from clrk.core.errors import ClrkError

_CONNECT_TIMEOUT_S: Final = 5.0
_ANSWER_TIMEOUT_S: Final = 120.0
_CHUNK: Final = 65_536
_MAX_TARGET: Final = 8000  # the daemon reads request lines of 8,190
USAGE: Final = 2  # the exit code of argparse for what can not be understood
_POSITIONAL: Final = {"invocation": "INVOCATION", "method": "METHOD", "url": "URL"}


class CommandError(ClrkError):
    """What the user has to be told; the command ends with exit_code."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class AdminConnection(http.client.HTTPConnection):
    """One connection to the admin socket. timeout_s bounds each wait, None waits for ever."""

    def __init__(self, path: Path, timeout_s: float | None = _ANSWER_TIMEOUT_S) -> None:
        super().__init__("clrk")
        self._path = path
        self._timeout_s = timeout_s

    def connect(self) -> None:
        """Connect to the socket. Raises: CommandError that says what to do."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(_CONNECT_TIMEOUT_S)
        try:
            self.sock.connect(str(self._path))
        except (FileNotFoundError, ConnectionRefusedError):
            raise CommandError(
                f"no clrk daemon at {self._path}: start it with `sudo clrk-runtime`, "
                "or name another one with CLRK_INSTANCE or --socket"
            ) from None
        except PermissionError:
            raise CommandError(
                f"{self._path}: permission denied; run with sudo, or be in group clrk before the daemon starts: "
                "sudo groupadd -f clrk; sudo usermod -aG clrk $USER"
            ) from None
        except OSError as exc:
            raise CommandError(f"connect to {self._path}: {exc.strerror or exc}") from None
        self.sock.settimeout(self._timeout_s)


class Admin:
    """The admin API. Every method opens its own connection and raises CommandError for an error answer."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def get(self, *segments: str, query: Mapping[str, str] | None = None) -> Any:
        """Return the JSON of a resource."""
        with self._open(segments, query) as response:
            return json.loads(response.read())

    def lines(self, *segments: str, query: Mapping[str, str] | None = None, has_end: bool = True) -> Iterator[bytes]:
        """Yield the lines of an NDJSON stream, without their newlines; one without an end may be silent for hours."""
        with self._open(segments, query, _ANSWER_TIMEOUT_S if has_end else None) as response:
            try:
                rest = b""
                while chunk := response.read1(_CHUNK):  # not by line: readline() takes a cut for the end
                    *lines, rest = (rest + chunk).split(b"\n")
                    yield from lines
            except (OSError, http.client.HTTPException) as exc:
                raise CommandError(f"the daemon broke off, this is not all: {type(exc).__name__}") from exc

    def _open(
        self, segments: tuple[str, ...], query: Mapping[str, str] | None, timeout_s: float | None = _ANSWER_TIMEOUT_S
    ) -> http.client.HTTPResponse:
        connection = AdminConnection(self.path, timeout_s)
        target = url_path(*segments) + (f"?{urlencode(query, errors='surrogateescape')}" if query else "")
        if len(target) > _MAX_TARGET:
            raise CommandError(f"the arguments make {len(target)} characters of a URL, of at most {_MAX_TARGET}", USAGE)
        try:
            connection.request("GET", target)
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as exc:
            raise CommandError(f"the daemon at {self.path} does not answer: {type(exc).__name__} {exc}") from exc
        if response.status != 200:
            detail = problem_detail(response.status, response.read())
            if response.status == http.client.BAD_REQUEST:
                raise CommandError(_name_argument(detail, query or {}), USAGE)
            raise CommandError(detail)
        return response


def url_path(*segments: str) -> str:
    """Return `/v1/…` with every segment quoted; bytes of an argument that are no text go as they are."""
    return "/v1/" + "/".join(quote(segment, safe="", errors="surrogateescape") for segment in segments)


def _name_argument(detail: str, query: Mapping[str, str]) -> str:
    """Return what the daemon says of a parameter, under the name that it has on the command line."""
    name, colon, said = detail.partition(": ")
    if colon and name in _POSITIONAL:
        return f"{_POSITIONAL[name]}: {said}"
    return f"--{name.replace('_', '-')}: {said}" if colon and name in query else detail


def problem_detail(status: int, body: bytes) -> str:
    """Return what an error answer says, whatever its form."""
    try:
        document = json.loads(body)
        return str(document.get("detail") or document.get("title"))
    except (ValueError, AttributeError):
        return f"HTTP {status}: {body[:500].decode('utf-8', 'replace')}"
