"""What a tenant's role may do in its database: the table in docs/provisioning.md, row by row, and the settings."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import pytest_asyncio

from tenancy_orm.config import ProvisioningConfig
from tenancy_orm.errors import ConfigurationError, ProvisioningError, SettingError
from tenancy_orm.postgres import connections
from tenancy_orm.protocols import GrantTarget
from tenancy_orm.provisioning import ReconcileReport
from tenancy_orm.tenant import Tenant
from tests.support.postgres import Postgres
from tests.support.provisioning import (
    TABLES,
    ScriptSchema,
    Workshop,
    Workshops,
    mended,
    open_workshops,
    placement,
    superuser_workshop,
)
from tests.support.waiting import until

NOTHING = ReconcileReport()

pytestmark = pytest.mark.asyncio(loop_scope="module")
PAGE = Path(__file__).parents[3] / "docs" / "provisioning.md"

# the refreshing function is the one of the page, for servers that have no MAINTAIN
REFRESH = re.search(r"```sql\n(CREATE FUNCTION refresh_totals.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
SCHEMA = f"""
{TABLES}
CREATE MATERIALIZED VIEW totals AS SELECT count(*) AS notes FROM notes;
CREATE SEQUENCE numbers;
CREATE TYPE mood AS ENUM ('glad');
CREATE FUNCTION one() RETURNS int LANGUAGE sql AS 'SELECT 1';
{REFRESH[1] if REFRESH else ""}
"""

# each statement of the page's table, with what it stands for
ROWS = re.findall(r"^\| `([^|]+)` \| (yes|no|by [^|]+?) *\|$", PAGE.read_text("utf-8"), re.MULTILINE)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def workshops(versioned: Postgres) -> AsyncIterator[Workshops]:
    """The workshops of that server."""
    async with open_workshops(versioned, registry=True, schema=ScriptSchema(SCHEMA)) as opened:
        yield opened


@pytest_asyncio.fixture(params=["superuser", "plain"], loop_scope="module")
async def workshop(request: pytest.FixtureRequest, workshops: Workshops) -> AsyncIterator[Workshop]:
    """A provisioner with either kind of administrator, on every version."""
    async with workshops.workshop(request.param) as opened:
        yield opened


async def may(workshop: Workshop, tenant: Tenant, sql: str) -> bool:
    """Whether the tenant's role may run it; nothing of it stays."""
    async with workshop.connect(tenant) as connection:
        transaction = connection.transaction()
        await transaction.start()
        try:
            await connection.execute(sql)
        except asyncpg.InsufficientPrivilegeError:
            return False
        finally:
            await transaction.rollback()
    return True


async def test_the_table_of_the_page_is_true(workshop: Workshop) -> None:
    """Every row, on every version, for either kind of administrator; "by" a setting is refused without it."""
    assert len(ROWS) > 20
    acme, globex = await workshop.create("acme"), await workshop.create("globex")
    names = {"role": placement(acme).role, "other": placement(globex).role, "database": placement(acme).database}
    async with workshop.admin() as connection:
        superuser = await connection.fetchval("SELECT rolsuper FROM pg_roles WHERE rolname = current_user")
        version = connections.version(connection)
    wrong = {}
    for sql, answer in ROWS:
        allowed = await may(workshop, acme, sql.format(**names))
        if "tenant_advisory_locks" in answer and not superuser:
            continue  # the administrator may not take the right from everybody
        if allowed != (answer == "yes"):
            wrong[sql] = allowed
    assert wrong == {}, version


async def test_further_privileges_are_given_by_a_setting(workshop: Workshop) -> None:
    """New tenants have them, old ones get them by a reconcile, later tables too; Alembic's is left out."""
    old = await workshop.create("old")
    async with workshop.admin() as connection:
        version = connections.version(connection)
    granted = ["TEMP", "truncate", *(["MAINTAIN"] if version >= 17 else [])]
    changed = workshop.provisioner_of(provisioning={"tenant_privileges": granted, "tenant_advisory_locks": True})
    new = await changed.create(workshop.draft("new"), key=None)
    statements = ["CREATE TEMPORARY TABLE t (id int)", "TRUNCATE notes", "SELECT pg_advisory_xact_lock(1)"]
    statements += ["REFRESH MATERIALIZED VIEW totals"] if version >= 17 else []
    assert not any([await may(workshop, old, sql) for sql in statements if "advisory" not in sql])
    assert all([await may(workshop, new, sql) for sql in statements])
    found = await changed.reconcile(check=True)
    assert {(one.tenant, one.kind, one.dangerous) for one in found.differences} == {("old", "right.missing", False)}
    assert not await may(workshop, old, "TRUNCATE notes")
    assert mended(await changed.reconcile()) == {"old": {"right.missing"}}
    assert await changed.reconcile() == NOTHING
    for tenant in (old, new):
        async with workshop.admin(placement(tenant).database) as connection:
            await connection.execute(f'SET ROLE "{workshop.names.owner}"; CREATE TABLE later (id int)')
        assert all([await may(workshop, tenant, sql) for sql in (*statements, "TRUNCATE later")])
        assert not await may(workshop, tenant, "TRUNCATE alembic_version")


