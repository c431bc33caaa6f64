"""The rows of one customer, out of a database that all customers share."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from tenancy_orm.adoption.selection import Selection
from tenancy_orm.errors import AdoptionError, ConfigurationError, TenantNotFoundError
from tests.support.fleet import Fleet
from tests.support.postgres import Postgres
from tests.support.projects import Project
from tests.support.shared_database import MAPPING, SHARED, TABLES
from tests.support.sources import ForeignDatabase, foreign_database

ACME = "org_id = 1"


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """The tables of one tenant, and a second revision."""
    project = Project.create(tmp_path / "app")
    project.add("0001", f"op.execute('''\n{TABLES}\n''')")
    project.add("0002", 'op.execute("ALTER TABLE tasks ADD pinned boolean NOT NULL DEFAULT false")', down="0001")
    return project


@pytest.fixture
async def source(postgres: Postgres) -> AsyncIterator[ForeignDatabase]:
    """A shared database with two customers."""
    async with foreign_database(postgres, SHARED) as made:
        yield made


async def test_each_customer_gets_its_rows_and_the_shared_ones(fleet: Fleet, source: ForeignDatabase) -> None:
    rows = fleet.tenancy.adoption.rows
    report = await rows.check("acme", source.url, where=ACME, mapping=MAPPING)
    assert report.problems == (), report.problems
    found = {one.source: (one.target, one.rows, one.total) for one in report.tables}
    assert found == {
        "public.audit": ("public.audit", 2, 5),
        "public.comments": ("public.comments", 4, 6),
        "public.countries": ("public.countries", 2, 2),
        "public.memberships": ("public.memberships", 2, 4),
        "public.orgs": ("public.organisation", 1, 2),
        "public.projects": ("public.projects", 2, 3),
        "public.sessions": (None, 0, 2),
        "public.tags": ("public.tags", 1, 2),
        "public.task_tags": ("public.task_tags", 2, 3),
        "public.tasks": ("public.tasks", 3, 5),
        "public.users": ("public.users", 2, 4),
    }
    ways = {one.source: one.how for one in report.tables}
    assert ways["public.orgs"] == "its id is org_id of other tables"
    assert ways["public.task_tags"] == "tag_id -> public.tags, task_id -> public.tasks"
    assert "parent_id -> public.comments" in ways["public.comments"]
    with pytest.raises(TenantNotFoundError):
        await fleet.registry.find("acme")
    for slug, number in (("acme", 1), ("globex", 2)):
        done = await rows.adopt(slug, source.url, where=f"org_id = {number}", mapping=MAPPING, at="0001")
        assert done.pending == "0002" and done.api_key is not None
    assert await fleet.fetch("acme", "SELECT id, title, plan FROM organisation") == [(1, "Acme", "pro")]
    assert await fleet.fetch("acme", "SELECT id, parent_id, title_length, pinned FROM tasks ORDER BY id") == [
        (1, None, 5, False),
        (2, 1, 6, False),
        (5, None, 4, False),
    ]
    assert await fleet.fetch("acme", "SELECT id FROM comments ORDER BY id") == [(1,), (2,), (3,), (6,)]
    assert await fleet.fetch("globex", "SELECT name FROM users ORDER BY id") == [("carol",), ("dave",)]
    assert await fleet.fetch("globex", "SELECT code FROM countries ORDER BY code") == [("de",), ("fr",)]
    assert await fleet.fetch("globex", "SELECT count(*) FROM audit") == [(1,)]
    # texts, as they were; sequences go on; triggers and keys are there again
    query = "SELECT body, data, at AT TIME ZONE 'UTC' FROM comments WHERE id = 1"
    assert await fleet.fetch("acme", query) == await source.fetch(query)
    async with fleet.tenancy.transaction("acme") as session:
        added = sa.text("INSERT INTO tasks (project_id, title) VALUES (1, '!go') RETURNING id, title")
        assert (await session.execute(added)).one() == (6, "!GO")
    assert await fleet.fetch("acme", "SELECT title FROM tasks WHERE id = 5") == [("!low",)]
    drift = await fleet.migrations.drift()
    assert drift.ok, drift
    # the same command again says so
    again = await rows.adopt("acme", source.url, where=ACME, mapping=MAPPING, at="0001")
    assert again.api_key is None and again.rows == report.rows and "already" in again.notes[0]


@pytest.mark.parametrize(("table", "shown"), [("projects", "org_id = 2"), ("orgs", "id = 2")])
async def test_a_table_with_other_customers_is_not_shared(
    fleet: Fleet, source: ForeignDatabase, table: str, shown: str
) -> None:
    """Also without a foreign key that would say so, and with the column left out."""
    await source.execute("ALTER TABLE projects DROP CONSTRAINT IF EXISTS projects_org_id_fkey")
    mapping = {**MAPPING, "shared": [table, "countries"]}
    mapping["tables"] = {name: one for name, one in MAPPING["tables"].items() if name != table or "where" not in one}
    report = await fleet.tenancy.adoption.rows.check("acme", source.url, where=ACME, mapping=mapping)
    wanted = f"table public.{table} is shared, and has rows of other customers ({shown})"
    assert any(problem.startswith(wanted) for problem in report.problems), report.problems


PLANTED = {
    "a task of another customer's project": (
        "UPDATE tasks SET project_id = 3 WHERE id = 1",
        r"1 row of public\.tasks \(id = 1\) belong .* project_id to rows of public\.projects that do not belong",
    ),
    "a tag of another customer": (
        "INSERT INTO task_tags VALUES (1, 2)",
        r"public\.task_tags \(task_id, tag_id = 1, 2\) belong to this customer, and refer by tag_id",
    ),
    "another customer's task under one of ours": (
        "UPDATE tasks SET parent_id = 1 WHERE id = 3",
        r"public\.tasks \(id = 3\) do not belong to this customer, and refer by parent_id",
    ),
    "nobody's audit row about our user": (
        "INSERT INTO audit VALUES (9, NULL, 1, 'login')",
        r"public\.audit \(id = 9\) do not belong to this customer, and refer by user_id",
    ),
    "a table that nothing reaches": (
        "CREATE TABLE plans (id int); INSERT INTO plans VALUES (1)",
        r"nothing reaches table public\.plans with 1 rows",
    ),
    "a reference to what is excluded": (
        "ALTER TABLE users ADD session_id int REFERENCES sessions (id); UPDATE users SET session_id = 1 WHERE id = 1",
        r"column public\.users\.session_id has no place",
    ),
}


@pytest.mark.parametrize("planted", PLANTED)
async def test_rows_that_do_not_clearly_belong_are_refused_by_name(
    fleet: Fleet, source: ForeignDatabase, planted: str
) -> None:
    sql, message = PLANTED[planted]
    rows = fleet.tenancy.adoption.rows
    assert (await rows.check("acme", source.url, where=ACME, mapping=MAPPING)).problems == ()
    await source.execute(sql)
    with pytest.raises(AdoptionError, match=message):
        await rows.adopt("acme", source.url, where=ACME, mapping=MAPPING)
    with pytest.raises(TenantNotFoundError):
        await fleet.registry.find("acme")


async def test_an_operator_decides_about_strays(fleet: Fleet, source: ForeignDatabase) -> None:
    """Nobody's rows follow what they refer to, or stay; others' rows never follow."""
    await source.execute("INSERT INTO audit VALUES (9, NULL, 1, 'login'), (10, 2, 1, 'spy')")
    counts = {}
    for choice in ("follow", "leave"):
        mapping = {**MAPPING, "tables": {**MAPPING["tables"], "audit": {"strays": choice}}}
        report = await fleet.tenancy.adoption.rows.check("acme", source.url, where=ACME, mapping=mapping)
        counts[choice] = next(one.rows for one in report.tables if one.source == "public.audit")
        assert bool(report.problems) == (choice == "follow"), report.problems
    assert counts == {"follow": 3, "leave": 2}
    tables = {**MAPPING["tables"], "audit": {"strays": "leave"}}
    without = {**MAPPING, "shared": [], "exclude": ["countries", "sessions"], "tables": tables}
    report = await fleet.tenancy.adoption.rows.check("acme", source.url, where=ACME, mapping=without)
    (problem,) = report.problems
    assert problem.endswith("refer by country to table public.countries, which is not copied")
    dropped = {**without, "tables": {**tables, "users": {"drop": ["country"]}}}
    report = await fleet.tenancy.adoption.rows.check("acme", source.url, where=ACME, mapping=dropped)
    assert report.problems == ()


async def test_more_than_one_customer_and_more_than_a_condition_are_refused(
    fleet: Fleet, source: ForeignDatabase
) -> None:
    rows = fleet.tenancy.adoption.rows
    both = await rows.check("acme", source.url, where="org_id IN (1, 2)", mapping=MAPPING)
    assert "rows of more than one customer would be copied, by org_id" in both.problems[0]
    report = await rows.check("acme", source.url, where="org_id = 1 -- ours", mapping=MAPPING)
    assert report.problems == ()
    for where in ("org_id = 1) OR (true", "org_id = 1; DROP TABLE orgs", "org_id = nothing", "org_id"):
        with pytest.raises((AdoptionError, ConfigurationError)):
            await rows.check("acme", source.url, where=where, mapping=MAPPING)
    with pytest.raises(AdoptionError, match="read-only transaction"):
        await source.execute("CREATE FUNCTION own() RETURNS int LANGUAGE sql AS 'DELETE FROM public.audit; SELECT 1'")
        await rows.check("acme", source.url, where="org_id = public.own()", mapping=MAPPING)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tables": {"users": {"wher": "x"}}}, "has no 'wher'"),
        ({"shared": "countries"}, "is a list of names"),
        ({"shared": ["orgs"], "exclude": ["orgs"]}, "keep one of the two"),
        ({"tables": {"users": {"strays": "keep"}}}, "strays of table 'users'"),
        ({"tables": {"nobody": {}}}, "which the source does not have"),
        ({"tables": {"users": {"drop": ["nothing"]}}}, "column 'nothing' of table 'public.users'"),
        ({"tables": {"users": {"via": ["name"]}}}, "is not a foreign key"),
    ],
)
async def test_a_mapping_that_is_not_understood_is_refused(
    fleet: Fleet, source: ForeignDatabase, values: dict[str, Any], message: str
) -> None:
    with pytest.raises((AdoptionError, ConfigurationError), match=message):
        await fleet.tenancy.adoption.rows.check("acme", source.url, where=ACME, mapping=values)


EXTRAS = """
CREATE TABLE events (org_id bigint NOT NULL, id bigint NOT NULL, body text) PARTITION BY LIST (org_id);
CREATE TABLE events_1 PARTITION OF events FOR VALUES IN (1);
CREATE TABLE events_2 PARTITION OF events FOR VALUES IN (2);
INSERT INTO events VALUES (1, 1, 'ours'), (2, 2, 'theirs');
ALTER DATABASE "{0}" SET DateStyle = 'SQL, DMY';
ALTER DATABASE "{0}" SET IntervalStyle = 'sql_standard';
ALTER DATABASE "{0}" SET bytea_output = 'escape';
"""


async def test_partitions_and_settings_of_the_source_change_no_value(
    fleet: Fleet, project: Project, source: ForeignDatabase
) -> None:
    """The texts of dates mean the same on both sides; a partitioned table has the rows of its partitions."""
    project.add("0003", 'op.execute("CREATE TABLE events (id bigint PRIMARY KEY, body text)")', down="0002")
    await source.execute(EXTRAS.format(source.name))
    await fleet.tenancy.adoption.rows.adopt("acme", source.url, where=ACME, mapping=MAPPING)
    assert await fleet.fetch("acme", "SELECT * FROM events") == [(1, "ours")]
    query = "SELECT data, at AT TIME ZONE 'UTC' FROM comments WHERE id = 1"
    assert await fleet.fetch("acme", query) == await source.fetch(query)


async def test_each_check_catches_what_would_come_along_without_it(
    fleet: Fleet, source: ForeignDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the look at references, the planted row reaches the copy, and its foreign key refuses it there."""
    await source.execute("INSERT INTO task_tags VALUES (1, 2)")

    async def nothing(*_: object) -> list[str]:
        return []

    monkeypatch.setattr(Selection, "problems", nothing)
    with pytest.raises(AdoptionError, match=r"task_tags refer to rows that are not copied, by foreign key"):
        await fleet.tenancy.adoption.rows.adopt("acme", source.url, where=ACME, mapping=MAPPING)
    # without a key in the tenant's table, nothing else sees another customer's rows
    both = await fleet.tenancy.adoption.rows.check("acme", source.url, where="org_id IN (1, 2)", mapping=MAPPING)
    assert both.problems == () and both.rows > 30
