"""Errors as HTTP answers (RFC 9457), and the bounded reading of request bodies that may end in one."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Final

from aiohttp import web
from aiohttp.client_exceptions import ClientError
from aiohttp.http_exceptions import HttpProcessingError

from clrk.core.errors import ClrkError

PROBLEM_TYPE: Final = "application/problem+json"
SERVER: Final = {"Server": "clrk"}  # instead of aiohttp's, which tells strangers its version and Python's


class Problem(ClrkError):
    """An answer that is an error. detail is for the caller: it says what happened and what to do, and no secret."""

    def __init__(self, status: int, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(f"{status}: {detail}")
        self.status = status
        self.detail = detail
        self.headers = dict(headers or {})

    def response(self, invocation_id: str) -> web.Response:
        """Return the answer; it names the invocation in the header and in the body. A daemon has none ("")."""
        title = HTTPStatus(self.status).phrase
        body = {"type": "about:blank", "title": title, "status": self.status, "detail": self.detail}
        headers = {"Content-Type": PROBLEM_TYPE, **SERVER} | self.headers
        if invocation_id:
            body["invocation_id"] = headers["X-Clrk-Invocation-ID"] = invocation_id
        return web.Response(status=self.status, body=json.dumps(body).encode() + b"\n", headers=headers)


async def read_body(
    request: web.BaseRequest, *, limit: int, idle_s: float, total_s: float, charge: Callable[[int], None]
) -> bytes:
    """Return the whole body; it is held once, and never more than limit bytes of it.

    Shape: charge is told of each chunk's size, and may raise a Problem when memory is short.

    Raises: Problem 413 over the limit, 408 when it does not come in time, 400 when its coding is broken;
        ConnectionResetError when the client is gone.
    """
    if (request.content_length or 0) > limit:
        raise Problem(413, f"the body is over {limit} bytes", {"Connection": "close"})
    received = bytearray()
    loop = asyncio.get_running_loop()
    deadline = loop.time() + total_s
    try:
        while not request.content.at_eof():
            async with asyncio.timeout_at(min(deadline, loop.time() + idle_s)):
                chunk = await request.content.readany()
            if len(received) + len(chunk) > limit:
                raise Problem(413, f"the body is over {limit} bytes", {"Connection": "close"})
            charge(len(chunk))
            received += chunk
    except TimeoutError:
        raise Problem(408, "the body did not come in time", {"Connection": "close"}) from None
    except (ClientError, HttpProcessingError, web.RequestPayloadError) as exc:
        raise Problem(400, "the body is not what its headers say", {"Connection": "close"}) from exc
    return bytes(received)
