"""Data migrations: batches with checkpoints, after the DDL of their revision and before the next one."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest
import sqlalchemy as sa

from tenancy_orm.config import TenancyConfig
from tenancy_orm.errors import ConfigurationError, MigrationError
from tenancy_orm.migrations import Batch, data_migration, data_tables
from tenancy_orm.protocols import GrantTarget
from tenancy_orm.runs.progress import ProgressReader
from tests.support.alembic_program import Alembic
from tests.support.data_migration_process import start
from tests.support.fleet import Fleet, activity, open_fleet, until
from tests.support.projects import Project

WORDS = 'op.add_column("notes", sa.Column("words", sa.Integer, server_default="0", nullable=False))'
UNWORDS = 'op.drop_column("notes", "words")'
HEADER = "from tenancy_orm.migrations import data_migration\n\n"
# not idempotent: a batch that is done twice shows
COUNT = (
    HEADER
    + """
@data_migration(table="notes", batch_size=10, max_batch_size=10)
def count_words(batch):
    return f"UPDATE notes SET words = words + 1 WHERE {batch.rows}"
"""
)
REVERSED = (
    COUNT
    + """
@count_words.reverse
def forget_words(batch):
    return f"UPDATE notes SET body = 'undone ' || words WHERE {batch.rows}"
"""
)
FILL = "INSERT INTO notes (body) SELECT 'note ' || n FROM generate_series(1, {}) AS n"
CHECKPOINTS = "SELECT revision, name, direction, after, rows FROM tenancy_migration.data ORDER BY id"


def add(
    project: Project, revision: str, code: str, upgrade: str = WORDS, downgrade: str = UNWORDS, **more: Any
) -> None:
    """Write a revision with data migrations."""
    path = project.add(revision, upgrade, downgrade, **{"down": f"{int(revision) - 1:04}", **more})
    path.write_text(path.read_text() + "\n\n" + code)


async def counts(fleet: Fleet, slug: str) -> list[tuple[Any, ...]]:
    """How many notes have which number of words."""
    return await fleet.fetch(slug, "SELECT words, count(*) FROM notes GROUP BY words ORDER BY words")


async def has_checkpoints(fleet: Fleet, slug: str) -> bool:
    ((found,),) = await fleet.fetch(slug, "SELECT to_regnamespace('tenancy_migration') IS NOT NULL")
    return bool(found)


async def test_each_row_is_migrated_once_and_nothing_is_left(fleet: Fleet, project: Project) -> None:
    """Two in one path, with a revision between that needs the first; new tenants are born with all of it."""
    await fleet.execute("acme", FILL.format(35))
    add(project, "0002", COUNT)
    project.add("0003", 'op.execute("ALTER TABLE notes ADD CHECK (words = 1)")', down="0002")
    code = (
        HEADER
        + """
import sqlalchemy as sa

@data_migration(table="notes", where="body NOT LIKE '%!'")
def shout(batch):
    notes = sa.table("notes", sa.column("body"))
    yield sa.update(notes).where(sa.text(batch.rows)).values(body=notes.c.body + "!")
    yield f"UPDATE notes AS n SET body = n.body WHERE {batch.rows_of('n')} AND false"
