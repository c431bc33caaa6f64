"""Every tenant's database is migrated; failures are reported by tenant, and revisions are read back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from tenancy_orm.errors import (
    ConfigurationError,
    FleetMigrationError,
    MigrationError,
    TenantNotFoundError,
    TenantProvisioningError,
    WrongEventLoopError,
)
from tenancy_orm.events import TenantMigrated, TenantMigrationFailed
from tenancy_orm.migrations.plan import Plan
from tenancy_orm.registry.rows import TenantDraft, uuid7
from tenancy_orm.runs import FleetReport, TenantOutcome
from tenancy_orm.tenant import Status, Tenant
from tests.support.alembic_proxies import assert_nothing_is_active, run_plain_alembic
from tests.support.fleet import Fleet, activity, count_queries, until
from tests.support.projects import Project

TENANTS = ("acme", "globex", "initech")
RATING = 'op.add_column("notes", sa.Column("rating", sa.Integer))'
NO_RATING = 'op.drop_column("notes", "rating")'


def results(report: FleetReport) -> dict[str, tuple[str | None, str | None, bool]]:
    return {outcome.slug: (outcome.before, outcome.after, outcome.changed) for outcome in report.outcomes}


def add_rating(project: Project) -> None:
    project.add("0002", RATING, NO_RATING, down="0001")


# --- upgrade --------------------------------------------------------------------------------------------------------


async def test_every_tenant_is_upgraded(fleet: Fleet, project: Project) -> None:
    add_rating(project)
    report = await fleet.migrations.upgrade()
    assert results(report) == dict.fromkeys(TENANTS, ("0001", "0002", True))
    assert report.ok
    for slug in TENANTS:
        assert await fleet.columns(slug) == ["id", "body", "rating"]
        assert await fleet.revision(slug) == "0002"
        assert await fleet.recorded(slug) == "0002"


async def test_what_is_at_head_is_left_alone(fleet: Fleet) -> None:
    report = await fleet.migrations.upgrade()
    assert results(report) == dict.fromkeys(TENANTS, ("0001", "0001", False))
    assert report.changed == ()


async def test_a_tenant_at_head_costs_one_connection_and_one_select(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    await fleet.provisioner.template("default")
    queries = count_queries(fleet.services.servers["default"], monkeypatch)
    await fleet.migrations.upgrade()
    queries.pop(None, None)  # who shares the server's connections may have looked at it
    assert [len(asked) for asked in queries.values()] == [1, 1, 1]


async def test_a_migrated_tenant_is_asked_for_its_state_by_one_statement(
    fleet: Fleet, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the lock, under it, after the notice, and at the end: prepared once. DDL is not prepared at all."""
    add_rating(project)
    await fleet.provisioner.template("default")
    queries = count_queries(fleet.services.servers["default"], monkeypatch)
    assert len((await fleet.migrations.upgrade()).changed) == 3
    queries.pop(None, None)  # who shares the server's connections may have looked at it
    assert len(queries) == 3
    for asked in queries.values():
        states = [query for query in asked if " AS heads" in query]
        assert len(states) == 4
        assert len(set(states)) == 1
        assert "pg_try_advisory_lock" in states[0]
        assert asked[-5:-1] == [
            "BEGIN;",
            "ALTER TABLE notes ADD COLUMN rating INTEGER",
            "UPDATE alembic_version SET version_num='0002' WHERE alembic_version.version_num = '0001'",
            "COMMIT;",
        ]


async def test_a_tenant_that_the_registry_has_elsewhere_is_migrated_all_the_same(
    fleet: Fleet, project: Project
) -> None:
    """Its first SELECT takes no lock, or one for nothing."""
    add_rating(project)
    await fleet.registry.set_revision(fleet.tenants["acme"].id, "0002")
    await fleet.registry.set_revision(fleet.tenants["globex"].id, "0009")
    await fleet.execute(
        "initech", "ALTER TABLE notes ADD rating integer; UPDATE alembic_version SET version_num = '0002'"
    )
    assert results(await fleet.migrations.upgrade()) == {
        "acme": ("0001", "0002", True),
        "globex": ("0001", "0002", True),
        "initech": ("0002", "0002", False),
    }