async def test_a_server_without_a_privilege_is_refused(versioned: Postgres) -> None:
    """Before PostgreSQL 17, MAINTAIN is a mistake of the configuration, at the first creation and in a reconcile."""
    async with superuser_workshop(versioned, schema=ScriptSchema(SCHEMA)) as workshop:
        provisioner = workshop.provisioner_of(provisioning={"tenant_privileges": ["MAINTAIN"]})
        if versioned.version.split(".")[0] >= "17":
            await provisioner.create(workshop.draft("acme"), key=None)
            return
        with pytest.raises(ConfigurationError, match="MAINTAIN needs PostgreSQL 17, and server 'default' runs"):
            await provisioner.create(workshop.draft("acme"), key=None)
        assert await workshop.slugs() == {}
        (error,) = (await provisioner.reconcile()).errors
        assert "MAINTAIN needs PostgreSQL 17" in error


async def test_a_privilege_that_is_none_is_refused() -> None:
    """The setting says which there are, and where others go."""
    with pytest.raises(SettingError, match=r"tenant_privileges: may hold TEMPORARY, TRUNCATE, MAINTAIN alone"):
        ProvisioningConfig(tenant_privileges=("TRIGGER",))
    with pytest.raises(SettingError, match="grants: must be a function"):
        ProvisioningConfig(grants=3)  # type: ignore[arg-type]


# --- the grant hook -------------------------------------------------------------------------------------------------


def hook(target: GrantTarget) -> Iterable[str]:
    """Takes a right away, and gives one."""
    yield f"REVOKE UPDATE, DELETE ON notes FROM {target.role}"
    yield f"GRANT USAGE, CREATE ON SCHEMA public TO {target.role}"
    yield f"GRANT CONNECT ON DATABASE {target.database} TO reporting"
    yield "GRANT SELECT ON notes TO reporting"


async def test_the_hook_has_the_last_word(workshop: Workshop, versioned: Postgres) -> None:
    """What it gives or takes is no difference; old tenants get it by a reconcile, and back if somebody changes it."""
    async with versioned.connect() as connection:
        await connection.execute(
            "DO $$ BEGIN IF to_regrole('reporting') IS NULL THEN CREATE ROLE reporting; END IF; END $$"
        )
    old = await workshop.create("old")
    changed = workshop.provisioner_of(provisioning={"grants": hook})
    new = await changed.create(workshop.draft("new"), key=None)
    update, create = "UPDATE notes SET body = ''", "CREATE TABLE mine (id int)"

    async def rights(tenant: Tenant) -> tuple[bool, bool, bool]:
        async with workshop.admin(placement(tenant).database) as connection:
            seen = await connection.fetchval("SELECT has_table_privilege('reporting', 'notes', 'SELECT')")
        return await may(workshop, tenant, update), await may(workshop, tenant, create), seen

    assert (await rights(old), await rights(new)) == ((True, False, False), (False, True, True))
    for _ in range(2):
        found = await changed.reconcile(check=True)
        assert {(one.tenant, one.kind, one.dangerous) for one in found.differences} == {("old", "grants.hook", False)}
        assert await rights(old) == (True, False, False)
    assert mended(await changed.reconcile()) == {"old": {"grants.hook"}}
    assert await rights(old) == (False, True, True)
    assert await changed.reconcile(check=True) == NOTHING == await changed.reconcile()
    async with workshop.admin(placement(new).database) as connection:
        await connection.execute("REVOKE SELECT ON notes FROM reporting; GRANT SELECT ON bodies TO reporting")
    assert mended(await changed.reconcile()) == {"new": {"grants.hook", "right.other"}}
    assert await rights(new) == (False, True, True)
    assert await changed.reconcile() == NOTHING


@pytest.mark.parametrize(
    ("statements", "message"),
    [
        (["GRANT SELECT ON missing TO {role}"], "'GRANT SELECT ON missing TO .*' failed in database .*does not exist"),
        (["/* a */ -- b\n commit"], "would end the transaction"),
        (["SET ROLE NONE"], "changes the role"),
        (["SELECT set_config('role', 'none', true)"], "changes the role"),
        (["SELECT 1; COMMIT"], "'SELECT 1; COMMIT' failed .*multiple commands"),
        ([1], "must return SQL statements"),
        (["ALTER SYSTEM SET work_mem = '1GB'"], "failed in database"),
        (["CREATE ROLE evil SUPERUSER"], "failed in database .*(permission denied|must be superuser)"),
    ],
)
async def test_a_failing_hook_is_told_and_leaves_nothing(
    versioned: Postgres, statements: list[Any], message: str
) -> None:
    """A creation is undone, a reconcile reports it and changes nothing; it runs as the owner, who is no superuser."""

    def failing(target: GrantTarget) -> Iterable[str]:
        yield f"GRANT TRUNCATE ON notes TO {target.role}"
        for statement in statements:
            yield statement.format(role=target.role) if isinstance(statement, str) else statement

    async with superuser_workshop(versioned, schema=ScriptSchema(SCHEMA)) as workshop:
        old = await workshop.create("old")
        changed = workshop.provisioner_of(provisioning={"grants": failing})
        with pytest.raises(ProvisioningError, match=message):
            await changed.create(workshop.draft("new"), key=None)
        assert await workshop.slugs() == {"old": "active"}
        (error,) = (await changed.reconcile()).errors
        assert error.startswith("old: provisioning.grants") and re.search(message, error)
        with pytest.raises(ProvisioningError, match=message):
            await changed.apply_grants(old)
        assert not await may(workshop, old, "TRUNCATE notes")


