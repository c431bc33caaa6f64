"""The control database shows a tenant its own rows alone, whatever the query forgets to ask."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import asyncpg
import pytest
from alembic import command
from sqlalchemy import event, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from tenancy_orm.audit.actor import Actor
from tenancy_orm.control import database
from tenancy_orm.control.database import ControlDatabase
from tenancy_orm.control.grants import application_policy, grant_application
from tenancy_orm.control.models import metadata
from tenancy_orm.control.viewer import VIEWER_COLUMNS
from tenancy_orm.errors import ConfigurationError, ControlSchemaError, TenantNotFoundError
from tenancy_orm.metering.metrics import TenantMetrics
from tenancy_orm.postgres.errors import sqlstate_of
from tenancy_orm.postgres.quoting import quote_identifier, quote_literal
from tenancy_orm.quotas.manager import QuotaManager
from tenancy_orm.tenant import Tenant
from tenancy_orm.tenants.domains import DomainManager
from tests.support.control import ControlPlane, control_plane, revoke_application
from tests.support.postgres import Postgres

DENIED = "42501"
READ_ONLY = "25006"
PASSWORD = "of this role alone"

# every table with tenants' rows, with its tenant column; nobody names partitions
TENANT_TABLES = text(
    "SELECT c.relname, a.attname FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid "
    "WHERE c.relnamespace = 'tenancy'::regnamespace AND c.relkind IN ('r', 'p') AND NOT c.relispartition "
    "AND (a.attname = 'tenant_id' OR (c.relname = 'tenants' AND a.attname = 'id')) AND NOT a.attisdropped ORDER BY 1"
)

# what the plane's own methods do not write for both tenants
ROWS = """
INSERT INTO tenancy.former_slugs VALUES ('was-' || {id}, {id}, now() + interval '1 day');
INSERT INTO tenancy.domains (domain, tenant_id, token) VALUES ({id} || '.example.com', {id}, 'token');
INSERT INTO tenancy.members (tenant_id, subject, roles) VALUES ({id}, 'alice', '{{owner}}');
INSERT INTO tenancy.invitations (id, tenant_id, roles, digest, expires_at)
    VALUES (gen_random_uuid(), {id}, '{{member}}', sha256('secret'), now() + interval '1 day');
INSERT INTO tenancy.usage (tenant_id, resource, period, period_start, period_end, used)
    VALUES ({id}, 'users', 'lifetime', 'epoch', 'infinity', 3);
INSERT INTO tenancy.usage_keys (tenant_id, key, resource, amount) VALUES ({id}, 'once', 'users', 1);
INSERT INTO tenancy.quota_holds VALUES (gen_random_uuid(), {id}, 'jobs', 1, 'infinity');
INSERT INTO tenancy.quota_blocks VALUES (gen_random_uuid(), {id}, 'users', 'lifetime', 'epoch', 1, 'infinity');
INSERT INTO tenancy.quota_pressure VALUES ({id}, 'users:0.8', 'users', 'free', now());
INSERT INTO tenancy.usage_records (tenant_id, resource, period, period_start, period_end, quantity, idempotency_key)
    VALUES ({id}, 'users', 'month', 'epoch', now(), 3, {id});
INSERT INTO tenancy.tenant_metrics VALUES ({id}, now(), 1, 1, 1, 1);
INSERT INTO tenancy.schedules (name) VALUES ('daily') ON CONFLICT DO NOTHING;
INSERT INTO tenancy.schedule_runs (schedule, tenant_id) VALUES ('daily', {id});
WITH run AS (
    INSERT INTO tenancy.migration_runs (command, target, actor_kind, host, package_version, fingerprint, plan)
    VALUES ('upgrade', 'head', 'operator', 'here', '0', '', '{{}}') RETURNING id
) INSERT INTO tenancy.migration_run_tenants (run, tenant_id, server, position) SELECT id, {id}, 'default', 0 FROM run;
INSERT INTO tenancy.tenant_upgrades (tenant_id, target) VALUES ({id}, '0002');
INSERT INTO tenancy.operations (kind, tenant_id, step, actor_kind) VALUES ('move', {id}, 'begun', 'system');
INSERT INTO tenancy.tenant_databases (server, name, tenant_id, role_name, state)
    VALUES ('default', {id}, {id}, {id}, 'kept');
