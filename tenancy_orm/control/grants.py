"""The rights of the application's own role in the control database: what it needs, and nothing else.

The role that runs ``tenancy init`` owns the tables. An application that serves requests should log in as another one,
to which this module grants exactly what the code uses: it can read the audit log and append to it through
``tenancy.audit_append``, and can neither change an entry, nor disable a trigger, nor choose an entry's sequence number,
time, hash or database role.

Row-level security protects the tables that hold tenants' rows. Their owner bypasses it; the application's role does
not, so it gets a policy on each table that shows it every row, and it may SET ROLE to the viewer role. It can read the
months of the audit log by their own names, and the sequences, as ``pg_dump`` does for a backup of the control database.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Final

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from ..errors import ConfigurationError
from ..postgres.quoting import quote_identifier
from .models import SCHEMA
from .viewer import grant_viewer, viewer_of

# Every table and view of the schema; a test compares this with the catalogue.
APPLICATION_TABLES: Final[Mapping[str, str]] = {
    "alembic_version": "SELECT",
    "installation": "SELECT",
    "status_transitions": "SELECT",
    "fleet_revision": "SELECT, UPDATE",
    "servers": "SELECT, INSERT, UPDATE, DELETE",
    "tiers": "SELECT, INSERT, UPDATE",
    "tenants": "SELECT, INSERT, UPDATE, DELETE",
    "api_keys": "SELECT, INSERT, UPDATE, DELETE",
    "members": "SELECT, INSERT, UPDATE, DELETE",
    "invitations": "SELECT, INSERT, UPDATE, DELETE",
    "revocations": "SELECT, INSERT, UPDATE, DELETE",
    "data_keys": "SELECT, INSERT, DELETE",
    "templates": "SELECT, INSERT, UPDATE, DELETE",
    "key_checks": "SELECT, INSERT",
    "former_slugs": "SELECT, INSERT, UPDATE, DELETE",
    "domains": "SELECT, INSERT, UPDATE, DELETE",
    "audit_log": "SELECT",
    "audit_head": "SELECT",
    "audit_cuts": "SELECT",
    # a row that is added counts only if a key signed it
    "audit_keys": "SELECT, INSERT",
    "audit_summary": "SELECT",
    "usage": "SELECT, INSERT, UPDATE, DELETE",
    "usage_keys": "SELECT, INSERT, DELETE",
    "quota_holds": "SELECT, INSERT, UPDATE, DELETE",
    "quota_blocks": "SELECT, INSERT, UPDATE, DELETE",
    "quota_pressure": "SELECT, INSERT, UPDATE, DELETE",
    "usage_records": "SELECT, INSERT, UPDATE, DELETE",
    "tenant_metrics": "SELECT, INSERT, DELETE",
    "schedules": "SELECT, INSERT, UPDATE, DELETE",
    "schedule_runs": "SELECT, INSERT, UPDATE, DELETE",
    "connection_caps": "SELECT, INSERT, UPDATE, DELETE",
    "connection_leases": "SELECT, INSERT, UPDATE, DELETE",
    "jobs": "SELECT, INSERT, UPDATE, DELETE",
    "migration_runs": "SELECT, INSERT, UPDATE, DELETE",
    "migration_run_tenants": "SELECT, INSERT, UPDATE, DELETE",
    "tenant_upgrades": "SELECT, INSERT, UPDATE, DELETE",
    "migration_run_processes": "SELECT, INSERT, UPDATE, DELETE",
    "warm_databases": "SELECT, INSERT, UPDATE, DELETE",
    "operations": "SELECT, INSERT, UPDATE, DELETE",
    "tenant_databases": "SELECT, INSERT, UPDATE, DELETE",
    "backup_keys": "SELECT, INSERT, UPDATE, DELETE",
    "backups": "SELECT, INSERT, UPDATE, DELETE",
    "active_tenants": "SELECT",
    "tier_distribution": "SELECT",
}

# These functions run with their owner's rights, so that PUBLIC may not call them.
APPLICATION_FUNCTIONS: Final[tuple[str, ...]] = ("audit_append", "audit_ensure_partitions")

_ROLE = text(
    # a superuser is a member of every role
    "SELECT r.rolbypassrls, pg_has_role(r.oid, c.relowner, 'MEMBER') AS owner, "
    # before PostgreSQL 16 it can make itself a member of any role that is not a superuser
    "r.rolcreaterole AND current_setting('server_version_num')::integer < 160000 AS any_member "
    "FROM pg_roles r, pg_class c WHERE r.rolname = :role AND c.oid = 'tenancy.audit_log'::regclass"
)
# What the role, or one that it can become, may change: by grants to it, to other roles or PUBLIC, or by a predefined
# role.
_WRITABLE = text(
    "SELECT c.relname, array_agg(DISTINCT p.privilege) AS privileges FROM pg_class c "
    "CROSS JOIN unnest(ARRAY['INSERT', 'UPDATE', 'DELETE', 'TRUNCATE', 'REFERENCES', 'TRIGGER']) AS p (privilege) "
    "JOIN pg_roles r ON pg_has_role(CAST(:role AS name), r.oid, 'MEMBER') "
    "WHERE c.relnamespace = 'tenancy'::regnamespace AND c.relkind IN ('r', 'p', 'v', 'm', 'f') "
    "AND CASE WHEN p.privilege IN ('INSERT', 'UPDATE', 'REFERENCES') "
    "THEN has_any_column_privilege(r.oid, c.oid, p.privilege) ELSE has_table_privilege(r.oid, c.oid, p.privilege) END "
    "GROUP BY 1 ORDER BY 1"
)
_MAY_CREATE = text(
    "SELECT bool_or(has_schema_privilege(r.oid, 'tenancy', 'CREATE')) FROM pg_roles r "
    "WHERE pg_has_role(CAST(:role AS name), r.oid, 'MEMBER')"
)
_WITHOUT_POLICY = text(
    "SELECT c.relname FROM pg_class c WHERE c.relnamespace = 'tenancy'::regnamespace AND c.relrowsecurity "
    "AND NOT EXISTS (SELECT FROM pg_policy p WHERE p.polrelid = c.oid AND p.polname = :policy) ORDER BY 1"
)
# the months of the audit log, those that retention has detached too: revision 0006 shares them in the same way
_MONTHS = text(
    "SELECT relname FROM pg_class WHERE relnamespace = 'tenancy'::regnamespace AND relkind = 'r' "
    "AND relname LIKE 'audit\\_log\\_y%' ORDER BY 1"
)


async def grant_application(connection: AsyncConnection, role: str) -> None:
    """Grant ``role`` exactly the privileges in this module, whatever it had before; run as the tables' owner.

    Args:
        connection: A transaction on the control database.
        role: An existing role, a group or one that logs in.

    Raises:
        ConfigurationError: the role does not exist; or it cannot be restricted, since it is a superuser, is or can make
            itself a member of the tables' owner, or has BYPASSRLS; or it would have more than is granted here, through
            PUBLIC or another role. The transaction must not be committed then.
        ControlSchemaError: the control database has no viewer role.
    """
    row = (await connection.execute(_ROLE, {"role": role})).one_or_none()
    if row is None:
        raise ConfigurationError(f"role {role!r} does not exist; create it first")
    if row.owner or row.any_member:
        raise ConfigurationError(f"role {role!r} has or can get the rights of the control tables' owner; use another")
    if row.rolbypassrls:
        raise ConfigurationError(f"role {role!r} bypasses row-level security; run: ALTER ROLE ... NOBYPASSRLS")
    months = (await connection.scalars(_MONTHS)).all()
    for statement in (*_revokes(role), *await _grants(connection, role, months)):
        await connection.exec_driver_sql(statement)
    policy = application_policy(role)
    for table in (await connection.scalars(_WITHOUT_POLICY, {"policy": policy})).all():
        # where the role may only read, so may the policy
        is_read_only = table in months or APPLICATION_TABLES.get(table) == "SELECT"
        verb, check = ("SELECT", "") if is_read_only else ("ALL", "WITH CHECK (true)")
        await connection.exec_driver_sql(
            f"CREATE POLICY {policy} ON {_qualified(table)} FOR {verb} TO {quote_identifier(role)} USING (true) {check}"
        )
    await grant_viewer(connection, await viewer_of(connection), role)
    await _check(connection, role)


def application_policy(role: str) -> str:
    """The name of the policy that shows ``role`` every row: a hash, since the role's name could make it too long."""
    return f"application_{sha256(role.encode()).hexdigest()[:16]}"


