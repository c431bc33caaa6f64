"""What the synchronous connections to one server's tenants share: the dialect, and what their logins send."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import create_engine
from sqlalchemy.engine.interfaces import Dialect
from sqlalchemy.ext.asyncio import create_async_engine

from ..routing.connector import Connector
from ..servers.settings import TRACKED, without

# what a dialect reads from its first connection is of these types; what else it has belongs to its driver
_FACTS = (bool, int, str, tuple)


class ThreadServer:
    """One server, for synchronous code.

    Args:
        connector: The connector of the server.
    """

    def __init__(self, connector: Connector) -> None:
        self._connector = connector
        # psycopg would look hstore up in one tenant's database, and expect it in all others
        engine = create_engine("postgresql+psycopg://", use_native_hstore=False)
        self.dialect: Dialect = engine.dialect
        self.dialect._has_native_hstore = False  # type: ignore[attr-defined]
        is_disconnect = connector.outage.is_disconnect(self.dialect.is_disconnect)
        self.dialect.is_disconnect = is_disconnect  # type: ignore[method-assign]
        self.on_connect = self.dialect.on_connect()
        self.adapters: Any = self.dialect._psycopg_adapters_map  # type: ignore[attr-defined]
        self.ready = False

    def prepare(self) -> None:
        """Take what the asynchronous dialect has read from the server: it is PostgreSQL's, and not the driver's.

        A dialect of its own would have to be initialised from an administrator's connection as well.
        """
        if self.ready:
            return
        known = vars(self._connector.dialect)
        unread = vars(create_async_engine("postgresql+asyncpg://").dialect)
        for name, value in known.items():
            if isinstance(value, _FACTS) and unread.get(name) != value:
                setattr(self.dialect, name, value)
        self.ready = True

    def startup(self) -> tuple[Mapping[str, str], Mapping[str, str]]:
        """Return the settings that a login sends, and those to set after it. In any thread.

        libpq sends settings in ``options``, which PgBouncer refuses before 1.20. It keeps those that it tracks for each
        of its clients, so they can be set as well.
        """
        server = self._connector.server
        settings = server.tenant_startup()
        if not server.is_pooled:
            return settings, {}
        tracked = {name: value for name, value in settings.items() if name.lower() in TRACKED}
        return without(settings, tracked), tracked


__all__ = ["ThreadServer"]
