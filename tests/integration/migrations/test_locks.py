"""Locks of other sessions, concurrent runs, and invalid indexes of interrupted ones."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import textwrap
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest

from tenancy_orm.config import TenancyConfig
from tenancy_orm.runs import FleetMigrator
from tests.support.alembic_program import Alembic
from tests.support.fleet import Fleet, activity, look_before_waiting, open_fleet, until
from tests.support.projects import NOTES, Project
from tests.support.warm import Program, start_module

RATING = 'op.add_column("notes", sa.Column("rating", sa.Integer))'
COUNTED = """
op.execute("INSERT INTO notes (body) VALUES ('applied')")
"""
CONCURRENTLY = """
with op.get_context().autocommit_block():
    op.create_index("ix_notes_body", "notes", ["body"], postgresql_concurrently=True, if_not_exists=True)
"""
INDEXES = """
SELECT c.relname::text, i.indisvalid FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
WHERE i.indrelid = 'notes'::regclass AND NOT i.indisprimary ORDER BY 1
"""


@asynccontextmanager
async def impatient(config: TenancyConfig, **changes: Any) -> AsyncIterator[FleetMigrator]:
    """Another process's migrator, with other time limits."""
    async with open_fleet(config.replace(**changes)) as fleet:
        yield fleet.migrations


async def is_waiting(connection: asyncpg.Connection[Any], event: str) -> bool:
    """Whether another session of this database waits for a lock of the kind ``event``."""
    return await activity(connection, f"wait_event_type = 'Lock' AND wait_event = '{event}'") > 0


# --- lock_timeout ---------------------------------------------------------------------------------------------------


async def test_a_lock_conflict_is_tried_again(fleet: Fleet, config: TenancyConfig, project: Project) -> None:
    project.add("0002", RATING, down="0001")
    # as many attempts as it takes until two of them were seen
    settings = {"lock_timeout": 0.2, "attempts": 1_000}
    async with impatient(config, migration=settings) as migrations, fleet.connect("acme") as holder:
        transaction = holder.transaction()
        await transaction.start()
        await holder.execute("LOCK TABLE notes")
        run = asyncio.create_task(migrations.upgrade())
        # the first attempt waits, and gives up; the second one waits
        for _ in range(2):
            await until(lambda: is_waiting(holder, "relation"))
            await until(lambda: is_waiting(holder, "relation"), False)
        await transaction.commit()
        report = await run
    assert report.ok
    assert await fleet.revision("acme") == "0002"


async def test_a_lock_that_stays_is_a_bounded_wait_and_one_tenants_failure(
    fleet: Fleet, config: TenancyConfig, project: Project
) -> None:
    project.add("0002", RATING, down="0001")
    impatiently = impatient(config, migration={"lock_timeout": 0.1})
    async with impatiently as migrations, fleet.connect("acme") as holder, holder.transaction():
        await holder.execute("LOCK TABLE notes")
        report = await migrations.upgrade()
    assert [(failure.slug, failure.sqlstate) for failure in report.failures] == [("acme", "55P03")]
    assert report.failures[0].seconds < 20
    assert await fleet.revision("acme") == "0001"
    assert await fleet.revision("globex") == "0002"


@pytest.mark.parametrize("block", ["after", "in"])
async def test_rows_that_an_autocommit_block_has_committed_are_not_changed_twice(
    fleet: Fleet, config: TenancyConfig, project: Project, block: str
) -> None:
    """A lock time-out after them is no reason to do them again; one without such rows is."""
    before, inside = (COUNTED, "pass") if block == "after" else ("", COUNTED.strip())
    body = f"""
{before}
with op.get_context().autocommit_block():
    {inside}
    op.execute("ALTER TABLE gate ADD COLUMN n integer")
"""
    project.add("0002", body, down="0001")
    project.add("0001", NOTES + '\nop.execute("CREATE TABLE gate ()")', "pass")
    await fleet.execute("acme", f'CREATE TABLE gate (); ALTER TABLE gate OWNER TO "{fleet.services.names.owner}"')
    settings = {"lock_timeout": 0.1, "retry_pause": 0.01}
    async with (
        impatient(config, migration=settings) as migrations,
        fleet.connect("acme") as holder,
        holder.transaction(),
    ):
        await holder.execute("LOCK TABLE gate")
        report = await migrations.upgrade(tenants=["acme"])
    assert "has committed changes of rows, which a repetition makes again" in report.reasons["acme"]
    assert await fleet.fetch("acme", "SELECT body FROM notes") == [("applied",)]


