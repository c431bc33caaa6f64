"""What PUBLIC may do on the databases that a server's tenants share, and who connects there by that alone.

PostgreSQL grants CONNECT and TEMPORARY on every database to PUBLIC: a tenant's role could connect to ``postgres``,
``template1`` and the control database. Preparing a server revokes that. Other roles may rely on it, such as one for
monitoring, or those of an application on the same server: they are found first, and nothing is revoked from them
without a word.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

import asyncpg
from sqlalchemy import text

from ...config import TenancyConfig
from ...control.database import ControlDatabase
from ...errors import ConfigurationError
from ...postgres import connections
from ...postgres.connections import Connection
from ...postgres.dsn import Dsn
from ...postgres.errors import CONCURRENT_UPDATE, DUPLICATE_OBJECT, UNIQUE_VIOLATION, sqlstate_of
from ...postgres.quoting import quote_identifier
from ..server_objects import databases, roles

logger = logging.getLogger("tenancy_orm.provisioning")

# The errors of two installations that prepare the same server at the same time.
RACES: Final = (CONCURRENT_UPDATE, DUPLICATE_OBJECT, UNIQUE_VIOLATION)
_ATTEMPTS = 50

_CONTROL = text(
    "SELECT current_database() AS database, current_user AS role, pg_postmaster_start_time() AS started, "
    "(SELECT rolsuper FROM pg_roles WHERE rolname = current_user) AS is_superuser, "
    "to_regclass('tenancy.installation') IS NOT NULL AS is_initialised"
)
# Tables and views that are neither this package's, PostgreSQL's own, nor an extension's.
_OTHER_TABLES = """
    SELECT n.nspname || '.' || c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f') AND n.nspname <> 'information_schema'
    AND NOT starts_with(n.nspname, 'pg_')
    AND (n.nspname <> 'tenancy' OR c.relname <> 'alembic_version' AND to_regclass('tenancy.installation') IS NULL)
    AND NOT EXISTS (
        SELECT FROM pg_depend e WHERE e.classid = 'pg_class'::regclass AND e.objid = c.oid AND e.deptype = 'e'
    ) ORDER BY 1 LIMIT 20
"""
_STATE = (
    "SELECT bool_or(a.grantee = 0) AS is_open, bool_or(a.grantee = 0 AND a.privilege_type = 'CONNECT') AND "
    "bool_and(d.datallowconn) AS lets_connect, bool_and(pg_has_role(current_user, d.datdba, 'USAGE')) AS may_revoke "
    "FROM pg_database d, aclexplode(coalesce(d.datacl, acldefault('d', d.datdba))) AS a WHERE d.datname = $1"
)
# A tenant's role, of whichever installation, has the name of a database with a marker.
_DEPENDENT = """
SELECT r.rolname::text FROM pg_roles r
WHERE r.rolcanlogin AND NOT r.rolsuper AND r.rolname <> ALL ($2::text[]) AND r.rolname::text !~ $3
AND NOT EXISTS (
    SELECT FROM pg_database own
    WHERE own.datname = r.rolname AND starts_with(shobj_description(own.oid, 'pg_database'), 'tenancy:')
) AND NOT EXISTS (
    SELECT FROM pg_database d, aclexplode(coalesce(d.datacl, acldefault('d', d.datdba))) AS a
    WHERE d.datname = $1 AND a.privilege_type = 'CONNECT' AND a.grantee <> 0 AND pg_has_role(r.oid, a.grantee, 'USAGE')
)
ORDER BY 1
"""
_SESSIONS = (
    "SELECT usename::text AS role, coalesce(application_name, '') AS application_name, count(*)::int AS count "
    "FROM pg_stat_activity WHERE datname = $1 AND usename = ANY ($2::text[]) GROUP BY 1, 2 ORDER BY 1, 2"
)


@dataclass(frozen=True, slots=True)
class ControlFacts:
    """The control database as preparing a server sees it."""

    database: str
    role: str
    is_superuser: bool
    started: datetime  # of its server, which this identifies: a server can have many host names
    is_initialised: bool
    other_tables: tuple[str, ...]
    """Some of the tables and views in it that are not this package's, as ``schema.name``."""
    roles: tuple[str, ...] = ()
    """Further roles that this installation logs in to it as."""