async def test_tenants_can_be_chosen(fleet: Fleet, project: Project) -> None:
    add_rating(project)
    acme, globex = fleet.tenants["acme"], fleet.tenants["globex"]
    report = await fleet.migrations.upgrade(tenants=[acme, str(globex.id), "acme", globex.id])
    assert results(report) == dict.fromkeys(("acme", "globex"), ("0001", "0002", True))
    assert await fleet.revision("initech") == "0001"


async def test_an_unknown_tenant_is_refused_before_any_is_touched(fleet: Fleet, project: Project) -> None:
    add_rating(project)
    with pytest.raises(TenantNotFoundError, match="'nobody'"):
        await fleet.migrations.upgrade(tenants=["acme", "nobody"])
    assert await fleet.revision("acme") == "0001"


async def test_an_unknown_revision_is_refused_before_any_tenant_is_touched(fleet: Fleet) -> None:
    with pytest.raises(MigrationError, match="Can't locate revision identified by '0009'"):
        await fleet.migrations.upgrade("0009")


async def test_concurrency_must_be_a_number_from_one(fleet: Fleet) -> None:
    with pytest.raises(ConfigurationError, match="at least 1"):
        await fleet.migrations.upgrade(concurrency=0)


async def test_a_migration_that_fails_on_the_template_touches_no_tenant(fleet: Fleet, project: Project) -> None:
    project.add("0002", RATING + '\nop.execute("SELECT no_such_function()")', down="0001")
    with pytest.raises(MigrationError, match=r"no tenant was touched: .*42883"):
        await fleet.migrations.upgrade()
    for slug in TENANTS:
        assert await fleet.columns(slug) == ["id", "body"]


async def test_new_tenants_are_at_the_new_head(fleet: Fleet, project: Project) -> None:
    add_rating(project)
    await fleet.migrations.upgrade()
    await fleet.create("hooli")
    assert await fleet.revision("hooli") == "0002"
    assert await fleet.recorded("hooli") == "0002"


# --- failures -------------------------------------------------------------------------------------------------------


async def test_one_tenants_failure_does_not_stop_the_others(fleet: Fleet, project: Project) -> None:
    add_rating(project)
    await fleet.execute("globex", "ALTER TABLE notes ADD rating text")
    report = await fleet.migrations.upgrade()
    assert results(report) == {
        "acme": ("0001", "0002", True),
        "globex": ("0001", "0001", False),
        "initech": ("0001", "0002", True),
    }
    (failure,) = report.failures
    assert failure.sqlstate == "42701"
    assert failure.error is not None
    assert failure.error.startswith("upgrade 0001 -> 0002: ")
    assert await fleet.recorded("globex") == "0001"
    with pytest.raises(FleetMigrationError, match="1 of 3 tenants failed to migrate: globex") as raised:
        report.raise_for_failures()
    assert raised.value.failures == {"globex": failure.error}


async def test_a_run_can_stop_at_the_first_failure(fleet: Fleet, project: Project) -> None:
    add_rating(project)
    await fleet.execute("acme", "ALTER TABLE notes ADD rating text")
    report = await fleet.migrations.upgrade(concurrency=1, stop_on_failure=True)
    assert [failure.slug for failure in report.failures] == ["acme"]
    assert report.skipped == ("globex", "initech")
    assert report.total == 3
    assert await fleet.revision("globex") == "0001"
    with pytest.raises(FleetMigrationError, match="3 of 3") as raised:
        report.raise_for_failures()
    assert "not started" in raised.value.failures["initech"]


async def test_values_of_rows_are_kept_out_of_the_report(fleet: Fleet, project: Project) -> None:
    project.add("0002", 'op.create_unique_constraint("notes_body_key", "notes", ["body"])', down="0001")
    await fleet.execute("acme", "INSERT INTO notes (body) VALUES ('my secret'), ('my secret')")
    report = await fleet.migrations.upgrade()
    (failure,) = report.failures
    assert failure.sqlstate == "23505"
    assert "secret" not in str(report)


