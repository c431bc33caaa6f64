"""One tenant's database at a point in time, out of a base backup and WAL of a whole server."""

from __future__ import annotations

import os
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import psycopg
import pytest
from sqlalchemy import text

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.errors import (
    ConfigurationError,
    MarkerMismatchError,
    OperationStateError,
    RecoveryError,
    RecoveryTargetError,
)
from tenancy_orm.postgres import login
from tenancy_orm.postgres.connections import Connection
from tenancy_orm.restores.recovery import RecoveredDatabase
from tenancy_orm.routing.marker import marker_text
from tenancy_orm.tenant import Tenant
from tenancy_orm.testing.embedded import SUPERUSER
from tests.support.own_objects import MAKE, NAMES, OWNERS, watched_sandbox
from tests.support.postgres import Postgres
from tests.support.processes import opened
from tests.support.recovery import backup_directory, left_in, now, receiving, recovery_settings
from tests.support.replication import TestServer, primary_server, standby_of
from tests.support.waiting import until

SECONDS = 60.0


@pytest.fixture(scope="module")
def primary() -> Iterator[TestServer]:
    """The server of this module's tenants."""
    # what a recovered server must not do: archive, load libraries, use the network, encrypt
    further = {"archive_mode": "on", "archive_command": "false", "max_prepared_transactions": "7"}
    # a test says which transactions there are
    further["autovacuum"] = "off"
    with primary_server(settings=further) as server:
        yield server


@pytest.fixture
def directory() -> Iterator[Path]:
    """For base backups, WAL and recovered servers."""
    with backup_directory() as made:
        yield made


@pytest.fixture
async def tenancy(tenancy_config: TenancyConfig, primary: TestServer, directory: Path) -> AsyncIterator[Tenancy]:
    """A ``Tenancy`` on that server; its slot is dropped at the end."""
    async with recovering(tenancy_config.replace(**recovery_settings(primary, directory))) as made:
        yield made


@asynccontextmanager
async def recovering(config: TenancyConfig) -> AsyncIterator[Tenancy]:
    """A ``Tenancy`` with a new control database; its slot is dropped at the end."""
    async with opened(config, initialise=True) as made:
        yield made
        await made.recovery.drop_slot()


async def create(tenancy: Tenancy, slug: str) -> Tenant:
    """Make a tenant."""
    return (await tenancy.tenants.create(slug)).tenant


async def write(tenancy: Tenancy, slug: str, *bodies: str) -> None:
    """Write notes of a tenant."""
    async with tenancy.transaction(slug) as session:
        for body in bodies:
            await session.execute(text("INSERT INTO notes (body) VALUES (:body)"), {"body": body})


async def bodies(tenancy: Tenancy, slug: str) -> list[str]:
    """The notes of a tenant."""
    async with tenancy.session(slug) as session:
        return list(await session.scalars(text("SELECT body FROM notes ORDER BY id")))


async def read(recovered: RecoveredDatabase, statement: str = "SELECT body FROM notes ORDER BY id") -> list[Any]:
    """Read the first column from a recovered database."""
    connection: Connection = await login.connect(recovered.dsn, purpose="test", timeout=SECONDS)
    try:
        return [row[0] for row in await connection.fetch(statement)]
    finally:
        await connection.close()


