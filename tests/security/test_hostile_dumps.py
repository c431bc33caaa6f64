"""A hostile dump restores without raising its rights, or not at all."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from tenancy_orm.config import TenancyConfig
from tenancy_orm.errors import ContentsRefusedError, ProvisioningError
from tenancy_orm.postgres.connections import version
from tenancy_orm.postgres.programs import Programs, find_programs
from tenancy_orm.provisioning.copies.restoring import restore_archive
from tenancy_orm.provisioning.server_objects import databases
from tenancy_orm.registry.databases import TenantDatabase
from tenancy_orm.restores import DumpSource
from tenancy_orm.tenant import Placement
from tests.support.dumps import dump, rewrite
from tests.support.fleet import Fleet, fleet_config, open_fleet
from tests.support.postgres import Postgres
from tests.support.projects import NOTES, Project

SPACE = 600  # characters of a comment, in place of which a dump gets other SQL

# takes what the owner of all databases may give: the right to connect to the neighbour's
TAKE = """
CREATE FUNCTION take() RETURNS boolean LANGUAGE plpgsql VOLATILE AS $$
BEGIN
    IF pg_has_role(current_user, '{owner}', 'USAGE') THEN
        EXECUTE 'GRANT CONNECT ON DATABASE "{neighbour}" TO "{role}"';
    END IF;
    RETURN true;
END $$;
"""
HOSTILE = (
    TAKE
    + """
CREATE FUNCTION take_as_owner() RETURNS boolean LANGUAGE sql SECURITY DEFINER AS 'SELECT public.take()';
CREATE FUNCTION indexed(text) RETURNS text LANGUAGE plpgsql IMMUTABLE AS 'BEGIN PERFORM public.take(); RETURN $1; END';
CREATE INDEX hostile_index ON notes (indexed(body));
CREATE FUNCTION fire() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM public.take(); RETURN NEW; END';
CREATE TRIGGER hostile_trigger BEFORE UPDATE ON notes FOR EACH ROW EXECUTE FUNCTION fire();
ALTER TABLE notes ADD CONSTRAINT hostile_check CHECK (length(indexed(body)) >= 0);
CREATE VIEW hostile_view AS SELECT take() AS taken;
CREATE RULE hostile_rule AS ON DELETE TO notes DO ALSO SELECT take();
ALTER TABLE notes ADD COLUMN hostile_default boolean DEFAULT take();
CREATE TABLE extra (n int, also text GENERATED ALWAYS AS (indexed(n::text)) STORED);
CREATE TRIGGER extra_trigger BEFORE INSERT ON extra FOR EACH ROW EXECUTE FUNCTION fire();
CREATE DOMAIN hostile_domain AS int CHECK (take());
CREATE TYPE pair AS (a int, b int);
CREATE FUNCTION compares(pair, pair) RETURNS boolean LANGUAGE sql AS 'SELECT public.take()';
CREATE OPERATOR public.=== (LEFTARG = pair, RIGHTARG = pair, FUNCTION = compares);
CREATE CAST (int AS pair) WITH FUNCTION to_pair(int);
CREATE POLICY hostile_policy ON notes USING (take());
CREATE STATISTICS hostile_statistics ON (indexed(body)) FROM notes;
CREATE SCHEMA IF NOT EXISTS tenancy_orm;
CREATE FUNCTION tenancy_orm.hidden() RETURNS boolean LANGUAGE sql SECURITY DEFINER AS 'SELECT public.take()';
"""
).replace("CREATE CAST", "CREATE FUNCTION to_pair(int) RETURNS pair LANGUAGE sql AS 'SELECT NULL::pair';\nCREATE CAST")
REFUSED = {
    "function public.take()",
    "function public.take_as_owner()",
    "function public.indexed(text)",
    "function public.fire()",
    "function public.compares(public.pair, public.pair)",
    "function public.to_pair(integer)",
    "function tenancy_orm.hidden",
    "index hostile_index on table public.notes",
    "trigger hostile_trigger on table public.notes",
    "constraint hostile_check on table public.notes",
    "view public.hostile_view",
    "rule hostile_rule on table public.notes",
    "column hostile_default on table public.notes",
    "column also on table public.extra",
    "trigger extra_trigger on table public.extra",
    "domain public.hostile_domain",
    "operator public.===(public.pair,public.pair)",
    "cast (integer AS public.pair)",
    "policy hostile_policy on table public.notes",
    "statistics public.hostile_statistics on table public.notes",
}

# run by a CHECK constraint while rows come in: what each statement was answered
ATTEMPTS = {
    "superuser": 'ALTER ROLE "{role}" SUPERUSER',
    "role": "CREATE ROLE hostile_role",
    "set role": 'SET ROLE "{owner}"',
    "reset role": "RESET ROLE; CREATE ROLE hostile_role",
    "authorization": "RESET SESSION AUTHORIZATION; CREATE ROLE hostile_role",
    "program": "COPY (SELECT 1) TO PROGRAM 'true'",
    "file": "COPY (SELECT 1) TO '/tmp/hostile'",
    "extension": "CREATE EXTENSION dblink",
    "language": "CREATE LANGUAGE plpython3u",
    "event trigger": "CREATE EVENT TRIGGER hostile ON ddl_command_start EXECUTE FUNCTION public.refuse()",
    "database": 'ALTER DATABASE "{neighbour}" SET work_mem = 1024',
    "own database": "ALTER DATABASE {{database}} SET search_path = hostile",
    "let in": "GRANT CONNECT ON DATABASE {{database}} TO PUBLIC",
    "neighbour": 'GRANT CONNECT ON DATABASE "{neighbour}" TO "{role}"',
    "defaults": 'ALTER DEFAULT PRIVILEGES FOR ROLE "{owner}" GRANT ALL ON TABLES TO PUBLIC',
    "settings": "ALTER SYSTEM SET work_mem = 1024",
    "passwords": "SELECT rolpassword FROM pg_authid",
    "subscription": "CREATE SUBSCRIPTION hostile CONNECTION 'dbname=x' PUBLICATION x WITH (connect = false)",
}
PROBE = """
CREATE TABLE attempts (name text, statement text);
CREATE TABLE answers (name text, answer text);
CREATE FUNCTION refuse() RETURNS event_trigger LANGUAGE plpgsql AS 'BEGIN END';
CREATE FUNCTION attempt(name text, statement text) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE found text := 'it worked';
BEGIN
    BEGIN
        EXECUTE replace(statement, '{{database}}', quote_ident(current_database()));
    EXCEPTION WHEN OTHERS THEN
        found := sqlstate;
    END;
    INSERT INTO public.answers VALUES (name, found);
    RETURN true;
