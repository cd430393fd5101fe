"""Who the caller is, as far as an agent's extractors say (CONTRACT section 12): checked before anything runs.

Header: given more than once is a 400; absent or empty gives no field. Body: the first scalar that the JSONPath selects
in a JSON body; none gives no field. JWT: every extractor of the agent has to be satisfied, with its claim; a missing
token, a bad one, or one without the claim is a 401. While the issuer's keys can not be had, the answer is 503: nothing
runs, and the caller is not told to throw a good token away. Values are single printable lines of at most
MAX_VALUE_CHARS. ce-* headers are never looked at.
"""

from __future__ import annotations

import asyncio
import json
from itertools import islice
from typing import Any, Final, Protocol

import msgspec
from jsonpath import JSONPathError

from clrk.core.gateway_config import GatewayConfig
from clrk.core.json_path import compile_json_path
from clrk.core.resources import BodyExtractor, HeaderExtractor, JwtExtractor, TaskAgent
from clrk.gateway.identity_token import read_token, refused, verify
from clrk.gateway.jwks import Jwks, KeysUnavailableError
from clrk.gateway.media import parse_media_type
from clrk.gateway.problem import Problem

MAX_VALUE_CHARS: Final = 256
MAX_READ_BYTES: Final = 4 * 2**20  # of a body: as objects, it takes up to twenty times as much
MAX_SEARCHED_BYTES: Final = 256 * 1024  # of a body, by an expression that may have to look at all of it
_MAX_MATCHES: Final = 1000
_THREAD_BYTES: Final = 4096  # from here on, other callers would notice: a filter takes 2 ms for each 1024 bytes of `0,`

Fields = tuple[tuple[str, str], ...]


class Headers(Protocol):
    """What is needed of aiohttp's headers."""

    def getall(self, key: str, default: list[str], /) -> list[str]:
        """Return every value of a header, whatever its case."""


class Identities:
    """Applies the extractors of agents to requests. One per gateway; use from its event loop."""

    def __init__(self, config: GatewayConfig) -> None:
        self._jwks = Jwks(config)
        self._large_bodies = asyncio.Semaphore(1)  # one at a time: what they take of memory and of the processor

    def reconfigure(self, config: GatewayConfig) -> None:
        """Use the key sets of another configuration."""
        self._jwks.reconfigure(config)

    async def close(self) -> None:
        """End every fetch of keys."""
        self._jwks.close()

    async def identify(self, agent: TaskAgent, headers: Headers, body: bytes) -> Fields:
        """Return (field, value) of every extractor that found one: Identity.caller_fields.

        Raises: Problem 401 (token), 400 (a value that can not be one), 413, 503 (no keys).
        """
        return await self.check_headers(agent, headers) + await self.check_body(agent, headers, body)

    async def check_headers(self, agent: TaskAgent, headers: Headers) -> Fields:
        """Do what needs no body: a caller with a bad token need not send one. Raises: Problem 401, 400, 503."""
        extractors = agent.spec.identity.extractors
        tokens = [extractor for extractor in extractors if isinstance(extractor, JwtExtractor)]
        fields = [(extractor.field, await self._claim(extractor, headers)) for extractor in tokens]
        for extractor in extractors:
            if isinstance(extractor, HeaderExtractor) and (value := _header(extractor, headers)):
                fields.append((extractor.field, value))
        return tuple(fields)

    async def check_body(self, agent: TaskAgent, headers: Headers, body: bytes) -> Fields:
        """Do the rest. Raises: Problem 400, 413."""
        extractors = [entry for entry in agent.spec.identity.extractors if isinstance(entry, BodyExtractor)]
        media = parse_media_type(next(iter(headers.getall("Content-Type", [])), ""))
        if not extractors or not body or media is None or not media.is_json:
            return ()
        if len(body) < _THREAD_BYTES:
            return body_fields(extractors, body)
        async with self._large_bodies:
            return await asyncio.to_thread(body_fields, extractors, body)

    async def _claim(self, extractor: JwtExtractor, headers: Headers) -> str:
        token = read_token(headers.getall("Authorization", []))
        try:
            keys = await self._jwks.keys(extractor.jwks, token.kid)
        except KeysUnavailableError:
            raise Problem(503, "the issuer's keys can not be had now", {"Retry-After": "5"}) from None
        claims = verify(token, keys, extractor)
        text = _scalar_text(claims.get(extractor.claim))
        if not text or not _is_value(text):
            raise refused("the token lacks a usable value of the claim that this agent wants")
        return text


def _header(extractor: HeaderExtractor, headers: Headers) -> str:
    values = headers.getall(extractor.name, [])
    if len(values) > 1:
        raise Problem(400, f"{extractor.name}: given more than once")
    value = values[0].strip(" \t") if values else ""
    if value and not _is_value(value):
        raise Problem(400, f"{extractor.name}: not one printable line of at most {MAX_VALUE_CHARS} characters")
    return value


def body_fields(extractors: list[BodyExtractor], body: bytes) -> Fields:
    """Return what the expressions find in a JSON body.

    Raises: Problem 400, 413. Cost: one pass over the body for each expression.
    """
    paths = [compile_json_path(extractor.json_path) for extractor in extractors]
    limit = MAX_READ_BYTES if all(path.singular_query() for path in paths) else MAX_SEARCHED_BYTES
    if len(body) > limit:
        raise Problem(413, f"this agent's identity is looked for in bodies of at most {limit} bytes")
    try:
        document = msgspec.json.decode(body)
        found = [
            (extractor.field, _first_scalar(path, document)) for extractor, path in zip(extractors, paths, strict=True)
        ]
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise Problem(400, "the body is not JSON") from None
    except (JSONPathError, RecursionError):
        raise Problem(400, "the body is nested too deep for this agent's identity to be found") from None
    for field, value in found:
        if value and not _is_value(value):
            raise Problem(400, f"identity {field}: not one printable line of at most {MAX_VALUE_CHARS} characters")
    return tuple((field, value) for field, value in found if value)


def _first_scalar(path: Any, document: Any) -> str:
    texts = (_scalar_text(match.obj) for match in islice(path.finditer(document), _MAX_MATCHES))
    return next((text for text in texts if text), "")


def _scalar_text(value: object) -> str:
    """Return a string, number or boolean as JSON writes it, strings without quotes; "" for everything else."""
    if isinstance(value, str):
        return value
    return json.dumps(value) if isinstance(value, bool | int | float) else ""


def _is_value(text: str) -> bool:
    """Say whether a value can stand in a span and a header of the envelope, and be read by people."""
    return len(text) <= MAX_VALUE_CHARS and text.isprintable()