async def test_what_was_reached_before_a_failure_is_recorded(fleet: Fleet, project: Project) -> None:
    project.configure("target_metadata=target_metadata, transaction_per_migration=True")
    add_rating(project)
    project.add("0003", 'op.add_column("notes", sa.Column("author", sa.Text))', down="0002")
    await fleet.execute("globex", "ALTER TABLE notes ADD author text")
    report = await fleet.migrations.upgrade()
    assert results(report)["globex"] == ("0001", "0002", True)
    assert [failure.slug for failure in report.failures] == ["globex"]
    assert await fleet.revision("globex") == await fleet.recorded("globex") == "0002"


async def test_a_tenant_that_does_not_end_where_it_should_has_failed(fleet: Fleet, project: Project) -> None:
    """The revision is read back: here a trigger undoes it at commit, as a revision with its own ROLLBACK could."""
    add_rating(project)
    await fleet.execute(
        "globex",
        """
        CREATE FUNCTION undo() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN UPDATE alembic_version SET version_num = '0001'; RETURN NULL; END $$;
        CREATE CONSTRAINT TRIGGER undo AFTER UPDATE ON alembic_version DEFERRABLE INITIALLY DEFERRED
            FOR EACH ROW WHEN (NEW.version_num = '0002') EXECUTE FUNCTION undo();
        """,
    )
    report = await fleet.migrations.upgrade()
    (failure,) = report.failures
    assert failure.slug == "globex"
    assert "it is at 0001 and not at 0002 although the migration reported no error" in str(failure.error)


async def test_a_connection_that_is_lost_is_one_tenants_failure(fleet: Fleet, project: Project) -> None:
    die = """
        tenant = op.get_context().opts["tenant"]
        if tenant is not None and tenant.slug == "globex":
            op.execute("SET LOCAL ROLE NONE")
            op.execute("SELECT pg_terminate_backend(pg_backend_pid())")
    """
    project.add("0002", RATING + die.replace("\n        ", "\n"), down="0001")
    report = await fleet.migrations.upgrade()
    (failure,) = report.failures
    assert failure.slug == "globex"
    assert failure.sqlstate in ("57P01", "08003"), "the server's last word, or the closed connection"
    assert await fleet.revision("globex") == "0001"


# --- downgrade and stamp --------------------------------------------------------------------------------------------


async def test_every_tenant_is_downgraded(fleet: Fleet, project: Project) -> None:
    add_rating(project)
    await fleet.migrations.upgrade()
    report = await fleet.migrations.downgrade("-1")
    assert results(report) == dict.fromkeys(TENANTS, ("0002", "0001", True))
    assert await fleet.columns("acme") == ["id", "body"]
    report = await fleet.migrations.downgrade("base")
    assert results(report) == dict.fromkeys(TENANTS, ("0001", None, True))
    assert await fleet.recorded("acme") is None
    report = await fleet.migrations.upgrade("+1")
    assert results(report) == dict.fromkeys(TENANTS, (None, "0001", True))


async def test_a_relative_target_that_a_tenant_does_not_have_is_its_failure(fleet: Fleet, project: Project) -> None:
    add_rating(project)
    await fleet.migrations.upgrade(tenants=["acme"])
    report = await fleet.migrations.upgrade("+1")
    assert [failure.slug for failure in report.failures] == ["acme"]
    assert results(report)["globex"] == ("0001", "0002", True)


async def test_stamping_writes_the_revision_and_runs_nothing(fleet: Fleet, project: Project) -> None:
    add_rating(project)
    report = await fleet.migrations.stamp("head")
    assert results(report) == dict.fromkeys(TENANTS, ("0001", "0002", True))
    assert await fleet.columns("acme") == ["id", "body"]
    assert await fleet.recorded("acme") == "0002"


async def test_stamping_can_purge_revisions_that_are_no_more(fleet: Fleet) -> None:
    await fleet.execute("acme", "UPDATE alembic_version SET version_num = 'lost'")
    report = await fleet.migrations.stamp("head")
    assert "Can't locate revision identified by 'lost'" in str(report.failures[0].error)
    report = await fleet.migrations.stamp("head", purge=True)
    assert report.ok
    assert results(report) == {"acme": ("lost", "0001", True)} | dict.fromkeys(
        ("globex", "initech"), ("0001", "0001", False)
    )


# --- which tenants --------------------------------------------------------------------------------------------------