END $$;
"""
WORKED = "it worked"
CONCURRENT = "XX000"  # "tuple concurrently updated": autovacuum writes to rows of pg_database too
CONNECTS = "SELECT has_database_privilege($1::name, $2::text, 'CONNECT')"


@pytest.fixture
def config(postgres: Postgres, name_prefix: str, control_url: str, tmp_path: Path) -> TenancyConfig:
    project = Project.create(tmp_path / "app")
    project.add("0001", NOTES, 'op.drop_table("notes")')
    return fleet_config(postgres, control_url, name_prefix, project)


@pytest.fixture
async def fleet(config: TenancyConfig) -> AsyncIterator[Fleet]:
    async with open_fleet(config, initialise=True) as opened:
        await opened.create("acme", "globex")
        await opened.execute("acme", "INSERT INTO notes (body) VALUES ('one')")
        yield opened


def place(fleet: Fleet, slug: str) -> Placement:
    found = fleet.tenants[slug].placement
    assert found is not None
    return found


def filled(fleet: Fleet, sql: str) -> str:
    """SQL with the names of the owner, of acme's role and of the neighbour's database."""
    values = {
        "owner": fleet.services.names.owner,
        "role": place(fleet, "acme").role,
        "neighbour": place(fleet, "globex").database,
    }
    for name, value in values.items():
        sql = sql.replace("{" + name + "}", value)
    return sql


async def as_owner(fleet: Fleet, sql: str) -> None:
    async with fleet.connect("acme") as connection:
        await connection.execute(f'SET ROLE "{fleet.services.names.owner}"')
        await connection.execute(filled(fleet, sql))


async def has_taken(fleet: Fleet) -> bool:
    """Whether acme's role can connect to the neighbour's database; it cannot any more afterwards."""
    role, neighbour = place(fleet, "acme").role, place(fleet, "globex").database
    connection = await fleet.provisioner.connect_admin("default")
    try:
        found = bool(await connection.fetchval(CONNECTS, role, neighbour))
        await connection.execute(f'REVOKE CONNECT ON DATABASE "{neighbour}" FROM "{role}"')
    finally:
        await connection.close()
    return found


async def present(fleet: Fleet) -> set[str]:
    """The databases and roles of this installation; other tests have theirs on the same server."""
    connection = await fleet.provisioner.connect_admin("default")
    try:
        rows = await connection.fetch("SELECT datname::text FROM pg_database UNION SELECT rolname::text FROM pg_roles")
        return {row[0] for row in rows if row[0].startswith(fleet.services.names.stem)}
    finally:
        await connection.close()


async def programs(fleet: Fleet) -> Programs:
    async with fleet.connect("acme") as connection:
        return find_programs(version(connection))


async def test_code_that_the_revision_does_not_make_never_becomes_the_owners(fleet: Fleet, tmp_path: Path) -> None:
    """Where it does, a tenant gets into its neighbour's database: by a call, by ANALYZE, and by any UPDATE."""
    await as_owner(fleet, HOSTILE)
    archive = DumpSource(await dump(fleet, "acme", tmp_path / "dump"))
    await has_taken(fleet)
    before = await present(fleet)
    restores = fleet.tenancy.restores
    with pytest.raises(ContentsRefusedError, match="--accept-differences") as refused:
        await restores.restore("acme", archive)
    assert REFUSED - set(refused.value.findings) == set()
    assert not await has_taken(fleet)
    assert await present(fleet) == before

    # ... without that check
    report = await restores.restore("acme", archive, accept=True)
    assert any("hostile_index" in one for one in report.differences)
    await has_taken(fleet)
    async with fleet.tenancy.session("acme") as session:
        await session.execute(sa.text("SELECT take_as_owner()"))
        await session.commit()
    assert await has_taken(fleet)
    async with fleet.connect("acme") as connection:
        await connection.execute("ANALYZE notes")
    assert await has_taken(fleet)
    await as_owner(fleet, "UPDATE notes SET body = body")
    assert await has_taken(fleet)