@dataclass(frozen=True, slots=True)
class Connected:
    """Sessions of one role and application_name."""

    role: str
    application_name: str
    count: int


@dataclass(frozen=True, slots=True)
class Closing:
    """A database on which PUBLIC has rights, and what revoking them changes.

    ``losing`` are the roles that can connect through PUBLIC alone, and ``connected`` the sessions that they have now,
    which last until they end. Superusers, tenants' roles and this installation's own roles lose nothing. ``kept`` are
    roles of this installation, which are granted the rights that they need. Where the administrator may not revoke the
    rights nobody loses them; ``relying`` are the roles that would, if a superuser revoked them.
    """

    server: str
    database: str
    losing: tuple[str, ...] = ()
    connected: tuple[Connected, ...] = ()
    kept: tuple[str, ...] = ()
    may_revoke: bool = True
    """Whether the administrator may revoke these rights: a superuser or the database's owner may."""
    relying: tuple[str, ...] = ()

    @property
    def statement(self) -> str:
        """The SQL that revokes the rights, and first gives this installation's own roles what they need."""
        return "; ".join(databases.closing_statements(self.database, but=self.kept))

    def remedy(self, role: str) -> str:
        """The statement by which ``role`` can still connect."""
        return f"GRANT CONNECT ON DATABASE {quote_identifier(self.database)} TO {quote_identifier(role)}"


@dataclass(frozen=True, slots=True)
class SharedDatabases:
    """Finds the databases of a server that tenants' roles must not connect to.

    Args:
        prefix: ``TenancyConfig.name_prefix``; roles that are named as this package names them lose nothing.
        control: The control database; None if it does not exist yet.
        ours: Further roles that lose nothing.
    """

    prefix: str
    control: ControlFacts | None
    ours: tuple[str, ...] = field(default=())

    async def closings(self, connection: Connection, server: str) -> tuple[Closing, ...]:
        """Read which of them PUBLIC has rights on; only reads.

        Args:
            connection: The administrator's, to any database of the server.
            server: The server's name.
        """
        found: dict[str, set[str]] = {"postgres": set(), "template1": set()}
        maintenance, administrator, started = await connection.fetchrow(
            "SELECT current_database(), current_user, pg_postmaster_start_time()"
        )
        found.setdefault(maintenance, set())
        if not await roles.is_superuser(connection):
            found[maintenance].add(administrator)
        ours, only_ours = {administrator, *self.ours}, set[str]()
        if maintenance == administrator and not await connection.fetchval(_OTHER_TABLES):
            only_ours.add(maintenance)  # a database of the role's own, by PostgreSQL's custom
        if (control := self.control) is not None and control.started == started:
            users = {control.role, *control.roles}
            ours |= users
            found.setdefault(control.database, set()).update(
                users - ({control.role} if control.is_superuser else set())
            )
            if not control.other_tables:
                only_ours.add(control.database)
        only_ours -= {"postgres", "template1"}
        closings = []
        for name, kept in found.items():
            closing = await self._closing(connection, server, name, kept, ours, only_sessions=name in only_ours)
            if closing is not None:
                closings.append(closing)
        return tuple(closings)

    async def _closing(
        self,
        connection: Connection,
        server: str,
        name: str,
        kept: Collection[str],
        ours: Collection[str],
        *,
        only_sessions: bool,
    ) -> Closing | None:
        state = await connection.fetchrow(_STATE, name)
        if state is None or not state["is_open"]:
            return None
        relying: Sequence[str] = ()
        if state["lets_connect"]:
            pattern = f"^{self.prefix}_[0-9a-f]{{8}}_"
            relying = [row[0] for row in await connection.fetch(_DEPENDENT, name, sorted(ours), pattern)]
        if not state["may_revoke"]:
            return Closing(server, name, kept=tuple(sorted(kept)), may_revoke=False, relying=tuple(relying))
        losing = relying
        sessions = [Connected(**row) for row in await connection.fetch(_SESSIONS, name, losing)] if losing else []
        if only_sessions:
            # nothing in there is of use to anybody else, so that only those who are there can miss it
            losing = sorted({session.role for session in sessions})
        return Closing(server, name, tuple(losing), tuple(sessions), kept=tuple(sorted(kept)))