INSERT INTO tenancy.backup_keys (id, tenant_id, recipient, sealed_identity) VALUES ({id}, {id}, 'age1', 'x');
INSERT INTO tenancy.backups (id, tenant_id, store, path, key_id) VALUES (gen_random_uuid(), {id}, 's', 'p', {id});
"""


@dataclass
class Two:
    """A control plane with rows of two tenants in every table that can have some."""

    plane: ControlPlane
    acme: Tenant
    globex: Tenant

    @property
    def control(self) -> ControlDatabase:
        return self.plane.control

    async def sql(self, statement: str, **parameters: Any) -> list[Any]:
        async with self.control.transaction() as connection:
            result = await connection.execute(text(statement), parameters)
            return list(result.all()) if result.returns_rows else []

    async def viewer(self) -> str:
        return str((await self.sql("SELECT viewer FROM tenancy.installation"))[0][0])


@pytest.fixture
async def two(control_url: str) -> AsyncIterator[Two]:
    async with control_plane(control_url, opened=False) as plane:
        acme, _ = await plane.tenant("acme")
        globex, _ = await plane.tenant("globex")
        made = Two(plane, acme, globex)
        for tenant in (acme, globex):
            for statement in ROWS.format(id=quote_literal(str(tenant.id))).split(";"):
                await made.sql(statement.replace(":", r"\:"))
        yield made


@pytest.fixture
async def application(postgres: Postgres, two: Two) -> AsyncIterator[ControlPlane]:
    """The same control database as the application's own role, which row-level security holds."""
    role = postgres.new_name("app")
    async with postgres.connect() as admin:
        await admin.execute(f"CREATE ROLE \"{role}\" LOGIN PASSWORD '{PASSWORD}'")
    await two.control.grant_application(role)
    try:
        url = postgres.url(two.control.database, user=role, password=PASSWORD)
        async with control_plane(url, initialise=False, opened=False) as plane:
            yield plane
    finally:
        async with postgres.connect(two.control.database) as admin:
            await admin.execute(f'DROP OWNED BY "{role}"; DROP ROLE "{role}"')


async def months_of(two: Two) -> set[str]:
    """The partitions of the audit log."""
    found = await two.sql("SELECT relname FROM pg_class WHERE relispartition AND relkind = 'r'")
    return {row[0] for row in found}


async def seen(connection: AsyncConnection, table: str, column: str) -> set[UUID]:
    """The tenants with rows in the result of a query without WHERE."""
    rows = await connection.execute(text(f"SELECT DISTINCT {column} FROM tenancy.{quote_identifier(table)}"))
    return {row[0] for row in rows}


async def state_in_viewing(two: Two, statement: str) -> str | None:
    """The SQLSTATE that a statement fails with as acme's viewer, or None."""
    try:
        async with two.control.viewing(two.acme.id) as connection:
            await connection.execute(text(statement))
    except DBAPIError as error:
        return sqlstate_of(error)
    return None


# --- rows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("restricted", [False, True], ids=["owner", "application"])
async def test_a_query_that_forgets_its_tenant_sees_one_tenant_in_every_table(
    two: Two, application: ControlPlane, restricted: bool
) -> None:
    """The tables are those of the catalogue: one that is added without a policy fails here."""
    control = application.control if restricted else two.control
    both = {two.acme.id, two.globex.id}
    async with control.connect() as connection:
        tables = [(row[0], row[1]) for row in await connection.execute(TENANT_TABLES)]
        # the attack: without the layer it works
        for table, column in tables:
            assert await seen(connection, table, column) == both, table
    assert {table for table, _ in tables} == set(VIEWER_COLUMNS) - {"tiers"}
    for tenant in (two.acme, two.globex):
        async with control.viewing(tenant.id) as connection:
            for table, column in tables:
                assert await seen(connection, table, column) == {tenant.id}, table


async def test_every_tenants_table_and_partition_has_its_policy(two: Two) -> None:
    """Also those partitions that are made later."""
    await two.sql("SELECT tenancy.audit_ensure_partitions(9)")
    unprotected = await two.sql(
        "SELECT c.relname FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid "
        "WHERE c.relnamespace = 'tenancy'::regnamespace AND c.relkind IN ('r', 'p') "
        "AND (a.attname = 'tenant_id' OR (c.relname = 'tenants' AND a.attname = 'id')) AND NOT (c.relrowsecurity "
        "AND EXISTS (SELECT 1 FROM pg_policy p WHERE p.polrelid = c.oid AND p.polname = 'tenant_rows'))"
    )
    partitions = await two.sql("SELECT 1 FROM pg_inherits WHERE inhparent = 'tenancy.audit_log'::regclass")
    assert unprotected == []
    assert len(partitions) == 10


