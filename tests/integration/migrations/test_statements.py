"""Revisions as they are written for other drivers: scripts of several statements, blocks outside of the transaction."""

from __future__ import annotations

import logging

import pytest

from tenancy_orm.errors import MigrationError
from tests.support.fleet import Fleet
from tests.support.projects import Project

SCRIPT = """
-- a comment; with a semicolon
CREATE TABLE lines (id integer, body text DEFAULT 'a; b'); /* and another; one */
CREATE FUNCTION touch() RETURNS trigger LANGUAGE plpgsql AS $body$
BEGIN
    NEW.body := format('%s; touched', NEW.body);
    RETURN NEW;
END
$body$;
CREATE FUNCTION first_line() RETURNS text LANGUAGE sql BEGIN ATOMIC
    SELECT CASE WHEN count(*) > 0 THEN 'some' ELSE 'none' END FROM lines;
    SELECT body FROM lines LIMIT 1;
END;
CREATE TRIGGER touch BEFORE INSERT ON lines FOR EACH ROW EXECUTE FUNCTION touch();
DO $$ BEGIN INSERT INTO lines (id) VALUES (1); INSERT INTO lines (id) VALUES (2); END $$;
"""


async def test_a_text_may_hold_several_statements(fleet: Fleet, project: Project) -> None:
    """As psycopg takes it: in ``op.execute``, ``text()``, on the connection itself, and read from a file."""
    (project.root / "lines.sql").write_text(SCRIPT)
    body = f"""
    with open({str(project.root / "lines.sql")!r}) as script:
        op.execute(script.read())
    op.execute("CREATE TABLE a (id integer); INSERT INTO a VALUES (7)")
    op.execute(sa.text("INSERT INTO a VALUES (8); INSERT INTO a VALUES (9);"))
    bind = op.get_bind()
    bind.exec_driver_sql("ALTER TABLE a ADD body text; UPDATE a SET body = '100% ;' WHERE id = 9")
    assert bind.execute(sa.text("SELECT id FROM a ORDER BY id;")).scalars().all() == [7, 8, 9]
    assert bind.exec_driver_sql("SELECT ';'").scalar() == ";"
    assert bind.execute(sa.text("SELECT :x || ';'"), {{"x": "b"}}).scalar() == "b;"
    """
    project.add("0002", body, "op.execute('DROP TABLE a; DROP TABLE lines CASCADE; DROP FUNCTION touch')", down="0001")
    report = await fleet.migrations.upgrade()
    assert report.ok, report.reasons
    assert await fleet.fetch("acme", "SELECT first_line()") == [("a; b; touched",)]
    assert await fleet.fetch("acme", "SELECT body FROM a WHERE id = 9") == [("100% ;",)]
    assert (await fleet.migrations.downgrade("0001")).ok
    assert await fleet.fetch("acme", "SELECT to_regclass('a')::text, to_regclass('lines')::text") == [(None, None)]


async def test_a_statement_that_is_not_prepared_says_what_it_has_changed(fleet: Fleet, project: Project) -> None:
    """What has rows to return is prepared; a name may look like it."""
    body = """
    bind = op.get_bind()
    assert bind.exec_driver_sql("INSERT INTO notes (id, body) VALUES (1, 'a'), (2, '100%')").rowcount == 2
    assert bind.execute(sa.text("UPDATE notes SET body = 'b' WHERE id = 1")).rowcount == 1
    assert {*bind.execute(sa.text("UPDATE notes SET body = 'c' returning id")).scalars()} == {1, 2}
    assert bind.execute(sa.text("DELETE FROM notes WHERE id = :id"), {"id": 3}).rowcount == 0
    assert bind.execute(sa.text("DELETE FROM notes")).rowcount == 2
    assert not bind.execute(sa.text('CREATE TABLE returning_ ("returning" text)')).returns_rows
    assert not bind.execute(sa.text("DROP TABLE returning_")).returns_rows
    """
    project.add("0002", body, down="0001")
    report = await fleet.migrations.upgrade()
    assert report.ok, report.reasons