async def test_what_runs_during_a_restore_can_do_nothing_elsewhere(fleet: Fleet, tmp_path: Path) -> None:
    """The login that restores may do nothing that its contents attempt; an administrator may do it all."""
    await as_owner(fleet, PROBE)
    async with fleet.connect("acme") as connection:
        rows = [(name, filled(fleet, statement)) for name, statement in ATTEMPTS.items()]
        await connection.executemany("INSERT INTO attempts VALUES ($1, $2)", rows)
        archive = await dump(fleet, "acme", tmp_path / "dump")
        # ... as an administrator
        for name in ("superuser", "role", "set role", "reset role", "neighbour", "program", "let in", "defaults"):
            answer = CONCURRENT
            while answer == CONCURRENT:
                transaction = connection.transaction()
                await transaction.start()
                await connection.execute("SELECT attempt(name, statement) FROM attempts WHERE name = $1", name)
                await connection.execute("RESET ROLE")
                answer = await connection.fetchval("SELECT answer FROM answers")
                await transaction.rollback()
            assert answer == WORKED, name
    found, tenant = await programs(fleet), fleet.tenants["acme"]
    new_databases, database = fleet.provisioner.new_databases, fleet.provisioner.new_databases.new_name()
    await fleet.registry.record_database(
        TenantDatabase(
            server="default", name=database, tenant_id=tenant.id, role=place(fleet, "acme").role, state="making"
        )
    )
    async with new_databases.open(tenant, "default", database, timeout=60, valid_for=60) as new:
        await restore_archive(new, found, archive)
        connection = await new.login.connect(timeout=10)
        try:
            await connection.execute("ANALYZE")
            await connection.execute("DO 'BEGIN PERFORM public.attempt(name, statement) FROM public.attempts; END'")
            answers = dict(await connection.fetch("SELECT name, answer FROM answers"))
        finally:
            await connection.close()
        inside = await new.connect()
        try:
            assert not await databases.is_open_to_public(inside, database)
        finally:
            await inside.close()
    assert set(answers) == set(ATTEMPTS)
    # to grant what one may not pass on is a warning
    assert {name for name, answer in answers.items() if answer == WORKED} == {"let in"}


