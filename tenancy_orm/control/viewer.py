"""The viewer role, which reads the control database for one tenant under row-level security.

``ControlDatabase.viewing`` sets it for one transaction. It cannot log in, owns nothing, writes nothing, and may read
only the columns below: neither the digests of keys, nor sealed passwords, nor where a tenant's database is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from sqlalchemy import select, text, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from ..errors import AdministratorNeededError, ConfigurationError, ControlSchemaError
from ..postgres.errors import INSUFFICIENT_PRIVILEGE, sqlstate_of
from ..postgres.quoting import quote_identifier
from .models import SCHEMA, installation
from .names import Names

# What a tenant may know about itself, by table; and the tiers, which its limits are computed from.
VIEWER_COLUMNS: Final[Mapping[str, tuple[str, ...]]] = {
    "tenants": (
        "id",
        "slug",
        "status",
        "tier",
        "quotas",
        "reason",
        "timezone",
        "trial_ends_at",
        "created_at",
        "updated_at",
        "deleted_at",
        "suspend_at",
        "suspend_reason",
        "purge_at",
    ),
    "api_keys": (
        "id",
        "tenant_id",
        "name",
        "prefix",
        "scopes",
        "networks",
        "created_at",
        "expires_at",
        "revoked_at",
        "revoked_reason",
        "last_used_at",
        "rotated_from",
    ),
    "members": ("tenant_id", "subject", "roles", "created_at"),
    "invitations": (
        "id",
        "tenant_id",
        "roles",
        "email",
        "created_at",
        "expires_at",
        "accepted_at",
        "accepted_by",
        "withdrawn_at",
    ),
    "domains": (
        "domain",
        "tenant_id",
        "token",
        "created_at",
        "verified_at",
        "checked_at",
        "failing_since",
        "failures",
        "lapsed_at",
    ),
    "former_slugs": ("slug", "tenant_id", "redirects_until"),
    "usage": ("tenant_id", "resource", "period", "period_start", "period_end", "used", "closed_at"),
    "usage_keys": ("tenant_id", "key", "resource", "amount", "created_at"),
    "usage_records": ("tenant_id", "resource", "period", "period_start", "period_end", "quantity", "created_at"),
    "quota_holds": ("tenant_id", "resource", "amount", "expires_at"),
    "quota_blocks": ("tenant_id", "resource", "period", "period_start", "unspent", "expires_at"),
    "quota_pressure": ("tenant_id", "resource", "tier", "since"),
    "tenant_metrics": ("tenant_id", "sampled_at", "size_bytes", "connections", "queries", "errors"),
    "schedule_runs": ("schedule", "tenant_id", "sent_for", "sent_at", "attempts"),
    "migration_run_tenants": (
        "run",
        "tenant_id",
        "state",
        "revision_before",
        "revision_after",
        "started_at",
        "ended_at",
    ),
    "tenant_upgrades": ("tenant_id", "target", "failures", "failed_at", "next_at"),
    "operations": ("id", "kind", "tenant_id", "state", "step", "created_at", "ended_at"),
    "tenant_databases": ("tenant_id", "state", "kept_until", "created_at"),
    "backup_keys": ("id", "tenant_id", "created_at", "destroyed_at"),
    "backups": ("id", "tenant_id", "state", "started_at", "ended_at", "bytes", "verified_at", "pruned_at"),
    "audit_log": (
        "sequence",
        "occurred_at",
        "action",
        "tenant_id",
        "slug",
        "actor_kind",
        "actor_id",
        "before",
        "after",
        "detail",
        "request_id",
        "source",
        "database_role",
        "hash",
    ),
    "tiers": ("name", "rank", "limits"),
}

# Views that show such columns only; granted where they run with their reader's rights.
VIEWER_VIEWS: Final[tuple[str, ...]] = ("audit_summary",)

# One round trip sets the tenant, read-only and the role; all three end with the transaction.
VIEW_AS = text(
    "SELECT set_config('tenancy.viewer', :tenant, true), set_config('transaction_read_only', 'on', true), "
    "set_config('role', :role, true)"
)

_ROLE = text("SELECT rolcanlogin, rolsuper, rolbypassrls FROM pg_roles WHERE rolname = :role")
# from PostgreSQL 16 on a membership has separate options to inherit and to SET ROLE
_GRANTED = text(
    "SELECT v.modern, rolsuper OR "
    "pg_has_role(rolname, CAST(:viewer AS name), CASE WHEN v.modern THEN 'SET' ELSE 'MEMBER' END) AS granted "
    "FROM pg_roles, (SELECT current_setting('server_version_num')::integer >= 160000 AS modern) v "
    "WHERE rolname = :role"
)
_APPLICATIONS = text(
    "SELECT r.rolname FROM pg_class c CROSS JOIN LATERAL aclexplode(c.relacl) a JOIN pg_roles r ON r.oid = a.grantee "
    "WHERE c.oid = 'tenancy.tenants'::regclass AND a.privilege_type = 'INSERT' AND a.grantee <> c.relowner"
)
_INVOKER_VIEWS = text(
    "SELECT relname FROM pg_class WHERE relnamespace = 'tenancy'::regnamespace "
    # asyncpg knows the type text[], and would ask the server for name[], which takes 10 ms
    "AND relname = ANY(CAST(:views AS text[])) AND 'security_invoker=true' = ANY(reloptions)"
)
# everything that it may do in the schema, as one text each
_HELD = text(
    """
    WITH viewer AS (SELECT oid FROM pg_roles WHERE rolname = :viewer), acls AS (
        SELECT c.relname::text AS name, '' AS part, c.relacl AS acl FROM pg_class c
        WHERE c.relnamespace = 'tenancy'::regnamespace
        UNION ALL SELECT c.relname::text, a.attname::text, a.attacl FROM pg_attribute a
        JOIN pg_class c ON c.oid = a.attrelid WHERE c.relnamespace = 'tenancy'::regnamespace AND a.attacl IS NOT NULL
        AND NOT a.attisdropped
        UNION ALL SELECT concat(p.proname, '(', pg_get_function_identity_arguments(p.oid), ')'), '', p.proacl
        FROM pg_proc p WHERE p.pronamespace = 'tenancy'::regnamespace
        UNION ALL SELECT '', '', nspacl FROM pg_namespace WHERE nspname = 'tenancy'
    )
    SELECT concat_ws(' ', e.privilege_type, acls.name, acls.part, CASE WHEN e.is_grantable THEN 'grantable' END)
    FROM viewer, acls CROSS JOIN LATERAL aclexplode(acls.acl) e WHERE e.grantee = viewer.oid
    """
)


async def prepare_viewer(connection: AsyncConnection, prefix: str) -> str:
    """Create the installation's viewer role if it is missing, grant it exactly its rights, and return its name.

    Roles that were granted the application's rights before may SET ROLE to it from now on.

    Args:
        connection: A transaction on the control database, as the tables' owner.
        prefix: ``TenancyConfig.name_prefix``; a name that an earlier call made is kept.

    Raises:
        AdministratorNeededError: the current role may not create or grant it; the error has the SQL to run.
        ConfigurationError: the role can log in, or bypasses row-level security.
    """
    row = (await connection.execute(select(installation.c.id, installation.c.viewer))).one()
    viewer = row.viewer or Names(prefix, row.id).viewer
    owner = str(await connection.scalar(text("SELECT current_user")))
    await _ensure_role(connection, viewer, owner)
    for role in (owner, *await connection.scalars(_APPLICATIONS)):
        await grant_viewer(connection, viewer, role)
    views = list(await connection.scalars(_INVOKER_VIEWS, {"views": list(VIEWER_VIEWS)}))
    # To revoke and grant takes ten times as long as to look, and would write to the catalogue at every start.
    if set(await connection.scalars(_HELD, {"viewer": viewer})) != _expected(views):
        for statement in _rights(viewer, views):
            await connection.exec_driver_sql(statement)
    if row.viewer is None:
        await connection.execute(update(installation).values(viewer=viewer))
    return viewer


async def viewer_of(connection: AsyncConnection) -> str:
    """The name of the installation's viewer role.

    Raises:
        ControlSchemaError: there is none.
    """
    found = await connection.scalar(select(installation.c.viewer))
    if found is None:
        raise ControlSchemaError("the control database has no viewer role; run: tenancy init")
    return str(found)


async def grant_viewer(connection: AsyncConnection, viewer: str, role: str) -> None:
    """Let ``role`` SET ROLE to ``viewer``; from PostgreSQL 16 on, without inheriting its rights.

    Raises:
        AdministratorNeededError: the current role may not grant it; the error has the SQL to run.
    """
    row = (await connection.execute(_GRANTED, {"viewer": viewer, "role": role})).one()
    if row.granted:
        return
    options = " WITH INHERIT FALSE, SET TRUE" if row.modern else ""
    await _execute_privileged(connection, f"GRANT {quote_identifier(viewer)} TO {quote_identifier(role)}{options}")


async def _ensure_role(connection: AsyncConnection, viewer: str, owner: str) -> None:
    quoted = quote_identifier(viewer)
    row = (await connection.execute(_ROLE, {"role": viewer})).one_or_none()
    if row is None:
        grant = f"GRANT {quoted} TO {quote_identifier(owner)} WITH ADMIN OPTION"
        await _execute_privileged(connection, f"CREATE ROLE {quoted} NOLOGIN", grant)
    elif row.rolcanlogin or row.rolsuper or row.rolbypassrls:
        raise ConfigurationError(
            f"role {viewer!r} can log in, or bypasses row-level security; "
            f"run as an administrator: ALTER ROLE {quoted} NOLOGIN NOSUPERUSER NOBYPASSRLS"
        )


async def _execute_privileged(connection: AsyncConnection, statement: str, *more: str) -> None:
    """Run ``statement``; where the role may not, an administrator has to run it, and ``more`` after it."""
    try:
        await connection.exec_driver_sql(statement)
    except DBAPIError as exc:
        if sqlstate_of(exc) != INSUFFICIENT_PRIVILEGE:
            raise
        raise AdministratorNeededError((statement, *more)) from exc


def _expected(views: list[str]) -> set[str]:
    """What ``_HELD`` returns once the statements of ``_rights`` have run."""
    columns = {f"SELECT {table} {column}" for table, names in VIEWER_COLUMNS.items() for column in names}
    return {"USAGE  ", "EXECUTE viewing_tenant() "} | columns | {f"SELECT {view} " for view in views}


def _rights(viewer: str, views: list[str]) -> list[str]:
    grantee = quote_identifier(viewer)
    statements = [
        f"REVOKE ALL ON ALL {kind} IN SCHEMA {SCHEMA} FROM {grantee}" for kind in ("TABLES", "SEQUENCES", "FUNCTIONS")
    ]
    statements += [
        f"REVOKE ALL ON SCHEMA {SCHEMA} FROM {grantee}",
        f"GRANT USAGE ON SCHEMA {SCHEMA} TO {grantee}",
        f"GRANT EXECUTE ON FUNCTION {SCHEMA}.viewing_tenant TO {grantee}",
    ]
    for table, columns in VIEWER_COLUMNS.items():
        quoted = ", ".join(map(quote_identifier, columns))
        statements.append(f"GRANT SELECT ({quoted}) ON {SCHEMA}.{quote_identifier(table)} TO {grantee}")
    return statements + [f"GRANT SELECT ON {SCHEMA}.{quote_identifier(view)} TO {grantee}" for view in views]