async def test_a_tenant_is_as_it_was_and_nobody_elses_database_is_opened(
    tenancy: Tenancy, primary: TestServer, directory: Path
) -> None:
    """Its rows are those of that time; the server's log shows which databases were opened; nothing is left."""
    acme, beta = await create(tenancy, "acme"), await create(tenancy, "beta")
    assert acme.placement is not None and beta.placement is not None
    async with receiving(tenancy):
        base = (await tenancy.recovery.take_base()).taken
        assert await tenancy.recovery.bases() == [base]
        assert await tenancy.recovery.verify_base() == base
        await write(tenancy, "acme", "first", "second")
        await write(tenancy, "beta", "old")
        primary.query("SELECT lo_from_bytea(4711, 'large')", database=acme.placement.database)
        target = now(primary)
        await write(tenancy, "beta", "new")
        primary.query("DROP TABLE tags, notes", database=acme.placement.database)

        async with tenancy.recovery.open(acme, target) as recovered:
            assert await read(recovered) == ["first", "second"]
            assert await read(recovered, "SELECT convert_from(lo_get(4711), 'UTF8')") == ["large"]
            assert (recovered.database, recovered.version) == (acme.placement.database, primary.version)
            assert recovered.last_commit is not None and recovered.last_commit <= target
            with pytest.raises(asyncpg.InvalidAuthorizationSpecificationError, match=r"no pg_hba.conf entry"):
                await login.connect(recovered.dsn, purpose="test", timeout=SECONDS, database=beta.placement.database)
            with pytest.raises(asyncpg.ReadOnlySQLTransactionError):
                await read(recovered, "CREATE TABLE x ()")
            for name, value in {
                "listen_addresses": "",
                "archive_mode": "off",
                "ssl": "off",
                "max_logical_replication_workers": "0",
                "autovacuum": "off",
                "max_prepared_transactions": "7",
            }.items():
                assert await read(recovered, f"SHOW {name}") == [value]
            (log,) = (directory / "scratch").glob("*/server.log")
            opened = set(re.findall(r"connection authorized: .* database=(\S+)", log.read_text("utf-8")))
            assert opened == {"template1", acme.placement.database}
            (process,) = [found for found in left_in(directory) if "config_file" in found]
            assert str(directory) in process
        assert left_in(directory) == []

        window = await tenancy.recovery.window()
        assert window.oldest == base.ended_at and window.newest is not None and window.newest > target
        assert window.gaps == ()
    async with tenancy.session("beta") as session:
        assert list(await session.scalars(text("SELECT body FROM notes ORDER BY id"))) == ["old", "new"]


async def test_base_backups_that_are_due_are_taken_of_servers_whose_wal_is_received(
    tenancy: Tenancy, primary: TestServer, directory: Path
) -> None:
    """By a worker on the machine that has the directory; while a recovery reads there, nothing is deleted."""
    settings = tenancy.config.recovery.replace(base_seconds=3_600.0, keep_seconds=0.001)
    async with Tenancy(tenancy.config.replace(recovery=settings)) as working:
        recovery = working.recovery
        (job,) = [one for one in working._lifetime.parts.built_in_jobs if one.name == "base_backups"]
        assert (await recovery.take_due_bases()).taken == ()
        async with receiving(tenancy):
            result = await job.run()
            (first,) = await recovery.bases()
            assert result is not None and (result.result, result.errors) == ({"taken": [first.id]}, ())
            assert (await recovery.take_due_bases()).taken == ()
            with recovery._directory(recovery._server(None)).locked("lock", shared=True):
                report = await recovery.take_base()
            assert report.pruned == ()
            assert [one.id for one in await recovery.bases()] == [first.id, report.taken.id]
            (newest, _) = await tenancy.audit.events(action="server.base_backup")
            assert newest.detail is not None and newest.detail["base"] == report.taken.id