async def test_a_migration_ends_by_its_deadline(fleet: Fleet, config: TenancyConfig, project: Project) -> None:
    body = """
        tenant = op.get_context().opts["tenant"]
        if tenant is not None and tenant.slug == "acme":
            op.execute("SELECT pg_sleep(60)")
    """
    project.add("0002", body, down="0001")
    async with impatient(config, migration={"timeout": 1.0}) as migrations:
        report = await migrations.upgrade(tenants=["acme"])
    assert report.reasons == {"acme": "not done within 1 s; raise migration.timeout"}
    async with fleet.connect("acme") as connection:
        await until(lambda: activity(connection, "wait_event = 'PgSleep'"), 0)


async def test_who_holds_the_lock_is_named_in_the_error(
    fleet: Fleet, config: TenancyConfig, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By pid, application_name, state and age; never by a query, which may hold values."""
    look_before_waiting(monkeypatch)
    project.add("0002", RATING, down="0001")
    settings = {"lock_timeout": 0.8, "attempts": 2, "retry_pause": 0.01}
    async with impatient(config, migration=settings) as migrations, fleet.connect("acme") as holder:
        await holder.execute("SET application_name = 'nightly import'")
        async with holder.transaction():
            await holder.execute("LOCK TABLE notes; SELECT 'secret' FROM notes")
            reasons = (await migrations.upgrade()).reasons
        pid = holder.get_server_pid()
    assert re.fullmatch(
        r"upgrade 0001 -> 0002: canceling statement due to lock timeout \(SQLSTATE 55P03\), blocked by "
        rf"pid {pid} \(application 'nightly import', idle in transaction for \d+ s, transaction of \d+ s\)",
        reasons["acme"],
    ), reasons
    assert await fleet.revision("acme") == "0001"


async def test_each_statement_is_bounded_and_a_revision_can_say_otherwise(
    fleet: Fleet, config: TenancyConfig, project: Project, caplog: pytest.LogCaptureFixture
) -> None:
    """A statement that takes too long is not tried again: it would take as long."""
    caplog.set_level("INFO", "tenancy_orm.migrations")
    slow = 'if op.get_context().opts["tenant"]: op.execute("INSERT INTO notes (body) SELECT pg_sleep(0.6)::text")'
    project.add("0002", slow, down="0001")
    settings = {"statement_timeout": 0.3}
    async with impatient(config, migration=settings) as migrations:
        report = await migrations.upgrade(tenants=["acme"])
        assert report.reasons == {
            "acme": "upgrade 0001 -> 0002: canceling statement due to statement timeout (SQLSTATE 57014); "
            "migration.statement_timeout is 0.3 s, and a revision can set another one for a statement: "
            "with timeouts(statement=...)"
        }
        assert "attempt 1 of" not in caplog.text
        checked = """
            from tenancy_orm.migrations import timeouts
            show = lambda name: op.get_bind().exec_driver_sql(f"SHOW {name}_timeout").scalar()
            with timeouts(lock=60, statement=None):
                assert (show("lock"), show("statement")) == ("1min", "0")
                with timeouts(lock=None):
                    assert (show("lock"), show("statement")) == ("0", "0")
                    op.execute("SELECT pg_sleep(0.6)")
                assert show("lock") == "1min"
            with op.get_context().autocommit_block():
                try:
                    with timeouts(lock=7):
                        op.get_bind().exec_driver_sql("SELECT 1 / 0")
                except sa.exc.DBAPIError:
                    pass
                assert (show("lock"), show("statement")) == ("5s", "300ms")
            assert (show("lock"), show("statement")) == ("5s", "300ms")
            try:
                with timeouts(lock=-1):
                    pass
            except Exception as exc:
                assert "lock_timeout must be at least 0" in str(exc)
        """
        # a template has the same limits, but those of the setting are the fleet's
        project.add("0002", f'if op.get_context().opts["tenant"]:{textwrap.indent(checked, "    ")}', down="0001")
        report = await migrations.upgrade(tenants=["acme"])
        assert report.ok, report.reasons


async def test_other_limits_are_printed_as_well(alembic: Alembic, project: Project) -> None:
    body = """
        from tenancy_orm.migrations import timeouts
        with op.get_context().autocommit_block(), timeouts(lock=600, statement=None):
            op.create_index("ix_notes_body", "notes", ["body"], postgresql_concurrently=True)
    """
    project.add("0002", body, down="0001")
    printed = await alembic("upgrade", "head", "--sql")
    order = ["COMMIT;", "SET lock_timeout = '600000ms';", "SET statement_timeout = '0';", "CONCURRENTLY ix_notes_body",
             "RESET lock_timeout;", "RESET statement_timeout;"]  # fmt: skip
    assert [part for part in order if part in printed] == order
    places = [printed.index(part) for part in order]
    assert places == sorted(places)


# --- two runs at once -----------------------------------------------------------------------------------------------


async def test_two_runs_apply_each_revision_once(fleet: Fleet, config: TenancyConfig, project: Project) -> None:
    project.add("0002", COUNTED + CONCURRENTLY, down="0001")
    project.add("0003", COUNTED, down="0002")
    async with open_fleet(config) as other:
        reports = await asyncio.gather(fleet.migrations.upgrade(), other.migrations.upgrade())
    assert all(report.ok for report in reports)
    for slug in fleet.tenants:
        assert await fleet.fetch(slug, "SELECT count(*) FROM notes") == [(2,)]
        assert await fleet.fetch(slug, INDEXES) == [("ix_notes_body", True)]
    changed = [outcome.slug for report in reports for outcome in report.changed]
    assert sorted(changed) == sorted(fleet.tenants)


async def test_two_runs_of_a_relative_target_go_one_step(fleet: Fleet, config: TenancyConfig, project: Project) -> None:
    project.add("0002", COUNTED + 'op.execute("SELECT pg_sleep(0.3)")', down="0001")
    project.add("0003", COUNTED, down="0002")
    await fleet.provisioner.template("default")
    async with open_fleet(config) as other, fleet.connect("acme") as holder:
        transaction = holder.transaction()
        await transaction.start()
        await holder.execute("LOCK TABLE notes")
        runs = [
            asyncio.create_task(migrations.upgrade("+1", tenants=["acme"]))
            for migrations in (fleet.migrations, other.migrations)
        ]
        # one waits for the table, the other one polls for the first one's lock
        await until(lambda: is_waiting(holder, "relation"))
        await until(lambda: activity(holder, "backend_type = 'client backend'"), 2)
        await transaction.commit()
        reports = [await run for run in runs]
    assert sorted(report.outcomes[0].changed for report in reports) == [False, True]
    assert await fleet.revision("acme") == "0002"


async def test_waiting_for_another_run_is_bounded(fleet: Fleet, config: TenancyConfig, project: Project) -> None:
    project.add("0002", RATING, down="0001")
    async with fleet.connect("acme") as holder:
        transaction = holder.transaction()
        await transaction.start()
        await holder.execute("LOCK TABLE notes")
        run = asyncio.create_task(fleet.migrations.upgrade())
        await until(lambda: is_waiting(holder, "relation"))
        async with impatient(config, migration={"wait": 0.2}) as other:
            report = await other.upgrade()
        assert [failure.slug for failure in report.failures] == ["acme"]
        assert re.fullmatch(
            r"another run has been migrating it for 0.2 s; wait for that one to end \(blocked by pid \d+ "
            r"\(application 'tenancy-migration', active for \d+ s, transaction of \d+ s\)\)",
            str(report.failures[0].error),
        ), report.failures[0].error
        await transaction.commit()
        assert (await run).ok


# --- invalid indexes ------------------------------------------------------------------------------------------------


@asynccontextmanager
async def writer(fleet: Fleet, slug: str) -> AsyncIterator[asyncpg.Connection[Any]]:
    """A transaction that has written to ``notes``: CREATE INDEX CONCURRENTLY waits for its end."""
    async with fleet.connect(slug) as connection, connection.transaction():
        await connection.execute("INSERT INTO notes (body) VALUES ('unfinished')")
        yield connection


async def leave_invalid_index(fleet: Fleet, slug: str, statement: str) -> None:
    """Interrupt a CREATE INDEX CONCURRENTLY."""
    async with writer(fleet, slug), fleet.connect(slug) as connection:
        await connection.execute("SET lock_timeout = '50ms'")
        with pytest.raises(asyncpg.LockNotAvailableError):
            await connection.execute(statement)


async def test_if_not_exists_takes_an_invalid_index_for_a_good_one(fleet: Fleet) -> None:
    """Without the repair, IF NOT EXISTS accepts an invalid index."""
    statement = "CREATE INDEX CONCURRENTLY IF NOT EXISTS ix_notes_body ON notes (body)"
    await leave_invalid_index(fleet, "acme", statement)
    await fleet.execute("acme", statement)
    assert await fleet.fetch("acme", INDEXES) == [("ix_notes_body", False)]


async def test_an_index_that_a_lock_timeout_interrupted_is_built(
    fleet: Fleet, config: TenancyConfig, project: Project
) -> None:
    project.add("0002", CONCURRENTLY, down="0001")
    async with impatient(config, migration={"lock_timeout": 0.2, "attempts": 1_000}) as migrations:
        async with writer(fleet, "acme"):
            run = asyncio.create_task(migrations.upgrade())
            await until(lambda: fleet.fetch("acme", INDEXES), [("ix_notes_body", False)])
        report = await run
    assert report.ok
    assert await fleet.fetch("acme", INDEXES) == [("ix_notes_body", True)]


async def test_an_index_that_a_killed_run_left_is_built(fleet: Fleet, project: Project) -> None:
    await leave_invalid_index(fleet, "acme", "CREATE INDEX CONCURRENTLY ix_notes_body ON notes (body)")
    project.add("0002", CONCURRENTLY, down="0001")
    assert (await fleet.migrations.upgrade()).ok
    assert await fleet.fetch("acme", INDEXES) == [("ix_notes_body", True)]


async def test_an_invalid_index_of_an_earlier_revision_is_built_again(fleet: Fleet, project: Project) -> None:
    await leave_invalid_index(
        fleet, "acme", 'CREATE UNIQUE INDEX CONCURRENTLY "Odd ""name" ON notes (lower(body)) WHERE id > 7'
    )
    project.add("0002", RATING, down="0001")
    assert (await fleet.migrations.upgrade()).ok
    assert await fleet.fetch("acme", INDEXES) == [('Odd "name', True)]
    definition = await fleet.fetch("acme", "SELECT indexdef FROM pg_indexes WHERE indexname LIKE 'Odd%'")
    assert definition == [
        ('CREATE UNIQUE INDEX "Odd ""name" ON public.notes USING btree (lower((body)::text)) WHERE (id > 7)',)
    ]


async def test_an_invalid_index_of_a_table_that_goes_is_not_built_again(fleet: Fleet, project: Project) -> None:
    await leave_invalid_index(fleet, "acme", "CREATE INDEX CONCURRENTLY ix_notes_body ON notes (body)")
    project.add("0002", 'op.drop_table("notes")', down="0001")
    assert (await fleet.migrations.upgrade()).ok


async def test_an_index_that_another_session_builds_is_left_to_it(fleet: Fleet, project: Project) -> None:
    """A run waits for it only where a revision creates an index of that name."""
    project.add("0002", 'op.create_table("other", sa.Column("id", sa.Integer))', down="0001")
    async with fleet.connect("acme") as builder:
        # it waits for the snapshots of others in the end, and so for the run: that gives way, not this
        await builder.execute("SET deadlock_timeout = '5min'")
        async with writer(fleet, "acme") as holder:
            building = asyncio.create_task(builder.execute("CREATE INDEX CONCURRENTLY ix_notes_body ON notes (body)"))
            await until(lambda: is_waiting(holder, "virtualxid"))
            assert (await fleet.migrations.upgrade()).ok
            assert await fleet.fetch("acme", INDEXES) == [("ix_notes_body", False)]
            project.add("0003", CONCURRENTLY, down="0002")
            run = asyncio.create_task(fleet.migrations.upgrade())
            await until(lambda: is_waiting(holder, "relation"))
        await building
        report = await run
    assert report.ok
    assert await fleet.fetch("acme", INDEXES) == [("ix_notes_body", True)]


async def test_what_a_run_was_killed_before_is_built_by_the_next(
    fleet: Fleet, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where that has no revision to apply; an index that another revision drops is there to be dropped."""
    await leave_invalid_index(fleet, "acme", "CREATE INDEX CONCURRENTLY ix_notes_body ON notes (body)")
    await leave_invalid_index(fleet, "acme", "CREATE INDEX CONCURRENTLY ix_notes_id ON notes (id)")
    project.add(
        "0002",
        """
        tenant = op.get_context().opts["tenant"]
        if tenant is not None and tenant.slug == "acme":
            op.drop_index("ix_notes_id", "notes")
        """,
        down="0001",
    )
    with monkeypatch.context() as patched:
        patched.setattr("tenancy_orm.migrations.database.repair", fail)
        assert list((await fleet.migrations.upgrade()).reasons) == ["acme"]
    assert await fleet.fetch("acme", INDEXES) == [("ix_notes_body", False)]
    assert (await fleet.migrations.upgrade()).ok
    assert await fleet.fetch("acme", INDEXES) == [("ix_notes_body", True)]


async def fail(connection: object) -> None:
    raise ConnectionError("killed")


async def test_machines_build_what_a_killed_one_has_left(
    fleet: Fleet, config: TenancyConfig, project: Project, alembic: Alembic
) -> None:
    """One is killed while it builds an index; others take part in its run, and a run of its own goes on beside it."""
    project.add("0002", COUNTED, down="0001")
    project.add("0003", CONCURRENTLY, down="0002")
    # none gives up an index before the others have come
    machine = {
        **alembic.environment,
        "TENANCY_MIGRATIONS": str(project.migrations),
        "TENANCY_MIGRATION_LOCK_TIMEOUT": "0",
    }
    started: list[Program] = []

    async def taking_part(run: int) -> int:
        return len(await fleet.migrations.run_processes(run))

    async def start(*arguments: str) -> None:
        module = ("tenancy_orm.cli", "migrate", *arguments, "--json")
        started.append(await start_module(*module, cwd=project.root, env=machine))

    try:
        async with writer(fleet, "acme") as holder:
            started.append(await alembic.start("upgrade", "head"))
            await until(lambda: is_waiting(holder, "virtualxid"))
            left = await holder.fetchval(
                "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'virtualxid'"
            )
            started[0].kill()
            await started[0].wait()
            assert await fleet.fetch("acme", INDEXES) == [("ix_notes_body", False)]
            await fleet.expire_claims()
            await start("join", "1")
            await start("upgrade", "--join")
            await until(lambda: taking_part(1), 3)
            # only then: it is the latest run that is joined
            await start("upgrade")
            await until(lambda: taking_part(2), 1)
            # PostgreSQL has noticed the lost client, and another machine builds the index
            await until(lambda: activity(holder, f"pid = {left}"), 0)
            await until(lambda: is_waiting(holder, "virtualxid"))
        async with asyncio.timeout(60):
            ended = [await program.communicate() for program in started[1:]]
    finally:
        for program in started:
            program.send_signal(signal.SIGKILL)
            await program.wait()
    assert [one.status for one in ended] == [0, 0, 0], ended
    assert [json.loads(one.out)["run"] for one in ended] == [1, 1, 2]
    for slug in fleet.tenants:
        assert await fleet.revision(slug) == "0003"
        assert await fleet.fetch(slug, "SELECT count(*) FROM notes WHERE body = 'applied'") == [(1,)]
        assert await fleet.fetch(slug, INDEXES) == [("ix_notes_body", True)]


async def test_a_unique_index_that_cannot_be_built_fails_every_run_until_it_can(fleet: Fleet, project: Project) -> None:
    """The rows are not quoted, and nothing is left of the attempts."""
    await fleet.execute("acme", "INSERT INTO notes (body) VALUES ('secret'), ('secret')")
    async with fleet.connect("acme") as connection:
        with pytest.raises(asyncpg.UniqueViolationError):
            await connection.execute("CREATE UNIQUE INDEX CONCURRENTLY ix_notes_body ON notes (body)")
    project.add("0002", RATING, down="0001")
    for _ in range(2):
        report = await fleet.migrations.upgrade()
        assert report.reasons == {
            "acme": 'its revision is reached, but the invalid index "public"."ix_notes_body" cannot be built: '
            'could not create unique index "ix_notes_body_ccnew" (SQLSTATE 23505); '
            "remove the duplicates, and run this again"
        }
        assert report.failures[0].after == "0002"
        assert await fleet.fetch("acme", INDEXES) == [("ix_notes_body", False)]
    await fleet.execute("acme", "DELETE FROM notes")
    assert (await fleet.migrations.upgrade()).ok
    assert await fleet.fetch("acme", INDEXES) == [("ix_notes_body", True)]


PARTS = """
CREATE TABLE parted (id integer) PARTITION BY RANGE (id);
CREATE TABLE part PARTITION OF parted FOR VALUES FROM (0) TO (10);
CREATE INDEX ix_parted ON parted (id);
ALTER TABLE notes ADD CONSTRAINT one UNIQUE (id, body), ADD CONSTRAINT two EXCLUDE USING btree (id WITH =);
CREATE SCHEMA other AUTHORIZATION {owner};
CREATE TABLE other.things (id integer);
CREATE INDEX ix_new ON other.things (id);
CREATE INDEX "Odd ""name" ON notes (body);
ALTER TABLE parted OWNER TO {owner}; ALTER TABLE part OWNER TO {owner}; ALTER TABLE other.things OWNER TO {owner};
UPDATE pg_index SET indisvalid = false FROM pg_class c
WHERE c.oid = indexrelid AND c.relname IN ('part_id_idx', 'one', 'two', 'ix_new', 'Odd "name');
"""


async def test_indexes_of_every_kind_are_built_in_place(fleet: Fleet, project: Project) -> None:
    """Those of partitions and constraints cannot be dropped; one of the same name in another schema must not be."""
    await fleet.execute("acme", PARTS.format(owner=fleet.services.names.owner))
    await leave_invalid_index(fleet, "acme", "CREATE INDEX CONCURRENTLY ix_kept ON notes (body)")
    # what an interrupted REINDEX CONCURRENTLY leaves
    await leave_invalid_index(fleet, "acme", "REINDEX INDEX CONCURRENTLY notes_pkey")
    left = "SELECT relname::text FROM pg_class JOIN pg_index ON indexrelid = oid WHERE NOT indisvalid ORDER BY 1"
    assert len(await fleet.fetch("acme", left)) == 7
    created = """
        op.create_index("ix_new", "notes", ["body"])
        op.create_unique_constraint('Odd "name', "notes", ["id", "body"])
    """
    project.add("0002", created, down="0001")
    report = await fleet.migrations.upgrade()
    assert report.ok, report.reasons
    assert await fleet.fetch("acme", left) == []
    names = {row[0] for row in await fleet.fetch("acme", "SELECT relname::text FROM pg_class WHERE relkind = 'i'")}
    assert {"part_id_idx", "one", "two", "ix_new", 'Odd "name', "ix_kept", "notes_pkey"} <= names
    assert not any("_ccnew" in name for name in names)
    assert await fleet.fetch("acme", "SELECT to_regclass('other.ix_new') IS NOT NULL") == [(True,)]


async def test_partitioned_indexes_are_invalid_on_purpose(fleet: Fleet, project: Project) -> None:
    await fleet.execute(
        "acme",
        """
        CREATE TABLE parted (id integer) PARTITION BY RANGE (id);
        CREATE TABLE part PARTITION OF parted FOR VALUES FROM (0) TO (10);
        CREATE INDEX ix_parted ON ONLY parted (id);
        """,
    )
    project.add("0002", RATING, down="0001")
    assert (await fleet.migrations.upgrade()).ok
    found = await fleet.fetch("acme", "SELECT indisvalid FROM pg_index WHERE indexrelid = 'ix_parted'::regclass")
    assert found == [(False,)]


# --- tenants that are created during a run --------------------------------------------------------------------------


async def test_a_tenant_that_older_code_creates_meanwhile_is_migrated_too(
    fleet: Fleet, config: TenancyConfig, project: Project, tmp_path: Any
) -> None:
    old = Project.create(tmp_path / "old")
    old.add("0001", NOTES, 'op.drop_table("notes")')
    project.add("0002", RATING, down="0001")
    async with open_fleet(config.replace(migrations=old.migrations)) as older, fleet.connect("acme") as holder:
        transaction = holder.transaction()
        await transaction.start()
        await holder.execute("LOCK TABLE notes")
        run = asyncio.create_task(fleet.migrations.upgrade())
        await until(lambda: is_waiting(holder, "relation"))
        await older.create("late")
        assert await fleet.revision("late") == "0001"
        await transaction.commit()
        report = await run
    assert [outcome.slug for outcome in report.changed] == ["acme", "globex", "initech", "late"]
    assert await fleet.revision("late") == "0002"


async def test_a_tenant_that_is_purged_meanwhile_is_no_failure(fleet: Fleet, project: Project) -> None:
    project.add("0002", RATING, down="0001")
    async with fleet.connect("acme") as holder:
        transaction = holder.transaction()
        await transaction.start()
        await holder.execute("LOCK TABLE notes")
        run = asyncio.create_task(fleet.migrations.upgrade(concurrency=1))
        await until(lambda: is_waiting(holder, "relation"))
        await fleet.tenancy.tenants.delete("globex")
        await fleet.tenancy.tenants.purge("globex")
        await transaction.commit()
        report = await run
    assert report.ok
    assert [outcome.slug for outcome in report.outcomes] == ["acme", "initech"]