"""
    )
    add(project, "0004", code.replace("_of('n')", "_of('n').replace('body NOT', 'n.body NOT')"), "pass", "pass")
    report = await fleet.migrations.upgrade()
    assert report.ok, report.reasons
    assert await counts(fleet, "acme") == [(1, 35)]
    assert await fleet.fetch("acme", "SELECT count(*) FROM notes WHERE body LIKE 'note %!'") == [(35,)]
    for slug in fleet.tenants:
        assert (await fleet.revision(slug), await has_checkpoints(fleet, slug)) == ("0004", False)
    await fleet.create("umbrella")
    assert (await fleet.revision("umbrella"), await has_checkpoints(fleet, "umbrella")) == ("0004", False)
    again = await fleet.migrations.upgrade()
    assert (again.ok, len(again.changed)) == (True, 0)


async def test_a_check_of_what_a_data_migration_mends_is_asked_after_it(fleet: Fleet, project: Project) -> None:
    """It would stop the run before it begins; a check of another table, or of the same revision, does."""
    project.add("0002", 'op.add_column("notes", sa.Column("words", sa.Integer))', UNWORDS, down="0001")
    assert (await fleet.migrations.upgrade()).ok
    await fleet.execute("acme", FILL.format(35))
    add(project, "0003", COUNT.replace("words + 1", "1"), "pass", "pass")
    check = '\n\ndef preflight():\n    yield "SELECT FROM notes WHERE words IS NULL"\n'
    path = project.add("0004", 'op.alter_column("notes", "words", nullable=False)', "pass", down="0003")
    path.write_text(path.read_text() + check)
    other = '\n    yield "SELECT FROM alembic_version"\n'
    path.write_text(path.read_text() + other)
    with pytest.raises(MigrationError, match="none was touched"):
        await fleet.migrations.upgrade()
    assert await fleet.revision("acme") == "0002"
    path.write_text(path.read_text().replace(other, ""))
    report = await fleet.migrations.upgrade()
    assert report.ok, report.reasons
    await fleet.migrations.downgrade("0002")
    await fleet.execute("acme", "ALTER TABLE notes ALTER words DROP NOT NULL; UPDATE notes SET words = NULL")
    path = project.migrations / "versions" / "0003.py"
    path.write_text(path.read_text() + check)
    with pytest.raises(MigrationError, match="35 rows"):
        await fleet.migrations.upgrade()


async def test_a_failure_keeps_what_is_done_and_later_revisions_wait(fleet: Fleet, project: Project) -> None:
    """The table of checkpoints is not the tenant's to write; a run that follows goes on after the last batch."""
    await fleet.execute("acme", FILL.format(35) + "; UPDATE notes SET body = 'bad' WHERE id = 25")
    broken = COUNT.replace("words + 1", "words + CASE WHEN body = 'bad' THEN 1 / (id - id) ELSE 1 END")
    add(project, "0002", broken)
    project.add("0003", 'op.add_column("notes", sa.Column("after", sa.Integer))', down="0002")
    report = await fleet.migrations.upgrade()
    (failure,) = report.failures
    assert failure.error is not None
    assert failure.error.startswith("data migration 0002:count_words is unfinished: division by zero")
    assert (failure.slug, failure.sqlstate, failure.after) == ("acme", "22012", "0002")
    assert await fleet.fetch("acme", CHECKPOINTS) == [("0002", "count_words", "upgrade", ["20"], 20)]
    assert await counts(fleet, "acme") == [(0, 15), (1, 20)]
    assert (await fleet.revision("acme"), await fleet.recorded("acme")) == ("0002", "0002")  # 0003 waits
    assert report.run is not None
    for verify in (False, True):  # without 0003, acme would be at head
        shown = {x.slug: (x.has_unfinished_data, x.is_complete) for x in await fleet.migrations.status(verify=verify)}
        assert shown == {"acme": (True, False), "globex": (False, True), "initech": (False, True)}
    (record,) = await fleet.migrations.run_tenants(report.run, state="failed")
    progress = record.detail["data"]["0002:count_words"]
    assert (progress["done"], progress["rows"] <= 20) == (False, True)
    (other, _) = await fleet.migrations.run_tenants(report.run, state="done")
    assert other.detail["data"]["0002:count_words"] == {"rows": 0, "estimate": 0, "batches": 0, "done": True}

    async with fleet.tenancy.session("acme") as session:
        for statement in ("SELECT * FROM tenancy_migration.data", "DROP SCHEMA tenancy_migration CASCADE"):
            with pytest.raises(Exception, match=r"permission denied|must be owner"):
                await (await session.connection()).exec_driver_sql(statement)
            await session.rollback()
    assert (await fleet.provisioner.reconcile()).clean  # and nothing gives it rights
    async with fleet.tenancy.session("acme") as session:
        with pytest.raises(Exception, match="permission denied"):
            await (await session.connection()).exec_driver_sql("DELETE FROM tenancy_migration.data")

    await fleet.execute("acme", "UPDATE notes SET body = 'good' WHERE body = 'bad'")
    assert (await fleet.migrations.upgrade()).ok
    assert await counts(fleet, "acme") == [(1, 35)]
    assert (await fleet.revision("acme"), await has_checkpoints(fleet, "acme")) == ("0003", False)
    for verify in (False, True):
        assert all(x.is_complete for x in await fleet.migrations.status(verify=verify))