async def test_without_its_policy_a_table_shows_the_viewer_everything(two: Two) -> None:
    """So it is the policy that holds, and not the column grants."""
    await two.sql("ALTER TABLE tenancy.domains DISABLE ROW LEVEL SECURITY")
    async with two.control.viewing(two.acme.id) as connection:
        assert await seen(connection, "domains", "tenant_id") == {two.acme.id, two.globex.id}


async def test_a_viewer_of_nobody_sees_nothing(two: Two) -> None:
    """The role without the setting, as after a mistake in the code that sets it, has no rows."""
    viewer = await two.viewer()
    async with two.control.transaction() as connection:
        await connection.exec_driver_sql(f"SET LOCAL ROLE {quote_identifier(viewer)}")
        for value in (None, ""):
            if value is not None:
                await connection.execute(text("SELECT set_config('tenancy.viewer', :value, true)"), {"value": value})
            for table, columns in VIEWER_COLUMNS.items():
                if table != "tiers":
                    assert await seen(connection, table, quote_identifier(columns[0])) == set(), table


async def test_views_show_the_viewer_its_own_rows_or_are_refused(two: Two) -> None:
    """A view that reads with its owner's rights would show everything: it is granted from PostgreSQL 15 on only."""
    modern = (await two.sql("SELECT current_setting('server_version_num')::integer >= 150000"))[0][0]
    total = "SELECT sum(entries) FROM tenancy.audit_summary"
    everything = (await two.sql(total))[0][0]
    if modern:
        own = (await two.sql("SELECT count(*) FROM tenancy.audit_log WHERE tenant_id = :id", id=two.acme.id))[0][0]
        async with two.control.viewing(two.acme.id) as connection:
            assert await connection.scalar(text(total)) == own < everything
    else:
        assert await state_in_viewing(two, total) == DENIED
    for view in ("active_tenants", "tier_distribution"):
        assert await state_in_viewing(two, f"SELECT * FROM tenancy.{view}") == DENIED


# --- columns and writes ---------------------------------------------------------------------------------------------

REFUSED = {
    "digest": "SELECT digest FROM tenancy.api_keys",
    "digest version": "SELECT digest_version FROM tenancy.api_keys",
    "digest as a condition": "SELECT id FROM tenancy.api_keys WHERE digest IS NOT NULL",
    "whole row": "SELECT k FROM tenancy.api_keys k",
    "sealed password": "SELECT sealed_password FROM tenancy.tenants",
    "next sealed password": "SELECT next_sealed_password FROM tenancy.tenants",
    "server": "SELECT server FROM tenancy.tenants",
    "database": "SELECT database_name FROM tenancy.tenants",
    "role": "SELECT role_name FROM tenancy.tenants",
    "every column": "SELECT * FROM tenancy.tenants",
    "servers": "SELECT * FROM tenancy.servers",
    "data keys": "SELECT * FROM tenancy.data_keys",
    "installation": "SELECT * FROM tenancy.installation",
    "partition": "SELECT count(sequence) FROM tenancy.audit_log_{month}",
    "update": "UPDATE tenancy.tenants SET tier = 'enterprise'",
    "delete": "DELETE FROM tenancy.api_keys",
    "insert": (
        "INSERT INTO tenancy.domains (domain, tenant_id, token) SELECT slug || '.net', id, '' FROM tenancy.tenants"
    ),
    "truncate": "TRUNCATE tenancy.usage",
    "lock": "LOCK TABLE tenancy.usage IN EXCLUSIVE MODE",
    "row lock": "SELECT id FROM tenancy.tenants FOR UPDATE",
    "append": "SELECT tenancy.audit_append('a.b', NULL, NULL, 'system', NULL, NULL, NULL, NULL, NULL, NULL)",
    "partitions": "SELECT tenancy.audit_ensure_partitions(20)",
    "protect": "SELECT tenancy.protect_rows('tenancy.usage', 'tenant_id')",
    "policy": "DROP POLICY tenant_rows ON tenancy.usage",
    "disable": "ALTER TABLE tenancy.usage DISABLE ROW LEVEL SECURITY",
}