async def test_base_backups_of_one_second_have_names_of_their_own(
    tenancy: Tenancy, primary: TestServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In their order; so have those of a second that comes twice, when the server's clock was set back."""
    monkeypatch.setattr("tenancy_orm.restores.recovery.base_backups._FORM", "20260101T000000Z")
    async with receiving(tenancy):
        taken = [(await tenancy.recovery.take_base()).taken.id for _ in range(2)]
    assert taken == ["20260101T000000Z", "20260101T000000Z-2"]
    assert [one.id for one in await tenancy.recovery.bases()] == taken


async def test_a_tenant_is_restored_to_a_time_and_its_neighbours_are_newer(
    tenancy: Tenancy, primary: TestServer, directory: Path
) -> None:
    """Also to a time before a restore, when the tenant had another database; and not to what was not its own."""
    acme, beta = await create(tenancy, "acme"), await create(tenancy, "beta")
    assert acme.placement is not None and beta.placement is not None
    async with receiving(tenancy):
        await tenancy.recovery.take_base()
        await write(tenancy, "acme", "first")
        await write(tenancy, "beta", "old")
        first = now(primary)
        await write(tenancy, "acme", "second")
        second = now(primary)
        primary.query("DROP TABLE tags; DELETE FROM notes", database=acme.placement.database)
        await write(tenancy, "beta", "new")

        source = await tenancy.recovery.source("acme", second.astimezone(timezone(timedelta(hours=-3))))
        restored = await tenancy.restores.restore("acme", source)
        assert (restored.state, restored.differences) == ("done", ())
        assert await bodies(tenancy, "acme") == ["first", "second"]
        assert await bodies(tenancy, "beta") == ["old", "new"]
        assert left_in(directory) == []
        (entry,) = await tenancy.audit.events(tenant="acme", action="tenant.restore_backup")
        assert entry.after is not None and entry.after["database"] == restored.database

        await write(tenancy, "acme", "third")
        third = now(primary)
        # the tenant's database had another name then
        await tenancy.restores.restore("acme", await tenancy.recovery.source("acme", first.isoformat()))
        assert await bodies(tenancy, "acme") == ["first"]
        await tenancy.restores.restore("acme", await tenancy.recovery.source("acme", third))
        assert await bodies(tenancy, "acme") == ["first", "second", "third"]
        assert await bodies(tenancy, "beta") == ["old", "new"]

        # with the history changed, the marker decides: a neighbour's database is never taken
        async with tenancy.internals.control.transaction() as connection:
            swapped = {"one": acme.placement.database, "other": beta.placement.database, "id": acme.id}
            await connection.execute(text("ALTER TABLE tenancy.audit_log DISABLE TRIGGER USER"))
            await connection.execute(
                text(
                    "UPDATE tenancy.audit_log SET before = "
                    "before || jsonb_build_object('database', CAST(:other AS text)) "
                    "WHERE tenant_id = :id AND before->>'database' = :one"
                ),
                swapped,
            )
        source = await tenancy.recovery.source("acme", second)
        with pytest.raises(MarkerMismatchError, match=beta.placement.database):
            await tenancy.restores.restore("acme", source)
        assert await bodies(tenancy, "acme") == ["first", "second", "third"]
        assert left_in(directory) == []


async def test_a_tenant_whose_database_was_dropped_is_as_it_was(
    tenancy_config: TenancyConfig, primary: TestServer, directory: Path
) -> None:
    """What only that database knew comes from the recovered server: extensions, owners, how many rows there were."""
    settings = recovery_settings(primary, directory)
    settings["provisioning"]["grants"] = watched_sandbox
    async with recovering(tenancy_config.replace(**settings)) as tenancy, receiving(tenancy):
        acme = await create(tenancy, "acme")
        assert acme.placement is not None
        database, role = acme.placement.database, acme.placement.role
        primary.query("CREATE EXTENSION vector", database=database)
        async with tenancy.transaction("acme") as session:
            for statement in MAKE:
                await session.execute(text(statement))
        await tenancy.recovery.take_base()
        await write(tenancy, "acme", "first", "second")
        target = now(primary)
        await write(tenancy, "acme", "third")
        primary.query(f'DROP DATABASE "{database}" WITH (FORCE)')

        source = await tenancy.recovery.source("acme", target)
        async with source.open() as archive:
            assert archive.rows == {"public.notes": 2, "public.tags": 0, "sandbox.drafts": 1}
            assert archive.extensions is not None and "vector" in archive.extensions
            assert archive.tenant_owned is not None and "function sandbox.shout(text)" in archive.tenant_owned
        # no revision makes the extension
        assert (await tenancy.restores.restore_as("acme-2", source, accept=True)).left_out == ()
        assert (await tenancy.restores.restore("acme", source, accept=True)).left_out == ()
        assert await bodies(tenancy, "acme") == await bodies(tenancy, "acme-2") == ["first", "second"]
        place = (await tenancy.tenants.get(acme.id)).placement
        assert place is not None and place.database != database
        with psycopg.connect(primary.url(place.database)) as connection:
            assert sorted(connection.execute(OWNERS).fetchall()) == [(name, role) for name in NAMES]
            definer = "SELECT prosecdef FROM pg_proc WHERE proname = 'shout'"
            assert connection.execute(definer).fetchall() == [(True,)]
        assert left_in(directory) == []


async def test_a_time_at_which_the_database_was_being_dropped_is_refused_and_an_earlier_one_named(
    tenancy_config: TenancyConfig, primary: TestServer, directory: Path
) -> None:
    """Its files are deleted before DROP DATABASE commits, if no transaction ends between the time and that."""
    settings = recovery_settings(primary, directory, heartbeat_seconds=3_600.0)
    async with recovering(tenancy_config.replace(**settings)) as tenancy, receiving(tenancy):
        acme = await create(tenancy, "acme")
        assert acme.placement is not None
        await tenancy.recovery.take_base()
        await write(tenancy, "acme", "first")
        await write(tenancy, "acme", "second")
        target = now(primary)
        primary.query(f'DROP DATABASE "{acme.placement.database}" WITH (FORCE)')
        source = await tenancy.recovery.source("acme", target)
        with pytest.raises(RecoveryTargetError, match="was being dropped at that time") as refused:
            await tenancy.restores.restore("acme", source)
        found = re.search(r"choose a time before (\S+)$", str(refused.value))
        assert found is not None
        earlier = datetime.fromisoformat(found[1]) - timedelta(microseconds=1)
        await tenancy.restores.restore("acme", await tenancy.recovery.source("acme", earlier))
        assert await bodies(tenancy, "acme") == ["first"]
        assert left_in(directory) == []


async def test_what_cannot_be_recovered_is_refused_before_anything_is_started(
    tenancy: Tenancy, primary: TestServer, directory: Path
) -> None:
    """Times without an offset, in the future, too early, too late and in a gap; each error says why."""

    async def refused(to: str | datetime, expected: str, tenant: Tenant) -> None:
        with pytest.raises(RecoveryTargetError, match=expected):
            async with tenancy.recovery.open(tenant, to):
                pass
        assert left_in(directory) == []

    before = datetime.now(UTC)
    acme = await create(tenancy, "acme")
    await refused("2026-11-28 14:03", "does not say in which time zone: write .*'2026-11-28 14:03:00\\+00'", acme)
    await refused("tomorrow", "'tomorrow' is not a time", acme)
    await refused(datetime.now(UTC) + timedelta(days=1), "is in the future", acme)
    await refused(before - timedelta(days=1), "tenant 'acme' was created at", acme)
    moment = now(primary)
    await refused(moment, "there is no base backup of server 'default' in", acme)
    base = (await tenancy.recovery.take_base()).taken
    await refused(moment.astimezone(timezone(timedelta(hours=5))), "is before the oldest base backup", acme)
    await write(tenancy, "acme", "unreceived")
    late = now(primary)
    await refused(late, r"is after the last transaction in the WAL .* make sure that tenancy backup wal runs", acme)

    async with receiving(tenancy) as events:
        primary.query("SELECT pg_switch_wal()")
        await write(tenancy, "acme", "received")
        reached = now(primary)
        # the server is asked for a transaction, and it is waited for
        async with tenancy.recovery.open(acme, reached) as recovered:
            assert await read(recovered) == ["unreceived", "received"]
        with pytest.raises(OperationStateError, match="another process works on"):
            await tenancy.recovery.receive_wal()
    assert [event.kind for event in events if event.kind == "gap"] == []

    # the slot is lost, as by max_slot_wal_keep_size: the server does not keep what is not received
    await tenancy.recovery.drop_slot()
    await write(tenancy, "acme", "in the gap")
    in_gap = now(primary)
    for _ in range(3):
        primary.query("CREATE TABLE x AS SELECT 1 AS a")
        primary.query("DROP TABLE x")
        primary.query("SELECT pg_switch_wal()")
    primary.query("CHECKPOINT")
    async with receiving(tenancy) as events:
        assert [event.kind for event in events].count("gap") == 1
        await refused(in_gap, f"WAL of server 'default' is missing after file .* base backup {base.id}", acme)
        async with tenancy.recovery.open(acme, reached) as recovered:
            assert await read(recovered) == ["unreceived", "received"]
        assert len((await tenancy.recovery.window()).gaps) == 1
        newer = (await tenancy.recovery.take_base()).taken
        await write(tenancy, "acme", "after the gap")
        after = now(primary)
        async with tenancy.recovery.open(acme, after) as recovered:
            assert await read(recovered) == ["unreceived", "received", "in the gap", "after the gap"]
    assert [backup.id for backup in await tenancy.recovery.bases()] == [base.id, newer.id]


async def test_what_the_servers_administrators_have_set_is_without_effect(
    tenancy: Tenancy, tenancy_config: TenancyConfig, primary: TestServer, directory: Path
) -> None:
    """Libraries, commands, settings of roles and login triggers of the server; and tablespaces are copied."""
    acme = await create(tenancy, "acme")
    assert acme.placement is not None
    database = acme.placement.database
    place = directory / "tablespace"
    place.mkdir()
    owner = primary.data_dir.joinpath("pgdata").resolve().stat()
    os.chown(place, owner.st_uid, owner.st_gid)
    login_trigger = """
        CREATE FUNCTION public.refuse() RETURNS event_trigger LANGUAGE plpgsql AS
            $$ BEGIN RAISE 'a login trigger ran'; END $$;
        CREATE EVENT TRIGGER refuse ON login EXECUTE FUNCTION public.refuse();
        ALTER EVENT TRIGGER refuse ENABLE ALWAYS
    """
    undone = (
        "ALTER SYSTEM RESET ALL",
        "ALTER ROLE ALL RESET ALL",
        "ALTER DATABASE template1 RESET ALL",
    )
    try:
        primary.query(f"CREATE TABLESPACE side LOCATION '{place}'")
        primary.query("CREATE TABLE aside (body text) TABLESPACE side", database=database)
        primary.query("INSERT INTO aside VALUES ('in a tablespace')", database=database)
        # nothing of this has come into force on the server itself
        primary.query("ALTER SYSTEM SET shared_preload_libraries = 'no_such_library'")
        primary.query("ALTER SYSTEM SET archive_command = 'no-such-command'")
        primary.query("ALTER SYSTEM SET listen_addresses = '*'")
        primary.query("ALTER ROLE ALL SET lock_timeout = '12345'")
        async with receiving(tenancy):
            await tenancy.recovery.take_base()
            if primary.version >= 17:
                primary.query(login_trigger, database="template1")
            primary.query("ALTER DATABASE template1 SET default_transaction_read_only = on")
            target = now(primary)
            async with tenancy.recovery.open(acme, target) as recovered:
                assert await read(recovered, "SELECT body FROM aside") == ["in a tablespace"]
                assert await read(recovered, "SHOW lock_timeout") == ["0"]
                assert await read(
                    recovered,
                    "SELECT pg_tablespace_location(oid) LIKE '%/tenancy-recovery-%' "
                    "FROM pg_tablespace WHERE spcname = 'side'",
                ) == [True]

            # ... and with the protection off: the same library, named by this installation's own settings
            settings = recovery_settings(primary, directory, settings={"shared_preload_libraries": "no_such_library"})
            async with Tenancy(tenancy_config.replace(**settings)) as other:
                with pytest.raises(RecoveryError, match=r"does not start: could not access file .no_such_library"):
                    async with other.recovery.open(acme, target):
                        pass
            settings = recovery_settings(primary, directory, max_bytes=1_000_000)
            async with Tenancy(tenancy_config.replace(**settings)) as other:
                with pytest.raises(RecoveryError, match=r"more than recovery.max_bytes, 1,000,000"):
                    await other.recovery.source(acme, target)
            assert left_in(directory) == []

            # only what the last milliseconds need is kept
            settings = recovery_settings(primary, directory, keep_seconds=0.001)
            async with Tenancy(tenancy_config.replace(**settings)) as other:
                first, report = (await other.recovery.bases())[0], await other.recovery.take_base()
                assert [base.id for base in report.pruned] in ([], [first.id])
                last = (await other.recovery.take_base()).taken
                assert await other.recovery.bases() == [last]
            kept = {path.name for path in (directory / "kept").glob("default/wal/*/*")}
            assert min(kept)[:24] >= last.first_segment
    finally:
        for statement in undone:
            primary.query(statement)
        primary.query("SELECT pg_reload_conf()")
        if primary.version >= 17:
            options = "-c event_triggers=off"
            with psycopg.connect(primary.url("template1"), options=options, autocommit=True) as connection:
                connection.execute("DROP EVENT TRIGGER IF EXISTS refuse")
        primary.query("DROP TABLE IF EXISTS aside", database=database)
        primary.query("DROP TABLESPACE IF EXISTS side")


async def test_no_recovery_writes_into_a_tablespace_of_the_server_itself(
    tenancy: Tenancy, primary: TestServer, directory: Path
) -> None:
    """One that was made since the base backup would be made at the same place: such a time is refused."""
    acme = await create(tenancy, "acme")
    assert acme.placement is not None
    place = directory / "later"
    place.mkdir()
    owner = primary.data_dir.joinpath("pgdata").resolve().stat()
    os.chown(place, owner.st_uid, owner.st_gid)
    try:
        async with receiving(tenancy):
            await tenancy.recovery.take_base()
            await write(tenancy, "acme", "before")
            early = now(primary)
            await write(tenancy, "acme", "after")
            primary.query(f"CREATE TABLESPACE later LOCATION '{place}'")
            primary.query("CREATE TABLE aside () TABLESPACE later", database=acme.placement.database)
            late = now(primary)
            files = sorted(place.rglob("*"))
            with pytest.raises(RecoveryTargetError, match=rf"a tablespace was made in '{place}' between"):
                async with tenancy.recovery.open(acme, late):
                    pass
            async with tenancy.recovery.open(acme, early) as recovered:
                assert await read(recovered) == ["before"]
            assert sorted(place.rglob("*")) == files and left_in(directory) == []
            (base,) = (directory / "kept").glob("default/base/*")
            (elsewhere := directory / "elsewhere").mkdir()
            (base / "data" / "pg_tblspc" / "4711").symlink_to(elsewhere)
            with pytest.raises(RecoveryError, match=rf"lead to '{elsewhere}', which is not a copy"):
                async with tenancy.recovery.open(acme, early):
                    pass
    finally:
        primary.query("DROP TABLE IF EXISTS aside", database=acme.placement.database)
        primary.query("DROP TABLESPACE IF EXISTS later")


async def test_a_server_that_was_recovered_elsewhere_gives_one_database(
    tenancy: Tenancy, primary: TestServer, directory: Path
) -> None:
    """By its URL: by a login made for this, or read-only by the given one where it is a standby still."""
    acme, beta = await create(tenancy, "acme"), await create(tenancy, "beta")
    assert acme.placement is not None and beta.placement is not None
    await write(tenancy, "acme", "first")
    await write(tenancy, "beta", "old")
    with pytest.raises(ConfigurationError, match="leads to server 'default' itself"):
        await tenancy.recovery.source("acme", recovered_server=primary.url())
    with pytest.raises(ConfigurationError, match="leads to server 'default' itself, by another name"):
        await tenancy.recovery.source("acme", recovered_server=primary.url().replace("127.0.0.1", "localhost"))
    with pytest.raises(ConfigurationError, match="the URL of the recovered server is not a URL"):
        await tenancy.recovery.source("acme", recovered_server="elsewhere")
    with standby_of(primary, settings={"max_prepared_transactions": "7"}) as elsewhere:
        elsewhere.catch_up()
        async with tenancy.recovery.open(acme, recovered_server=elsewhere.url()) as recovered:
            assert recovered.dsn.user == SUPERUSER
            assert await read(recovered) == ["first"]
        elsewhere.promote()
        roles = "SELECT count(*) FROM pg_roles"
        opened = f"SELECT sessions FROM pg_stat_database WHERE datname = '{beta.placement.database}'"
        before, sessions = elsewhere.query(roles), elsewhere.query(opened)
        target = now(primary)
        primary.query("DROP TABLE tags, notes", database=acme.placement.database)
        await write(tenancy, "beta", "new")
        async with tenancy.recovery.open(acme, target, recovered_server=elsewhere.url()) as recovered:
            assert recovered.dsn.user != SUPERUSER
            assert (await read(recovered), recovered.time) == (["first"], target)
            with pytest.raises(asyncpg.ReadOnlySQLTransactionError):
                await read(recovered, "CREATE TABLE x ()")
        assert elsewhere.query(roles) == before
        # which hides all rows from the owner as well
        for change in ("ENABLE ROW LEVEL SECURITY, FORCE", "DISABLE ROW LEVEL SECURITY, NO FORCE"):
            elsewhere.query(f"ALTER TABLE notes {change} ROW LEVEL SECURITY", database=acme.placement.database)
            async with tenancy.recovery.open(acme, target, recovered_server=elsewhere.url()) as recovered:
                assert await read(recovered) == ["first"]
        source = await tenancy.recovery.source("acme", target, recovered_server=elsewhere.url())
        assert elsewhere.password not in str(source.describe())
        await tenancy.restores.restore("acme", source)
        assert await bodies(tenancy, "acme") == ["first"]
        assert await bodies(tenancy, "beta") == ["old", "new"]
        assert elsewhere.query(roles) == before
        # counted by the server: the tenant's database was opened, and the neighbour's by nobody
        counted = opened.replace(beta.placement.database, acme.placement.database)
        await until(lambda: elsewhere.query(counted) > 0, seconds=SECONDS)
        assert (sessions, elsewhere.query(opened)) == (0, 0)
        assert left_in(directory) == []
        mark = f"COMMENT ON DATABASE {acme.placement.database} IS '{marker_text(uuid4(), acme.id)}'"
        elsewhere.query(mark)
        with pytest.raises(MarkerMismatchError):
            await tenancy.recovery.source("acme", target, recovered_server=elsewhere.url())
        elsewhere.query(f"DROP DATABASE {acme.placement.database} WITH (FORCE)")
        with pytest.raises(RecoveryTargetError, match="the recovered server has no database"):
            await tenancy.recovery.source("acme", target, recovered_server=elsewhere.url())
        url = elsewhere.url()
    with pytest.raises(RecoveryError, match="the recovered server cannot be opened"):
        await tenancy.recovery.source("acme", target, recovered_server=url)


async def test_another_tenant_is_made_on_another_server_where_the_tenants_own_is_gone(
    tenancy_config: TenancyConfig, primary: TestServer, postgres: Postgres, directory: Path
) -> None:
    """Of its base backup and WAL, or of a server that was recovered elsewhere: nothing is asked of the lost one."""
    settings = recovery_settings(primary, directory)
    settings["servers"]["other"] = postgres.admin_url
    async with opened(tenancy_config.replace(**settings), initialise=True) as tenancy:
        acme = (await tenancy.tenants.create("acme", server="default")).tenant
        assert acme.placement is not None
        async with receiving(tenancy):
            await tenancy.recovery.take_base()
            await write(tenancy, "acme", "first")
            target = now(primary)
            await write(tenancy, "acme", "second")
            by_wal = await tenancy.recovery.source("acme", target)
        await tenancy.recovery.drop_slot()
        with standby_of(primary, settings={"max_prepared_transactions": "7"}) as elsewhere:
            elsewhere.catch_up()
            primary.halt()
            try:
                await tenancy.restores.restore_as("acme-1", by_wal, server="other")
                assert await bodies(tenancy, "acme-1") == ["first"]
                # one that replays still, as where it is paused at its target
                source = await tenancy.recovery.source("acme", recovered_server=elsewhere.url())
                await tenancy.restores.restore_as("acme-2", source, server="other")
                elsewhere.promote()
                await tenancy.restores.restore_as("acme-3", source, server="other")
                assert await bodies(tenancy, "acme-2") == await bodies(tenancy, "acme-3") == ["first", "second"]
                elsewhere.query(f"UPDATE pg_database SET datconnlimit = -2 WHERE datname = '{acme.placement.database}'")
                with pytest.raises(
                    RecoveryTargetError, match=r"was being dropped at that time.*choose an earlier time"
                ):
                    await tenancy.recovery.source("acme", recovered_server=elsewhere.url())
            finally:
                primary.start_again()
