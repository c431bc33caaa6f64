"""Copies of tenants' databases: complete, on their own, restored without rights, and gone at the end."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import sqlalchemy as sa

from tenancy_orm.config import TenancyConfig
from tenancy_orm.errors import ConfigurationError, ProvisioningError
from tenancy_orm.postgres import snapshots
from tenancy_orm.postgres.programs import find_programs
from tenancy_orm.postgres.quoting import quote_identifier
from tenancy_orm.provisioning.copies.making import Copies, DatabaseCopy
from tests.support import waiting
from tests.support.fleet import Fleet, fleet_config, open_fleet
from tests.support.postgres import Postgres
from tests.support.projects import NOTES, Project

LEFTOVERS = (
    "SELECT datname::text FROM pg_database WHERE datname LIKE '{0}%' UNION ALL "
    "SELECT rolname::text FROM pg_roles WHERE rolname LIKE '{0}%'"
)


@pytest.fixture
def config(postgres: Postgres, name_prefix: str, control_url: str, tmp_path: Path) -> TenancyConfig:
    project = Project.create(tmp_path / "app")
    project.add("0001", NOTES, 'op.drop_table("notes")')
    return fleet_config(postgres, control_url, name_prefix, project)


@pytest.fixture
async def fleet(config: TenancyConfig) -> AsyncIterator[Fleet]:
    """One tenant, acme, with 100 notes."""
    async with open_fleet(config, initialise=True) as opened:
        await opened.create("acme", "globex")
        await opened.execute("acme", "INSERT INTO notes (body) SELECT 'note ' || n FROM generate_series(1, 100) n")
        yield opened


@pytest.fixture
def copies(fleet: Fleet) -> Copies:
    return fleet.provisioner.copies


async def as_owner(fleet: Fleet, sql: str) -> None:
    """Run SQL in acme's database as the owner of tenants' databases, as a revision does."""
    async with fleet.connect("acme") as connection:
        await connection.execute(f'SET ROLE "{fleet.services.names.owner}"')
        await connection.execute(sql)


async def fetch(copy: DatabaseCopy, sql: str) -> list[tuple[Any, ...]]:
    connection = await copy.login.connect(timeout=10)
    try:
        return [tuple(row) for row in await connection.fetch(sql)]
    finally:
        await connection.close()


async def leftovers(fleet: Fleet, postgres: Postgres) -> list[str]:
    stem = fleet.services.names.scratch("")
    return [row[0] for row in await postgres.administer(LEFTOVERS.format(stem.replace("_", "\\_")))]


async def test_a_copy_has_everything_while_the_tenant_goes_on_to_work(
    fleet: Fleet, copies: Copies, postgres: Postgres
) -> None:
    await as_owner(
        fleet,
        """
        CREATE TABLE totals (n int CHECK (n > 0));
        CREATE FUNCTION count_notes() RETURNS trigger LANGUAGE plpgsql
            AS $$ BEGIN INSERT INTO public.totals VALUES (1); RETURN NULL; END $$;
        CREATE TRIGGER counting AFTER INSERT ON notes FOR EACH STATEMENT EXECUTE FUNCTION count_notes();
        CREATE MATERIALIZED VIEW numbers AS SELECT count(*) AS n FROM notes;
        SELECT lo_from_bytea(4711, 'a large object');
        """,
    )
    async with (
        fleet.tenancy.session("acme") as session,
        copies.open(fleet.tenants["acme"], timeout=60, valid_for=60) as copy,
    ):
        await session.execute(sa.text("INSERT INTO notes (body) VALUES ('while there is a copy')"))
        await session.commit()
        assert await fetch(copy, "SELECT count(*) FROM notes") == [(100,)]
        # restoring fires no trigger; the copy has it all the same
        assert await fetch(copy, "SELECT count(*) FROM totals") == [(0,)]
        await fetch(copy, "INSERT INTO notes (body) VALUES ('by the copy') RETURNING id")
        assert await fetch(copy, "SELECT n FROM totals") == [(1,)]
        assert await fetch(copy, "SELECT nextval('notes_id_seq')") == [(102,)]
        assert await fetch(copy, "SELECT n FROM numbers") == [(100,)]
        assert await fetch(copy, "SELECT convert_from(lo_get(4711), 'UTF8')") == [("a large object",)]
        assert copy.has_statistics
        assert copy.left_out == ()
    assert await fleet.fetch("acme", "SELECT count(*) FROM notes") == [(101,)]
    assert await leftovers(fleet, postgres) == []


async def test_the_schema_alone_has_no_rows_and_the_statistics_of_the_tenant(fleet: Fleet, copies: Copies) -> None:
    await fleet.execute("acme", "ANALYZE notes")
    async with copies.open(fleet.tenants["acme"], content="schema", timeout=60, valid_for=60) as copy:
        assert await fetch(copy, "SELECT count(*) FROM notes") == [(0,)]
        (tuples,) = await fetch(copy, "SELECT reltuples::int FROM pg_class WHERE relname = 'notes'")
        version = (await fetch(copy, "SHOW server_version_num"))[0][0]
        assert copy.has_statistics is (int(version) >= 180_000)
        assert tuples == ((100,) if copy.has_statistics else (-1,))


async def test_no_tenant_and_no_other_copy_can_connect_to_a_copy(
    fleet: Fleet, copies: Copies, postgres: Postgres
) -> None:
    tenant = fleet.tenants["acme"]
    assert tenant.placement is not None
    async with (
        copies.open(tenant, timeout=60, valid_for=60) as copy,
        copies.open(fleet.tenants["globex"], timeout=60, valid_for=60) as other,
    ):
        roles = {
            tenant.placement.role: fleet.provisioner.password(tenant),
            other.login.role: other.login.password,
        }
        for role, password in roles.items():
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await asyncpg.connect(postgres.url(copy.database, user=role, password=password))
        for database in (fleet.database("acme"), fleet.database("globex"), other.database):
            url = postgres.url(database, user=copy.login.role, password=copy.login.password)
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await asyncpg.connect(url)
        assert await fetch(
            copy, "SELECT datdba::regrole::text = current_user FROM pg_database WHERE datname = current_database()"
        ) == [(False,)]
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await fetch(copy, f'ALTER DATABASE "{copy.database}" CONNECTION LIMIT 1')
        # it may grant nobody the right to connect: PostgreSQL warns, and grants nothing
        await fetch(copy, f'GRANT CONNECT ON DATABASE "{copy.database}" TO PUBLIC')
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await asyncpg.connect(
                postgres.url(copy.database, user=tenant.placement.role, password=fleet.provisioner.password(tenant))
            )


HOSTILE = """
CREATE TABLE stolen (who text, super text);
CREATE FUNCTION grab(text) RETURNS boolean LANGUAGE plpgsql SET search_path = public, pg_temp AS $body$
BEGIN
    INSERT INTO public.stolen VALUES (session_user, current_setting('is_superuser'));
    BEGIN EXECUTE 'RESET ROLE'; EXECUTE 'ALTER ROLE {role} SUPERUSER'; EXCEPTION WHEN OTHERS THEN NULL; END;
    BEGIN EXECUTE 'GRANT {owner} TO {role}'; EXCEPTION WHEN OTHERS THEN NULL; END;
    BEGIN EXECUTE 'GRANT CONNECT ON DATABASE {other} TO {role}'; EXCEPTION WHEN OTHERS THEN NULL; END;
    RETURN true;
