"""A whole fleet out of shared databases, by a plan."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tenancy_orm.adoption import AdoptionPlan, FleetOutcome
from tenancy_orm.adoption.rows_work import RowsWork
from tenancy_orm.errors import AdoptionError, ConfigurationError
from tests.support.fleet import Fleet
from tests.support.postgres import Postgres
from tests.support.projects import Project
from tests.support.shared_database import MAPPING, SHARED, TABLES
from tests.support.sources import ForeignDatabase, foreign_database

LEAVE = {**MAPPING, "tables": {**MAPPING["tables"], "audit": {"strays": "leave"}}}
QUERY = {"query": "SELECT lower(name), id FROM public.orgs ORDER BY id", "where": "org_id = {key}"}


@pytest.fixture
def project(tmp_path: Path) -> Project:
    project = Project.create(tmp_path / "app")
    project.add("0001", f"op.execute('''\n{TABLES}\n''')")
    return project


@pytest.fixture
async def source(postgres: Postgres) -> AsyncIterator[ForeignDatabase]:
    async with foreign_database(postgres, SHARED) as made:
        yield made


async def test_a_dry_run_finds_rows_that_nobody_or_two_tenants_have(fleet: Fleet, source: ForeignDatabase) -> None:
    check = fleet.tenancy.adoption.fleet.check
    seen: list[FleetOutcome] = []
    report = await check(AdoptionPlan.parse({**QUERY, "mapping": MAPPING}, source=source.url), progress=seen.append)
    assert [(one.slug, one.state, one.rows) for one in report.tenants] == [
        ("acme", "checked", 21),
        ("globex", "checked", 15),
    ]
    assert tuple(seen) == report.tenants
    assert report.problems == ("2 of 5 rows of public.audit belong to no tenant of the plan (2 have no customer)",)
    assert {one.source: (one.total, one.claimed, one.way) for one in report.tables if one.way != "owned"} == {
        "public.countries": (2, 2, "shared"),
        "public.sessions": (2, 0, "left out"),
    }
    left = await check(AdoptionPlan.parse({**QUERY, "mapping": LEAVE}, source=source.url))
    assert left.ok and left.notes == report.problems
    acme = {"slug": "acme", "where": "org_id = 1"}
    one = await check(AdoptionPlan.parse({"tenants": [acme], "mapping": LEAVE}, source=source.url))
    assert "2 of 4 rows of public.users belong to no tenant of the plan" in one.problems
    twice = [acme, {"slug": "again", "where": "org_id = 1 AND true"}]
    two = await check(AdoptionPlan.parse({"tenants": twice, "mapping": LEAVE}, source=source.url))
    assert any("of public.tags are" in text or "more than once" in text for text in two.problems)
    # whatever the sums are
    assert "tenants 'acme' and 'again' are made of the rows of one customer, 1" in two.problems
    assert not (await fleet.tenancy.tenants.list()).items


async def test_a_failure_leaves_others_alone_and_the_next_run_goes_on(
    fleet: Fleet, postgres: Postgres, source: ForeignDatabase
) -> None:
    adopt = fleet.tenancy.adoption.fleet.adopt
    await source.execute("UPDATE tasks SET parent_id = 5 WHERE id = 3; UPDATE tasks SET parent_id = NULL WHERE id = 2")
    # others' rows that refer to acme's stay
    mapping = {**LEAVE, "tables": {**LEAVE["tables"], "tasks": {"strays": "leave"}}}
    async with foreign_database(postgres, TABLES) as whole:
        old = {"slug": "initech", "from": "$WHOLE", "at": "0001"}
        plan = AdoptionPlan.parse(
            {**QUERY, "mapping": mapping, "tenants": [old], "concurrency": 2},
            source=source.url,
            resolve=lambda url: whole.url if url == "$WHOLE" else url,
        )
        first = await adopt(plan)
        assert [(one.slug, one.state) for one in first.tenants] == [
            ("initech", "adopted"),
            ("acme", "adopted"),
            ("globex", "failed"),
        ]
        (failed,) = first.failures
        assert failed.error is not None and "tasks (id = 3) belong to this customer" in failed.error
        assert first.tenants[1].api_key is not None and first.tenants[1].api_key not in repr(first)
        await source.execute("UPDATE tasks SET parent_id = NULL WHERE id = 3")
        second = await adopt(plan)
    assert [one.state for one in second.tenants] == ["skipped", "skipped", "adopted"]
    assert await fleet.fetch("globex", "SELECT name FROM projects") == [("three",)]


async def test_what_is_refused_for_one_tenant_of_a_dry_run_does_not_stop_the_others(
    fleet: Fleet, source: ForeignDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are read in one transaction, which an error would end. So would a query that takes too long."""
    check = fleet.tenancy.adoption.fleet.check
    tenants = [{"slug": "acme", "where": "org_id = 'one'"}, {"slug": "globex", "where": "org_id = 2"}]
    plan = AdoptionPlan.parse({"tenants": tenants, "mapping": LEAVE}, source=source.url)
    report = await check(plan)
    assert [(one.slug, one.state) for one in report.tenants] == [("acme", "failed"), ("globex", "checked")]
    original, slow = RowsWork.look, fleet.tenancy.config.replace(adoption={"timeout": 1.0})

    async def look(self: RowsWork, opened: Any, said: Any, *given: Any) -> Any:
        with monkeypatch.context() as patch:
            if "pg_sleep" in said.where:
                patch.setattr(self, "services", replace(self.services, config=slow))
            return await original(self, opened, said, *given)

    monkeypatch.setattr(RowsWork, "look", look)
    tenants[0]["where"] = "org_id = 1 AND pg_sleep(60) IS NOT NULL"
    report = await check(AdoptionPlan.parse({"tenants": tenants, "mapping": LEAVE}, source=source.url))
    assert [(one.slug, one.state) for one in report.tenants] == [("acme", "failed"), ("globex", "checked")]
    assert "cannot be counted and checked within 1 s" in str(report.tenants[0].error)