@pytest.mark.parametrize("statement", REFUSED.values(), ids=REFUSED)
async def test_secrets_placement_and_writes_are_refused(two: Two, statement: str) -> None:
    """By privileges, whatever the policies say; the ordinary connection may do each."""
    month = (await two.sql("SELECT to_char(now() AT TIME ZONE 'UTC', '\"y\"YYYY\"m\"MM')"))[0][0]
    statement = statement.replace("{month}", month)
    state = None
    async with two.control.engine.connect() as connection:  # rolled back
        try:
            await connection.execute(text(statement))
        except DBAPIError as error:
            state = sqlstate_of(error)
    # the log's partitions have one policy already
    assert state in ({None, "42710"} if "protect" in statement else {None})
    async with two.control.engine.connect() as connection:
        await connection.exec_driver_sql(f"SET LOCAL ROLE {quote_identifier(await two.viewer())}")
        with pytest.raises(DBAPIError) as caught:
            await connection.execute(text(statement))
    assert sqlstate_of(caught.value) == DENIED
    assert await state_in_viewing(two, statement) in (DENIED, READ_ONLY)


async def test_the_transaction_reads_only(two: Two) -> None:
    """Also what privileges allow: the grants of a table could be too wide one day."""
    viewer = await two.viewer()
    await two.sql(f"GRANT ALL ON tenancy.usage TO {quote_identifier(viewer)}")
    assert await state_in_viewing(two, "DELETE FROM tenancy.usage") == READ_ONLY


async def test_row_security_cannot_be_switched_off(two: Two) -> None:
    """With the setting off PostgreSQL refuses the query instead of answering without the policies."""
    async with two.control.viewing(two.acme.id) as connection:
        await connection.exec_driver_sql("SET LOCAL row_security = off")
        with pytest.raises(DBAPIError) as caught:
            await connection.execute(text("SELECT id FROM tenancy.tenants"))
        await connection.rollback()
    assert sqlstate_of(caught.value) == DENIED


async def test_the_viewer_has_no_more_columns_than_are_listed(two: Two) -> None:
    """By the catalogue; every other privilege, on anything in the schema, is absent; it cannot log in."""
    viewer = await two.viewer()
    rows = await two.sql(
        "SELECT c.relname, a.attname FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid "
        "WHERE c.relnamespace = 'tenancy'::regnamespace AND c.relkind IN ('r', 'p') AND a.attnum > 0 "
        "AND NOT a.attisdropped AND has_column_privilege(:viewer, c.oid, a.attnum, 'SELECT')",
        viewer=viewer,
    )
    assert {(row[0], row[1]) for row in rows} == {(t, c) for t, columns in VIEWER_COLUMNS.items() for c in columns}
    writes = await two.sql(
        "SELECT c.relname FROM pg_class c WHERE c.relnamespace = 'tenancy'::regnamespace "
        "AND c.relkind IN ('r', 'p', 'v') AND (has_any_column_privilege(:viewer, c.oid, 'INSERT, UPDATE, REFERENCES') "
        "OR has_table_privilege(:viewer, c.oid, 'DELETE, TRUNCATE, TRIGGER'))",
        viewer=viewer,
    )
    assert writes == []
    role = (await two.sql("SELECT * FROM pg_roles WHERE rolname = :viewer", viewer=viewer))[0]
    flags = (role.rolcanlogin, role.rolsuper, role.rolbypassrls, role.rolcreaterole, role.rolcreatedb)
    assert flags == (False,) * 5
    assert {"digest", "sealed_password"} <= {column.name for table in metadata.tables.values() for column in table.c}


# --- the connection afterwards --------------------------------------------------------------------------------------

WHO = text(
    "SELECT pg_backend_pid() AS pid, current_user::text AS role, coalesce(current_setting('tenancy.viewer', true), '') "
    "AS viewer, current_setting('transaction_read_only') AS read_only"
)


async def _succeed(connection: AsyncConnection) -> None:
    await connection.execute(text("SELECT 1"))


async def _fail(connection: AsyncConnection) -> None:
    await connection.execute(text("SELECT 1 / 0"))


async def _raise(connection: AsyncConnection) -> None:
    raise LookupError