async def test_a_script_is_part_of_the_migrations_transaction(fleet: Fleet, project: Project) -> None:
    tenant = 'op.get_context().opts["tenant"]'
    fail = f"op.execute('SELECT 1/0; SELECT 2' if {tenant} else 'SELECT 1; SELECT 2')"
    project.add("0002", f"op.execute('CREATE TABLE a (); CREATE TABLE b ()')\n{fail}", down="0001")
    report = await fleet.migrations.upgrade(tenants=["acme"])
    assert report.reasons == {"acme": "upgrade 0001 -> 0002: division by zero (SQLSTATE 22012)"}
    assert await fleet.fetch("acme", "SELECT to_regclass('a')::text") == [(None,)]


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("BEGIN; CREATE TABLE a (); COMMIT", "statement 1 of 3 of a script is BEGIN; the migration is a transaction"),
        ("CREATE TABLE a (); COMMIT AND CHAIN; CREATE TABLE b ()", "statement 2 of 3 of a script is COMMIT AND"),
        # PostgreSQL would wait for the rows, and asyncpg for PostgreSQL, for as long as migration.timeout
        ("CREATE TABLE a (); COPY a FROM STDIN", "COPY FROM STDIN needs rows from the client"),
        (r"SELECT 1 \\gexec", r"\gexec is a command of psql"),
        ("COPY notes FROM stdin", "COPY FROM STDIN needs rows from the client"),
    ],
)
async def test_a_script_cannot_commit_a_part_of_a_migration(
    fleet: Fleet, project: Project, script: str, reason: str
) -> None:
    project.add("0002", f"op.execute('CREATE TABLE before (); SELECT 1')\nop.execute('{script}')", down="0001")
    with pytest.raises(MigrationError, match="no tenant was touched") as raised:
        await fleet.migrations.upgrade()
    assert reason in str(raised.value)
    # nor in a tenant, where it fails in the same way without a template
    report = await fleet.migrations.upgrade("+1", tenants=["acme"])
    assert reason in report.reasons["acme"]
    assert await fleet.fetch("acme", "SELECT to_regclass('before')::text, to_regclass('a')::text") == [(None, None)]


async def test_a_script_outside_of_the_transaction_may_have_its_own(fleet: Fleet, project: Project) -> None:
    body = """
    with op.get_context().autocommit_block():
        op.execute("BEGIN; CREATE TABLE a (); COMMIT")
        op.execute("CREATE TABLE b (id integer); CREATE INDEX CONCURRENTLY b_id ON b (id); SELECT 1")
    """
    project.add("0002", body, down="0001")
    assert (await fleet.migrations.upgrade()).ok
    assert await fleet.fetch("acme", "SELECT to_regclass('a')::text, to_regclass('b')::text") == [("a", "b")]
    project.add(
        "0003",
        """
        with op.get_context().autocommit_block():
            op.execute("BEGIN; CREATE TABLE c ()")
        """,
        down="0002",
    )
    report = await fleet.migrations.upgrade("+1", tenants=["acme"])
    assert "a script leaves its transaction open" in report.reasons["acme"]
    assert await fleet.fetch("acme", "SELECT to_regclass('c')::text") == [(None,)]


INDEX = """
with op.get_context().autocommit_block():
    op.create_index("notes_body", "notes", ["body"], postgresql_concurrently=True, if_not_exists=True)
"""


async def test_a_change_before_an_autocommit_block_is_warned_of(
    fleet: Fleet, project: Project, caplog: pytest.LogCaptureFixture
) -> None:
    """Once in a run, the template included: if the block fails, the change before it is committed."""
    project.add("0002", 'op.add_column("notes", sa.Column("rating", sa.Integer))' + INDEX, down="0001")
    with caplog.at_level(logging.WARNING, "tenancy_orm.migrations"):
        assert (await fleet.migrations.upgrade()).ok
    warnings = [text for text in caplog.messages if "autocommit_block" in text]
    assert len(warnings) == 1
    assert "revision 0002 changes the database before its autocommit_block(), which commits that" in warnings[0]
    assert "put the block into a revision of its own" in warnings[0]


async def test_a_revision_with_only_the_block_is_not_warned_of(
    fleet: Fleet, project: Project, caplog: pytest.LogCaptureFixture
) -> None:
    """A change by an earlier revision of the run is recorded, and reading changes nothing."""
    project.add("0002", 'op.add_column("notes", sa.Column("rating", sa.Integer))', down="0001")
    read = (
        "op.execute('SET lock_timeout = 1000')\nop.get_bind().execute(sa.text('WITH x AS (SELECT 1) SELECT * FROM x'))"
    )
    project.add("0003", read + INDEX + INDEX, down="0002")
    with caplog.at_level(logging.WARNING, "tenancy_orm.migrations"):
        assert (await fleet.migrations.upgrade()).ok
    assert not [text for text in caplog.messages if "autocommit_block" in text]
