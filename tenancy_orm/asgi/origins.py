"""Origins: which pages may use what a browser sends by itself.

A browser adds a cookie to every request to its host, whoever made the page that sends it (CSRF; for websockets, which
CORS does not cover, cross-site websocket hijacking). It also says who made the page, in headers that no page can set.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.types import Scope

from ..errors import ConfigurationError, CrossOriginError

_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})
# of a page of the same origin, or of no page: an address that was typed, a bookmark
_OWN_SITES = frozenset({b"same-origin", b"none"})
_DEFAULT_PORTS = {"http": 80, "ws": 80, "https": 443, "wss": 443}
_ORIGIN = re.compile(r"https?://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_.-]+)(:[0-9]{1,5})?")


class Origins:
    """Refuses requests of other origins' pages that use what the browser sends by itself.

    Reading is left to CORS: a GET, HEAD or OPTIONS request passes. Every other request, and every websocket, must come
    from a page of the same origin, or of a trusted one. "Same site" is not enough: ``globex.example.com`` and
    ``acme.example.com`` are one site. Clients that send neither ``Sec-Fetch-Site`` nor ``Origin`` are no browsers.

    Args:
        trusted: Further origins: ``https://app.example.com``.

    Raises:
        ConfigurationError: one is not an origin.
    """

    def __init__(self, trusted: Iterable[str] = ()) -> None:
        if isinstance(trusted, str):
            raise ConfigurationError("trusted_origins is a sequence of origins, not one string")
        self.trusted = frozenset(_normalised(origin) for origin in trusted)

    def check(self, scope: Scope) -> None:
        """Refuse the request of ``scope`` unless its page may use a cookie.

        Raises:
            CrossOriginError: it may not.
        """
        if scope["type"] == "http" and scope["method"] in _SAFE_METHODS:
            return
        headers: dict[bytes, bytes] = {}
        for name, value in scope["headers"]:
            if name in (b"origin", b"sec-fetch-site", b"host"):
                if name in headers:
                    raise CrossOriginError(None)
                headers[name] = value
        site, given = headers.get(b"sec-fetch-site"), headers.get(b"origin")
        origin = None if given is None else given.decode("latin-1")
        if site in _OWN_SITES or (origin is not None and origin.lower() in self.trusted):
            return
        if site is None and (origin is None or _is_of_host(origin, headers.get(b"host", b""))):
            return
        raise CrossOriginError(origin)


def _normalised(origin: str) -> str:
    if not _ORIGIN.fullmatch(origin):
        raise ConfigurationError(f"trusted origin {origin!r} must look like https://app.example.com, without a path")
    lower = origin.lower()
    # browsers leave the default port out
    return lower.removesuffix(f":{_DEFAULT_PORTS[lower.partition(':')[0]]}")


def _is_of_host(origin: str, host: bytes) -> bool:
    """Whether an origin is that of the host; a proxy may end TLS, so that the scheme does not count."""
    if not _ORIGIN.fullmatch(origin):
        return False
    try:
        # ValueError: an address in brackets, or a port, that is none
        parts = urlsplit(origin)
        default = _DEFAULT_PORTS[parts.scheme]
        own = urlsplit(f"//{host.decode('latin-1')}")
        return (parts.hostname, parts.port or default) == (own.hostname, own.port or default)
    except ValueError:
        return False
