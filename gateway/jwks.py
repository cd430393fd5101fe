"""Key sets of token issuers: read by the runtime from files, fetched here from URLs, kept and refreshed.

Theory of operation: each URL has a task that fetches it at once, then every REFRESH_S, or with a doubling pause while
it fails. A token that names a key which is not in the set asks for one more fetch, since issuers rotate their keys
without telling anybody; such fetches are at least RETRY_S apart, whoever asks. While fetching fails, the last set holds
for MAX_AGE_S; without a set nothing can be judged, which is an error of ours (503), and nothing runs.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

import aiohttp

from clrk.core.errors import ClrkError
from clrk.core.gateway_config import GatewayConfig
from clrk.core.jwks import KeySet, is_url, parse_jwks
from clrk.core.resources import JwtExtractor
from clrk.gateway._aio import spawn

REFRESH_S: Final = 300.0
RETRY_S: Final = 10.0
MAX_AGE_S: Final = 86_400.0
MAX_SIZE: Final = 256 * 1024
FETCH_S: Final = 5.0
_FIRST_PAUSE_S: Final = 1.0
_MAX_PAUSE_S: Final = 60.0
_LOG: Final = logging.getLogger(__name__)
_HEADERS: Final = {
    "Accept": "application/jwk-set+json, application/json",
    "Accept-Encoding": "identity",
    "User-Agent": "clrk",
}


class KeysUnavailableError(ClrkError):
    """There is no key set, so no token can be judged."""


class Jwks:
    """The key sets that the agents of the present configuration name. Use from one event loop."""

    def __init__(self, config: GatewayConfig) -> None:
        self._files: dict[str, KeySet] = {}
        self._remote: dict[str, RemoteKeys] = {}
        self.reconfigure(config)

    def reconfigure(self, config: GatewayConfig) -> None:
        """Use the files of this configuration, and fetch its URLs; sets that were fetched before are kept."""
        extractors = [extractor for agent in config.agents for extractor in agent.spec.identity.extractors]
        locations = {extractor.jwks for extractor in extractors if isinstance(extractor, JwtExtractor)}
        self._files = {path: parse_jwks(text) for path, text in config.jwks_files.items() if path in locations}
        urls = {location for location in locations if is_url(location)}
        for gone in set(self._remote) - urls:
            self._remote.pop(gone).close()
        for url in urls - set(self._remote):
            self._remote[url] = RemoteKeys(url)

    async def keys(self, location: str, kid: str | None) -> KeySet:
        """Return the key set; with a kid that it does not hold, the newest there is to be had.

        Raises: KeysUnavailableError.
        """
        if (keys := self._files.get(location)) is not None:
            return keys
        if (remote := self._remote.get(location)) is None:  # the agent is of an older configuration
            raise KeysUnavailableError("the key set is no longer configured")
        return await remote.keys(kid)

    def close(self) -> None:
        """End every fetch."""
        for remote in self._remote.values():
            remote.close()
        self._remote.clear()


class RemoteKeys:
    """The key set behind one URL. Shape: clock is a monotonic one, in seconds."""

    def __init__(self, url: str, clock: Callable[[], float] | None = None) -> None:
        self._url = url
        self._clock = clock or asyncio.get_running_loop().time
        self._keys: KeySet | None = None
        self._fetched_at = 0.0
        self._attempted_at: float | None = None
        self._fetching: asyncio.Task[bool] | None = None
        self._refreshing = spawn(self._refresh_forever(), name="jwks-refresh")

    async def keys(self, kid: str | None) -> KeySet:
        """See Jwks.keys."""
        keys = self._current()
        if keys is None or not keys.knows(kid):
            await self._fetch_for_token()
            keys = self._current()
        if keys is None:
            raise KeysUnavailableError("the key set could not be fetched")
        return keys

    def close(self) -> None:
        """End the refreshing, and a fetch that is under way."""
        self._refreshing.cancel()
        if self._fetching is not None:
            self._fetching.cancel()

    def _current(self) -> KeySet | None:
        return self._keys if self._clock() - self._fetched_at <= MAX_AGE_S else None

    async def _fetch_for_token(self) -> None:
        """Fetch, or wait for the fetch that is under way, unless the last one began less than RETRY_S ago."""
        recent = self._attempted_at is not None and self._clock() - self._attempted_at < RETRY_S
        if self._fetching is not None or not recent:
            await self._fetch()

    async def _refresh_forever(self) -> None:
        pause_s = _FIRST_PAUSE_S
        while True:
            if await self._fetch():
                pause_s = _FIRST_PAUSE_S
                await asyncio.sleep(REFRESH_S)
            else:
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _MAX_PAUSE_S)

    async def _fetch(self) -> bool:
        """Fetch once, however many ask; a caller that goes away ends nothing for the others."""
        if self._fetching is None:
            self._attempted_at = self._clock()
            self._fetching = spawn(self._fetch_once(), name="jwks-fetch")
            self._fetching.add_done_callback(self._fetched)
        return await asyncio.shield(self._fetching)

    def _fetched(self, _: asyncio.Task[bool]) -> None:
        self._fetching = None

    async def _fetch_once(self) -> bool:
        try:
            keys = parse_jwks(await _get(self._url))
        except (aiohttp.ClientError, OSError, ValueError) as exc:  # TimeoutError is an OSError
            _LOG.warning("key set %s: %s", self._url.partition("?")[0], str(exc) or type(exc).__name__)
            return False
        self._keys, self._fetched_at = keys, self._clock()
        return True


async def _get(url: str) -> bytes:
    """Return a response's body. Raises: aiohttp.ClientError, OSError, ValueError."""
    async with (
        aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=FETCH_S),
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            headers=_HEADERS,
        ) as session,
        session.get(url, allow_redirects=False) as response,  # a redirect could lead to http, or into the host
    ):
        if response.status != 200:
            raise ValueError(f"status {response.status}")
        received = bytearray()
        async for chunk in response.content.iter_any():
            received += chunk
            if len(received) > MAX_SIZE:
                raise ValueError(f"over {MAX_SIZE} bytes")
        return bytes(received)
