"""Checks of revisions are asked of every tenant before the first one is changed."""

from __future__ import annotations

import asyncio
from pathlib import Path

import asyncpg
import pytest

from tenancy_orm.config import TenancyConfig
from tenancy_orm.errors import MigrationError, PreflightError
from tenancy_orm.events import MigrationPreflightEnded
from tenancy_orm.migrations import Check, checks
from tenancy_orm.migrations.checks import MOST_ROWS
from tenancy_orm.migrations.plan import Plan
from tests.support.alembic_program import Alembic
from tests.support.fleet import Fleet, activity, look_before_waiting, open_fleet, until
from tests.support.postgres import Postgres
from tests.support.projects import NOTES, Project

RATING = 'op.add_column("notes", sa.Column("rating", sa.Integer))'
NOT_EMPTY = """yield Check("no empty notes", "SELECT body FROM notes WHERE body = ''; -- all of them")"""


async def states(fleet: Fleet) -> list[str | None]:
    return [await fleet.revision(slug) for slug in fleet.tenants]


async def test_one_tenant_that_does_not_pass_stops_the_run_before_any_is_changed(
    fleet: Fleet, project: Project
) -> None:
    """Who fails is listed with the check's name and a count; no value of a row is anywhere."""
    project.add("0002", RATING, down="0001", preflight=NOT_EMPTY)
    await fleet.execute("globex", "INSERT INTO notes (body) VALUES (''), (''), ('secret')")
    events: list[MigrationPreflightEnded] = []
    fleet.tenancy.events.subscribe(MigrationPreflightEnded, events.append)
    with pytest.raises(PreflightError) as caught:
        await fleet.migrations.upgrade()
    assert [(one.target, one.tenants, one.checks, one.failed) for one in events] == [("head", 3, 3, 1)]
    assert caught.value.failures == {"globex": "0002 no empty notes: 2 rows"}
    assert str(caught.value) == (
        "preflight: 1 of 3 tenants failed, and none was touched: globex: 0002 no empty notes: 2 rows"
    )
    assert await states(fleet) == ["0001"] * 3

    report = await fleet.migrations.preflight()
    assert [(one.slug, one.revision, one.checks, one.ok) for one in report.outcomes] == [
        ("acme", "0001", 1, True),
        ("globex", "0001", 1, False),
        ("initech", "0001", 1, True),
    ]
    assert report.summary().startswith("preflight of head: 3 tenants, 3 checks asked, 1 failed, ")

    # its record says why it ended; once the data is mended, the run goes on, and asks again
    (run,) = await fleet.migrations.runs()
    assert (run.state, run.reason) == ("failed", str(caught.value))
    assert {one.state for one in await fleet.migrations.run_tenants(run.id)} == {"skipped"}
    with pytest.raises(PreflightError):
        await fleet.migrations.resume(run.id)

    # the others alone, or all without it
    assert (await fleet.migrations.upgrade(tenants=["acme"])).ok
    assert (await fleet.migrations.upgrade(skip_preflight=True)).ok
    assert await states(fleet) == ["0002"] * 3
    assert (await fleet.migrations.preflight()).summary().startswith("preflight of head: 3 tenants, 0 checks asked")


async def test_texts_parameters_and_selects(fleet: Fleet, project: Project) -> None:
    """In each form a check counts rows, few or many, and ``op`` and the tenant are there as in a revision."""
    project.add(
        "0002",
        RATING,
        down="0001",
        preflight=f"""
            notes = sa.table("notes", sa.column("id"), sa.column("body"))
            yield "(SELECT 1 FROM notes WHERE body LIKE '%:x; --' ORDER BY 1) /* in a comment: ; */"
            yield sa.text("SELECT id, id FROM notes WHERE body = :body;").bindparams(body="b")
            yield sa.select(notes.c.id, notes.c.id).where(notes.c.body == "c").order_by(notes.c.id)
            yield Check("many", "SELECT FROM generate_series(1, {MOST_ROWS * 2})")
            yield Check("of two", sa.union_all(sa.select(notes.c.id), sa.select(notes.c.id)))
            tenant = op.get_context().opts["tenant"]
            yield Check(f"{{tenant and tenant.slug}}", "TABLE notes")
        """,
    )
    await fleet.execute("acme", "INSERT INTO notes (body) VALUES ('a%:x; --'), ('b'), ('c'), ('c')")
    (acme, *others) = (await fleet.migrations.preflight()).outcomes
    assert [str(one) for one in acme.findings] == [
        "0002 check 1: 1 row",
        "0002 check 2: 1 row",
        "0002 check 3: 2 rows",
        "0002 many: more than 10000 rows",
        "0002 of two: 8 rows",
        "0002 acme: 4 rows",
    ]
    assert [[one.check for one in other.findings] for other in others] == [["many"]] * 2


