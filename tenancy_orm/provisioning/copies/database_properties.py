"""What a database has beside its contents: its locale, and the settings of its sessions (``ALTER DATABASE ... SET``).

A dump of one database has neither. A copy without them sorts and compares texts in another way, so that another row
comes first, or belongs to another partition; and its sessions have another time zone or search path.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

import asyncpg

from ...cancellation import run_to_completion
from ...errors import OperationError
from ...postgres import connections
from ...postgres.connections import Connection
from ...postgres.quoting import quote_identifier
from ..rights.role_settings import assignment
from ..server_objects.databases import Locale

logger = logging.getLogger("tenancy_orm.provisioning")

# Of one role in this database: roles of tenants have none, see ``role_settings``, and others are not of this package.
_PROPERTIES = """
SELECT d.datcollate::text AS "collate", d.datctype::text AS ctype,
       CASE to_jsonb(d)->>'datlocprovider' WHEN 'i' THEN 'icu' WHEN 'b' THEN 'builtin' ELSE 'libc' END AS provider,
       COALESCE(to_jsonb(d)->>'datlocale', to_jsonb(d)->>'daticulocale') AS name,
       to_jsonb(d)->>'daticurules' AS rules,
       ARRAY(SELECT unnest(s.setconfig) FROM pg_catalog.pg_db_role_setting s
              WHERE s.setdatabase = d.oid AND s.setrole = 0) AS settings
  FROM pg_catalog.pg_database d WHERE d.datname = $1
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class DatabaseProperties:
    """What a copy of a database gets beside its contents.

    Attributes:
        locale: How texts are sorted and compared.
        settings: The settings of sessions, whoever connects, by name.
        required: Whether there is no copy where its server refuses one of the settings; else it goes without.
    """

    locale: Locale
    settings: Mapping[str, str] = field(default_factory=dict)
    required: bool = True

    async def apply(self, connection: Connection, database: str, *, server: str, trial: bool = False) -> None:
        """Give a database these settings.

        Args:
            connection: An administrative one, to any database of the server.
            database: The database, which was made with this locale.
            server: The server's name, for messages.
            trial: Only look whether the server refuses one; nothing is changed.

        Raises:
            OperationError: the server refuses one of them, and they are required.
        """
        refused = await self._set(connection, database, trial=trial)
        if not refused:
            return
        if self.required:
            raise OperationError(
                f"server {server!r} refuses settings that the database has which is copied, by SQLSTATE: "
                f"{', '.join(refused)}; let its administrator set them there, or take them off by ALTER DATABASE ... "
                "RESET"
            )
        logger.warning(
            "database %s on server %s goes without settings of its source: %s", database, server, ", ".join(refused)
        )

    async def _set(self, connection: Connection, database: str, *, trial: bool) -> list[str]:
        refused = []
        outer = connection.transaction()
        await outer.start()
        try:
            for name, value in self.settings.items():
                statement = f"ALTER DATABASE {quote_identifier(database)} SET {assignment(name, value)}"
                try:
                    async with connections.transaction(connection):
                        await connection.execute(statement)
                except (asyncpg.DataError, asyncpg.SyntaxOrAccessError) as exc:
                    refused.append(f"{name} ({exc.sqlstate})")
        except BaseException:
            await run_to_completion(connections.finish(connection, outer.rollback))
            raise
        if trial:
            await run_to_completion(connections.finish(connection, outer.rollback))
        else:
            await outer.commit()
        return refused


async def read_properties(connection: Connection, *, required: bool = True) -> DatabaseProperties:
    """Return the properties of the database of ``connection``, which may be of any role.

    Args:
        connection: To the database.
        required: As in ``DatabaseProperties``.
    """
    found = await find_properties(
        connection, await connection.fetchval("SELECT pg_catalog.current_database()::text"), required=required
    )
    assert found is not None  # noqa: S101 - the database exists, we are connected to it
    return found


async def find_properties(connection: Connection, database: str, *, required: bool = True) -> DatabaseProperties | None:
    """Return the properties of a database of the server, or None if there is no such database.

    Args:
        connection: To any database of the server, of any role.
        database: The database.
        required: As in ``DatabaseProperties``.
    """
    row = await connection.fetchrow(_PROPERTIES, database)
    if row is None:
        return None
    locale = Locale(
        provider=row["provider"], collate=row["collate"], ctype=row["ctype"], name=row["name"], rules=row["rules"]
    )
    named = (entry.partition("=") for entry in row["settings"])
    return DatabaseProperties(locale=locale, settings={name: value for name, _, value in named}, required=required)


__all__ = ["DatabaseProperties", "find_properties", "read_properties"]
