"""What somebody has changed by hand about a tenant's database or role is found, told, and mended."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import asyncpg
import pytest
import pytest_asyncio
from sqlalchemy import text

from tenancy_orm.events import IsolationIncident
from tenancy_orm.postgres import locks
from tenancy_orm.provisioning import ReconcileReport
from tenancy_orm.provisioning.creation.pipeline import tenant_key
from tenancy_orm.tenant import Status, Tenant
from tests.support.control_databases import create_control_database
from tests.support.postgres import ENDED, Postgres
from tests.support.provisioning import (
    Workshop,
    mended,
    open_workshop,
    placement,
    plain_workshop,
    set_marker,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

NOTHING = ReconcileReport()


@dataclass
class Arena:
    """Two tenants on a server; ``acme`` is the one that is changed by hand."""

    workshop: Workshop
    acme: Tenant
    globex: Tenant

    @property
    def names(self) -> dict[str, str]:
        """What the SQL of a case is filled with."""
        return {
            "database": f'"{placement(self.acme).database}"',
            "role": f'"{placement(self.acme).role}"',
            "other": f'"{placement(self.globex).role}"',
            "owner": f'"{self.workshop.names.owner}"',
        }

    async def execute(self, sql: str) -> None:
        """Run a superuser's SQL in acme's database, or beside it where it is about the database itself."""
        inside = None if sql.startswith("ALTER DATABASE") else placement(self.acme).database
        async with self.workshop.admin(inside) as connection:
            for statement in sql.format(**self.names).split(";"):
                await connection.execute(statement)

    async def as_acme(self, sql: str, database: str | None = None) -> Any:
        """Run SQL as acme's role."""
        async with self.workshop.connect(self.acme, database) as connection:
            return await connection.fetchval(sql.format(**self.names))

    async def as_globex(self, sql: str) -> Any:
        """Run SQL as globex's role, in acme's database."""
        async with self.workshop.connect(self.globex, placement(self.acme).database) as connection:
            return await connection.fetchval(sql.format(**self.names))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def arena(postgres: Postgres) -> AsyncIterator[Arena]:
    """Tenants acme and globex, with rows."""
    name, prefix = postgres.new_name(), f"d{secrets.token_hex(4)}"
    control_url = await create_control_database(postgres, name)
    workshop = await open_workshop(control_url=control_url, admin_url=postgres.admin_url, name_prefix=prefix)
    try:
        made = Arena(workshop, await workshop.create("acme"), await workshop.create("globex"))
        await made.as_acme("INSERT INTO notes (body) VALUES ('of acme')")
        yield made
    finally:
        await workshop.close()
        await postgres.drop_all(prefix)
        await postgres.drop_database(name)


Attack = Callable[[Arena], Awaitable[Any]]


@dataclass
class Case:
    """Something done by hand.

    Args:
        name: What it is.
        sql: The superuser's SQL.
        kinds: What is reported about acme.
        attack: What is possible by it, and refused without it.
        use: What is impossible by it, and works without it.
        others: What is reported about globex.
        undo: What mending leaves, and the next case must not find.
    """

    name: str
    sql: str
    kinds: set[str]
    attack: Attack | None = None
    use: Attack | None = None
    others: set[str] = field(default_factory=set)
    undo: str = ""


def connects(arena: Arena) -> Awaitable[Any]:
    return arena.as_globex("SELECT 1")


def reads(arena: Arena) -> Awaitable[Any]:
    return arena.as_globex("SELECT body FROM notes")


def uses(arena: Arena) -> Awaitable[Any]:
    return arena.as_acme("SELECT body FROM notes")


def run(sql: str) -> Attack:
    return lambda arena: arena.as_acme(sql)


async def passes_a_right_on(arena: Arena) -> None:
    await arena.as_acme("GRANT SELECT ON notes TO {other}")
    async with arena.workshop.admin(placement(arena.acme).database) as connection:
        query = "SELECT has_table_privilege($1::name, 'notes', 'SELECT')"
        if not await connection.fetchval(query, placement(arena.globex).role):
            raise asyncpg.InsufficientPrivilegeError("only a warning")


