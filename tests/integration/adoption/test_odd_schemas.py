"""Schemas with partitions, functions of their own types, and tables that are left out: nothing is lost by silence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tenancy_orm.errors import AdoptionError
from tests.support.fleet import Fleet
from tests.support.postgres import Postgres
from tests.support.projects import Project
from tests.support.sources import foreign_database

TABLES = """
CREATE TYPE {0}.hours AS (first int, last int);
CREATE TABLE {0}.shifts (id bigint PRIMARY KEY, at {0}.hours);
CREATE FUNCTION {0}.longest({0}.shifts, {0}.hours) RETURNS {0}.hours LANGUAGE sql AS 'SELECT $2';
CREATE OPERATOR {0}.<-> (LEFTARG = {0}.shifts, RIGHTARG = {0}.hours, FUNCTION = {0}.longest);
CREATE TABLE {0}.events (id bigint NOT NULL) PARTITION BY RANGE (id);
"""
# of the revision alone: a partition has a bound, which is code
LATER = """
CREATE TABLE public.events_1 PARTITION OF public.events FOR VALUES FROM (0) TO (10);
CREATE TABLE public.days (id bigint NOT NULL) PARTITION BY RANGE (id);
CREATE TABLE public.days_1 PARTITION OF public.days FOR VALUES FROM (0) TO (10);
"""
PARTITIONS = """
CREATE TABLE {1}.events_1 PARTITION OF {0}.events FOR VALUES FROM (0) TO (10);
INSERT INTO {0}.events VALUES (1), (2);
"""


@pytest.fixture
def project(tmp_path: Path) -> Project:
    project = Project.create(tmp_path / "app")
    project.add("0001", f"op.execute('''\n{TABLES.format('public')}\n''')")
    project.add("0002", f"op.execute('''\n{LATER}\n''')", down="0001")
    return project


async def test_partitions_in_another_schema_are_not_lost(fleet: Fleet, postgres: Postgres) -> None:
    """Neither those of the schema's own tables, nor those of shared ones."""
    adoption = fleet.tenancy.adoption
    made = "CREATE SCHEMA acme; CREATE SCHEMA parts;" + TABLES.format("acme")
    async with foreign_database(postgres, made + PARTITIONS.format("acme", "parts")) as source:
        with pytest.raises(AdoptionError, match=r"parts\.events_1 \(of acme\.events\); move .* SET SCHEMA acme"):
            await adoption.adopt("acme", source.url, schema="acme", at="0001")
        await source.execute(
            "ALTER TABLE parts.events_1 SET SCHEMA acme; "
            "CREATE TABLE days (id bigint NOT NULL) PARTITION BY RANGE (id); CREATE SCHEMA globex; "
            "CREATE TABLE days_1 PARTITION OF days FOR VALUES FROM (0) TO (10); "
            "CREATE TABLE globex.days_2 PARTITION OF days FOR VALUES FROM (10) TO (20); "
            "INSERT INTO days VALUES (1), (11); "
            "INSERT INTO acme.shifts VALUES (1, '(8,12)')"
        )
        options: dict[str, Any] = {"schema": "acme", "at": "0002"}
        with pytest.raises(AdoptionError, match=r"--with-shared public\.days_1$"):
            await adoption.adopt("acme", source.url, with_shared=["public.days"], **options)
        shared = ["public.days", "public.days_1"]
        report = await adoption.adopt("acme", source.url, with_shared=shared, **options)
        assert "partition globex.days_2 of table public.days is not copied" in report.notes
    assert await fleet.fetch("acme", "SELECT id FROM events ORDER BY id") == [(1,), (2,)]
    assert await fleet.fetch("acme", "SELECT id FROM days") == [(1,)]
    # what takes the schema's types has moved with them
    assert await fleet.fetch("acme", "SELECT (s <-> at)::text FROM shifts s") == [("(8,12)",)]


async def test_a_partitioned_table_is_left_out_with_its_partitions(fleet: Fleet, postgres: Postgres) -> None:
    logs = "CREATE TABLE logs (id bigint) PARTITION BY RANGE (id); "
    logs += "CREATE TABLE logs_1 PARTITION OF logs FOR VALUES FROM (0) TO (10); INSERT INTO logs VALUES (1)"
    async with foreign_database(postgres, TABLES.format("public") + logs) as source:
        report = await fleet.tenancy.adoption.adopt("acme", source.url, at="0001", without=["public.logs"])
        assert report.rows == 0 and report.tenant is not None
    assert await fleet.fetch("acme", "SELECT to_regclass('logs_1')") == [(None,)]


async def test_a_schema_with_a_name_in_quotes_needs_nothing_of_its_own(fleet: Fleet, postgres: Postgres) -> None:
    """A table that it does need is named as the option takes it."""
    made = 'CREATE TABLE "Land" (id bigint PRIMARY KEY); CREATE SCHEMA "north-sea";' + TABLES.format('"north-sea"')
    refers = 'CREATE TABLE "north-sea".ports (land bigint REFERENCES public."Land")'
    async with foreign_database(postgres, made + refers) as source:
        check = fleet.tenancy.adoption.check
        with pytest.raises(AdoptionError, match=r"outside of it: public\.Land \(.* --with-shared public\.Land$"):
            await check("north", source.url, schema="north-sea", at="0001")
        report = await check("north", source.url, schema="north-sea", with_shared=["public.Land"], at="0001")
    assert {one.text for one in report.differences} == {'table "Land" should not exist', "table ports should not exist"}