async def test_deleted_and_suspended_tenants_are_migrated_too(fleet: Fleet, project: Project) -> None:
    """A restored tenant must fit the code."""
    add_rating(project)
    await fleet.registry.transition(fleet.tenants["acme"].id, Status.SUSPENDED, action="tenant.suspend")
    await fleet.registry.transition(fleet.tenants["globex"].id, Status.DELETED, action="tenant.delete")
    report = await fleet.migrations.upgrade()
    assert results(report) == dict.fromkeys(TENANTS, ("0001", "0002", True))


async def test_tenants_that_come_or_go_are_left_alone(fleet: Fleet, project: Project) -> None:
    add_rating(project)
    await register(fleet, "coming")
    await fleet.registry.transition(fleet.tenants["globex"].id, Status.DELETED, action="tenant.delete")
    await fleet.registry.begin_purge(fleet.tenants["globex"].id)
    report = await fleet.migrations.upgrade()
    assert set(results(report)) == {"acme", "initech"}
    with pytest.raises(TenantProvisioningError):
        await fleet.migrations.upgrade(tenants=["coming"])


async def register(fleet: Fleet, slug: str) -> Tenant:
    """Begin to create a tenant."""
    tenant_id = uuid7()
    name = fleet.services.names.tenant(tenant_id)
    return await fleet.registry.register(
        TenantDraft(
            id=tenant_id, slug=slug, tier="free", server="default", database=name, role=name, sealed_password=b"-"
        )
    )


async def test_a_fleet_without_tenants_gets_its_template(fleet: Fleet, project: Project) -> None:
    for slug in TENANTS:
        await fleet.registry.transition(fleet.tenants[slug].id, Status.DELETED, action="tenant.delete")
        await fleet.registry.begin_purge(fleet.tenants[slug].id)
    project.add("0002", 'op.execute("SELECT no_such_function()")', down="0001")
    with pytest.raises(MigrationError, match="the template could not be built"):
        await fleet.migrations.upgrade()


# --- env.py and revisions -------------------------------------------------------------------------------------------


async def test_a_revision_learns_whose_database_it_is(fleet: Fleet, project: Project) -> None:
    body = """
        tenant = op.get_context().opts["tenant"]
        op.add_column("notes", sa.Column(tenant.slug if tenant else "nobody", sa.Integer))
        assert context.get_context() is op.get_context()
    """
    project.add("0002", body, down="0001")
    await fleet.migrations.upgrade()
    await fleet.create("hooli")
    assert [(await fleet.columns(slug))[-1] for slug in (*TENANTS, "hooli")] == [*TENANTS, "nobody"]


async def test_revisions_get_x_arguments(fleet: Fleet, project: Project) -> None:
    body = 'op.add_column("notes", sa.Column(context.get_x_argument(as_dictionary=True).get("name", "x"), sa.Text))'
    project.add("0002", body, down="0001")
    await fleet.migrations.upgrade(x=["name=colour"])
    assert (await fleet.columns("acme"))[-1] == "colour"


async def test_options_of_env_py_are_honoured(fleet: Fleet, project: Project) -> None:
    project.configure('target_metadata=target_metadata, version_table="revisions", version_table_schema="public"')
    await fleet.execute("acme", "ALTER TABLE alembic_version RENAME TO revisions")
    add_rating(project)
    report = await fleet.migrations.upgrade(tenants=["acme"])
    assert results(report) == {"acme": ("0001", "0002", True)}
    assert await fleet.fetch("acme", "SELECT version_num FROM revisions") == [("0002",)]


async def test_a_database_without_version_table_is_at_base(fleet: Fleet) -> None:
    await fleet.execute("acme", "DROP TABLE alembic_version, notes")
    report = await fleet.migrations.upgrade()
    assert results(report)["acme"] == (None, "0001", True)


@pytest.mark.parametrize("options", ["", ", transaction_per_migration=True", ', version_table="revisions"'])
async def test_a_tenant_cannot_write_a_version_table_that_is_made_later(
    fleet: Fleet, project: Project, options: str
) -> None:
    """The role's default privileges on the owner's new tables are reduced to SELECT on a version table."""
    project.configure("target_metadata=target_metadata" + options)
    await fleet.execute("acme", "DROP TABLE alembic_version, notes")
    assert (await fleet.migrations.upgrade(tenants=["acme"])).ok
    table = "revisions" if "revisions" in options else "alembic_version"
    role = fleet.database("acme")  # a tenant's role is named as its database is
    rights = [
        f"has_table_privilege('{role}', '{name}', '{right}')"
        for name, right in (("notes", "UPDATE"), (table, "SELECT"), (table, "UPDATE"), (table, "INSERT, DELETE"))
    ]
    assert await fleet.fetch("acme", f"SELECT {', '.join(rights)}") == [(True, True, False, False)]