async def leaves_its_database(arena: Arena) -> None:
    await arena.as_acme("SELECT 1", "postgres")


CASES = [
    Case("PUBLIC may connect", "GRANT CONNECT ON DATABASE {database} TO PUBLIC", {"database.public"}, connects),
    Case("another tenant may connect", "GRANT CONNECT ON DATABASE {database} TO {other}", {"database.grant"}, connects),
    Case("another tenant owns it", "ALTER DATABASE {database} OWNER TO {other}", {"database.owner"}, connects),
    Case(
        "another tenant may read",
        "GRANT CONNECT ON DATABASE {database} TO {other}; GRANT USAGE ON SCHEMA public TO {other};"
        "GRANT SELECT ON notes TO {other}; GRANT UPDATE (body) ON notes TO {other}",
        {"database.grant", "right.other"},
        reads,
    ),
    Case("a superuser", "ALTER ROLE {other} SUPERUSER CREATEDB BYPASSRLS", set(), reads, others={"role.attributes"}),
    Case("a template", "ALTER DATABASE {database} IS_TEMPLATE true", {"database.template"}),
    Case(
        "PUBLIC inside",
        "GRANT CREATE ON SCHEMA public TO PUBLIC; GRANT SELECT ON notes TO PUBLIC;"
        "ALTER DEFAULT PRIVILEGES FOR ROLE {owner} GRANT SELECT ON TABLES TO PUBLIC",
        {"right.public", "object.owner", "right.missing"},
        run("CREATE OR REPLACE VIEW mine AS SELECT 1"),
        undo="DROP VIEW mine",
    ),
    Case(
        "the version table",
        "GRANT UPDATE ON alembic_version TO {role}",
        {"right.version_table"},
        run("UPDATE alembic_version SET version_num = version_num"),
    ),
    Case(
        "rights to pass on",
        "GRANT SELECT ON notes TO {role} WITH GRANT OPTION",
        {"right.grantable", "right.other"},
        passes_a_right_on,
    ),
    Case("another database", "GRANT CONNECT ON DATABASE postgres TO {role}", {"role.grant"}, leaves_its_database),
    Case(
        "a function of a superuser",
        "CREATE FUNCTION version_file() RETURNS text SECURITY DEFINER LANGUAGE sql "
        "AS $$SELECT pg_read_file('PG_VERSION')$$",
        {"object.owner"},
        run("SELECT version_file()"),
        undo="DROP FUNCTION version_file()",
    ),
    Case(
        "a table of the tenant's role",
        "ALTER TABLE notes OWNER TO {role}",
        {"object.owner", "right.missing"},
        run("ALTER TABLE notes ALTER body SET NOT NULL"),
    ),
    Case(
        "no guard and no bound",
        "DROP EVENT TRIGGER tenancy_guard; GRANT EXECUTE ON FUNCTION pg_advisory_lock(bigint) TO PUBLIC",
        {"guard.missing", "advisory_locks"},
        run("SELECT pg_advisory_lock(1)"),
    ),
    Case("nobody may connect", "ALTER DATABASE {database} ALLOW_CONNECTIONS false", {"database.closed"}, use=uses),
    Case("no connections", "ALTER DATABASE {database} CONNECTION LIMIT 0", {"database.connection_limit"}, use=uses),
    Case("an expired role", "ALTER ROLE {role} VALID UNTIL '2000-01-01'", {"role.expires"}, use=uses),
    Case(
        "rights taken away",
        "REVOKE SELECT ON notes FROM {role};ALTER DEFAULT PRIVILEGES FOR ROLE {owner} REVOKE ALL ON TABLES FROM {role}",
        {"right.missing"},
        use=uses,
    ),
    Case(
        "a schema made by hand",
        'CREATE SCHEMA "Extra"; CREATE TABLE "Extra"."T" (id serial); CREATE TYPE "Extra".mood AS ENUM (\'a\')',
        {"object.owner", "right.missing"},
        use=run('INSERT INTO "Extra"."T" DEFAULT VALUES'),
        undo='DROP SCHEMA "Extra" CASCADE',
    ),
    Case(
        "a large object of a superuser",
        "SELECT lo_create(4711)",
        {"object.owner"},
        use=run("SELECT lo_put(4711, 0, 'x')"),
        undo="SELECT lo_unlink(4711)",
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
async def test_it_is_told_and_mended(arena: Arena, case: Case) -> None:
    """A check tells it and changes nothing; a reconcile mends it, and the attack fails; the next finds nothing."""
    await arena.execute(case.sql)
    await succeeds(arena, case)
    provisioner = arena.workshop.provisioner
    found = await provisioner.reconcile(check=True)
    told = {(one.tenant, one.kind) for one in found.differences}
    # what shows only once objects have their owner is not foretold
    assert told >= {("acme", kind) for kind in case.kinds - {"right.missing"}} | {("globex", k) for k in case.others}
    assert not found.clean and not any(one.mended for one in found.differences)
    assert any(one.dangerous for one in found.differences) == (case.use is None or "object.owner" in case.kinds)
    assert (await provisioner.reconcile(check=True)) == found
    await succeeds(arena, case)
    report = mended(await provisioner.reconcile())
    assert report == {slug: kinds for slug, kinds in (("acme", case.kinds), ("globex", case.others)) if kinds}
    await fails(arena, case)
    assert await provisioner.reconcile(check=True) == NOTHING == await provisioner.reconcile()
    if case.undo:
        await arena.execute(case.undo)


OWN_CODE = """
CREATE FUNCTION take() RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    IF pg_has_role(current_user, '{owner}', 'USAGE') THEN
        EXECUTE 'GRANT CONNECT ON DATABASE {neighbour} TO {role}';
    END IF;
    RETURN true;
END $$;
CREATE FUNCTION take_as_owner() RETURNS boolean LANGUAGE sql SECURITY DEFINER AS 'SELECT public.take()';
CREATE FUNCTION indexed(text) RETURNS text LANGUAGE plpgsql IMMUTABLE AS 'BEGIN PERFORM public.take(); RETURN $1; END';
CREATE TABLE drafts (body text);
CREATE INDEX drafts_idx ON drafts (indexed(body));
CREATE VIEW taken AS SELECT take();
CREATE TABLE plain (body text);
"""


async def test_code_that_a_tenant_has_made_does_not_become_the_owners(arena: Arena) -> None:
    """Its role could create once. As the owner's, it would run with the owner's rights on every tenant's database."""
    neighbour, role = placement(arena.globex).database, placement(arena.acme).role
    provisioner = arena.workshop.provisioner
    await arena.execute("GRANT CREATE ON SCHEMA public TO {role}")
    owner = arena.workshop.names.owner
    async with arena.workshop.connect(arena.acme) as tenant:
        await tenant.execute(OWN_CODE.format(owner=owner, neighbour=f'"{neighbour}"', role=f'"{role}"'))
    await arena.execute("REVOKE CREATE ON SCHEMA public FROM {role}")
    owners = (
        "SELECT proname::text, pg_get_userbyid(proowner)::text FROM pg_proc WHERE pronamespace = 'public'::regnamespace"
    )
    report = await provisioner.reconcile()
    told = {one.kind: one for one in report.differences if one.tenant == "acme"}
    assert told["object.code"].mended is False
    for name in ("take()", "take_as_owner()", "indexed(pg_catalog.text)", "TABLE public.drafts", "VIEW public.taken"):
        assert name in told["object.code"].detail, told
    assert "public.plain" in told["object.owner"].detail and told["object.owner"].mended
    assert not {one.kind for one in (await provisioner.reconcile()).differences} & {"object.owner"}
    async with (
        arena.workshop.admin(placement(arena.acme).database) as admin,
        arena.workshop.connect(arena.acme) as tenant,
    ):
        assert {owned for _, owned in await admin.fetch(owners)} == {role}
        may = f"SELECT has_database_privilege('{role}', '{neighbour}', 'CONNECT')"
        assert await tenant.fetchval("SELECT take_as_owner()") is True
        assert await admin.fetchval(may) is False
        # what it would do
        await admin.execute(f'ALTER FUNCTION take_as_owner() OWNER TO "{owner}"')
        await tenant.fetchval("SELECT take_as_owner()")
        assert await admin.fetchval(may) is True
        await admin.execute(f'REVOKE CONNECT ON DATABASE "{neighbour}" FROM "{role}"')
        await admin.execute(
            "DROP TABLE drafts, plain; DROP VIEW taken; DROP FUNCTION take_as_owner(), indexed(text), take()"
        )
    assert await provisioner.reconcile(check=True) == NOTHING


async def succeeds(arena: Arena, case: Case) -> None:
    """See the hole that was made."""
    if case.attack is not None:
        await case.attack(arena)
    if case.use is not None:
        with pytest.raises(asyncpg.PostgresError):
            await case.use(arena)


async def fails(arena: Arena, case: Case) -> None:
    """See it closed."""
    if case.attack is not None:
        with pytest.raises((asyncpg.InsufficientPrivilegeError, asyncpg.UndefinedFunctionError)):
            await case.attack(arena)
    if case.use is not None:
        await case.use(arena)


async def test_sessions_that_were_opened_before_are_ended(arena: Arena) -> None:
    """A REVOKE does not end them; acme's own go on."""
    await arena.execute("GRANT CONNECT ON DATABASE {database} TO PUBLIC")
    async with (
        arena.workshop.connect(arena.globex, placement(arena.acme).database) as foreign,
        arena.workshop.connect(arena.acme) as own,
    ):
        await arena.workshop.provisioner.reconcile(thorough=False)
        with pytest.raises((*ENDED, OSError)):
            await foreign.fetchval("SELECT 1")
        assert await own.fetchval("SELECT 1") == 1


async def test_what_a_migration_has_given_to_the_tenants_own_role_stays(arena: Arena) -> None:
    """Further rights of its own role are no difference, nor are tables that it makes by one of them."""
    await arena.execute(
        "CREATE SCHEMA own; ALTER SCHEMA own OWNER TO {owner}; SET ROLE {owner};"
        "GRANT USAGE, CREATE ON SCHEMA own TO {role}; GRANT TRUNCATE ON notes TO {role}"
    )
    await arena.as_acme("CREATE TABLE own.mine (id int)")
    assert await arena.workshop.provisioner.reconcile() == NOTHING
    await arena.as_acme("DROP TABLE own.mine")
    await arena.execute("DROP SCHEMA own CASCADE; REVOKE TRUNCATE ON notes FROM {role}")


async def test_shared_catalogues_alone_tell_of_other_roles(arena: Arena) -> None:
    """Housekeeping looks into no database, unless the shared catalogues name roles that should not be there."""
    await arena.execute("REVOKE SELECT ON notes FROM {role}")
    assert await arena.workshop.provisioner.reconcile(thorough=False) == NOTHING
    await arena.execute("GRANT SELECT ON notes TO {other}")
    report = await arena.workshop.provisioner.reconcile(thorough=False)
    assert mended(report) == {"acme": {"right.missing", "right.other"}}


async def test_housekeeping_tells_of_an_operators_role_and_takes_nothing_from_it(arena: Arena) -> None:
    """A timer locks nobody out without a word; ``tenancy reconcile`` does, after its check has shown it."""
    reporting = f"{placement(arena.acme).role[:20]}_reporting"
    holds = f"SELECT has_table_privilege('{reporting}', 'notes', 'SELECT')"
    await arena.execute(f"CREATE ROLE {reporting}; GRANT SELECT ON notes TO {reporting}, {{other}}")
    for thorough, holds_it, is_mended in ((False, True, [False, True]), (True, False, [True])):
        report = await arena.workshop.provisioner.reconcile(thorough=thorough)
        assert {one.kind for one in report.differences} == {"right.other"}
        assert sorted(one.mended for one in report.differences) == is_mended
        async with arena.workshop.admin(placement(arena.acme).database) as connection:
            assert await connection.fetchval(holds) is holds_it
    await arena.execute(f"DROP ROLE {reporting}")


async def test_a_database_that_is_being_changed_is_left_alone(arena: Arena) -> None:
    """Whoever holds the tenant's lock is at work on it."""
    await arena.execute("GRANT CONNECT ON DATABASE {database} TO PUBLIC")
    async with arena.workshop.admin() as connection:
        await locks.lock(connection, tenant_key(arena.acme.id), timeout=5)
        assert await arena.workshop.provisioner.reconcile() == NOTHING
    assert mended(await arena.workshop.provisioner.reconcile()) == {"acme": {"database.public"}}


async def test_what_is_mended_is_in_the_audit_log(arena: Arena) -> None:
    """With what it was; a check writes no entry."""

    async def entries() -> list[Any]:
        async with arena.workshop.control.connect() as connection:
            rows = await connection.execute(
                text("SELECT detail FROM tenancy.audit_log WHERE action = 'tenant.mend' ORDER BY sequence")
            )
            return [row.detail for row in rows]

    before = len(await entries())
    await arena.execute("GRANT CONNECT ON DATABASE {database} TO PUBLIC")
    await arena.workshop.provisioner.reconcile(check=True)
    assert len(await entries()) == before
    await arena.workshop.provisioner.reconcile()
    (entry,) = (await entries())[before:]
    assert [one["kind"] for one in entry["mended"]] == ["database.public"]


# --- markers --------------------------------------------------------------------------------------------------------


async def test_a_database_with_another_tenants_marker_is_not_touched(arena: Arena) -> None:
    """It may hold that tenant's data: nothing is changed, and each look is an incident."""
    name = placement(arena.acme).database
    own = f"tenancy:{arena.workshop.names.installation}:{arena.acme.id}"
    incidents: list[IsolationIncident] = []
    cancel = arena.workshop.events.subscribe(IsolationIncident, incidents.append)
    async with arena.workshop.admin() as connection:
        await set_marker(connection, name, own.replace(str(arena.acme.id), str(arena.globex.id)))
    await arena.execute("GRANT CONNECT ON DATABASE {database} TO PUBLIC; GRANT SELECT ON notes TO {other}")
    for adopt in ((), ("acme",)):
        report = await arena.workshop.provisioner.reconcile(adopt=adopt)
        assert (report.corrected, report.complete) == ((), False)
        assert {one.kind for one in report.differences} == {"marker.other", "database.public"}
    await connects(arena)
    await arena.workshop.events.drain()
    assert [(one.tenant_id, one.kind) for one in incidents] == [(arena.acme.id, "MarkerMismatchError")] * 2
    cancel()
    async with arena.workshop.admin() as connection:
        await set_marker(connection, name, own)
    assert mended(await arena.workshop.provisioner.reconcile()) == {"acme": {"database.public", "right.other"}}


async def test_a_database_without_a_marker_is_adopted_only_on_request(arena: Arena) -> None:
    """Others lose their rights on it at once; nothing is granted in it before somebody has said that it is acme's."""
    await arena.execute(
        "COMMENT ON DATABASE {database} IS NULL; GRANT CONNECT ON DATABASE {database} TO PUBLIC;"
        "REVOKE SELECT ON notes FROM {role}"
    )
    await connects(arena)
    report = await arena.workshop.provisioner.reconcile(adopt=["globex"])
    assert [(one.kind, one.mended) for one in report.differences] == [
        ("marker.missing", False),
        ("database.public", True),
    ]
    assert report.differences[0].remedy.startswith(f"COMMENT ON DATABASE {arena.names['database']} IS E'tenancy:")
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await connects(arena)
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await uses(arena)
    report = await arena.workshop.provisioner.reconcile(adopt=[str(arena.acme.id)])
    assert mended(report) == {"acme": {"marker.missing", "right.missing"}}
    await uses(arena)
    assert await arena.workshop.provisioner.reconcile() == NOTHING


# --- what is missing altogether -------------------------------------------------------------------------------------


async def test_a_missing_role_is_made_again_with_its_password(arena: Arena) -> None:
    """As after a restore on a server that never had the role; a suspended tenant's cannot log in."""
    for status in (Status.SUSPENDED, Status.ACTIVE):
        await arena.workshop.set_login(arena.acme, status is Status.ACTIVE)
        await arena.execute("DROP OWNED BY {role}; DROP ROLE {role}")
        found = await arena.workshop.provisioner.reconcile(check=True)
        assert {one.kind for one in found.differences} >= {"role.missing"}
        kinds = mended(await arena.workshop.provisioner.reconcile())["acme"]
        assert kinds >= {"role.missing", "right.missing"}
        assert await arena.workshop.provisioner.reconcile() == NOTHING
        if status is Status.SUSPENDED:
            with pytest.raises(asyncpg.InvalidAuthorizationSpecificationError):
                await uses(arena)
    await uses(arena)


async def test_a_missing_database_is_told(arena: Arena) -> None:
    """Nothing is made in its place; the other tenants are checked all the same."""
    name = placement(arena.globex).database
    async with arena.workshop.admin() as connection:
        await connection.execute(f'ALTER DATABASE "{name}" RENAME TO "{name}_aside"')
    await arena.execute("GRANT CONNECT ON DATABASE {database} TO PUBLIC")
    report = await arena.workshop.provisioner.reconcile()
    assert report.corrected == ("acme",)
    assert {(one.tenant, one.kind, one.mended) for one in report.differences} >= {
        ("acme", "database.public", True),
        ("globex", "database.missing", False),
    }
    async with arena.workshop.admin() as connection:
        await connection.execute(f'ALTER DATABASE "{name}_aside" RENAME TO "{name}"')
    await arena.workshop.provisioner.reconcile()
    assert await arena.workshop.provisioner.reconcile() == NOTHING


# --- an administrator who is not a superuser ------------------------------------------------------------------------


async def test_what_the_administrator_may_not_mend_is_told_with_its_statement(own_server: Postgres) -> None:
    """A superuser runs the statements of the report; then nothing is left."""
    async with plain_workshop(own_server) as workshop:
        acme, globex = await workshop.create("acme"), await workshop.create("globex")
        database, role = placement(acme).database, placement(acme).role
        async with own_server.connect(database) as superuser:
            await superuser.execute(f'ALTER ROLE "{role}" BYPASSRLS; ALTER DATABASE "{database}" OWNER TO postgres')
            await superuser.execute("CREATE TABLE by_hand (id int)")
            await superuser.execute(f'GRANT SELECT ON notes TO "{placement(globex).role}"')
        report = await workshop.provisioner.reconcile()
        left = {one.kind: one for one in report.differences if not one.mended}
        assert left.keys() >= {"role.attributes", "database.owner"}
        assert not report.complete
        for _ in range(3):
            report = await workshop.provisioner.reconcile()
            for one in report.differences:
                if not one.mended:
                    async with own_server.connect(one.database) as superuser:
                        await superuser.execute(one.remedy)
        assert await workshop.provisioner.reconcile() == NOTHING


async def test_a_tenant_that_cannot_be_checked_is_listed(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are checked."""
    from tenancy_orm.provisioning.server_objects.blockers import Blockers

    original = Blockers.connect

    async def connect(self: Blockers, database: str | None = None, **options: Any) -> Any:
        if database == placement(arena.globex).database:
            raise ConnectionRefusedError("on purpose")
        return await original(self, database, **options)

    monkeypatch.setattr(Blockers, "connect", connect)
    await arena.execute("REVOKE SELECT ON notes FROM {role}")
    report = await arena.workshop.provisioner.reconcile()
    assert (report.corrected, report.errors) == (("acme",), ("globex: ConnectionRefusedError: on purpose",))


async def test_many_can_mend_at_once(arena: Arena) -> None:
    """Several reconciles at the same time do not disturb each other."""
    await arena.execute("GRANT CONNECT ON DATABASE {database} TO PUBLIC; GRANT SELECT ON notes TO {other}")
    reports = await asyncio.gather(*(arena.workshop.provisioner_of().reconcile() for _ in range(3)))
    assert [report.errors for report in reports] == [()] * 3
    assert await arena.workshop.provisioner.reconcile() == NOTHING