@pytest.mark.parametrize("body", [_succeed, _fail, _raise])
async def test_a_connection_is_clean_afterwards(two: Two, body: Callable[[AsyncConnection], Any]) -> None:
    """The same backend serves the next caller as its own role, without the setting, and may write."""
    async with two.control.connect() as connection:
        before = (await connection.execute(WHO)).one()
    inside = None
    try:
        async with two.control.viewing(two.acme.id) as connection:
            inside = (await connection.execute(WHO)).one()
            await body(connection)
    except (DBAPIError, LookupError):
        assert body is not _succeed
    async with two.control.transaction() as connection:
        after = (await connection.execute(WHO)).one()
        assert await seen(connection, "tenants", "id") == {two.acme.id, two.globex.id}
    assert inside is not None
    assert tuple(inside) == (before.pid, await two.viewer(), str(two.acme.id), "on")
    assert after == before
    assert after.viewer == ""


async def test_a_cancelled_viewer_leaves_nothing_behind(two: Two) -> None:
    """Whichever connection comes next, it is nobody's viewer."""
    entered = asyncio.Event()

    async def look() -> None:
        async with two.control.viewing(two.acme.id) as connection:
            entered.set()
            await connection.execute(text("SELECT pg_sleep(60)"))

    task = asyncio.create_task(look())
    await entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    for _ in range(3):
        async with two.control.transaction() as connection:
            assert (await connection.execute(WHO)).one().viewer == ""
            assert await seen(connection, "tenants", "id") == {two.acme.id, two.globex.id}


async def test_viewers_of_two_tenants_at_once_do_not_mix(two: Two) -> None:
    """Each sees its own on whatever pooled connection it gets, prepared statements and all."""

    async def look(tenant: Tenant) -> None:
        for _ in range(10):
            async with two.control.viewing(tenant.id) as connection:
                assert await seen(connection, "api_keys", "tenant_id") == {tenant.id}
            async with two.control.connect() as connection:
                assert await seen(connection, "api_keys", "tenant_id") == {two.acme.id, two.globex.id}

    async with asyncio.timeout(60):
        await asyncio.gather(*(look(tenant) for tenant in (two.acme, two.globex) * 3))


# --- who uses it ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("restricted", [False, True], ids=["owner", "application"])
async def test_what_tenants_read_is_read_as_them(two: Two, application: ControlPlane, restricted: bool) -> None:
    """Keys, members, domains, usage and one tenant's audit log come through the viewer, in one more statement each."""
    plane = application if restricted else two.plane
    viewer = await two.viewer()
    quotas = QuotaManager(plane.control, plane.config, plane.events, plane.audit)
    domains = DomainManager(plane.control, plane.audit)
    async with two.plane.control.transaction() as connection:
        for tenant in (two.acme, two.globex):
            sample = "INSERT INTO tenancy.tenant_metrics VALUES (:id, now(), 1, 0, 0, 0) ON CONFLICT DO NOTHING"
            await connection.execute(text(sample), {"id": tenant.id})
    statements: list[tuple[str, Any]] = []
    engine = plane.control.engine.sync_engine
    event.listen(engine, "before_cursor_execute", lambda *args: statements.append((args[2], args[3])))
    reads: dict[str, Callable[[], Any]] = {
        "keys": lambda: plane.keys.list(two.acme),
        "members": lambda: plane.members.list(two.acme),
        "invitations": lambda: plane.members.invitations(two.acme),
        "domains": lambda: domains.list(two.acme),
        "usage": lambda: quotas.usage(two.acme),
        "usage by id": lambda: quotas.usage(two.acme.id),
        "metrics": lambda: TenantMetrics(plane.control).history(two.acme),
        "audit": lambda: plane.audit.events(tenant=two.acme),
        "audit by id": lambda: plane.audit.events(tenant=two.acme.id),
    }
    for name, read in reads.items():
        statements.clear()
        assert len(await read()) > 0, name
        assert len(statements) == 2, name
        assert "set_config" in statements[0][0] and viewer in statements[0][1], name
    statements.clear()
    assert {entry.tenant_id for entry in await plane.audit.events()} >= {two.acme.id, two.globex.id}
    assert len(statements) == 1
    assert {entry.tenant_id for entry in await plane.audit.events(tenant="acme")} == {two.acme.id}
    with pytest.raises(TenantNotFoundError):
        await quotas.usage(UUID(int=0))