END $body$;
CREATE TABLE bait (body text CHECK (grab(body)));
INSERT INTO bait VALUES ('x');
TRUNCATE stolen;
REVOKE CONNECT ON DATABASE {other} FROM {role};
"""


async def rights(postgres: Postgres, role: str, owner: str, other: str) -> tuple[Any, ...]:
    (row,) = await postgres.administer(
        "SELECT rolsuper, pg_has_role(rolname, %s::name, 'MEMBER'), has_database_privilege(rolname, %s, 'CONNECT') "
        "FROM pg_roles WHERE rolname = %s",
        (owner, other, role),
    )
    return tuple(row)


async def test_hostile_contents_gain_no_rights_by_a_restore(fleet: Fleet, copies: Copies, postgres: Postgres) -> None:
    tenant, owner, other = fleet.tenants["acme"], fleet.services.names.owner, fleet.database("globex")
    assert tenant.placement is not None
    role = tenant.placement.role
    # what a function in a CHECK constraint does when a row is written
    await as_owner(fleet, HOSTILE.format(role=role, owner=owner, other=other))
    before = (False, False, False)
    await postgres.administer(f'ALTER ROLE "{role}" NOSUPERUSER')
    await postgres.administer(f'REVOKE "{owner}" FROM "{role}"')
    assert await rights(postgres, role, owner, other) == before

    async with copies.open(tenant, timeout=60, valid_for=60) as copy:
        assert await fetch(copy, "SELECT who, super FROM stolen") == [(copy.login.role, "off")]
    assert await rights(postgres, role, owner, other) == before

    # the same dump, restored by the superuser, gives the tenant everything
    async with fleet.connect("acme") as connection:
        await connection.execute("INSERT INTO bait VALUES ('by the superuser')")
    assert await rights(postgres, role, owner, other) == (True, True, True)
    await postgres.administer(f'ALTER ROLE "{role}" NOSUPERUSER')


async def test_what_a_tenant_owns_is_copied_too(fleet: Fleet, copies: Copies) -> None:
    tenant = fleet.tenants["acme"]
    assert tenant.placement is not None
    await fleet.execute("acme", f'CREATE SCHEMA own AUTHORIZATION "{tenant.placement.role}"')
    async with fleet.tenancy.session("acme") as session:
        await session.execute(sa.text("CREATE TABLE own.things AS SELECT 1 AS n"))
        await session.commit()
    async with copies.open(tenant, timeout=60, valid_for=60) as copy:
        assert await fetch(copy, "SELECT n FROM own.things") == [(1,)]


async def test_what_cannot_be_copied_is_an_error_and_nothing_is_left(
    fleet: Fleet, copies: Copies, postgres: Postgres
) -> None:
    # a table of the superuser's, which neither the owner nor the tenant may read
    await fleet.execute("acme", "CREATE TABLE secret (n int); REVOKE ALL ON secret FROM PUBLIC")
    with pytest.raises(ProvisioningError, match=r"tenant 'acme' could not be copied: pg_dump: .*secret"):
        async with copies.open(fleet.tenants["acme"], timeout=60, valid_for=60):
            pass
    assert await leftovers(fleet, postgres) == []


async def test_rows_that_their_owner_may_not_see_are_copied(fleet: Fleet, copies: Copies) -> None:
    await fleet.execute("acme", "INSERT INTO notes (body) VALUES ('hidden')")
    await as_owner(fleet, "ALTER TABLE notes ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY")
    async with copies.open(fleet.tenants["acme"], timeout=60, valid_for=60) as copy:
        await fetch(copy, "ALTER TABLE notes NO FORCE ROW LEVEL SECURITY")
        assert await fetch(copy, "SELECT count(*) FROM notes WHERE body = 'hidden'") == [(1,)]


async def test_the_program_that_failed_is_the_one_in_the_message(
    fleet: Fleet, copies: Copies, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one fails as well, since its input ends or nobody reads its output."""

    async def refuse(connection: Any, role: str) -> None:
        """Leave the login without the right to read all rows."""

    monkeypatch.setattr("tenancy_orm.provisioning.copies.making.see_all_rows", refuse)
    await as_owner(fleet, "ALTER TABLE notes ENABLE ROW LEVEL SECURITY; ALTER TABLE notes FORCE ROW LEVEL SECURITY")
    with pytest.raises(ProvisioningError, match=r"pg_dump: .*row-level security policy for table \"notes\""):
        async with copies.open(fleet.tenants["acme"], timeout=60, valid_for=60):
            pass
    await as_owner(
        fleet,
        """
        ALTER TABLE notes NO FORCE ROW LEVEL SECURITY;
        INSERT INTO notes (body) SELECT repeat('long', 100) FROM generate_series(1, 20000);
        CREATE FUNCTION fits(text) RETURNS boolean LANGUAGE sql RETURN true;
        ALTER TABLE notes ADD CHECK (fits(body));
        CREATE OR REPLACE FUNCTION fits(text) RETURNS boolean LANGUAGE sql RETURN false;
        """,
    )
    with pytest.raises(ProvisioningError, match=r"pg_restore: .*COPY failed for table \"notes\""):
        async with copies.open(fleet.tenants["acme"], timeout=60, valid_for=60):
            pass


