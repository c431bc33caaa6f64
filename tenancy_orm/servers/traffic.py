"""Logins of tenants' roles at one address: PostgreSQL's own, or a pooler's, which takes fewer startup parameters."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from enum import IntEnum
from typing import Any, Final, TypeVar

import asyncpg

from ..postgres.dsn import Dsn
from ..postgres.poolers import check_transactions, is_direct
from .settings import TRACKED, named_in, without

logger = logging.getLogger("tenancy_orm.servers")

C = TypeVar("C", bound="asyncpg.Connection[Any]")

_CACHE: Final = "statement_cache_size"


class _Pins(IntEnum):
    """Which of the server's own settings are sent at a login, beside those that are configured."""

    ALL = 0
    TRACKED = 1  # those that PgBouncer keeps for each of its clients
    NONE = 2


class TenantAddress:
    """Where tenants' roles log in.

    Args:
        server: The server's name, for messages.
        dsn: The address.
        settings: The configured settings of tenants' connections, in lower case; one in the DSN overrides them.
        bounds: Settings that override one in the DSN.
        direct: Whether it is known to lead to PostgreSQL itself.
    """

    def __init__(
        self, server: str, dsn: Dsn, settings: Mapping[str, str], bounds: Mapping[str, str], *, direct: bool
    ) -> None:
        self.dsn = dsn
        self.named = named_in(dsn)
        self.further_settings = without(settings, self.named)
        self._server = server
        self._own = {"application_name": dsn.application_name("tenancy"), **self.further_settings, **bounds}
        self.judges_hosts = dsn.parameters.get("target_session_attrs") in ("read-write", "read-only")
        """Whether a host is chosen by its ``default_transaction_read_only``: a value of ours must not hide its own."""
        self._is_direct = direct
        self._is_proved = direct
        self._is_pooled = dsn.client_size(_CACHE) == 0
        self._pins = _Pins.ALL
        if self._is_pooled:
            # of PostgreSQL's own address it asks for no more than what is configured
            self._pins = _Pins.NONE if direct else _Pins.TRACKED

    @property
    def is_pooled(self) -> bool:
        """Whether a pooler answers, as far as is known: its DSN says so, or a login has shown it."""
        return self._is_pooled

    @property
    def prepared_statement_cache_size(self) -> int:
        """How many prepared statements SQLAlchemy keeps for each connection: none at a pooler."""
        size = self.dsn.client_size("prepared_statement_cache_size")
        return 0 if self._is_pooled else 100 if size is None else size

    def startup(self, found: Mapping[str, str]) -> Mapping[str, str]:
        """Return the settings that a login sends, as far as it is known by now what answers here.

        Args:
            found: The server's own values of the pinned settings.
        """
        return self._startup(found, self._pins)

    async def connect(self, found: Mapping[str, str], login: Callable[..., Awaitable[C]]) -> C:
        """Log in with as many settings as what answers here takes.

        Args:
            found: The server's own values of the pinned settings.
            login: Opens a connection with the settings that it is given, and further arguments of ``asyncpg.connect``.

        Raises:
            PoolerError: a pooler in statement mode answers, through which no transaction works.
        """
        for pins in _Pins:
            if pins < self._pins:
                continue
            caches = {_CACHE: 0} if self._is_pooled else {}
            try:
                connection = await login(self._startup(found, pins), **caches)
            except asyncpg.ProtocolViolationError:
                # it may be about something else; if it is about a setting, a login with fewer of them succeeds
                if pins is _Pins.NONE:
                    raise
                continue
            if pins <= self._pins and (self._is_pooled or await self._is_known_direct(connection)):
                return await self._proved(connection)
            self._found_pooler(pins, "refuses startup parameters (08P01)" if pins else "has process ids of its own")
            if caches:
                return await self._proved(connection)
            connection.terminate()
            return await self._proved(await login(self._startup(found, pins), **{_CACHE: 0}))
        raise AssertionError("the last login returns or raises")

    async def _proved(self, connection: C) -> C:
        """Have the first login of each process at a pooler find out that it works by transactions."""
        if self._is_pooled and not self._is_proved:
            try:
                await check_transactions(connection, str(self.dsn))
            except BaseException:
                connection.terminate()
                raise
            self._is_proved = True
        return connection

    async def _is_known_direct(self, connection: asyncpg.Connection[Any]) -> bool:
        if not self._is_direct:
            try:
                self._is_direct = await is_direct(connection)
            except BaseException:
                connection.terminate()
                raise
        return self._is_direct

    def _startup(self, found: Mapping[str, str], pins: _Pins) -> Mapping[str, str]:
        if pins is _Pins.NONE:
            return self._own
        values = without(found, self.named | ({"default_transaction_read_only"} if self.judges_hosts else set()))
        if pins is _Pins.TRACKED:
            values = {name: value for name, value in values.items() if name in TRACKED}
        return {**values, **self._own}

    def _found_pooler(self, pins: _Pins, sign: str) -> None:
        known, self._is_pooled = self._is_pooled, True
        self._pins = max(self._pins, pins)
        if known:
            return
        logger.warning(
            "a connection pooler answers tenants of server %s at %s, since it %s: prepared statements are not kept, "
            "and settings that a tenant's role has given itself are in force for that tenant until reconcile",
            self._server,
            self.dsn,
            sign,
        )


__all__ = ["TenantAddress"]
