"""The token with which a client's next request sees what this one has written, also on replicas."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Final

from starlette.requests import cookie_parser
from starlette.types import Scope

from ..errors import ConfigurationError, TenancyError
from ..routing.consistency import TOKEN_SECONDS, Consistency
from ..tenant import Tenant

if TYPE_CHECKING:
    from ..tenancy import Tenancy
    from .connection import WatchedConnection

logger = logging.getLogger("tenancy_orm.asgi")

_NAME: Final = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")


class ConsistencyTransport:
    """Reads tokens from requests, and adds one to the answer of each request that has committed something.

    Args:
        tenancy: The ``Tenancy`` that serves the requests.
        header: The name of a header; None for none.
        cookie: The name of a cookie; None for none.

    Raises:
        ConfigurationError: a name is malformed.
    """

    def __init__(self, tenancy: Tenancy, *, header: str | None, cookie: str | None) -> None:
        for kind, name in (("header", header), ("cookie", cookie)):
            if name is not None and not _NAME.fullmatch(name):
                raise ConfigurationError(f"consistency_{kind} must be the name of a {kind}, not {name!r}")
        self._tenancy = tenancy
        self._header = None if header is None else header.lower().encode()
        self._cookie = cookie

    def begin(self, tenant: Tenant, scope: Scope, connection: WatchedConnection) -> Consistency:
        """Return what notes the writes of a request, with the token that it came with; its answer gets another."""
        consistency = Consistency(tenant.id, self._token_of(scope))
        secure = scope["scheme"] in ("https", "wss")
        connection.before_start = partial(self._headers, tenant, consistency, secure=secure)
        return consistency

    def _token_of(self, scope: Scope) -> str | None:
        for name, value in scope["headers"]:
            if name == self._header:
                return str(value.decode("latin-1"))
            if self._cookie is not None and name == b"cookie":
                token = cookie_parser(value.decode("latin-1")).get(self._cookie)
                if token is not None:
                    return token
        return None

    async def _headers(
        self, tenant: Tenant, consistency: Consistency, *, secure: bool
    ) -> Sequence[tuple[bytes, bytes]]:
        if not consistency.has_written:
            return ()
        router = self._tenancy.internals.router
        try:
            token = await router.consistency_token(tenant)
        except TenancyError as exc:
            logger.warning("an answer to tenant %s has no consistency token: %s", tenant.slug, exc)
            return ()
        headers = []
        if self._header is not None:
            headers.append((self._header, token.encode()))
        if self._cookie is not None:
            seconds = TOKEN_SECONDS + math.ceil(self._tenancy.config.replicas.max_staleness)
            attributes = f"Path=/; Max-Age={seconds}; HttpOnly; SameSite=Lax{'; Secure' if secure else ''}"
            headers.append((b"set-cookie", f"{self._cookie}={token}; {attributes}".encode()))
        return headers


__all__ = ["ConsistencyTransport"]