async def test_env_py_and_scripts_are_loaded_once(fleet: Fleet, project: Project) -> None:
    log = project.root / "loaded"
    note = f"\nwith open({str(log)!r}, 'a') as log: log.write({{0!r}})\n"
    env, script = project.migrations / "env.py", project.migrations / "versions" / "0001.py"
    env.write_text(env.read_text() + note.format("e"))
    script.write_text(script.read_text() + note.format("s"))
    add_rating(project)
    await fleet.provisioner.template("default")
    log.write_text("")
    await fleet.migrations.upgrade()
    assert log.read_text() == "es"


async def test_an_env_py_that_runs_no_migrations_is_refused(fleet: Fleet, project: Project) -> None:
    (project.migrations / "env.py").write_text("from alembic import context\ncontext.is_offline_mode()\n")
    with pytest.raises(ConfigurationError, match=r"env.py cannot be used: it calls neither .*environment.run"):
        await fleet.migrations.upgrade()


async def test_plain_alembic_works_in_the_same_process(fleet: Fleet, project: Project, tmp_path: Path) -> None:
    """After a run, and after one that failed in the template, in env.py, or in a tenant."""
    expected = run_plain_alembic(tmp_path / "own")

    def check() -> None:
        assert_nothing_is_active()
        assert run_plain_alembic(tmp_path / "own") == expected

    assert (await fleet.migrations.upgrade()).ok
    check()
    revision = project.add("0002", "op.execute('SELECT 1/0')", down="0001")
    with pytest.raises(MigrationError):
        await fleet.migrations.upgrade()
    check()
    assert not (await fleet.migrations.upgrade("+1")).ok
    check()
    revision.write_text("raise ZeroDivisionError")
    with pytest.raises(ZeroDivisionError):
        await fleet.migrations.upgrade()
    check()


async def test_several_heads_and_dependencies(fleet: Fleet, project: Project) -> None:
    project.add("a1", 'op.add_column("notes", sa.Column("a", sa.Text))', 'op.drop_column("notes", "a")', down="0001")
    project.add("b1", 'op.create_table("b", sa.Column("id", sa.Integer))', 'op.drop_table("b")', depends="0001")
    with pytest.raises(MigrationError, match="Multiple head revisions"):
        await fleet.migrations.upgrade()
    report = await fleet.migrations.upgrade("heads")
    assert results(report) == dict.fromkeys(TENANTS, ("0001", "a1,b1", True))
    assert await fleet.recorded("acme") == "a1,b1"
    await fleet.create("hooli")
    assert await fleet.recorded("hooli") == "a1,b1"
    project.add("m1", down=("a1", "b1"))
    report = await fleet.migrations.upgrade()
    assert results(report) == dict.fromkeys((*TENANTS, "hooli"), ("a1,b1", "m1", True))
    report = await fleet.migrations.downgrade("b1@base", tenants=["acme"])
    assert results(report) == {"acme": ("m1", "a1", True)}


async def test_a_revision_may_leave_its_transaction(fleet: Fleet, project: Project) -> None:
    body = """
        op.add_column("notes", sa.Column("rating", sa.Integer))
        with op.get_context().autocommit_block():
            op.create_index("ix_notes_rating", "notes", ["rating"], postgresql_concurrently=True)
        op.add_column("notes", sa.Column("last", sa.Integer))
    """
    project.add("0002", body, down="0001")
    report = await fleet.migrations.upgrade()
    assert report.ok
    assert await fleet.fetch("acme", "SELECT indisvalid FROM pg_index WHERE indexrelid = 'ix_notes_rating'::regclass")
    assert (await fleet.columns("acme"))[-1] == "last"


# --- events and progress --------------------------------------------------------------------------------------------