async def test_what_is_no_check_is_refused(fleet: Fleet, project: Project) -> None:
    """So is what writes, also in disguise; and no error quotes a row."""
    await fleet.execute("acme", "INSERT INTO notes (body) VALUES ('a secret')")
    await fleet.execute(
        "acme", "CREATE FUNCTION public.wipe() RETURNS int LANGUAGE sql AS 'DELETE FROM notes; SELECT 1'"
    )
    wrong = {
        'yield Check("many", "SELECT 1; SELECT 2")': "check 'many' must be one SELECT, which returns what is wrong",
        'yield "DELETE FROM notes"': "check 'check 1' must be one SELECT, which returns what is wrong",
        'yield "WITH x AS (DELETE FROM notes RETURNING 1) TABLE x"': "top level (SQLSTATE 0A000)",
        'yield "SELECT public.wipe()"': "cannot execute DELETE in a read-only transaction (SQLSTATE 25006)",
        'yield "SELECT FROM notes FOR UPDATE"': "in a read-only transaction (SQLSTATE 25006)",
        'op.execute("DELETE FROM notes"); return []': "in a read-only transaction (SQLSTATE 25006)",
        'yield "SELECT FROM notes WHERE body::int > 0"': "0002 check 1: it fails with SQLSTATE 22P02",
        'yield "SELECT FROM nots"': 'relation "nots" does not exist (SQLSTATE 42P01)',
        "yield 7": "preflight() of 0002 yields a int; yield a text of SQL, a select or a Check",
        "return 7": "preflight() of 0002 must yield checks, and returns a int",
        'raise ValueError("a secret")': "0002 preflight(): it raises ValueError",
        "op.get_bind().commit(); return []": "0002 preflight(): it ends the transaction that it is asked in",
    }
    for body, message in wrong.items():
        project.add("0002", RATING, down="0001", preflight=body)
        (outcome,) = (await fleet.migrations.preflight(tenants=["acme"])).outcomes
        assert outcome.reason is not None and message in outcome.reason, (body, outcome.reason)
        assert "secret" not in outcome.reason
        assert await fleet.fetch("acme", "SELECT count(*) FROM notes") == [(1,)]
    for name, statement in (("", "SELECT 1"), ("x", 7)):
        with pytest.raises(MigrationError):
            Check(name, statement)  # type: ignore[arg-type]


async def test_a_check_of_what_an_earlier_revision_creates_is_asked_in_its_place(
    fleet: Fleet, config: TenancyConfig, project: Project
) -> None:
    """In the transaction of the tenant, which fails alone; it can still not write there."""
    project.add("0002", RATING, down="0001")
    project.add(
        "0003",
        'op.alter_column("notes", "rating", nullable=False)',
        down="0002",
        preflight="""
            yield Check("every note is rated", "SELECT FROM notes WHERE rating IS NULL")
            yield Check("no empty notes", "SELECT FROM notes WHERE body = ''")
            yield Check("later", "SELECT FROM notes WHERE body = 'later'", deferred=True)
        """,
    )
    await fleet.execute("acme", "INSERT INTO notes (body) VALUES ('')")
    report = await fleet.migrations.preflight()
    assert [one.deferred for one in report.outcomes] == [("0003",)] * 3
    assert report.reasons == {"acme": "0003 no empty notes: 1 row"}
    assert "deferred: 0003" in report.summary()

    await fleet.execute("acme", "UPDATE notes SET body = 'later'")
    run = await fleet.migrations.upgrade()
    assert run.reasons == {"acme": "upgrade 0002 -> 0003: preflight: every note is rated: 1 row; later: 1 row"}
    assert await states(fleet) == ["0001", "0003", "0003"]

    # a transaction that has written refuses to write while it asks, and goes on to write
    insert = "op.execute(\"INSERT INTO notes (body) VALUES ('0003')\")"
    nothing = 'yield Check("nothing", "SELECT FROM notes WHERE rating = 7")'
    writes = 'if op.get_context().opts["tenant"] is not None: op.execute("DELETE FROM notes")'
    project.add("0003", insert, down="0002", preflight=f"{nothing}\n{writes}")
    async with open_fleet(config) as again:
        plan = Plan.of(await again.migrations.environment(), "upgrade", "head")
        reasons = (await again.migrations.execute(plan, ["acme"], checks="in_place")).reasons
        assert "cannot execute DELETE in a read-only transaction (SQLSTATE 25006)" in reasons["acme"]
    project.add("0003", insert, down="0002", preflight=nothing)
    async with open_fleet(config) as again:
        assert (await again.migrations.upgrade(tenants=["acme"])).ok
    assert await fleet.fetch("acme", "SELECT count(*) FROM notes") == [(2,)]