async def test_the_application_still_reads_and_writes_every_tenants_rows(two: Two, application: ControlPlane) -> None:
    """Row-level security does not stand in the way of the control plane itself."""
    issued = await application.keys.issue(two.globex, name="more")
    await application.keys.revoke(issued.key_id, actor=Actor("operator", "ada"))
    initech, _ = await application.tenant("initech")
    assert {key.tenant_id for key in await application.keys.list(initech)} == {initech.id}
    assert [entry.action for entry in await application.audit.events(tenant=two.globex, limit=1)] == ["key.revoke"]


# --- roles ----------------------------------------------------------------------------------------------------------


async def test_the_applications_policies_come_and_go_with_its_grants(two: Two, postgres: Postgres) -> None:
    """A role with nothing but the table privileges sees no rows; granting twice is granting once."""
    role = postgres.new_name("app")
    quoted = quote_identifier(role)
    policies = "SELECT count(*) FROM pg_policies WHERE schemaname = 'tenancy' AND policyname = :policy"
    kinds = "SELECT tablename FROM pg_policies WHERE policyname = :policy AND cmd = 'SELECT'"
    member = "SELECT pg_has_role(:role, viewer, 'MEMBER') FROM tenancy.installation"
    visible = f"SET LOCAL ROLE {quoted}"
    months = await months_of(two)
    tables = len(VIEWER_COLUMNS) - 1 + len(months)
    await two.sql(f"CREATE ROLE {quoted}")
    try:
        await two.sql(f"GRANT USAGE ON SCHEMA tenancy TO {quoted}")
        await two.sql(f"GRANT SELECT ON tenancy.tenants TO {quoted}")
        async with two.control.transaction() as connection:
            await connection.exec_driver_sql(visible)
            assert await seen(connection, "tenants", "id") == set()
        for action, count in ((grant_application, tables), (grant_application, tables), (revoke_application, 0)):
            async with two.control.transaction() as connection:
                await action(connection, role)
            assert (await two.sql(policies, policy=application_policy(role)))[0][0] == count
            if count:
                # it writes no entries of its own, on whatever privilege
                reads = await two.sql(kinds, policy=application_policy(role))
                assert {row[0] for row in reads} == {"audit_log", *months}
            assert (await two.sql(member, role=role))[0][0] is (count > 0)
    finally:
        await two.sql(f"DROP OWNED BY {quoted}")
        await two.sql(f"DROP ROLE {quoted}")


# what the viewer may do in the schema, by the catalogue alone
RIGHTS = """
    SELECT c.relname, a.attname, has_column_privilege(:viewer, c.oid, a.attnum, p.name)
    FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND NOT a.attisdropped,
        unnest('{SELECT,INSERT,UPDATE,REFERENCES,SELECT WITH GRANT OPTION}'::text[]) AS p (name)
    WHERE c.relnamespace = 'tenancy'::regnamespace AND c.relkind IN ('r', 'p', 'v')
    UNION ALL SELECT c.relname, '', has_sequence_privilege(:viewer, c.oid, 'USAGE, SELECT, UPDATE')
    FROM pg_class c WHERE c.relnamespace = 'tenancy'::regnamespace AND c.relkind = 'S'
    UNION ALL SELECT p.oid::regprocedure::text, '', EXISTS (
        SELECT FROM aclexplode(p.proacl) a WHERE a.grantee = (SELECT oid FROM pg_roles WHERE rolname = :viewer))
    FROM pg_proc p WHERE p.pronamespace = 'tenancy'::regnamespace
    UNION ALL SELECT '', p.name, has_schema_privilege(:viewer, 'tenancy', p.name)
    FROM unnest('{USAGE,CREATE,USAGE WITH GRANT OPTION}'::text[]) AS p (name)
    ORDER BY 1, 2, 3
"""