HOSTILE = """
CREATE FUNCTION own.become() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM set_config('role', 'none', false);
    NEW.body := current_user;
    RETURN NEW;
END $$;
CREATE TRIGGER become BEFORE UPDATE ON notes FOR EACH ROW EXECUTE FUNCTION own.become()
"""


async def test_a_trigger_of_the_tenants_own_is_not_executed(
    fleet: Fleet, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the refusal off, its function runs in the owner's session, and becomes the administrator."""
    placement = fleet.tenants["acme"].placement
    assert placement is not None
    role = placement.role
    given = f'CREATE SCHEMA own AUTHORIZATION "{role}"; GRANT TRIGGER ON notes TO "{role}"; SET ROLE "{role}"'
    await fleet.execute("acme", f"{FILL.format(1)}; {given}; {HOSTILE}")
    await fleet.execute("globex", f'GRANT CREATE ON SCHEMA public TO "{fleet.database("globex")}"')
    ((administrator,),) = await fleet.fetch("acme", "SELECT session_user::text")
    add(project, "0002", COUNT)
    reasons = (await fleet.migrations.upgrade()).reasons
    assert reasons.keys() == {"acme", "globex"}
    assert "the trigger become on public.notes calls a function of the tenant's role" in reasons["acme"]
    assert "may create objects in schema 'public', or owns some there, and data migrations would" in reasons["globex"]
    assert await fleet.revision("acme") == "0001"
    with monkeypatch.context() as patched:
        patched.setattr("tenancy_orm.migrations.database.refuse_foreign_triggers", lambda connection, tenant: None)
        await fleet.migrations.upgrade(tenants=["acme"])
    assert await fleet.fetch("acme", "SELECT body FROM notes") == [(administrator,)]


HOSTILE_CHECKPOINTS = """
CREATE FUNCTION tenancy_migration.become() RETURNS integer LANGUAGE plpgsql AS $$
BEGIN
    PERFORM set_config('role', 'none', false);
    RAISE EXCEPTION 'I am %', current_user;
END $$;
CREATE VIEW tenancy_migration.data AS SELECT tenancy_migration.become() AS id;
GRANT ALL ON SCHEMA tenancy_migration TO PUBLIC; GRANT ALL ON tenancy_migration.data TO PUBLIC
"""


async def test_checkpoints_that_a_tenant_has_made_are_not_read(
    fleet: Fleet, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A view's function is executed in the owner's session, and becomes the administrator, where it is not refused."""
    add(project, "0002", COUNT)
    role = fleet.database("acme")
    made = f'CREATE SCHEMA tenancy_migration AUTHORIZATION "{role}"; SET ROLE "{role}"; {HOSTILE_CHECKPOINTS}'
    await fleet.execute("acme", made)
    ((administrator,),) = await fleet.fetch("acme", "SELECT session_user::text")
    with monkeypatch.context() as patched:
        anybodys = sa.text("SELECT true WHERE to_regclass('tenancy_migration.data') IS NOT NULL")
        patched.setattr("tenancy_orm.migrations.data_checkpoints._OWN", anybodys)
        assert f"I am {administrator}" in (await fleet.migrations.upgrade(tenants=["acme"])).reasons["acme"]
    reasons = (await fleet.migrations.upgrade(tenants=["acme"])).reasons
    assert "tenancy_migration.data is not the owner role's table of checkpoints: drop it" in reasons["acme"]
    assert await fleet.revision("acme") == "0001"
    await fleet.execute("acme", "DROP SCHEMA tenancy_migration CASCADE")
    assert (await fleet.migrations.upgrade(tenants=["acme"])).ok


async def test_checkpoints_are_no_drift(fleet: Fleet, project: Project) -> None:
    """A run that refuses drift finishes what is unfinished, and nobody is told to drop the checkpoints."""
    await fleet.execute("acme", FILL.format(5) + "; UPDATE notes SET body = 'bad' WHERE id = 5")
    add(project, "0002", COUNT.replace("words + 1", "words + CASE WHEN body = 'bad' THEN 1 / (id - id) ELSE 1 END"))
    assert not (await fleet.migrations.upgrade()).ok
    assert await has_checkpoints(fleet, "acme")
    found = await fleet.migrations.drift()
    assert (found.ok, found.matching) == (True, 3)
    await fleet.execute("acme", "UPDATE notes SET body = 'good'")
    assert (await fleet.migrations.upgrade(refuse_drift=True)).ok
    assert (await counts(fleet, "acme"), await has_checkpoints(fleet, "acme")) == ([(1, 5)], False)


async def test_requests_have_the_hooks_rights_before_the_first_batch(config: TenancyConfig, project: Project) -> None:
    """They are served at the new revision for as long as its data migrations take, also where those fail."""

    def hook(target: GrantTarget) -> list[str]:
        grant = f"GRANT TRUNCATE ON public.%I TO {target.role}"
        loop = f"FOR t IN SELECT tablename FROM pg_tables WHERE tablename = 'bin' LOOP EXECUTE format('{grant}', t);"
        return [f"DO $$DECLARE t text; BEGIN {loop} END LOOP; END$$"]

    async with open_fleet(config.replace(provisioning={"grants": hook}), initialise=True) as fleet:
        await fleet.create("acme")
        await fleet.execute("acme", FILL.format(1))
        ddl = 'op.execute("CREATE TABLE bin ()")'
        add(project, "0002", COUNT.replace("words + 1", "1 / (id - id)"), f"{WORDS}; {ddl}")
        assert list((await fleet.migrations.upgrade()).reasons) == ["acme"]
        await fleet.tenancy.execute("TRUNCATE bin", tenant="acme")


async def test_a_downgrade_undoes_the_rows_that_were_done(fleet: Fleet, project: Project) -> None:
    """All of them; after an unfinished upgrade those alone. An upgrade is refused until that is done."""
    await fleet.execute("acme", FILL.format(35))
    await fleet.execute("globex", FILL.format(35) + "; UPDATE notes SET body = 'bad' WHERE id = 25")
    add(project, "0002", REVERSED.replace("words + 1", "words + CASE WHEN body = 'bad' THEN 1 / (id - id) ELSE 1 END"))
    await fleet.migrations.upgrade()
    report = await fleet.migrations.downgrade("0001")
    assert report.ok, report.reasons
    undone = "SELECT count(*) FILTER (WHERE body = 'undone 1'), count(*) FROM notes"
    assert await fleet.fetch("acme", undone) == [(35, 35)]
    assert await fleet.fetch("globex", undone) == [(20, 35)]
    for slug in fleet.tenants:
        assert (await fleet.revision(slug), await has_checkpoints(fleet, slug)) == ("0001", False)

    await fleet.execute("globex", "UPDATE notes SET body = 'x' WHERE body = 'bad'")
    report = await fleet.migrations.upgrade()
    assert report.run is not None
    await fleet.execute("acme", "UPDATE notes SET body = 'note'")
    assert (await fleet.migrations.undo(report.run)).ok
    assert await fleet.fetch("acme", undone) == [(35, 35)]
    assert (await fleet.migrations.upgrade()).ok
    again = "UPDATE notes SET body = 'note'; ALTER TABLE notes ADD CHECK (id <> 25 OR body NOT LIKE 'undone%')"
    await fleet.execute("globex", again)
    (failure,) = (await fleet.migrations.downgrade("0001")).failures
    assert (failure.slug, failure.after) == ("globex", "0002")
    (refused,) = (await fleet.migrations.upgrade()).failures
    assert refused.error is not None
    assert "run that downgrade again before you upgrade" in refused.error
    await fleet.execute("globex", "ALTER TABLE notes DROP CONSTRAINT notes_check")
    assert (await fleet.migrations.downgrade("0001")).ok
    assert await fleet.fetch("globex", undone) == [(35, 35)]


KEYS = """
op.create_table("visits", sa.Column("day", sa.Date), sa.Column("page", sa.Text), sa.Column("n", sa.Integer),
                sa.PrimaryKeyConstraint("day", "page"))
op.create_table("files", sa.Column("id", sa.Uuid, primary_key=True), sa.Column("n", sa.Integer))
op.create_table("logs", sa.Column("line", sa.Text, nullable=False, unique=True), sa.Column("n", sa.Integer))
op.create_table("bare", sa.Column("line", sa.Text, unique=True))
"""
ROWS = """
INSERT INTO visits SELECT DATE '2026-01-01' + n % 3, 'p' || n, 0 FROM generate_series(1, 55) AS n;
INSERT INTO files SELECT gen_random_uuid(), 0 FROM generate_series(1, 55);
INSERT INTO logs SELECT E'it''s \\\\ :x %s {} ' || n, 0 FROM generate_series(1, 55) AS n
"""


async def test_keys_of_several_columns_uuids_and_texts(fleet: Fleet, project: Project) -> None:
    """The order is the key's, whatever its type; a table without one is refused, and no tenant is touched."""
    project.add("0002", KEYS, down="0001")
    assert (await fleet.migrations.upgrade()).ok
    await fleet.execute("acme", ROWS)
    code = HEADER
    for table, key in (("visits", None), ("files", None), ("logs", "line")):
        code += f'''
@data_migration(table="{table}", key={key!r}, batch_size=7, max_batch_size=7, name="{table}")
def fill(batch):
    return f"UPDATE {table} SET n = n + 1 WHERE {{batch.rows}}"

globals()["{table}"] = fill
'''
    add(project, "0003", code, "pass", "pass")
    report = await fleet.migrations.upgrade()
    assert report.ok, report.reasons
    for table in ("visits", "files", "logs"):
        assert await fleet.fetch("acme", f"SELECT n, count(*) FROM {table} GROUP BY n") == [(1, 55)]

    for table, key, reason in (
        ("bare", None, "has no primary key"),
        ("bare", "line", "has no unique index on (line)"),
        ("visits", "day", "has no unique index on (day)"),
        # not as long as the one before: Python would take the compiled file for this one's
        ("missing_table", None, "there is no table"),
    ):
        add(
            project,
            "0004",
            HEADER + f'@data_migration(table="{table}", key={key!r})\ndef f(batch):\n    return ""',
            "pass",
        )
        with pytest.raises(MigrationError, match="no tenant was touched") as caught:
            await fleet.migrations.upgrade()
        assert reason in str(caught.value)
    assert await fleet.revision("acme") == "0003"


def test_mistakes_are_refused_where_they_are_written() -> None:
    async def fill(batch: Batch) -> None: ...

    with pytest.raises(ConfigurationError, match="must be a plain function"):
        data_migration(table="notes")(fill)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="sizes of 1 to"):
        data_migration(table="notes", batch_size=0)
    with pytest.raises(ConfigurationError, match="no column as its key"):
        data_migration(table="notes", key=())


async def test_rows_that_old_code_goes_on_to_write_are_found(fleet: Fleet, project: Project) -> None:
    """With ``where`` the table is gone through again; a function that does not make it false is told so."""
    await fleet.execute(
        "acme", "CREATE TABLE late (id integer PRIMARY KEY, n integer); INSERT INTO late VALUES (50), (51)"
    )
    await fleet.execute("acme", f'ALTER TABLE late OWNER TO "{fleet.services.names.owner}"')
    code = (
        HEADER
        + """
@data_migration(table="late", where="n IS NULL", batch_size=1, max_batch_size=1)
def fill(batch):
    yield f"UPDATE late SET n = 1 WHERE {batch.rows}"
    if "batch_after" in batch.rows:
        yield "INSERT INTO late VALUES (49)"
"""
    )
    upgrade = 'op.execute("CREATE TABLE IF NOT EXISTS late (id integer PRIMARY KEY, n integer)")'
    add(project, "0002", code, upgrade, "pass")
    report = await fleet.migrations.upgrade()
    assert report.ok, report.reasons
    assert await fleet.fetch("acme", "SELECT count(n), count(*) FROM late") == [(3, 3)]
    (acme, *_) = await fleet.migrations.run_tenants(report.run or 0)
    # each row once, however many passes there are
    assert (acme.detail["data"]["0002:fill"]["rows"], acme.detail["data"]["0002:fill"]["estimate"]) == (3, 3)

    await fleet.execute("acme", "INSERT INTO late VALUES (1)")
    add(project, "0003", code.replace("SET n = 1", "SET n = NULL"), "pass", "pass")
    (failure,) = (await fleet.migrations.upgrade()).failures
    assert failure.error is not None
    assert "1 of 1 rows still have n IS NULL after a batch" in failure.error


async def test_the_rows_of_a_table_that_was_just_filled_are_known(
    fleet: Fleet, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There are no statistics yet. How many are done is of these, and not of what is done."""
    monkeypatch.setattr(data_tables, "_SAMPLED_PAGES", 50)  # of about 130
    await fleet.execute("acme", FILL.format(20_000) + "; UPDATE notes SET body = 'bad' WHERE id = 25")
    add(project, "0002", COUNT.replace("words + 1", "words + CASE WHEN body = 'bad' THEN 1 / (id - id) ELSE 1 END"))
    report = await fleet.migrations.upgrade(tenants=["acme"])
    (acme,) = await fleet.migrations.run_tenants(report.run or 0)
    data = acme.detail["data"]["0002:count_words"]
    assert (data["done"], data["rows"] <= 20) == (False, True)
    assert 10_000 < data["estimate"] < 40_000
    await fleet.execute("acme", "UPDATE notes SET body = 'good' WHERE id = 25; DELETE FROM notes WHERE id > 50")
    report = await fleet.migrations.upgrade(tenants=["acme"])
    (acme,) = await fleet.migrations.run_tenants(report.run or 0)
    data = acme.detail["data"]["0002:count_words"]
    assert (data["done"], data["rows"], data["estimate"]) == (True, 50, 50)


@asynccontextmanager
async def slowed(config: TenancyConfig, **settings: Any) -> AsyncIterator[Fleet]:
    """Another process's fleet, with other settings of data migrations."""
    async with open_fleet(config.replace(migration=settings)) as fleet:
        yield fleet


async def is_waiting(connection: asyncpg.Connection[Any]) -> bool:
    """Whether another session of this database waits for a transaction that has locked a row."""
    return await activity(connection, "wait_event_type = 'Lock' AND query LIKE 'UPDATE notes%'") > 0


async def test_a_batch_waits_for_nobody_for_long(fleet: Fleet, config: TenancyConfig, project: Project) -> None:
    """A row that a request has locked makes the batch smaller, and the batch gives way; both end."""
    project.add("0002", WORDS, down="0001")
    assert (await fleet.migrations.upgrade()).ok
    await fleet.execute("acme", FILL.format(35))
    add(project, "0003", COUNT, "pass", "pass")
    await fleet.provisioner.template("default")
    async with slowed(config, data_lock_timeout=0.1, data_pause=0) as other, fleet.connect("acme") as holder:
        transaction = holder.transaction()
        await transaction.start()
        await holder.execute("UPDATE notes SET body = 'mine' WHERE id = 15")
        running = asyncio.create_task(other.migrations.upgrade(tenants=["acme"]))

        async def is_next_to_it() -> bool:
            try:
                return (await fleet.fetch("acme", "SELECT after FROM tenancy_migration.data")) == [(["14"],)]
            except asyncpg.UndefinedTableError:
                return False

        # by ever smaller batches up to the locked row
        await until(is_next_to_it)
        await transaction.commit()
        report = await running
    assert report.ok, report.reasons
    assert await counts(fleet, "acme") == [(1, 35)]
    assert await fleet.fetch("acme", "SELECT body FROM notes WHERE id = 15") == [("mine",)]


async def test_a_busy_server_is_left_alone(fleet: Fleet, config: TenancyConfig, project: Project) -> None:
    """While a session of the tenant waits for a lock, or many are active, no batch begins."""
    await fleet.execute("acme", FILL.format(35) + "; CREATE TABLE gate ()")
    add(project, "0002", COUNT)
    await fleet.provisioner.template("default")
    async with slowed(config, data_pause=0) as other, fleet.connect("acme") as holder, fleet.connect("acme") as waiter:
        transaction = holder.transaction()
        await transaction.start()
        await holder.execute("LOCK TABLE gate")
        waiting = asyncio.create_task(waiter.fetch("SELECT FROM gate"))
        running = asyncio.create_task(other.migrations.upgrade(tenants=["acme"]))
        await until(lambda: has_checkpoints(fleet, "acme"))

        async def asks() -> bool:
            found = await fleet.fetch(
                "acme",
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
                "AND query ~ 'ROLLBACK|COMMIT|replay_lag' AND application_name LIKE 'tenancy-migration%'",
            )
            return found != [(0,)]

        await until(asks)
        assert await fleet.fetch("acme", CHECKPOINTS) == [("0002", "count_words", "upgrade", None, 0)]
        assert not running.done()
        await transaction.rollback()
        await waiting
        assert (await running).ok
    assert await counts(fleet, "acme") == [(1, 35)]


async def test_requests_are_served_at_the_revision_meanwhile(
    fleet: Fleet, config: TenancyConfig, project: Project
) -> None:
    """The registry has it before the first batch; a run that is interrupted leaves what is done, and can go on."""
    project.add("0002", WORDS, down="0001")
    assert (await fleet.migrations.upgrade()).ok
    await fleet.execute("acme", FILL.format(35) + "; ANALYZE notes")
    add(project, "0003", COUNT, 'op.execute("CREATE TABLE third ()")', 'op.execute("DROP TABLE third")')
    project.add("0004", 'op.execute("CREATE TABLE fourth ()")', 'op.execute("DROP TABLE fourth")', down="0003")
    await fleet.provisioner.template("default")
    async with slowed(config, data_lock_timeout=60, data_pause=0) as other, fleet.connect("acme") as holder:
        transaction = holder.transaction()
        await transaction.start()
        await holder.execute("UPDATE notes SET body = 'mine' WHERE id = 15")
        running = asyncio.create_task(other.migrations.upgrade(tenants=["acme"]))
        await until(lambda: is_waiting(holder))
        assert await fleet.recorded("acme") == "0003"
        migrating = "SELECT migrating_to FROM tenancy.tenants WHERE slug = 'acme'"
        async with fleet.tenancy.internals.control.connect() as control:
            assert (await control.exec_driver_sql(migrating)).scalar() is None
        run = (await fleet.migrations.runs())[0].id
        progress = await ProgressReader(fleet.tenancy.internals.control).read(run)
        assert f"data migrations {progress.data_rows} of 35 rows" in progress.line()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await transaction.commit()
    assert await fleet.fetch("acme", CHECKPOINTS) == [("0003", "count_words", "upgrade", ["10"], 10)]
    report = await fleet.migrations.upgrade()
    assert report.ok, report.reasons
    assert await counts(fleet, "acme") == [(1, 35)]
    assert (await fleet.revision("acme"), await fleet.recorded("acme")) == ("0004", "0004")


APART = "between the commit and the checkpoint"


@pytest.mark.parametrize("moment", [APART, "in the batch", "before the commit", "after the commit"])
async def test_a_kill_neither_repeats_nor_skips_a_batch(
    fleet: Fleet, config: TenancyConfig, project: Project, moment: str
) -> None:
    """SIGKILL in a batch, before and after its commit; with a checkpoint apart, one would repeat."""
    await fleet.execute("acme", FILL.format(45))
    add(project, "0002", COUNT)
    await fleet.provisioner.template("default")
    child = await start(config, moment)
    try:
        async with asyncio.timeout(60):
            assert await child.wait() == -signal.SIGKILL
    finally:
        child.kill()
        await child.wait()
    await until(
        lambda: fleet.fetch("acme", CHECKPOINTS),
        [
            ("0002", "count_words", "upgrade", ["30"], 30)
            if moment == "after the commit"
            else ("0002", "count_words", "upgrade", ["20"], 20)
        ],
    )
    assert (await fleet.migrations.upgrade()).ok
    assert await counts(fleet, "acme") == ([(1, 35), (2, 10)] if moment == APART else [(1, 45)])


async def test_plain_alembic_runs_them_as_well(fleet: Fleet, project: Project, alembic: Alembic) -> None:
    """``alembic upgrade`` and ``downgrade`` go through the same code; a stamp declares them done."""
    await fleet.execute("acme", FILL.format(35))
    add(project, "0002", COUNT)
    broken = COUNT.replace("words + 1", "words + CASE WHEN body = 'note 25' THEN 1 / (id - id) ELSE 1 END")
    add(project, "0002", broken)
    failed = await alembic("upgrade", "head", ok=False)
    assert "data migration 0002:count_words is unfinished: division by zero" in failed
    for verify in (False, True):
        assert [x.has_unfinished_data for x in await fleet.migrations.status(verify=verify)] == [True, False, False]
    assert "\n-- not in this script: data migration 0002:count_words\n" in await alembic("upgrade", "head", "--sql")
    await alembic("stamp", "0001")
    assert not await has_checkpoints(fleet, "acme")
    await fleet.execute("acme", "ALTER TABLE notes DROP COLUMN words")
    add(project, "0002", COUNT)
    await alembic("-x", "tenant=acme", "upgrade", "head")
    assert await counts(fleet, "acme") == [(1, 35)]