@pytest.mark.parametrize("locked", [True, False], ids=["locked", "unlocked"])
async def test_a_table_that_is_emptied_and_filled_again_is_not_empty_in_the_copy(
    fleet: Fleet, copies: Copies, monkeypatch: pytest.MonkeyPatch, *, locked: bool
) -> None:
    """As it would be where that happens between the snapshot and the dump of the rows."""
    begin = snapshots.begin_snapshot

    async def beginning(connection: Any, read_names: Any) -> None:
        if locked:
            await begin(connection, read_names)
        else:
            await connection.transaction(isolation="repeatable_read", readonly=True).start()
            await connection.fetchval("SELECT 1")
        async with fleet.connect("acme") as other:
            await other.execute("SET lock_timeout = '200ms'")
            with contextlib.suppress(asyncpg.LockNotAvailableError):
                await other.execute("BEGIN; TRUNCATE notes CASCADE; INSERT INTO notes (body) VALUES ('new'); COMMIT")

    await fleet.execute("acme", "INSERT INTO notes (body) VALUES ('old')")
    monkeypatch.setattr("tenancy_orm.provisioning.copies.making.begin_snapshot", beginning)
    async with copies.open(fleet.tenants["acme"], timeout=60, valid_for=60) as copy:
        found = await fetch(copy, "SELECT body FROM notes WHERE body IN ('old', 'new')")
    assert found == ([("old",)] if locked else [])