async def read_control(control: ControlDatabase, config: TenancyConfig) -> ControlFacts:
    """Read what preparing a server needs to know of the control database.

    Raises:
        ControlUnavailableError: it does not answer, or does not exist.
    """
    async with control.connect() as connection:
        row = (await connection.execute(_CONTROL)).one()
        tables = tuple(await connection.scalars(text(_OTHER_TABLES)))
    listens_as = Dsn.parse(config.control.listen_url).user if config.control.listen_url else None
    return ControlFacts(
        database=row.database,
        role=row.role,
        is_superuser=row.is_superuser,
        started=row.started,
        is_initialised=row.is_initialised,
        other_tables=tables,
        roles=(listens_as,) if listens_as and listens_as != row.role else (),
    )


def refuse_loss(closings: Iterable[Closing]) -> None:
    """Refuse to go on where somebody would lose access.

    Raises:
        ConfigurationError: a role connects to one of the databases through PUBLIC alone.
    """
    losses = [closing for closing in closings if closing.losing]
    if not losses:
        return
    places = "; ".join(f"{closing.database} (by {', '.join(closing.losing)})" for closing in losses)
    raise ConfigurationError(
        f"server {losses[0].server!r} is not prepared for tenants, and nothing was changed: that would revoke PUBLIC's "
        f"CONNECT on databases which roles use by that alone: {places}. Run tenancy init, which shows this and asks; "
        f"or grant it to those that need it, as in: {losses[0].remedy(losses[0].losing[0])}; or set "
        "provisioning.revoke_public to false"
    )


async def close(connection: Connection, closing: Closing, *, keep: Iterable[str] = ()) -> None:
    """Revoke PUBLIC's rights on a database; a warning has the statement for a superuser where it may not do that.

    Args:
        connection: The administrator's, to any database of the server.
        closing: The database.
        keep: Roles that are granted CONNECT and TEMPORARY first, beside this installation's own.
    """
    name = closing.database
    for remaining in reversed(range(_ATTEMPTS)):
        try:
            await _close(connection, name, sorted({*closing.kept, *keep}))
        except asyncpg.PostgresError as exc:
            if sqlstate_of(exc) not in RACES or not remaining:
                raise
            await asyncio.sleep(connections.POLL_SECONDS)
        else:
            break
    if await databases.is_open_to_public(connection, name):
        logger.warning(
            "every role can connect to database %s on server %s, and its administrator may not change that; "
            "run as a superuser: %s%s",
            name,
            closing.server,
            closing.statement,
            f" (which takes access from {', '.join(closing.relying)})" if closing.relying else "",
        )


async def _close(connection: Connection, name: str, keep: Sequence[str]) -> None:
    if not await databases.is_open_to_public(connection, name):
        return
    existing = await connection.fetch("SELECT rolname::text FROM pg_roles WHERE rolname = ANY ($1::text[])", keep)
    with suppress(asyncpg.InsufficientPrivilegeError):  # logged by the caller, as when PostgreSQL only warns
        await databases.close_to_public(connection, name, but=[row[0] for row in existing])


__all__ = [
    "Closing",
    "Connected",
    "ControlFacts",
    "SharedDatabases",
    "close",
    "read_control",
    "refuse_loss",
]
