"""Empty databases that a login of their own fills: copies of tenants' databases, and new databases of tenants.

The owner of tenants' databases owns the database, so that the login can neither rename it nor let others in. The login
owns what it brings in, and nobody else but administrators can connect.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import asyncpg

from ...cancellation import run_to_completion
from ...control.names import Names
from ...errors import OperationError
from ...postgres import connections
from ...postgres.connections import Connection
from ...postgres.quoting import quote_identifier, quote_literal
from ...servers import Server
from ..logins.copy_logins import CopyLogin, create_login
from ..server_objects import databases, roles
from ..server_objects.blockers import Blockers
from ..server_objects.databases import Locale, LocaleMissingError
from .extensions import install

_EXTENSIONS = """
SELECT e.extname::text AS name, n.nspname::text AS schema, e.extversion AS version
  FROM pg_catalog.pg_extension e JOIN pg_catalog.pg_namespace n ON n.oid = e.extnamespace
 WHERE e.extname <> 'plpgsql' ORDER BY e.oid
"""

# in each database: an archive, or a server that is adopted from, names the schema, and gets no rights in these by that
_SERVERS = ("public", "pg_catalog", "information_schema")


@dataclass(frozen=True, slots=True)
class InstalledExtension:
    """An extension of a database: its name, its schema and its version, None where any version will do."""

    name: str
    schema: str = "public"
    version: str | None = None


async def read_extensions(connection: Connection) -> tuple[InstalledExtension, ...]:
    """Return the extensions of the database of ``connection``, in the order in which they were created."""
    return tuple(InstalledExtension(*row) for row in await connection.fetch(_EXTENSIONS))


async def create_for_login(
    connection: Connection,
    blockers: Blockers,
    server: Server,
    names: Names,
    *,
    database: str,
    login: str,
    seconds: float,
    extensions: Iterable[InstalledExtension] = (),
    wanted: Sequence[str] = (),
    locale: Locale | None = None,
) -> CopyLogin:
    """Create an empty database with extensions, and the login that owns what comes into it.

    Args:
        connection: An administrative one.
        blockers: Of its server.
        server: The server.
        names: Of this installation.
        database: The database's name, which is new.
        login: The login's name, which is new: that of a short-lived role.
        seconds: For how long the login is valid.
        extensions: Extensions that another database has, and this one gets.
        wanted: Names of further extensions.
        locale: The database's locale; that of template0 where None.

    Raises:
        DatabaseExistsError: there is such a database.
        OperationError: the server does not have the locale.
        ProvisioningError: the administrator may not create one of ``wanted``.
    """
    made = await create_login(connection, server.dsn, login, database, seconds=seconds)
    try:
        await databases.create(
            connection, database, template="template0", owner=names.owner, open_to_connections=False, locale=locale
        )
    except LocaleMissingError as exc:
        raise OperationError(
            f"server {server.name!r} does not have the locale {exc}, which the database has that is copied: texts "
            "would be sorted and compared in another way there; install the locale on that server, or choose another "
            "one"
        ) from exc
    quoted, role = quote_identifier(database), quote_identifier(login)
    await connections.execute_unflushed(
        connection,
        f"REVOKE ALL ON DATABASE {quoted} FROM PUBLIC",
        f"GRANT CONNECT, CREATE, TEMPORARY ON DATABASE {quoted} TO {role}",
        f"ALTER DATABASE {quoted} WITH ALLOW_CONNECTIONS true",
    )
    inside = await blockers.connect(database, purpose="tenancy-copy")
    try:
        await _prepare(inside, names.owner, role, extensions)
        await install(inside, wanted, server=server.name)
        await _open_public(inside, names.owner, role)
    finally:
        await run_to_completion(connections.close(inside))
    return made


async def _prepare(inside: Connection, owner: str, role: str, extensions: Iterable[InstalledExtension]) -> None:
    """Install extensions, while nothing of a tenant's is in the database yet: an administrator does this."""
    for one in extensions:
        is_own = one.schema not in _SERVERS
        if is_own:
            await inside.execute(f"CREATE SCHEMA IF NOT EXISTS {quote_identifier(one.schema)}")
        create = f"CREATE EXTENSION IF NOT EXISTS {quote_identifier(one.name)} SCHEMA {quote_identifier(one.schema)}"
        version = "" if one.version is None else f" VERSION {quote_literal(one.version)}"
        try:
            await inside.execute(f"{create}{version} CASCADE")
        except (asyncpg.InvalidParameterValueError, asyncpg.UndefinedFileError):
            await inside.execute(f"{create} CASCADE")  # the server does not have this version any more
        if is_own:
            await inside.execute(f"GRANT ALL ON SCHEMA {quote_identifier(one.schema)} TO {role}")


async def _open_public(inside: Connection, owner: str, role: str) -> None:
    # on PostgreSQL 14, everybody may create something there
    if connections.version(inside) >= 15 or await roles.is_superuser(inside):
        if connections.version(inside) >= 15:
            await inside.execute(f"SET ROLE {quote_identifier(owner)}")
        await inside.execute(f"GRANT ALL ON SCHEMA public TO {role}")


__all__ = ["InstalledExtension", "create_for_login", "read_extensions"]