async def test_every_tenant_is_an_event(fleet: Fleet, project: Project) -> None:
    add_rating(project)
    await fleet.execute("globex", "ALTER TABLE notes ADD rating text")
    events: list[TenantMigrated | TenantMigrationFailed] = []
    fleet.services.events.subscribe(TenantMigrated, events.append)
    fleet.services.events.subscribe(TenantMigrationFailed, events.append)
    await fleet.migrations.upgrade()
    seen = {event.slug: event for event in events}
    acme, globex = seen["acme"], seen["globex"]
    assert isinstance(acme, TenantMigrated)
    assert (acme.revision, acme.changed) == ("0002", True)
    assert isinstance(globex, TenantMigrationFailed)
    assert "42701" in globex.error


async def test_progress_is_told(fleet: Fleet, project: Project) -> None:
    add_rating(project)
    totals: list[int] = []
    done: list[str] = []

    class Bar:
        def total(self, count: int) -> None:
            totals.append(count)

        def done(self, outcome: TenantOutcome) -> None:
            done.append(outcome.slug)

    await fleet.migrations.upgrade(progress=Bar())
    assert totals == [3]
    assert sorted(done) == sorted(TENANTS)


async def test_the_report_has_a_summary(fleet: Fleet, project: Project) -> None:
    add_rating(project)
    await fleet.migrations.upgrade(tenants=["acme"])
    await fleet.execute("globex", "ALTER TABLE notes ADD rating text")
    summary = (await fleet.migrations.upgrade()).summary()
    assert summary.startswith("upgrade head: 3 tenants, 1 migrated, 1 unchanged, 1 failed, ")


# --- status ---------------------------------------------------------------------------------------------------------


async def test_status_reads_the_databases(fleet: Fleet, project: Project) -> None:
    add_rating(project)
    await fleet.migrations.upgrade(tenants=["acme"])
    await fleet.execute("globex", "UPDATE alembic_version SET version_num = '0002'")
    await fleet.execute("initech", f"COMMENT ON DATABASE {fleet.database('initech')} IS 'another'")
    found = {item.slug: item for item in await fleet.migrations.status(verify=True)}
    assert (found["acme"].revision, found["acme"].recorded, found["acme"].at_head) == ("0002", "0002", True)
    assert found["acme"].is_recorded
    assert (found["globex"].revision, found["globex"].recorded) == ("0002", "0001")
    assert not found["globex"].is_recorded
    assert (found["initech"].revision, found["initech"].at_head) == (None, None)
    assert "marker" in str(found["initech"].error)


# --- cancelling -----------------------------------------------------------------------------------------------------


async def test_a_cancelled_run_leaves_every_tenant_whole(fleet: Fleet, project: Project) -> None:
    add_rating(project)
    await fleet.provisioner.template("default")
    async with fleet.connect("acme") as blocker, blocker.transaction():
        await blocker.execute("LOCK TABLE notes")
        run = asyncio.create_task(fleet.migrations.upgrade())
        await until(lambda: fleet.recorded("globex"), "0002")
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run
        await until(lambda: activity(blocker, "backend_type = 'client backend'"), 0)
    assert await fleet.revision("acme") == "0001"
    assert results(await fleet.migrations.upgrade())["acme"] == ("0001", "0002", True)


# --- another event loop ---------------------------------------------------------------------------------------------


async def test_a_run_is_refused_in_another_event_loop(fleet: Fleet, project: Project) -> None:
    add_rating(project)
    plan = Plan.of(await fleet.migrations.environment(), "upgrade", "head")
    uses: list[Callable[[], Coroutine[Any, Any, Any]]] = [
        fleet.migrations.upgrade,
        fleet.migrations.status,
        lambda: fleet.migrations.downgrade("base"),
        lambda: fleet.migrations.stamp("head"),
        lambda: fleet.migrations.execute(plan),
        lambda: fleet.migrations.run_command(plan.environment, {}),
        lambda: fleet.migrations.run_on("default", fleet.database("acme"), print),
    ]
    for use in uses:
        with pytest.raises(WrongEventLoopError):
            await asyncio.to_thread(lambda use=use: asyncio.run(use()))  # type: ignore[misc]
    assert await fleet.revision("acme") == "0001"
