"""`clrk agents run-task`: invoke an agent as a caller would, and end as the invocation ended."""

from __future__ import annotations

import argparse
import http.client
import json
import re
import sys
import time
from pathlib import Path
from typing import Final
from urllib.parse import quote

from clrk.gateway.cli import terminal
from clrk.gateway.cli.agents import SHORT_ID, agent_key
from clrk.gateway.cli.connection import USAGE, Admin, AdminConnection, CommandError, problem_detail, url_path

EXIT_CODES: Final = {"Succeeded": 0, "Failed": 1, "Timeout": 124, "Rejected": 77}
_CHUNK: Final = 65_536
_OUTCOME_WAIT_S: Final = 10
_TIMEOUT_GRACE_S: Final = 10.0
_VALUE: Final = re.compile(r"[\x21-\x7e][\x20-\x7e]*")  # of a header
_TOKEN: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, section 5.6.2
# CloudEvents HTTP binding, section 3.1.3.2: space, double quote, percent and all but printable ASCII are encoded.
_HEADER_SAFE: Final = "".join(chr(code) for code in range(0x21, 0x7F) if chr(code) not in '"%')


class _ReaderGone(Exception):
    """Nobody reads stdout any more: not the daemon's doing, so no OSError."""


def run_task(admin: Admin, args: argparse.Namespace) -> int:
    """Stream the answer to stdout, byte by byte as it comes; everything else goes to stderr."""
    namespace, name = agent_key(args.name)
    body = _read_input(args.input)
    headers = _headers(args, body)
    timeout_s = _timeout(args.timeout)
    deadline, patience_s = None, None
    if timeout_s is not None:
        headers["X-Clrk-Timeout"] = f"{timeout_s:.3f}"
        patience_s = timeout_s + _TIMEOUT_GRACE_S  # the daemon ends it; we go away only if it does not
        deadline = time.monotonic() + patience_s
    connection = AdminConnection(admin.path, patience_s)
    try:
        connection.request("POST", url_path("agents", namespace, name, "run"), body=body, headers=headers)
        response = connection.getresponse()
        invocation = response.getheader("X-Clrk-Invocation-ID", "")
        if invocation and not args.quiet:
            terminal.error(f"invocation {invocation}")
        if response.status >= 400:
            code = _failed(response)
        else:
            whole = _copy(connection, response, deadline)
            code = _exit_code(admin, invocation, whole=whole)
    except TimeoutError:
        connection.close()  # the caller goes away: the invocation is cancelled
        raise CommandError(f"no end within {args.timeout}: cancelled", EXIT_CODES["Timeout"]) from None
    except _ReaderGone:
        connection.close()
        raise BrokenPipeError from None
    except (OSError, http.client.HTTPException) as exc:
        raise CommandError(f"the daemon broke off: {type(exc).__name__} {exc}") from exc
    if code in (EXIT_CODES["Failed"], EXIT_CODES["Timeout"]) and invocation and not args.quiet:
        _point_to_the_cause(args.name, invocation)
    return code


def _point_to_the_cause(name: str, invocation: str) -> None:
    short = invocation[:SHORT_ID]
    terminal.error(f"why: `clrk agents logs {name}/{short}` is what it wrote, `clrk trace {short}` what it did")


def _copy(connection: AdminConnection, response: http.client.HTTPResponse, deadline: float | None) -> bool:
    """Copy the body; False when it was cut. The deadline counts for all of it, not for each read."""
    try:
        while True:
            if deadline is not None:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError
                if connection.sock is not None:
                    connection.sock.settimeout(left)
            chunk = response.read1(_CHUNK)
            if not chunk:
                return True
            _write(chunk)
    except (http.client.IncompleteRead, ConnectionError):
        return False


def _write(chunk: bytes) -> None:
    try:
        sys.stdout.buffer.write(chunk)
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        raise _ReaderGone from None


def _failed(response: http.client.HTTPResponse) -> int:
    """Explain an error answer; its phase is the invocation's, or what the status says."""
    detail = problem_detail(response.status, response.read())
    terminal.error(detail)
    if response.status == 504:
        return EXIT_CODES["Timeout"]
    if response.status in (500, 502, 507):
        code = response.getheader("X-Clrk-Exit-Code")
        if code not in (None, "0") and f"code {code}" not in detail:
            terminal.error(f"the agent exited with code {code}")
        return EXIT_CODES["Failed"]
    return EXIT_CODES["Rejected"]


def _exit_code(admin: Admin, invocation: str, *, whole: bool) -> int:
    """Ask how the invocation ended: bytes may have been sent before it failed."""
    if not whole:
        terminal.error("the answer was cut off")
    try:
        outcome = admin.get("invocations", invocation, query={"wait": str(_OUTCOME_WAIT_S)})
    except CommandError as exc:
        if not whole:
            return EXIT_CODES["Failed"]
        terminal.error(f"how the invocation ended is not known: {exc}")
        return EXIT_CODES["Succeeded"]
    if outcome["message"]:
        terminal.error(outcome["message"])
    return EXIT_CODES.get(outcome["phase"], 1)


def _read_input(text: str | None) -> bytes:
    if text is None:
        return b""
    try:
        if text == "-":
            return sys.stdin.buffer.read()
        if text.startswith("@"):
            return Path(text[1:]).read_bytes()
    except OSError as exc:
        raise CommandError(f"-i {text}: {exc.strerror}", USAGE) from exc
    return text.encode("utf-8", "surrogateescape")


def _headers(args: argparse.Namespace, body: bytes) -> dict[str, str]:
    headers = {"X-Clrk-Trigger": "cli"}
    if args.content_type is not None and not _VALUE.fullmatch(args.content_type):
        raise CommandError(f"--content-type: write a media type such as text/plain, not {args.content_type!r}", USAGE)
    if body:
        headers["Content-Type"] = args.content_type or _content_type(body)
    elif args.content_type:
        headers["Content-Type"] = args.content_type
    for pair in args.header:
        key, equals, value = pair.partition("=")
        if not equals or not _TOKEN.fullmatch(key):
            raise CommandError(f"-H {pair!r}: write NAME=VALUE", USAGE)
        _set_attribute(headers, key.lower().removeprefix("ce-"), value)
    for key in ("type", "source", "subject"):
        if (value := getattr(args, f"ce_{key}")) is not None:
            _set_attribute(headers, key, value)
    return headers


def _set_attribute(headers: dict[str, str], key: str, value: str) -> None:
    headers[f"ce-{key}"] = quote(value.encode("utf-8", "surrogateescape"), safe=_HEADER_SAFE)


def _content_type(body: bytes) -> str:
    try:
        json.loads(body)
    except ValueError:
        pass  # not JSON (UnicodeDecodeError is a ValueError too)
    else:
        return "application/json"
    try:
        body.decode("utf-8")
    except UnicodeDecodeError:
        return "application/octet-stream"
    return "text/plain; charset=utf-8"


def _timeout(text: str | None) -> float | None:
    if text is None:
        return None
    from clrk.core.resources import MAX_TIMEOUT_S  # pydantic is slow to import: only when asked for
    from clrk.core.values import parse_duration  # pydantic is slow to import: only when asked for

    try:
        timeout_s = parse_duration(text)
    except ValueError as exc:
        raise CommandError(f"--timeout: {exc}", USAGE) from None
    if not 0 < timeout_s <= MAX_TIMEOUT_S:
        raise CommandError(f"--timeout: write more than 0 and at most {MAX_TIMEOUT_S / 3600:g}h, not {text!r}", USAGE)
    return timeout_s
