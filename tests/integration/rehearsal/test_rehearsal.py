"""A migration that is tried on clones: what it takes, what it locks and rewrites, and whether it can be taken back."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from pathlib import Path
from typing import Any

import pytest

from tenancy_orm.errors import ConfigurationError, MigrationError, RehearsalError
from tenancy_orm.rehearsal import CloneReport, PhaseReport, StatementReport
from tests.integration.rehearsal.conftest import Leftovers
from tests.support.fleet import Fleet, open_fleet
from tests.support.projects import Project

ADD = 'op.add_column("notes", sa.Column("n", sa.Integer))'
DROP = 'op.drop_column("notes", "n")'


def statements(phase: PhaseReport) -> dict[str, StatementReport]:
    return {one.sql: one for revision in phase.revisions for one in revision.statements}


def phase(clone: CloneReport, name: str) -> PhaseReport:
    return next(one for one in clone.phases if one.name == name)


async def test_a_rehearsal_measures_and_changes_no_tenant(fleet: Fleet, project: Project, leftovers: Leftovers) -> None:
    project.add(
        "0002",
        """
        op.execute("LOCK TABLE notes IN SHARE MODE")
        op.execute("ALTER TABLE notes ALTER COLUMN id TYPE bigint")
        op.create_table("tags", sa.Column("name", sa.Text))
        op.execute("CREATE INDEX ON tags (name)")
        """,
        'op.drop_table("tags")\nop.execute("ALTER TABLE notes ALTER COLUMN id TYPE int")',
        down="0001",
    )
    project.add(
        "0003",
        """
        with op.get_context().autocommit_block():
            op.execute("CREATE INDEX CONCURRENTLY IF NOT EXISTS notes_body ON notes (body)")
        """,
        'op.drop_index("notes_body", "notes")',
        down="0002",
    )
    told: list[str] = []
    report = await fleet.migrations.rehearse(clones=1, progress=told.append)
    report.raise_for_failures()
    assert report.ok
    (clone,) = report.clones
    assert (clone.slug, clone.server, clone.revision) == ("globex", "default", "0001")  # the largest
    assert [one.name for one in clone.phases] == ["upgrade", "downgrade", "upgrade again"]
    assert [one.revision for one in phase(clone, "upgrade").revisions] == ["0002", "0003"]
    assert [one.revision for one in phase(clone, "downgrade").revisions] == ["0003", "0002"]
    assert told[1:] == [f"globex: {text}" for text in ("copy", "upgrade", "downgrade", "upgrade again")]

    found = statements(phase(clone, "upgrade"))
    assert not any("alembic_version" in sql for sql in found)
    taken = {(lock.relation, lock.mode, lock.blocks) for lock in found["LOCK TABLE notes IN SHARE MODE"].locks}
    assert taken == {("public.notes", "Share", "writes")}
    rewriting = found["ALTER TABLE notes ALTER COLUMN id TYPE bigint"]
    assert ("public.notes", "AccessExclusive", "reads and writes") in {
        (lock.relation, lock.mode, lock.blocks) for lock in rewriting.locks
    }
    assert [(one.relation, one.kind) for one in rewriting.rewrites if one.kind == "table"] == [
        ("public.notes", "table")
    ]
    assert all(one.size > 0 for one in rewriting.rewrites)
    # until the end of the transaction, and not only of the statement
    held = next(lock.seconds for lock in rewriting.locks if lock.mode == "AccessExclusive")
    assert held > rewriting.seconds
    # nobody waits for what is new
    assert all(not one.locks for sql, one in found.items() if "tags" in sql)
    concurrent = found["CREATE INDEX CONCURRENTLY IF NOT EXISTS notes_body ON notes (body)"]
    assert {(lock.relation, lock.mode) for lock in concurrent.locks} <= {("public.notes", "ShareUpdateExclusive")}
    assert concurrent.rewrites == ()

    assert report.estimate is not None
    assert report.estimate.tenants == 2
    assert 0 < report.estimate.low <= report.estimate.high
    for slug in ("acme", "globex"):
        assert (await fleet.revision(slug), await fleet.recorded(slug)) == ("0001", "0001")
    assert await leftovers() == []
    assert json.loads(json.dumps(dataclasses.asdict(report)))["clones"][0]["slug"] == "globex"
    entries = await fleet.tenancy.audit.events(tenant=fleet.tenants["globex"])
    assert "tenant.copy" in [entry.action for entry in entries]


async def test_what_is_not_a_revisions_own_is_not_among_its_statements(fleet: Fleet, project: Project) -> None:
    """Savepoints, limits and queries of the package: the time of a preflight and of data migrations is one number."""
    path = project.add(
        "0002", ADD, DROP, down="0001", preflight='yield Check("bodies", "SELECT FROM notes WHERE id < 0")'
    )
    text = path.read_text() + textwrap.dedent(
        """
        from tenancy_orm.migrations import data_migration


        @data_migration(table="notes", where="n IS NULL")
        def fill(batch):
            return f"UPDATE notes SET n = 1 WHERE {batch.rows}"


        @fill.reverse
        def empty(batch):
            return f"UPDATE notes SET n = NULL WHERE {batch.rows}"
        """
    )
    path.write_text(text)
    project.add("0003", 'op.create_table("tags", sa.Column("name", sa.Text))', 'op.drop_table("tags")', down="0002")
    (clone,) = (await fleet.migrations.rehearse(tenants=["acme"])).clones
    assert clone.ok, clone
    for name, prefixes in (("upgrade", ["ALTER", "CREATE"]), ("downgrade", ["DROP", "ALTER"])):
        found = phase(clone, name).revisions
        assert [[one.sql.split()[0] for one in revision.statements] for revision in found] == [
            [one] for one in prefixes
        ]
    second, third = phase(clone, "upgrade").revisions
    assert second.preflight_seconds and second.data_seconds
    assert (third.preflight_seconds, third.data_seconds) == (None, None)
    third, second = phase(clone, "downgrade").revisions
    assert (third.data_seconds, second.preflight_seconds) == (None, None) and second.data_seconds


async def test_a_downgrade_that_does_not_lead_back_differs(fleet: Fleet, project: Project) -> None:
    """It loses a column, executes nothing, or brings a column back without its values."""
    project.add("0002", ADD, f'{DROP}\nop.drop_column("notes", "body")', down="0001")
    report = await fleet.migrations.rehearse(tenants=["acme"])
    (clone,) = report.clones
    assert [(one.after, one.text) for one in clone.differences if one.after == "downgrade"] == [
        ("downgrade", "table notes: column body is missing")
    ]
    assert "differs after downgrade: table notes: column body is missing" in report.failures["acme"]
    with pytest.raises(RehearsalError) as caught:
        report.raise_for_failures()
    assert caught.value.failures.keys() == {"acme"}

    project.add("0002", ADD, "pass", down="0001")
    (clone,) = (await fleet.migrations.rehearse(tenants=["acme"])).clones
    assert clone.idle_downgrades == ("0002",)
    assert [(one.after, one.text) for one in clone.differences] == [
        ("downgrade", "table notes: column n should not exist")
    ]
    assert clone.error is not None and clone.error.startswith('upgrade again: upgrade 0001 -> 0002: column "n"')

    back = """
        op.add_column("notes", sa.Column("body", sa.String(1000), nullable=False, server_default=""))
        op.alter_column("notes", "body", server_default=None)
    """
    project.add("0002", 'op.drop_column("notes", "body")', back, down="0001")
    (clone,) = (await fleet.migrations.rehearse(tenants=["acme"])).clones
    assert clone.ok, clone
    assert clone.lost_values == ("public.notes.body",)


async def test_a_downgrade_that_is_missing_can_be_left_out(fleet: Fleet, project: Project) -> None:
    path = project.add("0002", ADD, "raise NotImplementedError", down="0001")
    (clone,) = (await fleet.migrations.rehearse(tenants=["acme"])).clones
    assert clone.error is not None and clone.error.startswith("downgrade: ")
    assert clone.error.count("--no-downgrade") == 1
    path.write_text(path.read_text().partition("def downgrade")[0])
    (clone,) = (await fleet.migrations.rehearse(tenants=["acme"])).clones
    assert clone.error is not None and "0002 has no downgrade()" in clone.error
    assert clone.error.count("--no-downgrade") == 1
    (clone,) = (await fleet.migrations.rehearse(tenants=["acme"], downgrade=False)).clones
    assert clone.ok
    assert [one.name for one in clone.phases] == ["upgrade"]


async def test_a_tenant_with_another_schema_differs_from_a_new_one(fleet: Fleet, project: Project) -> None:
    project.add("0002", ADD, DROP, down="0001")
    await fleet.execute("acme", "ALTER TABLE notes ALTER COLUMN body DROP NOT NULL")
    report = await fleet.migrations.rehearse(clones=2)
    clones = {clone.slug: clone for clone in report.clones}
    assert clones["globex"].ok
    assert not report.ok
    assert {(one.after, one.text) for one in clones["acme"].differences} == {
        (after, "table notes: column body may be NULL, should be NOT NULL") for after in ("upgrade", "upgrade again")
    }


async def test_a_revision_that_the_data_does_not_fit_fails_on_that_clone_alone(
    fleet: Fleet, project: Project, leftovers: Leftovers
) -> None:
    project.add("0002", "op.execute(\"ALTER TABLE notes ADD CHECK (body NOT LIKE 'note%')\")", "pass", down="0001")
    report = await fleet.migrations.rehearse(clones=2, downgrade=False)
    clones = {clone.slug: clone for clone in report.clones}
    assert clones["acme"].ok
    error = clones["globex"].error
    assert error is not None and "upgrade 0001 -> 0002" in error and "(SQLSTATE 23514)" in error
    assert phase(clones["globex"], "upgrade").error is not None
    assert await leftovers() == []
    # in an empty database it succeeds, and one that fails there fails for all
    project.add("0003", 'op.execute("SELECT 1 / 0")', down="0002")
    report = await fleet.migrations.rehearse(clones=2)
    assert all("a new database cannot be built" in (clone.error or "") for clone in report.clones)


async def test_a_tenants_function_runs_in_a_clone_without_rights(
    fleet: Fleet, project: Project, tmp_path: Path
) -> None:
    owner = fleet.services.names.owner
    tenant = fleet.tenants["acme"]
    assert tenant.placement is not None
    hostile = f"""
        CREATE TABLE seen (who text);
        CREATE FUNCTION grab() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            INSERT INTO public.seen VALUES (session_user || ' ' || current_setting('is_superuser'));
            BEGIN EXECUTE 'RESET ROLE'; EXECUTE 'GRANT "{owner}" TO "{tenant.placement.role}"';
            EXCEPTION WHEN OTHERS THEN NULL; END;
            RETURN new; END $$;
        CREATE TRIGGER grabbing BEFORE UPDATE ON notes FOR EACH ROW EXECUTE FUNCTION grab();
    """
    async with fleet.connect("acme") as connection:
        await connection.execute(f'SET ROLE "{owner}"; {hostile}')
    note = tmp_path / "who"
    project.add(
        "0002",
        f"""
        op.execute("UPDATE notes SET body = 'x'")
        if op.get_context().opts["tenant"] is not None:
            from pathlib import Path

            Path({str(note)!r}).write_text(op.get_bind().scalar(sa.text("SELECT who FROM seen")))
        """,
        "pass",
        down="0001",
    )
    (clone,) = (await fleet.migrations.rehearse(tenants=["acme"])).clones
    who, is_superuser = note.read_text().split()
    assert "_x_" in who
    assert is_superuser == "off"
    assert clone.error is None  # it differs from a new tenant, which has no such trigger
    assert await is_member(fleet, tenant.placement.role, owner) is False
    # by the administrator it does what it is after
    await fleet.execute("acme", "UPDATE notes SET body = 'y'")
    assert await is_member(fleet, tenant.placement.role, owner) is True


async def is_member(fleet: Fleet, role: str, owner: str) -> Any:
    ((found,),) = await fleet.fetch("acme", f"SELECT pg_has_role('{role}', '{owner}', 'MEMBER')")
    return found


async def test_branches_and_other_targets_than_head_are_rehearsed(fleet: Fleet, project: Project) -> None:
    project.add("0002", ADD, DROP, down="0001")
    project.add("b", 'op.execute("CREATE TABLE b (n int)")', 'op.execute("DROP TABLE b")', down="0001")
    project.add("c", 'op.execute("CREATE TABLE c (n int)")', 'op.execute("DROP TABLE c")', down=("0002", "b"))
    for target in ("0002", "heads"):
        (clone,) = (await fleet.migrations.rehearse(target, tenants=["acme"])).clones
        assert clone.ok, clone
    report = await fleet.migrations.upgrade("b", tenants=["acme"])
    report = await fleet.migrations.upgrade("0002", tenants=["acme"])
    assert await fleet.revision("acme") is not None
    assert report.ok
    (clone,) = (await fleet.migrations.rehearse("heads", tenants=["acme"])).clones
    assert clone.ok, clone
    assert clone.revision == "0002,b"


async def test_the_largest_the_oldest_and_those_that_fit_are_chosen(fleet: Fleet, project: Project) -> None:
    with pytest.raises(MigrationError, match="every tenant is at head already"):
        await fleet.migrations.rehearse()
    project.add("0002", ADD, DROP, down="0001")
    with pytest.raises(ConfigurationError, match="clones must be at least 1"):
        await fleet.migrations.rehearse(clones=0)
    with pytest.raises(MigrationError, match="nowhere"):
        await fleet.migrations.rehearse("nowhere")
    assert {clone.slug for clone in (await fleet.migrations.rehearse(clones=9, downgrade=False)).clones} == {
        "acme",
        "globex",
    }
    await fleet.migrations.upgrade(tenants=["globex"])
    assert [clone.slug for clone in (await fleet.migrations.rehearse(downgrade=False)).clones] == ["acme"]
    report = await fleet.migrations.rehearse(tenants=["globex"])
    assert "there is nothing to rehearse" in report.failures["globex"]


async def test_what_is_too_large_is_not_cloned(fleet: Fleet, project: Project) -> None:
    project.add("0002", ADD, DROP, down="0001")
    size = await fleet.provisioner.copies.size(fleet.tenants["acme"])
    larger = await fleet.provisioner.copies.size(fleet.tenants["globex"])
    assert larger > size
    between = fleet.services.config.replace(rehearsal={"max_bytes": (size + larger) // 2})
    async with open_fleet(between) as bounded:
        report = await bounded.migrations.rehearse(clones=2, downgrade=False)
        assert [clone.slug for clone in report.clones] == ["acme"]
        assert any("1 of 2 tenants are larger than rehearsal.max_bytes" in note for note in report.notes)
        report = await bounded.migrations.rehearse(tenants=["globex"])
        assert "rehearsal.max_bytes" in report.failures["globex"]
        # a schema has no size
        report = await bounded.migrations.rehearse(tenants=["globex"], content="schema")
        assert report.ok, report.failures
        assert report.estimate is None


async def test_a_clone_that_takes_too_long_is_given_up(fleet: Fleet, project: Project, leftovers: Leftovers) -> None:
    project.add("0002", 'op.execute("SELECT pg_sleep(60) FROM notes LIMIT 1")', down="0001")
    short = fleet.services.config.replace(rehearsal={"timeout": 5.0})
    async with open_fleet(short) as bounded:
        report = await bounded.migrations.rehearse(tenants=["acme"])
    assert report.failures == {"acme": "not done within 5 s; raise rehearsal.timeout"}
    assert await leftovers() == []


async def test_extensions_are_there_before_the_tenants_contents(fleet: Fleet, project: Project) -> None:
    """Those of the tenant, wherever they are; and those that the setting adds, which the revision needs."""
    await fleet.execute("acme", "CREATE SCHEMA ext; CREATE EXTENSION vector SCHEMA ext")
    await fleet.execute("acme", f'GRANT USAGE ON SCHEMA ext TO "{fleet.services.names.owner}"')
    async with fleet.connect("acme") as connection:
        await connection.execute(f'SET ROLE "{fleet.services.names.owner}"')
        await connection.execute("CREATE TABLE points (at ext.vector(2)); INSERT INTO points VALUES ('[1,2]')")
    project.add(
        "0002",
        'op.execute("SET LOCAL search_path = public, ext; CREATE TABLE embeddings (v vector(3))")',
        'op.drop_table("embeddings")',
        down="0001",
    )
    (clone,) = (await fleet.migrations.rehearse("0002", tenants=["globex"])).clones
    assert "a new database cannot be built" in (clone.error or "")
    async with open_fleet(fleet.services.config.replace(extensions=("vector",))) as extended:
        report = await extended.migrations.rehearse(clones=2)
        clones = {clone.slug: clone for clone in report.clones}
        assert clones["globex"].ok, report.failures
        assert clones["acme"].error is None, report.failures
        texts = {one.text for one in clones["acme"].differences}
        assert "table points should not exist" in texts
        assert "table embeddings: column v is ext.vector(3), should be public.vector(3)" in texts
