"""The SQL of a command is rendered without a database, apart by revision, as Alembic prints it."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from alembic import command

from tenancy_orm.errors import MigrationError
from tenancy_orm.migrations.configuration import alembic_config
from tenancy_orm.migrations.plan import Heads, Plan
from tenancy_orm.migrations.rendering import render, sql_text
from tenancy_orm.migrations.scripts import load
from tests.support.projects import NOTES, Project

BASE: Heads = frozenset()


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A table; a column with a value for each row, and a percent sign; an index that is built concurrently."""
    project = Project.create(tmp_path)
    project.add("1", NOTES, 'op.drop_table("notes")')
    project.add(
        "2",
        """
        op.add_column("notes", sa.Column("done", sa.Boolean, server_default=sa.false()))
        notes = sa.table("notes", sa.column("body", sa.Text))
        op.execute(notes.update().where(notes.c.body.like("50%")).values(body="it's"))
        """,
        'op.drop_column("notes", "done")',
        down="1",
    )
    project.add(
        "3",
        """
        with op.get_context().autocommit_block():
            op.create_index("notes_body", "notes", ["body"], postgresql_concurrently=True)
        """,
        'op.drop_index("notes_body", "notes")',
        down="2",
    )
    return project


def plan(project: Project, command: str = "upgrade", revision: str = "heads") -> Plan:
    return Plan.of(load(alembic_config(project.migrations)), command, revision)


def printed_by_alembic(project: Project, direction: str, revision: str) -> str:
    config = alembic_config(project.migrations)
    config.output_buffer = io.StringIO()
    getattr(command, direction)(config, revision, sql=True)
    return config.output_buffer.getvalue()


@pytest.mark.parametrize("options", ["", "transaction_per_migration=True", 'version_table_schema="app"'])
@pytest.mark.parametrize(
    ("direction", "start", "target"), [("upgrade", "", "3"), ("upgrade", "2", "3"), ("downgrade", "3", "1")]
)
def test_the_text_is_the_one_that_alembic_prints(
    project: Project, options: str, direction: str, start: str, target: str
) -> None:
    project.configure(
        f"target_metadata=target_metadata,\n    {options}" if options else "target_metadata=target_metadata"
    )
    heads = frozenset({start} if start else ())
    expected = printed_by_alembic(project, direction, f"{start}:{target}" if start else target)
    assert sql_text(render(plan(project, direction, target), heads)) == expected
    assert expected.count("COMMIT;") >= 1


def test_each_revision_has_its_statements_and_its_file(project: Project) -> None:
    first, second, third = render(plan(project), BASE)
    assert [first.revision, second.revision, third.revision] == ["1", "2", "3"]
    assert second.path == str(project.migrations / "versions" / "2.py")
    assert second.summary == "upgrade 1 -> 2"
    assert second.statements == (
        "ALTER TABLE notes ADD COLUMN done BOOLEAN DEFAULT false",
        "UPDATE notes SET body='it''s' WHERE notes.body LIKE '50%'",
        "UPDATE alembic_version SET version_num='2' WHERE alembic_version.version_num = '1'",
    )
    assert [text for text in third.statements if "INDEX" in text] == [
        "CREATE INDEX CONCURRENTLY notes_body ON notes (body)"
    ]
    written = [line for text, line in zip(second.output, second.lines, strict=True) if "ADD COLUMN" in text]
    source = (project.migrations / "versions" / "2.py").read_text().splitlines()
    assert "add_column" in source[(written[0] or 0) - 1]
    assert first.lines[0] is None
    assert first.statements[0] == "BEGIN"
    assert third.statements[-1] == "COMMIT"


def test_a_database_at_the_target_needs_nothing(project: Project) -> None:
    assert render(plan(project), frozenset({"3"})) == []
    assert render(plan(project, "downgrade", "base"), BASE) == []


def test_branches_are_rendered_from_all_their_heads(project: Project) -> None:
    project.add("b", 'op.execute("SELECT 1")', down="1")
    project.add("c", 'op.execute("SELECT 2")', down=("3", "b"))
    (merged,) = render(plan(project), frozenset({"3", "b"}))
    assert merged.statements[1] == "SELECT 2"
    removed, replaced = merged.statements[2:-1]  # which branch goes first is Alembic's choice
    assert removed.startswith("DELETE FROM alembic_version")
    assert replaced.startswith("UPDATE alembic_version SET version_num='c'")


def test_a_revision_that_reads_the_database_is_named(project: Project) -> None:
    project.add("4", 'op.get_bind().execute(sa.text("SELECT 1")).scalar_one()', down="3")
    project.add("5", 'op.execute("SELECT 5")', down="4")
    with pytest.raises(MigrationError, match=r"upgrade 3 -> 4: it cannot be printed as SQL.*as_sql"):
        render(plan(project), frozenset({"3"}))
    fourth, fifth = render(plan(project), frozenset({"3"}), keep_going=True)
    assert fourth.error is not None
    assert fifth.error is None
    assert "SELECT 5" in fifth.statements