async def test_a_copy_ends_by_its_deadline(fleet: Fleet, copies: Copies, postgres: Postgres) -> None:
    async with fleet.connect("acme") as connection:
        # it is waited for before the snapshot is taken
        await connection.execute("BEGIN; LOCK TABLE notes IN ACCESS EXCLUSIVE MODE")
        with pytest.raises(ProvisioningError, match=r"not done within 2 s; raise rehearsal\.timeout"):
            async with copies.open(fleet.tenants["acme"], timeout=2, valid_for=60):
                pass
    assert await leftovers(fleet, postgres) == []


async def test_a_cancellation_drops_the_copy(fleet: Fleet, copies: Copies, postgres: Postgres) -> None:
    opened = asyncio.Event()

    async def use() -> None:
        async with copies.open(fleet.tenants["acme"], timeout=60, valid_for=60):
            opened.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(use())
    await opened.wait()
    assert len(await leftovers(fleet, postgres)) == 2
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert await leftovers(fleet, postgres) == []


KILLED = """
import asyncio, sys
from tenancy_orm import Tenancy, TenancyConfig

async def main():
    async with Tenancy(TenancyConfig.from_env()) as tenancy:
        tenant = await tenancy.tenants.get_by_slug("acme")
        async with tenancy.internals.provisioner.copies.open(tenant, timeout=60, valid_for=60):
            print("made", flush=True)
            await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_reconcile_removes_what_a_killed_process_leaves(
    fleet: Fleet, config: TenancyConfig, postgres: Postgres
) -> None:
    assert config.servers is not None
    assert config.encryption_keys is not None
    variables = {
        "TENANCY_CONTROL_URL": config.control_url,
        "TENANCY_SERVERS": " ".join(f"{name}={url}" for name, url in config.servers.items()),
        "TENANCY_ENCRYPTION_KEYS": ",".join(f"{key}:{value!s}" for key, value in config.encryption_keys.items()),
        "TENANCY_NAME_PREFIX": config.name_prefix,
        "TENANCY_MIGRATIONS": str(config.migrations),
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", KILLED, env=variables, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(60):
            assert await process.stdout.readline() == b"made\n"
        # while the process lives, its copy is in use
        await fleet.provisioner.reconcile()
        assert len(await leftovers(fleet, postgres)) == 2
    finally:
        process.send_signal(signal.SIGKILL)
        await process.wait()

    async def removed() -> bool:
        await fleet.provisioner.reconcile()
        return await leftovers(fleet, postgres) == []

    await waiting.until(removed)


async def test_a_copy_outlasts_the_time_limits_of_sessions(
    fleet: Fleet, config: TenancyConfig, postgres: Postgres
) -> None:
    """One that is idle holds the locks by which ``reconcile`` knows that the copy is in use; another the snapshot."""
    if int(postgres.version.partition(".")[0]) >= 17:
        name = quote_identifier(fleet.database("acme"))
        await postgres.administer(f"ALTER DATABASE {name} SET transaction_timeout = '50ms'")
    # an administrator of its own: other tests work as the server's at the same time
    role = postgres.new_name("admin")
    url = postgres.url(user=role, password="of this test")
    await postgres.administer(f"CREATE ROLE {role} SUPERUSER LOGIN PASSWORD 'of this test'")
    try:
        await postgres.administer(f"ALTER ROLE {role} SET idle_session_timeout = '200ms'")
        async with (
            open_fleet(config.replace(servers={"default": url})) as other,
            other.provisioner.copies.open(fleet.tenants["acme"], timeout=60, valid_for=60) as copy,
        ):
            bounded = await asyncpg.connect(url)
            # one of the same role that is as old as the copy has ended by then
            await waiting.until(lambda: asyncio.sleep(0, bounded.is_closed()))
            await postgres.administer(f"ALTER ROLE {role} RESET idle_session_timeout")
            await other.provisioner.reconcile()
            assert await fetch(copy, "SELECT count(*) FROM notes") == [(100,)]
    finally:
        await postgres.administer(f"DROP ROLE {role}")


def test_the_programs_are_of_the_servers_version_or_the_next_newer_one(tmp_path: Path) -> None:
    assert find_programs(16).version == 16
    assert find_programs(17).version == 18
    with pytest.raises(ConfigurationError, match=r"PostgreSQL 99 needs pg_dump and pg_restore.*client_programs"):
        find_programs(99)
    with pytest.raises(ConfigurationError, match=r"found: none"):
        find_programs(16, tmp_path)