async def test_an_error_of_any_kind_is_its_tenants_alone(
    fleet: Fleet, source: ForeignDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = RowsWork.create

    async def create(self: RowsWork, slug: str, *given: Any, **options: Any) -> Any:
        if slug == "acme":
            raise KeyError("of the application's code")
        return await original(self, slug, *given, **options)

    monkeypatch.setattr(RowsWork, "create", create)
    plan = AdoptionPlan.parse({**QUERY, "mapping": LEAVE, "concurrency": 2}, source=source.url)
    report = await fleet.tenancy.adoption.fleet.adopt(plan)
    assert [(one.slug, one.state) for one in report.tenants] == [("acme", "failed"), ("globex", "adopted")]
    assert report.tenants[0].error == 'KeyError: "of the application\'s code"'


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "names no tenants"),
        ({"tenants": [{"where": "a = 1"}]}, "has no slug"),
        ({"tenants": [{"slug": "a", "where": "a = 1", "schema": "a"}]}, "set where or schema"),
        ({"tenants": [{"slug": "a", "where": "a = 1"}] * 2}, "two tenants 'a'"),
        ({"tenants": [{"slug": "a", "schema": "x"}, {"slug": "b", "schema": "x"}]}, "are made of the same"),
        ({"tenants": [{"slug": "a", "wher": "a = 1"}]}, "has no 'wher'"),
        ({"query": "SELECT 1, 2"}, "condition of its keys"),
        ({"query": "SELECT 1, 2", "schema": "acme"}, r'or where they are schemas: schema = "\{key\}"'),
        ({"query": "SELECT 1, 2", "schema": "{key}", "where": "a = {key}"}, "are rows or schemas"),
        ({"schema": "{key}", "tenants": [{"slug": "a"}]}, "schema of the plan is for the keys"),
        ({"tenants": [{"slug": "a", "where": "a = 1", "without": ["public.a"]}]}, "is rows, and without is for"),
        ({"tenants": [{"slug": "a", "with_shared": ["public.a"]}]}, "a whole database, and with_shared is for"),
        ({"tenants": [{"slug": "a", "without": ["{schema}.a"]}]}, r"\{schema\} in its without has no meaning"),
        ({**QUERY, "accept_differences": "yes"}, "true or false, not 'yes'"),
        ({"query": "SELECT 1", "where": "org_id = {key}"}, "yields two columns"),
        ({"query": "SELECT x", "where": "org_id = {key}"}, "query of the plan fails"),
        ({"query": "DELETE FROM public.audit RETURNING 1, 2", "where": "org_id = {key}"}, "read-only transaction"),
        ({**QUERY, "concurrency": 0}, "a number from 1"),
    ],
)
async def test_a_plan_that_is_not_understood_is_refused(
    fleet: Fleet, source: ForeignDatabase, values: dict[str, Any], message: str
) -> None:
    with pytest.raises((AdoptionError, ConfigurationError), match=message):
        await fleet.tenancy.adoption.fleet.check(AdoptionPlan.parse(values, source=source.url))


def test_a_plan_says_what_holds_for_tenants_that_do_not_say_it_themselves() -> None:
    """Each gets what is for what it is made of: rows have a mapping, and a whole database has no schema."""
    plan = AdoptionPlan.parse(
        {
            "query": "SELECT 1, 2",
            "schema": "tenant_{key}",
            "with_shared": ["public.country"],
            "without": ["{schema}.jobs", "public.log"],
            "accept_differences": True,
            "tenants": [
                {"slug": "whole"},
                {"slug": "rows", "where": "org_id = 1"},
                {"slug": "own", "schema": "own", "with_shared": [], "without": [], "accept_differences": False},
            ],
        },
        source="postgresql://db/old",
    )
    found = [(one.schema, one.with_shared, one.without, one.accept_differences) for one in plan.with_keys([("a", "7")])]
    assert found == [
        (None, (), ("public.log",), True),
        (None, (), (), False),
        ("own", (), (), False),
        ("tenant_7", ("public.country",), ("tenant_7.jobs", "public.log"), True),
    ]


async def test_a_key_of_the_query_is_a_value(fleet: Fleet, source: ForeignDatabase) -> None:
    """Whatever the shared database has in its rows, it is no SQL."""
    query = "SELECT 'acme', '1'' OR true OR ''1'' = ''1'"
    plan = AdoptionPlan.parse({"query": query, "where": "org_id::text = {key}", "mapping": LEAVE}, source=source.url)
    report = await fleet.tenancy.adoption.fleet.check(plan)
    assert report.tenants[0].rows == 2  # the shared ones