async def test_sql_in_a_dump_is_not_the_administrators(fleet: Fleet, tmp_path: Path) -> None:
    """A dump that RESETs its role is refused by PostgreSQL; as an administrator's, or with SET ROLE, it takes over."""
    await as_owner(fleet, f"COMMENT ON TABLE notes IS '{'x' * SPACE}'")
    archive = await dump(fleet, "acme", tmp_path / "dump")
    sql = filled(fleet, 'RESET ROLE; ALTER ROLE "{role}" CREATEROLE; GRANT "{owner}" TO "{role}"; --')
    rewrite(archive, f"COMMENT ON TABLE public.notes IS '{'x' * SPACE}';", sql)
    before = await present(fleet)
    with pytest.raises(ProvisioningError, match="permission denied"):
        await fleet.tenancy.restores.restore("acme", DumpSource(archive))
    assert await present(fleet) == before
    role, owner = place(fleet, "acme").role, fleet.services.names.owner
    member = "SELECT pg_has_role($1::name, $2::name, 'MEMBER')"
    connection = await fleet.provisioner.connect_admin("default")
    try:
        assert not await connection.fetchval(member, role, owner)
        # ... and the way that is not taken
        name = fleet.services.names.scratch("0123456789abcdef")
        await databases.create(connection, name, template="template0", owner=owner)
        dsn = fleet.services.servers["default"].dsn
        assert dsn.user is not None and dsn.password is not None
        environment = dsn.environment(user=dsn.user, database=name, purpose="test")
        await asyncio.to_thread(
            subprocess.run,
            [
                (await programs(fleet)).path("pg_restore"),
                "--no-owner",
                f"--role={owner}",
                f"--dbname={name}",
                str(archive),
            ],
            env={**os.environ, **environment, "PGPASSWORD": dsn.password},
            capture_output=True,
            check=False,
        )
        assert await connection.fetchval(member, role, owner)
        await connection.execute(f'REVOKE "{owner}" FROM "{role}"; ALTER ROLE "{role}" NOCREATEROLE')
        await databases.drop(connection, name)
    finally:
        await connection.close()


async def test_rights_that_were_granted_inside_are_refused(fleet: Fleet, tmp_path: Path) -> None:
    """Contents can grant on what they bring along; those of the revision are given, and no others."""
    await as_owner(
        fleet,
        """
        CREATE FUNCTION give() RETURNS boolean LANGUAGE plpgsql AS $$
        BEGIN
            GRANT ALL ON public.notes TO "{neighbour}";
            ALTER DEFAULT PRIVILEGES GRANT ALL ON TABLES TO PUBLIC;
            RETURN true;
        EXCEPTION WHEN insufficient_privilege THEN RETURN true;
        END $$;
        CREATE MATERIALIZED VIEW given AS SELECT give();
        """,
    )
    archive = DumpSource(await dump(fleet, "acme", tmp_path / "dump"))
    for accept in (False, True):
        with pytest.raises(ContentsRefusedError) as refused:
            await fleet.tenancy.restores.restore("acme", archive, accept=accept)
        assert [one for one in refused.value.findings if one.startswith("rights on table public.notes for")]
        assert [one for one in refused.value.findings if one.startswith("default privileges")]
        assert not refused.value.may_accept


async def test_no_extension_gives_an_archive_rights_in_a_schema_of_postgresql(
    config: TenancyConfig, tmp_path: Path
) -> None:
    """Its login would get rights there, and what it makes there is not compared: the owner's code in the end."""
    async with open_fleet(config.replace(extensions=("vector",)), initialise=True) as fleet:
        await fleet.create("acme", "globex")
        await as_owner(fleet, f"COMMENT ON TABLE notes IS '{'x' * SPACE}'")
        archive = await dump(fleet, "acme", tmp_path / "dump")
        take = 'GRANT CONNECT ON DATABASE "{neighbour}" TO "{role}"'
        sql = filled(
            fleet,
            "SELECT 1;\nCREATE EXTENSION IF NOT EXISTS vector WITH SCHEMA information_schema;\n"
            "CREATE FUNCTION information_schema.take() RETURNS int LANGUAGE plpgsql SECURITY DEFINER AS "
            f"$$BEGIN {take}; RETURN 1; END$$; --",
        )
        rewrite(archive, f"COMMENT ON TABLE public.notes IS '{'x' * SPACE}';", sql)
        with pytest.raises(ProvisioningError, match="permission denied for schema information_schema"):
            await fleet.tenancy.restores.restore("acme", DumpSource(archive))
        assert not await has_taken(fleet)