@pytest.mark.parametrize(
    "change",
    [
        "GRANT SELECT ON tenancy.api_keys TO {viewer}",
        "GRANT UPDATE (digest) ON tenancy.api_keys TO {viewer}",
        "GRANT SELECT (id) ON tenancy.tenants TO {viewer} WITH GRANT OPTION",
        "GRANT USAGE ON ALL SEQUENCES IN SCHEMA tenancy TO {viewer}",
        "GRANT EXECUTE ON FUNCTION tenancy.audit_ensure_partitions TO {viewer}",
        "GRANT CREATE ON SCHEMA tenancy TO {viewer}",
        "REVOKE SELECT (id) ON tenancy.tenants FROM {viewer}",
        "REVOKE SELECT ON tenancy.audit_summary FROM {viewer}",
        "REVOKE EXECUTE ON FUNCTION tenancy.viewing_tenant FROM {viewer}",
        "REVOKE USAGE ON SCHEMA tenancy FROM {viewer}",
    ],
)
async def test_an_upgrade_gives_the_viewer_exactly_its_rights_again(two: Two, change: str) -> None:
    """What it has too much, and what it lacks."""
    viewer = await two.viewer()
    before = await two.sql(RIGHTS, viewer=viewer)
    await two.sql(change.format(viewer=quote_identifier(viewer)))
    assert await two.sql(RIGHTS, viewer=viewer) != before
    await two.control.upgrade()
    assert await two.sql(RIGHTS, viewer=viewer) == before


async def test_an_upgrade_that_changes_nothing_writes_nothing(two: Two) -> None:
    """Each start of a process that initialises would leave dead rows in the catalogue."""
    rows = "SELECT oid, xmin::text FROM pg_class UNION ALL SELECT oid, xmin::text FROM pg_namespace"
    columns = "SELECT attrelid, attnum, xmin::text FROM pg_attribute"
    before = await two.sql(rows), await two.sql(columns)
    await two.control.upgrade()
    assert (await two.sql(rows), await two.sql(columns)) == before


async def test_an_upgrade_keeps_an_application_that_was_granted_before(two: Two, application: ControlPlane) -> None:
    """Without another grant it sees every row as before, and one tenant's as that tenant."""
    role = make_url(application.config.control_url).username or ""
    await two.sql(f"REVOKE {quote_identifier(await two.viewer())} FROM {quote_identifier(role)}")
    async with two.control.engine.connect() as connection:
        await connection.run_sync(lambda sync: command.downgrade(database._alembic_config(sync), "0005_lifecycle"))
        await connection.commit()
    await application.control.engine.dispose()
    left = await two.sql("SELECT 1 FROM pg_policies WHERE schemaname = 'tenancy'")
    assert left == []
    await two.control.upgrade()
    await application.control.open()
    kinds = "SELECT tablename FROM pg_policies WHERE policyname = :policy AND cmd = 'SELECT'"
    months = await months_of(two)
    read = {row[0] for row in await two.sql(kinds, policy=application_policy(role))}
    assert read == {"audit_log", *months}
    covered = await two.sql("SELECT tablename FROM pg_policies WHERE policyname = :p", p=application_policy(role))
    assert {row[0] for row in covered} == (set(VIEWER_COLUMNS) - {"tiers"}) | months
    async with application.control.connect() as connection:
        assert await seen(connection, "api_keys", "tenant_id") == {two.acme.id, two.globex.id}
    async with application.control.viewing(two.acme.id) as connection:
        assert await seen(connection, "api_keys", "tenant_id") == {two.acme.id}
    # what later revisions added is granted as well, and a partition of next year takes the check of the former ones
    await application.members.add("acme", "carol", actor=Actor("session", "carol"))
    await application.revocations.add(subject="carol", actor=Actor("token", "carol"))
    assert [member.subject for member in await application.members.list("acme")] == ["carol"]
    assert await application.audit.ensure_partitions(12) > 0
    assert (await two.plane.audit.verify()).ok
    # all of the log by the names of its months, of which some were made before the role was granted anything
    async with application.control.connect() as connection:
        entries = [
            await connection.scalar(text(f"SELECT count(*) FROM tenancy.{month}")) for month in await months_of(two)
        ]
    assert [(sum(entries),)] == await two.sql("SELECT count(*) FROM tenancy.audit_log")


@pytest.fixture
async def owner_url(postgres: Postgres, empty_url: str) -> AsyncIterator[str]:
    """The URL of a control database with an owner that may not create roles."""
    role = postgres.new_name("owner")
    name = make_url(empty_url).database or ""
    async with postgres.connect() as admin:
        await admin.execute(f"CREATE ROLE \"{role}\" LOGIN PASSWORD '{PASSWORD}'")
        await admin.execute(f'ALTER DATABASE "{name}" OWNER TO "{role}"')
    yield postgres.url(name, user=role, password=PASSWORD)
    async with postgres.connect(name) as admin:
        await admin.execute(f'REASSIGN OWNED BY "{role}" TO CURRENT_USER')
        await admin.execute(f'DROP OWNED BY "{role}" CASCADE; DROP ROLE "{role}"')


