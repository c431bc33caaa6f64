"""Where the keys of an identity provider come from: the configuration, or the provider itself.

Fetched keys are kept, and fetched again in the background before they are old. However many requests wait, there is one
fetch; and there is at most one per ``refresh_seconds`` however many tokens name a key that is not known. Extra ``jwt``.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import math
import random
import re
import time
from collections.abc import Callable
from contextvars import Context
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import SplitResult, urlsplit

from ..errors import ConfigurationError, CredentialsUnavailableError, MissingExtraError
from .jwks import KeySet, load_json, read_published

if TYPE_CHECKING:
    import httpx

logger = logging.getLogger("tenancy_orm.authentication")

DISCOVERY_PATH: Final = "/.well-known/openid-configuration"
MAX_ANSWER_BYTES: Final = 256 * 1024

_MAX_AGE = re.compile(r"(?:^|[,\s])max-age=(\d{1,9})")


class KeySource:
    """Keys that do not change.

    ``keys`` are those that are held now, and ``due`` is the time (monotonic) from which ``current`` must be awaited
    before they are used.
    """

    def __init__(self, keys: KeySet | None = None) -> None:
        self.keys = keys
        self.due = math.inf
        self.on_change: list[Callable[[], None]] = []
        """Called when keys that were held have been replaced by others."""

    async def current(self) -> KeySet:
        """Return the keys to verify with.

        Raises:
            CredentialsUnavailableError: there are none.
        """
        assert self.keys is not None  # noqa: S101 - a source that fetches overrides this
        return self.keys

    async def refreshed(self) -> KeySet:
        """Return the keys after a token named one that is not among them: fetched again, if that may be done now.

        Raises:
            CredentialsUnavailableError: there are none.
        """
        return await self.current()


class IssuerKeys(KeySource):
    """The keys that an issuer publishes.

    Args:
        issuer: The issuer. Its discovery document names the address of the keys.
        url: The address of the keys; then the discovery document is not read.
        algorithms: Those that keys are used for.
        keys_seconds: How long keys are used before they are fetched again. An answer with ``Cache-Control: max-age``
            may shorten it, down to ``refresh_seconds``.
        refresh_seconds: The least time between two fetches because of keys that are not known; also the longest
            pause after a fetch that failed.
        stale_seconds: How long keys are used while the issuer does not answer.
        timeout: Seconds that a fetch may take.

    Raises:
        MissingExtraError: httpx is not installed.
        ConfigurationError: an address is not https, or a time is not positive.
    """

    def __init__(
        self,
        issuer: str,
        url: str | None,
        algorithms: frozenset[str],
        *,
        keys_seconds: float,
        refresh_seconds: float,
        stale_seconds: float,
        timeout: float,
    ) -> None:
        super().__init__()
        try:
            import httpx
        except ModuleNotFoundError as exc:
            raise MissingExtraError("httpx", "jwt") from exc
        self._httpx = httpx
        if not 0 < refresh_seconds <= keys_seconds <= stale_seconds:
            raise ConfigurationError("refresh_seconds, keys_seconds and stale_seconds must be positive, in this order")
        if timeout <= 0:
            raise ConfigurationError("timeout must be positive")
        self._issuer = issuer
        self._url = url
        self._discovery = issuer.rstrip("/") + DISCOVERY_PATH
        try:
            check_url(url or issuer)
        except ValueError as exc:
            name = "jwks_url" if url else "issuer"
            raise ConfigurationError(f"the {name} {_shown(url or issuer)!r} cannot be fetched from: {exc}") from None
        self._algorithms = algorithms
        self._keys_seconds = keys_seconds
        self._refresh_seconds = refresh_seconds
        self._stale_seconds = stale_seconds
        self._timeout = timeout
        self.due = -math.inf
        self._aged_at = -math.inf  # from then on requests wait for the next fetch, unless the last one failed
        self._stale_at = -math.inf
        self._tried_at = -math.inf
        self._failures = 0
        self._failure = ""
        self._task: asyncio.Task[None] | None = None

    async def current(self) -> KeySet:
        """Return the keys; where they are old, fetch them in the background, or first where they are very old."""
        now = time.monotonic()
        if now >= self._stale_at:
            self.keys = None
        if now >= self.due:
            task = self._fetch_once()
            if self.keys is None or (now >= self._aged_at and not self._failures):
                await asyncio.wait((task,))
        return self._held()

    async def refreshed(self) -> KeySet:
        """Return the keys; fetched again if the last attempt is ``refresh_seconds`` ago, or under way."""
        if self._running() is not None or time.monotonic() - self._tried_at >= self._refresh_seconds:
            await asyncio.wait((self._fetch_once(),))
        return self._held()

    def _held(self) -> KeySet:
        if self.keys is None:
            raise CredentialsUnavailableError(self._failure or f"no keys of {self._issuer} are known yet")
        return self.keys

    # --- fetching ---------------------------------------------------------------------------------------------------

    def _running(self) -> asyncio.Task[None] | None:
        task = self._task
        # one of another loop will never end: that of a parent process, or of a loop that is closed
        return None if task is None or task.done() or task.get_loop() is not asyncio.get_running_loop() else task

    def _fetch_once(self) -> asyncio.Task[None]:
        task = self._running()
        if task is None:
            # not with the request's context: its tenant has nothing to do with the keys
            task = asyncio.get_running_loop().create_task(self._fetch(), context=Context())
            self._task = task
        return task

    async def _fetch(self) -> None:
        httpx = self._httpx
        self._tried_at = time.monotonic()
        try:
            async with asyncio.timeout(self._timeout):
                found, unusable, max_age = await self._read()
        except TimeoutError:
            self._fail(f"no answer within {self._timeout:g} s")
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as exc:
            # its text may contain the address with a query; the type says enough
            self._fail(f"{type(exc).__name__}")
        except ValueError as exc:
            self._fail(str(exc))
        else:
            self._keep(found, unusable, max_age)

    def _keep(self, found: KeySet, unusable: list[str], max_age: float | None) -> None:
        if not found.keys:
            logger.warning(
                "%s publishes no key that can be used, so all its tokens are refused: %s",
                self._issuer,
                "; ".join(sorted(set(unusable))) or "its set is empty",
            )
        # the same object where nothing has changed: what was verified with it stays so
        if self.keys != found:
            former, self.keys = self.keys, found
            for callback in self.on_change if former is not None else ():
                callback()
        self._failures, self._failure = 0, ""
        seconds = self._keys_seconds
        if max_age is not None:
            seconds = min(max(max_age, self._refresh_seconds), seconds)
        self.due = self._tried_at + seconds
        self._aged_at = self._tried_at + 2 * seconds
        self._stale_at = self._tried_at + self._stale_seconds

    def _fail(self, reason: str) -> None:
        self._failures += 1
        self._failure = (
            f"the keys of {self._issuer} cannot be fetched from {_shown(self._url or self._discovery)}: {reason}"
        )
        pause = min(self._refresh_seconds, 2.0 ** min(self._failures - 1, 30)) * random.uniform(0.75, 1)
        now = time.monotonic()
        self.due = now + pause
        if self.keys is not None:
            # before the keys are dropped, so that none is used later
            self.due = min(self.due, self._stale_at)
            left = max(self._stale_at - now, 0)
            logger.warning("%s; the keys that are known are used for up to %.0f s more", self._failure, left)
        else:
            logger.error("%s", self._failure)

    async def _read(self) -> tuple[KeySet, list[str], float | None]:
        httpx = self._httpx
        # reading the certificates of authorities takes 20 ms
        verify: Any = await asyncio.to_thread(httpx.create_ssl_context)
        async with httpx.AsyncClient(verify=verify, follow_redirects=False, timeout=self._timeout) as client:
            url = self._url
            if url is None:
                url = self._keys_address(load_json((await self._get(client, self._discovery))[0]))
            raw, max_age = await self._get(client, url)
        return *read_published(load_json(raw), self._algorithms), max_age

    def _keys_address(self, document: object) -> str:
        if not isinstance(document, dict):
            raise ValueError("the discovery document is not an object")
        if document.get("issuer") != self._issuer:
            # RFC 8414 and OpenID Connect Discovery: the two must be identical
            raise ValueError("the discovery document names another issuer; it must be the same text")
        url = document.get("jwks_uri")
        if not isinstance(url, str):
            raise ValueError("the discovery document has no jwks_uri")
        try:
            check_url(url)
        except ValueError as exc:
            raise ValueError(f"its jwks_uri {exc}") from None
        return url

    async def _get(self, client: httpx.AsyncClient, url: str) -> tuple[bytes, float | None]:
        """Return the body, and the seconds that it may be cached."""
        # identity: a small answer that decompresses to a large one would pass the bound
        headers = {"Accept": "application/json", "Accept-Encoding": "identity", "User-Agent": "tenancy-orm"}
        async with client.stream("GET", url, headers=headers) as answer:
            if answer.status_code != 200:
                redirected = "; redirects are not followed" if answer.is_redirect else ""
                raise ValueError(f"{_shown(url)} answers {answer.status_code}{redirected}")
            if answer.headers.get("Content-Encoding", "identity") != "identity":
                raise ValueError(f"{_shown(url)} answers in a compressed form that was not asked for")
            body = bytearray()
            async for chunk in answer.aiter_raw():
                body += chunk
                if len(body) > MAX_ANSWER_BYTES:
                    raise ValueError(f"the answer of {_shown(url)} is longer than {MAX_ANSWER_BYTES} bytes")
            max_age = _MAX_AGE.search(answer.headers.get("Cache-Control", "").lower())
        return bytes(body), None if max_age is None else float(max_age[1])


def check_url(url: str) -> SplitResult:
    """Return the parts of an address that keys may be fetched from: https, or http to this machine itself.

    Raises:
        ValueError: it is another.
    """
    parts = urlsplit(url)
    if not parts.hostname or parts.username is not None or parts.password is not None:
        raise ValueError("is not the URL of a host")
    if parts.scheme != "https" and not (parts.scheme == "http" and _is_loopback(parts.hostname)):
        raise ValueError("is not https")
    return parts


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _shown(url: str) -> str:
    """The address without its user and its query, which may hold secrets."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "an address that is none"
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
