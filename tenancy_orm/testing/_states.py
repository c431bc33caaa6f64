"""What the control database has of a tenant, to find out whether a test has changed it."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import UUID

import asyncpg

from ..postgres import connections, login
from ..postgres.dsn import Dsn

# What a test may change of a tenant outside of its database: where it did, no other test gets that tenant.
_RECORDED = (
    ("tenants", "id", "- 'last_error'"),
    ("former_slugs", "tenant_id", ""),
    ("domains", "tenant_id", ""),
    ("api_keys", "tenant_id", "- 'last_used_at'"),
    ("members", "tenant_id", ""),
    ("invitations", "tenant_id", ""),
    ("usage", "tenant_id", ""),
    ("usage_keys", "tenant_id", ""),
    ("quota_holds", "tenant_id", ""),
    ("quota_blocks", "tenant_id", ""),
)
_ROWS = " UNION ALL ".join(
    f"SELECT '{table}' || (to_jsonb(t) {without})::text AS row FROM tenancy.{table} AS t WHERE {column} = $1"  # noqa: S608 - constants
    for table, column, without in _RECORDED
)
_STATE = f"SELECT md5(string_agg(row, '' ORDER BY row)) FROM ({_ROWS}) AS rows"  # noqa: S608 - constants
_SECONDS = 60.0


class States:
    """Reads digests of tenants' rows, over one connection of the background loop.

    The ``Tenancy`` under test would need a connection for it in each event loop of a test.
    """

    def __init__(self) -> None:
        self._connection: asyncpg.Connection[Any] | None = None
        self._dsn = ""
        self._using = asyncio.Lock()

    async def read(self, control_url: str, tenant_id: UUID) -> str:
        """Return the digest of a tenant's rows; "None" where there are none."""
        async with self._using:
            return str(await (await self._connected(control_url)).fetchval(_STATE, tenant_id))

    async def _connected(self, control_url: str) -> asyncpg.Connection[Any]:
        if self._connection is not None and not self._connection.is_closed() and self._dsn == control_url:
            return self._connection
        await self._close()
        self._dsn = control_url
        opened: asyncpg.Connection[Any] = await login.connect(
            Dsn.parse(control_url), purpose="tenancy-tests", timeout=_SECONDS
        )
        self._connection = opened
        return opened

    async def close(self) -> None:
        """Close the connection."""
        async with self._using:
            await self._close()

    async def _close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connections.close(connection)


__all__ = ["States"]