async def test_an_owner_that_may_not_create_roles_is_told_what_to_run(postgres: Postgres, owner_url: str) -> None:
    """The message is SQL for an administrator; after it the same call succeeds, and grants the application's role."""
    control = ControlDatabase(owner_url)
    app = postgres.new_name("app")
    try:
        with pytest.raises(ConfigurationError, match="CREATE ROLE") as caught:
            await control.upgrade()
        with pytest.raises(ControlSchemaError, match="tenancy init"):
            async with control.viewing(UUID(int=1)):
                raise AssertionError("nobody can look")
        async with postgres.connect() as admin:
            await admin.execute(str(caught.value).split(": ", 1)[1])
            await admin.execute(f'CREATE ROLE "{app}"')
        await control.upgrade()
        await control.open()
        await control.grant_application(app)
        async with control.viewing(UUID(int=1)) as connection:
            assert await seen(connection, "tenants", "id") == set()
    finally:
        await control.close()
        async with postgres.connect(make_url(owner_url).database or "") as admin:
            await admin.execute(f'DROP OWNED BY "{app}"; DROP ROLE "{app}"')


async def test_an_owner_that_may_create_roles_needs_no_administrator(postgres: Postgres, owner_url: str) -> None:
    """CREATEROLE is enough, on every version of PostgreSQL."""
    async with postgres.connect() as admin:
        await admin.execute(f'ALTER ROLE "{make_url(owner_url).username}" CREATEROLE')
    control = ControlDatabase(owner_url)
    try:
        for _ in range(2):
            await control.upgrade()
        await control.open()
        async with control.viewing(UUID(int=1)) as connection:
            assert await seen(connection, "tenants", "id") == set()
    finally:
        await control.close()


async def test_a_viewer_that_nothing_would_hold_back_is_refused(two: Two) -> None:
    """Row-level security does not hold a superuser, or a role with BYPASSRLS."""
    viewer = quote_identifier(await two.viewer())
    for right in ("BYPASSRLS", "SUPERUSER", "LOGIN"):
        await two.sql(f"ALTER ROLE {viewer} {right}")
        with pytest.raises(ConfigurationError, match="ALTER ROLE"):
            await two.control.upgrade()
        await two.sql(f"ALTER ROLE {viewer} NO{right}")
    await two.control.upgrade()


async def test_an_upgrade_takes_from_the_viewer_what_it_should_not_have(two: Two) -> None:
    """Rights of an earlier version, or that somebody added: tables, columns, functions, the schema."""
    viewer = quote_identifier(await two.viewer())
    for right in (
        "SELECT ON tenancy.data_keys",
        "SELECT (digest) ON tenancy.api_keys",
        "EXECUTE ON FUNCTION tenancy.audit_ensure_partitions",
        "CREATE ON SCHEMA tenancy",
    ):
        await two.sql(f"GRANT {right} TO {viewer}")
    assert await state_in_viewing(two, "SELECT digest FROM tenancy.api_keys") is None
    await two.control.upgrade()
    for statement in ("SELECT digest FROM tenancy.api_keys", "SELECT wrapped FROM tenancy.data_keys"):
        assert await state_in_viewing(two, statement) == DENIED
    left = await two.sql(
        "SELECT has_function_privilege(:viewer, 'tenancy.audit_ensure_partitions(integer)', 'EXECUTE') "
        "OR has_schema_privilege(:viewer, 'tenancy', 'CREATE')",
        viewer=await two.viewer(),
    )
    assert left == [(False,)]


async def test_a_role_that_was_not_granted_the_viewer_is_told_so(two: Two, application: ControlPlane) -> None:
    """The remedy is in the message; nothing is read with more rights instead."""
    role = make_url(application.config.control_url).username or ""
    await two.sql(f"REVOKE {quote_identifier(await two.viewer())} FROM {quote_identifier(role)}")
    with pytest.raises(ConfigurationError, match="grant_application") as caught:
        await application.keys.list(two.acme)
    assert isinstance(caught.value.__cause__, DBAPIError)
    assert isinstance(caught.value.__cause__.orig.__cause__, asyncpg.PostgresError)  # type: ignore[union-attr]