async def test_a_check_that_cannot_be_executed_fails_in_the_template(fleet: Fleet, project: Project) -> None:
    """Rows in a template are no failure: it has no data of its own."""
    project.add("0002", RATING, down="0001")
    project.add("0003", "pass", down="0002", preflight='yield "SELECT FROM notes WHERE ratting IS NULL"')
    with pytest.raises(MigrationError, match=r"template could not be built.*column \"ratting\" does not exist"):
        await fleet.migrations.upgrade()
    project.add("0003", "pass", down="0002", preflight='yield "SELECT 1 WHERE NOT EXISTS (TABLE notes)"')
    for slug in fleet.tenants:
        await fleet.execute(slug, "INSERT INTO notes (body) VALUES ('one')")
    assert (await fleet.migrations.upgrade()).ok


async def test_asking_is_bounded_and_a_lock_is_waited_for_again(
    fleet: Fleet, config: TenancyConfig, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.add(
        "0002", RATING, down="0001", preflight='yield Check("slow", "SELECT FROM notes, LATERAL pg_sleep(60 + id)")'
    )
    await fleet.execute("acme", "INSERT INTO notes (body) VALUES ('one')")
    async with open_fleet(config.replace(migration={"preflight_timeout": 1})) as other:
        report = await other.migrations.preflight()
        assert report.reasons == {"acme": "0002 slow: no answer within 1 s; migration.preflight_timeout is the limit"}
    project.add("0002", RATING, down="0001", preflight=NOT_EMPTY)
    # as many attempts as it takes until two of them were seen
    settings = {"lock_timeout": 0.2, "attempts": 1_000}
    async with open_fleet(config.replace(migration=settings)) as other, fleet.connect("acme") as holder:
        transaction = holder.transaction()
        await transaction.start()
        await holder.execute("LOCK TABLE notes")

        async def is_waiting() -> bool:
            return await activity(holder, "wait_event_type = 'Lock'") > 0

        asking = asyncio.create_task(other.migrations.preflight())
        for _ in range(2):
            await until(is_waiting)
            await until(is_waiting, False)
        await transaction.commit()
        assert (await asking).ok
    look_before_waiting(monkeypatch)
    settings = {"lock_timeout": 0.8, "attempts": 1}
    async with open_fleet(config.replace(migration=settings)) as other, fleet.connect("acme") as holder:
        async with holder.transaction():
            await holder.execute("LOCK TABLE notes")
            (reason,) = (await other.migrations.preflight()).reasons.values()
        assert f"(SQLSTATE 55P03), blocked by pid {holder.get_server_pid()} (" in reason


async def test_a_tenant_that_cannot_be_asked_fails(fleet: Fleet, project: Project) -> None:
    """Here because its database is another's; a tenant that is not at the recorded revision is asked from its own."""
    project.add("0002", RATING, down="0001", preflight=NOT_EMPTY)
    await fleet.execute("acme", f'COMMENT ON DATABASE "{fleet.database("acme")}" IS NULL')
    with pytest.raises(PreflightError, match="acme: not asked: "):
        await fleet.migrations.upgrade()
    assert (await fleet.migrations.upgrade(tenants=["globex", "initech"])).ok
    # the registry is wrong: it is at 0001 in fact
    await fleet.execute("globex", "UPDATE alembic_version SET version_num = '0001'; ALTER TABLE notes DROP rating")
    await fleet.execute("globex", "INSERT INTO notes (body) VALUES ('')")
    report = await fleet.migrations.upgrade(tenants=["globex", "initech"])
    assert "preflight: no empty notes: 1 row" in report.reasons["globex"]


HOSTILE = """
CREATE FUNCTION public.lower(varchar) RETURNS text LANGUAGE plpgsql AS $$
BEGIN
    PERFORM set_config('role', 'none', false);
    RETURN current_user;
END $$
"""


async def test_a_tenants_own_code_is_not_executed(
    fleet: Fleet, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the refusal off, a tenant's function runs in the owner's session, and becomes the administrator."""
    tenant = fleet.tenants["acme"]
    assert tenant.placement is not None
    role = tenant.placement.role
    project.add(
        "0002", RATING, down="0001",
        preflight="""
            administrator = op.get_bind().exec_driver_sql("SELECT session_user").scalar()
            yield Check("became administrator", f"SELECT FROM notes WHERE lower(body) = '{administrator}'")
        """,
    )  # fmt: skip
    await fleet.execute("acme", "INSERT INTO notes (body) VALUES ('one')")
    await fleet.execute("acme", f'GRANT CREATE ON SCHEMA public TO "{role}"; SET ROLE "{role}"; {HOSTILE}')
    with monkeypatch.context() as patched:
        patched.setattr("tenancy_orm.migrations.preflight.refuse_foreign_code", lambda connection, tenant: None)
        assert (await fleet.migrations.preflight()).reasons == {"acme": "0002 became administrator: 1 row"}
    for undone in ("SELECT 1", f'REVOKE CREATE ON SCHEMA public FROM "{role}"'):
        await fleet.execute("acme", undone)
        (reason,) = (await fleet.migrations.preflight()).reasons.values()
        assert "the tenant's role may create objects in schema 'public', or owns some there" in reason
    # nor in the transaction of the migration
    with monkeypatch.context() as patched:
        patched.setattr("tenancy_orm.migrations.preflight.refuse_foreign_code", lambda connection, tenant: None)
        project.add("0002", RATING, down="0001", preflight='yield Check("x", "SELECT FROM notes", deferred=True)')
        report = await fleet.migrations.upgrade(tenants=["acme"])
    assert "or owns some there" in report.reasons["acme"]
    await fleet.execute("acme", "DROP FUNCTION public.lower(varchar)")
    project.add("0002", RATING, down="0001", preflight=NOT_EMPTY)
    assert (await fleet.migrations.preflight()).ok


async def test_row_security_hides_nothing_from_a_check(
    fleet: Fleet, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table that forces row security on its owner is an error, and no success."""
    project.add("0002", RATING, down="0001", preflight=NOT_EMPTY)
    await fleet.execute("acme", "INSERT INTO notes (body) VALUES ('')")
    await fleet.execute("acme", "ALTER TABLE notes ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY")
    (reason,) = (await fleet.migrations.preflight()).reasons.values()
    assert "row-level security" in reason and "42501" in reason
    monkeypatch.setattr(
        checks, "_READ_ONLY", checks._READ_ONLY.replace("'row_security', 'off'", "'row_security', 'on'")
    )
    assert (await fleet.migrations.preflight()).ok


# --- the programs ---------------------------------------------------------------------------------------------------


async def test_alembic_upgrade_honours_it(alembic: Alembic, fleet: Fleet, project: Project) -> None:
    project.add("0002", RATING, down="0001", preflight=NOT_EMPTY)
    await fleet.execute("globex", "INSERT INTO notes (body) VALUES ('')")
    printed = await alembic("upgrade", "head", ok=False)
    assert printed.startswith("FAILED globex: 0002 no empty notes: 1 row\n")
    assert "FAILED: preflight: 1 of 3 tenants failed, and none was touched" in printed
    assert printed.count("no empty notes") == 1
    assert await states(fleet) == ["0001"] * 3
    assert "give true or false" in await alembic("-x", "skip_preflight=1", "upgrade", "head", ok=False)
    await alembic("-x", "skip_preflight=true", "upgrade", "head")
    assert await states(fleet) == ["0002"] * 3


PLAIN = """
from alembic import context
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import create_async_engine
from tenancy_orm import environment
import asyncio, os

def migrate(connection):
    context.configure(connection=connection, transaction_per_migration={each})
    with context.begin_transaction():
        environment.preflight(context)
        context.run_migrations()

async def run():
    engine = create_async_engine(os.environ["PLAIN_URL"])
    async with engine.connect() as connection:
        await connection.run_sync(migrate)
        await connection.commit()
    await engine.dispose()

if context.is_offline_mode():
    context.configure(dialect_name="postgresql")
    environment.preflight(context)
    context.run_migrations()
else:
    asyncio.run(run())
"""


@pytest.mark.parametrize("each", [False, True])
async def test_an_env_of_plain_alembic_calls_it(each: bool, tmp_path: Path, postgres: Postgres, empty_url: str) -> None:
    """On the one database of the project; deferred checks run before their revision."""
    project = Project.create(tmp_path / "plain")
    (project.migrations / "env.py").write_text(PLAIN.format(each=each))
    project.add("0001", NOTES)
    program = Alembic(project, {"PLAIN_URL": empty_url.replace("postgresql://", "postgresql+asyncpg://")})
    await program("upgrade", "head")
    project.add("0002", RATING, down="0001", preflight=NOT_EMPTY)
    project.add("0003", "pass", down="0002", preflight='yield Check("rated", "SELECT FROM notes WHERE rating IS NULL")')
    connection = await asyncpg.connect(empty_url)
    try:
        await connection.execute("INSERT INTO notes (body) VALUES ('')")
        assert "preflight: nothing was changed: 0002 no empty notes: 1 row" in await program(
            "upgrade", "head", ok=False
        )
        await connection.execute("UPDATE notes SET body = 'one'")
        assert "preflight: 0003 rated: 1 row" in await program("upgrade", "head", ok=False)
        reached = await connection.fetchval("SELECT version_num FROM alembic_version")
        assert reached == ("0002" if each else "0001")
        await connection.execute("DELETE FROM notes")
        await program("upgrade", "head")
        assert await connection.fetchval("SELECT version_num FROM alembic_version") == "0003"
        assert "ALTER TABLE notes" in await program("upgrade", "head", "--sql")
    finally:
        await connection.close()