async def _check(connection: AsyncConnection, role: str) -> None:
    """Refuse a role that has more than was granted: this module does not revoke rights of other roles."""
    excess = []
    for row in await connection.execute(_WRITABLE, {"role": role}):
        more = set(row.privileges) - set(APPLICATION_TABLES.get(row.relname, "").split(", "))
        excess += [f"{privilege} on {row.relname}" for privilege in sorted(more)]
    if await connection.scalar(_MAY_CREATE, {"role": role}):
        excess.append(f"CREATE on schema {SCHEMA}")
    if excess:
        raise ConfigurationError(
            f"role {role!r} would have {', '.join(excess)}, from PUBLIC or from a role that it is a member of; "
            "revoke that first"
        )


def _qualified(table: str) -> str:
    return f"{SCHEMA}.{quote_identifier(table)}"


def _revokes(role: str) -> list[str]:
    grantee = quote_identifier(role)
    kinds = ("TABLES", "SEQUENCES", "FUNCTIONS")
    return [
        *(f"REVOKE ALL ON ALL {kind} IN SCHEMA {SCHEMA} FROM {grantee}" for kind in kinds),
        # what a later upgrade creates is granted after it
        *(f"ALTER DEFAULT PRIVILEGES IN SCHEMA {SCHEMA} REVOKE ALL ON {kind} FROM {grantee}" for kind in kinds),
        f"REVOKE ALL ON SCHEMA {SCHEMA} FROM {grantee}",
    ]


async def _grants(connection: AsyncConnection, role: str, months: Sequence[str]) -> list[str]:
    grantee = quote_identifier(role)
    database = quote_identifier(str(await connection.scalar(text("SELECT current_database()"))))
    statements = [
        # revoked from PUBLIC where tenants' databases share the server
        f"GRANT CONNECT ON DATABASE {database} TO {grantee}",
        f"GRANT USAGE ON SCHEMA {SCHEMA} TO {grantee}",
        f"GRANT SELECT ON ALL SEQUENCES IN SCHEMA {SCHEMA} TO {grantee}",
        *(f"GRANT SELECT ON {_qualified(month)} TO {grantee}" for month in months),
    ]
    statements += [
        f"GRANT {privileges} ON {_qualified(table)} TO {grantee}" for table, privileges in APPLICATION_TABLES.items()
    ]
    statements += [
        f"GRANT EXECUTE ON FUNCTION {SCHEMA}.{quote_identifier(name)} TO {grantee}" for name in APPLICATION_FUNCTIONS
    ]
    return statements