async def test_the_rows_that_a_failing_hook_has_met_are_not_in_what_is_reported(
    versioned: Postgres, caplog: pytest.LogCaptureFixture
) -> None:
    """PostgreSQL's own text quotes a row; a creation's error, its record, a reconcile's report and the logs do not."""
    filling = "INSERT INTO notes (id, body) VALUES (4242 + 1, 'a'); INSERT INTO notes (id, body) VALUES (4242 + 1, 'b')"

    def repeating(target: GrantTarget) -> Iterable[str]:
        return filling.split("; ")

    async with superuser_workshop(versioned, schema=ScriptSchema(SCHEMA)) as workshop:
        old = await workshop.create("old")
        async with workshop.connect(old) as connection:
            with pytest.raises(asyncpg.UniqueViolationError, match=r"DETAIL: .*4243"):
                await connection.execute(filling)
        changed = workshop.provisioner_of(provisioning={"grants": repeating})
        with pytest.raises(ProvisioningError, match=r"duplicate key value.*SQLSTATE 23505") as raised:
            await changed.create(workshop.draft("new"), key=None)
        (reported,) = (await changed.reconcile()).errors
        assert "SQLSTATE 23505" in reported
    for told in (str(raised.value), reported, caplog.text):
        assert "4243" not in told
        assert "DETAIL" not in told


async def test_a_hook_does_not_end_the_applications_transactions(versioned: Postgres) -> None:
    """Neither a check nor a reconcile with nothing dangerous to mend: it reports what it waits for."""

    def locking(target: GrantTarget) -> str:
        return "ALTER TABLE notes ENABLE ROW LEVEL SECURITY"

    async with superuser_workshop(versioned, schema=ScriptSchema(SCHEMA)) as workshop:
        acme = await workshop.create("acme")
        changed = workshop.provisioner_of(provisioning={"grants": locking})
        async with workshop.connect(acme) as connection:
            await connection.execute("BEGIN; SELECT * FROM notes")
            (error,) = (await changed.reconcile(check=True)).errors
            assert error.startswith("acme: ") and "lock timeout" in error
            assert await connection.fetchval("SELECT 1") == 1


async def test_what_a_hook_defers_is_done_by_the_owner(versioned: Postgres) -> None:
    """Before PostgreSQL 18, a deferred trigger runs as whoever commits: in a reconcile that is a superuser."""

    def filling(target: GrantTarget) -> str:
        return "INSERT INTO filled VALUES (1)"

    schema = f"""
    {SCHEMA}
    CREATE TABLE filled (id int); CREATE TABLE seen (who text);
    CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql AS
        'BEGIN INSERT INTO public.seen SELECT current_user; RETURN NULL; END';
    CREATE CONSTRAINT TRIGGER later AFTER INSERT ON filled DEFERRABLE INITIALLY DEFERRED
        FOR EACH ROW EXECUTE FUNCTION see();
    """
    async with superuser_workshop(versioned, schema=ScriptSchema(schema)) as workshop:
        acme = await workshop.create("acme")
        await workshop.provisioner_of(provisioning={"grants": filling}).reconcile()
        async with workshop.admin(placement(acme).database) as connection:
            assert await connection.fetchval("SELECT DISTINCT who FROM seen") == workshop.names.owner


async def test_a_hook_that_meets_a_concurrent_change_is_repeated(workshop: Workshop) -> None:
    """PostgreSQL refuses the later of two changes of one object's rights (XX000), as beside a reconcile."""

    def granting(target: GrantTarget) -> str:
        return f"GRANT TRUNCATE ON notes TO {target.role}"

    acme = await workshop.create("acme")
    changed = workshop.provisioner_of(provisioning={"grants": granting})
    async with workshop.admin(placement(acme).database) as connection:
        await connection.execute(f'SET ROLE "{workshop.names.owner}"; BEGIN; GRANT REFERENCES ON notes TO PUBLIC')
        applied = asyncio.ensure_future(changed.apply_grants(acme))
        async with workshop.admin() as observer:
            await until(lambda: observer.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"))
        await connection.execute("COMMIT")
        await applied
    assert await may(workshop, acme, "TRUNCATE notes")
