"""Rights in a tenant's database: the owner role owns its objects, the tenant's role reads and writes rows."""

from __future__ import annotations

from ...postgres.connections import Connection, transaction, version
from ...postgres.quoting import quote_identifier, quote_literal
from .tenant_rights import Contents, TenantRights, grant_statements

CHECKPOINTS_SCHEMA = "tenancy_migration"
"""In a tenant's database while data migrations are unfinished: how far they have come, nothing of the tenant's."""

_CONTENTS = """
WITH owner AS (SELECT oid FROM pg_roles WHERE rolname = $1),
versions AS (SELECT attrelid FROM pg_attribute WHERE attnum > 0 AND NOT attisdropped
              GROUP BY attrelid HAVING array_agg(attname::text) = ARRAY['version_num'])
SELECT 'schema' AS kind, quote_ident(nspname) AS name FROM pg_namespace
 WHERE nspname = 'public' OR nspowner = (TABLE owner) AND nspname <> 'tenancy_migration'
UNION ALL
SELECT CASE WHEN relkind = 'S' THEN 'sequence' WHEN c.oid IN (TABLE versions) THEN 'version' ELSE 'table' END,
       quote_ident(nspname) || '.' || quote_ident(relname)
  FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace
 WHERE relowner = (TABLE owner) AND relkind IN ('r', 'p', 'v', 'm', 'f', 'S') AND relpersistence <> 't'
   AND nspname <> 'tenancy_migration'
 ORDER BY 1, 2
"""


async def contents(connection: Connection, owner: str) -> Contents:
    """Return the objects of ``owner`` in the database of ``connection``. An extension's objects are not the owner's.

    A version table can have any name (``version_table`` in env.py), but always has the one column ``version_num``.
    """
    found: dict[str, list[str]] = {"schema": [], "table": [], "sequence": [], "version": []}
    for kind, name in await connection.fetch(_CONTENTS, owner):
        found[kind].append(name)
    return Contents(*(tuple(found[kind]) for kind in ("schema", "table", "sequence", "version")))


async def grant_and_mark(
    connection: Connection,
    name: str,
    *,
    role: str,
    rights: TenantRights,
    what: Contents,
    marker: str,
) -> None:
    """Grant ``role`` its rights on the data, also on what the owner creates later, and set the marker.

    This is one transaction: a database with its marker has the rights as well, and one without was never a tenant's.

    Args:
        connection: To the tenant's database, as the owner.
        name: The tenant's database.
        role: The tenant's role.
        rights: What the role may do.
        what: The database's contents.
        marker: The marker that ``routing.marker`` verifies.

    Raises:
        ProvisioningError: a statement of the grant hook failed; the message has it.
    """
    statements = grant_statements(rights.wanted(what, name), role)
    mark = f"COMMENT ON DATABASE {quote_identifier(name)} IS {quote_literal(marker)}"
    if rights.hook is None:
        await connection.execute("; ".join([*statements, mark]))
        return
    async with transaction(connection):
        await connection.execute("; ".join(statements))
        await rights.run_hook(connection, name, role)
        await connection.execute(mark)


async def revision(connection: Connection, owner: str) -> str | None:
    """Return the schema's revision in Alembic's version table, or None if the database has no such table."""
    for table in (await contents(connection, owner)).version_tables:
        found = await connection.fetch(f"SELECT version_num FROM {table} ORDER BY 1")  # noqa: S608 - quoted by PostgreSQL
        return ",".join(row["version_num"] for row in found) or None
    return None


async def protect_version_table(connection: Connection, role: str, table: str) -> None:
    """Reduce the rights of ``role`` on a version table to SELECT: its default privileges have given it more.

    Args:
        connection: To the tenant's database, as the owner.
        role: The tenant's role.
        table: The version table, quoted.
    """
    quoted = quote_identifier(role)
    await connection.execute(f"REVOKE ALL ON TABLE {table} FROM {quoted}; GRANT SELECT ON TABLE {table} TO {quoted}")


async def prepare_schema(connection: Connection, owner: str) -> None:
    """Make ``owner`` the owner of schema ``public`` and revoke CREATE from PUBLIC, as PostgreSQL 15 does by default.

    Args:
        connection: An administrative one, to a template that is being built.
        owner: The owner of the database.

    Raises:
        asyncpg.InsufficientPrivilegeError: PostgreSQL 14, and the administrator is not a superuser.
    """
    if version(connection) < 15:
        await connection.execute(
            f"ALTER SCHEMA public OWNER TO {quote_identifier(owner)}; REVOKE CREATE ON SCHEMA public FROM PUBLIC"
        )
