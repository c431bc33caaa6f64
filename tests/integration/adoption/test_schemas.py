"""Schemas of a shared database that become tenants, one each, as django-tenants and Apartment lay them out."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa

from tenancy_orm.adoption import AdoptionPlan
from tenancy_orm.adoption.renaming import rewritten
from tenancy_orm.errors import AdoptionDifferencesError, AdoptionError, TenantNotFoundError
from tests.support.fleet import Fleet
from tests.support.postgres import Postgres
from tests.support.projects import Project
from tests.support.sources import ForeignDatabase, foreign_database

SHARED = """
CREATE TABLE {0}.country (code text PRIMARY KEY, name text NOT NULL);
"""
TABLES = """
CREATE TYPE {0}.mood AS ENUM ('good', 'bad');
CREATE TABLE {0}.authors (id bigserial PRIMARY KEY, name text NOT NULL, mood {0}.mood NOT NULL DEFAULT 'good',
    country text CONSTRAINT authors_country_fkey REFERENCES public.country (code));
CREATE TABLE {0}."order" (id bigserial PRIMARY KEY, author_id bigint NOT NULL
    CONSTRAINT order_author_fkey REFERENCES {0}.authors (id), "Total" numeric(10, 2) NOT NULL DEFAULT 0);
CREATE SEQUENCE {0}.numbers START 100;
ALTER TABLE {0}."order" ADD number bigint NOT NULL DEFAULT nextval('{0}.numbers');
CREATE VIEW {0}.totals AS SELECT author_id, sum("Total") AS total FROM {0}."order" GROUP BY author_id;
CREATE FUNCTION {0}.count_orders(bigint) RETURNS bigint LANGUAGE sql STABLE SET search_path TO {0}
    AS $$ SELECT count(*) FROM {0}."order" WHERE author_id = $1 $$;
CREATE FUNCTION {0}.check_total() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {1}RETURN NEW; END $$;
CREATE TRIGGER checking BEFORE INSERT ON {0}."order" FOR EACH ROW EXECUTE FUNCTION {0}.check_total();
"""
# on one line, as a revision may indent the others
CHECK = (
    """IF NEW."Total" < 0 THEN RAISE EXCEPTION 'no total is below zero'; END IF; """
    "/* as in {0}.authors */ PERFORM 1 FROM {0}.authors WHERE id = NEW.author_id; "
)
ROWS = """
INSERT INTO {0}.authors (name, country) SELECT '{0} ' || n, 'fr' FROM generate_series(1, {1}) n;
INSERT INTO {0}."order" (author_id, "Total") SELECT n, n FROM generate_series(1, {1}) n;
"""
LAYOUT = (
    "CREATE TABLE public.tenants (schema_name text PRIMARY KEY);"
    + SHARED.format("public")
    + "INSERT INTO country VALUES ('fr', 'France'), ('de', 'Germany');"
    + "".join(
        f"CREATE SCHEMA {name}; CREATE TABLE {name}.django_migrations (id serial PRIMARY KEY, app text);"
        + TABLES.format(name, CHECK.format(name))
        + ROWS.format(name, count)
        for name, count in (("acme", 7), ("globex", 3))
    )
)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """The same tables in ``public``, and a second revision."""
    project = Project.create(tmp_path / "app")
    script = SHARED.format("public") + TABLES.format("public", CHECK.format("public"))
    project.add("0001", f"op.execute('''\n{script}\n''')")
    project.add("0002", "op.execute('ALTER TABLE \"order\" ADD paid boolean NOT NULL DEFAULT false')", down="0001")
    return project


@pytest.fixture
async def source(postgres: Postgres) -> AsyncIterator[ForeignDatabase]:
    """A shared database with two tenants' schemas, and tables of all tenants in ``public``."""
    async with foreign_database(postgres, LAYOUT) as made:
        yield made


async def test_each_schema_becomes_a_tenant_with_the_shared_tables_that_it_needs(
    fleet: Fleet, source: ForeignDatabase
) -> None:
    adoption = fleet.tenancy.adoption
    with pytest.raises(AdoptionError, match="--at REVISION"):
        await adoption.check("acme", source.url, schema="acme")
    with pytest.raises(AdoptionError, match=r"authors_country_fkey.*--with-shared public\.country"):
        await adoption.check("acme", source.url, schema="acme", at="0001")
    with pytest.raises(AdoptionDifferencesError, match="table django_migrations should not exist"):
        await adoption.adopt("acme", source.url, schema="acme", with_shared=["public.country"], at="0001")
    with pytest.raises(AdoptionError, match=r"has no table 'acme\.none' to leave out"):
        await adoption.check(
            "acme", source.url, schema="acme", with_shared=["public.country"], at="0001", without=["acme.none"]
        )
    for slug, count in (("acme", 7), ("globex", 3)):
        report = await adoption.adopt(
            slug,
            source.url,
            schema=slug,
            with_shared=["public.country"],
            without=[f"{slug}.django_migrations"],
            at="0001",
        )
        assert {table.source: (table.target, table.rows) for table in report.tables} == {
            f"{slug}.authors": ("public.authors", count),
            f"{slug}.order": ("public.order", count),
            "public.country": ("public.country", 2),
        }
        async with fleet.tenancy.transaction(slug) as session:
            names = (await session.execute(sa.text("SELECT DISTINCT split_part(name, ' ', 1) FROM authors"))).all()
            assert names == [(slug,)]
            row = sa.text('INSERT INTO "order" (author_id, "Total") VALUES (1, 5) RETURNING id, number, paid')
            assert (await session.execute(row)).one() == (count + 1, 100 + count, False)
            assert (await session.execute(sa.text("SELECT count_orders(1)"))).scalar() == 2
            assert (await session.execute(sa.text("SELECT total FROM totals WHERE author_id = 1"))).scalar() == 6
        assert await fleet.fetch(slug, "SELECT nspname FROM pg_namespace WHERE nspname IN ('acme', 'globex')") == []
        assert await fleet.fetch(slug, "SELECT version_num FROM alembic_version") == [("0002",)]
    drift = await fleet.migrations.drift()
    assert drift.ok, drift


async def test_a_fleet_of_schemas_is_adopted_by_a_plan(fleet: Fleet, source: ForeignDatabase) -> None:
    """Each schema leaves its own table of another tool behind, and one alone may differ from its revision."""
    dotted = '"initech.io"'
    await source.execute(
        f"CREATE SCHEMA {dotted}; CREATE TABLE {dotted}.django_migrations (id serial PRIMARY KEY, app text);"
        + TABLES.format(dotted, CHECK.format(dotted))
        + ROWS.format(dotted, 2)
        + "CREATE TABLE globex.extra (n int);"
        + "INSERT INTO public.tenants VALUES ('public'), ('acme'), ('initech.io')"
    )
    globex = {"slug": "globex", "schema": "globex", "accept_differences": True}
    plan = AdoptionPlan.parse(
        {
            "query": "SELECT split_part(schema_name, '.', 1), schema_name FROM public.tenants "
            "WHERE schema_name <> 'public' ORDER BY 1",
            "schema": "{key}",
            "with_shared": ["public.country"],
            "without": ["{schema}.django_migrations"],
            "at": "0001",
            "concurrency": 2,
            "tenants": [globex],
        },
        source=source.url,
    )
    adoption = fleet.tenancy.adoption.fleet
    strict = AdoptionPlan(tenants=tuple(replace(one, accept_differences=False) for one in plan.tenants))
    refused = await adoption.check(strict)
    assert [one.error for one in refused.failures] == ["table extra should not exist"] and not refused.notes
    looked = await adoption.check(plan)
    assert [(one.slug, one.rows, one.error) for one in looked.tenants] == [
        ("globex", 8, None),
        ("acme", 16, None),
        ("initech", 6, None),
    ]
    assert looked.ok and looked.notes == ("globex: accepted: table extra should not exist",)
    assert {one.state for one in (await adoption.adopt(strict)).tenants} == {"failed"}
    done = await adoption.adopt(plan)
    assert [(one.slug, one.state, one.error) for one in done.tenants] == [
        (slug, "adopted", None) for slug in ("globex", "acme", "initech")
    ]
    for slug, count in (("globex", 3), ("acme", 7), ("initech", 2)):
        assert await fleet.fetch(slug, "SELECT count(*) FROM authors") == [(count,)]
        assert await fleet.fetch(slug, "SELECT to_regclass('django_migrations')") == [(None,)]
    assert {one.state for one in (await adoption.adopt(plan)).tenants} == {"skipped"}


async def test_what_cannot_follow_is_refused_by_name(fleet: Fleet, source: ForeignDatabase) -> None:
    """A schema's name in a string, a function of another schema, and a name that is taken."""
    adopt = fleet.tenancy.adoption.adopt
    arguments = {
        "schema": "acme",
        "with_shared": ["public.country"],
        "without": ["acme.django_migrations", "globex.django_migrations"],
        "at": "0001",
    }
    await source.execute(
        "CREATE OR REPLACE FUNCTION acme.check_total() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "EXECUTE 'SELECT 1 FROM acme.authors'; RETURN NEW; END $$"
    )
    with pytest.raises(AdoptionDifferencesError, match=r"public\.check_total\(\) names the schema acme in its text"):
        await adopt("acme", source.url, **arguments)  # type: ignore[arg-type]
    await source.execute("CREATE FUNCTION public.one() RETURNS int LANGUAGE sql AS 'SELECT 1'")
    await source.execute("ALTER TABLE acme.authors ALTER id SET DEFAULT public.one()")
    with pytest.raises(AdoptionError, match=r"function public\.one\(\).*default value for column id of table acme"):
        await adopt("acme", source.url, **arguments)  # type: ignore[arg-type]
    await source.execute("CREATE TABLE globex.country (n int)")
    with pytest.raises(AdoptionError, match=r"globex\.country cannot become 'public'"):
        await adopt("globex", source.url, **{**arguments, "schema": "globex"})  # type: ignore[arg-type]
    for unknown in ({"schema": "nobody"}, {"with_shared": ["public.none"]}):
        with pytest.raises(AdoptionError, match=r"has no (schema|table) '(nobody|public\.none)'"):
            await adopt("acme", source.url, **{**arguments, **unknown})  # type: ignore[arg-type]
    for slug in ("acme", "globex"):
        with pytest.raises(TenantNotFoundError):
            await fleet.tenancy.tenants.get(slug)
    assert (await fleet.provisioner.reconcile(check=True)).clean


def test_only_names_before_a_point_are_replaced() -> None:
    definition = (
        "CREATE OR REPLACE FUNCTION public.f()\n RETURNS int\n LANGUAGE sql\n SET search_path TO 'a-b', 'public'\n"
        'AS $function$ SELECT x."a-b".n, \'it\'\'s "a-b".c\' FROM "a-b".c, "xa-b".d, "a-b" $function$\n'
    )
    assert rewritten(definition, "a-b", "public") == (
        "CREATE OR REPLACE FUNCTION public.f()\n RETURNS int\n LANGUAGE sql\n SET search_path TO 'public', 'public'\n"
        'AS $function$ SELECT x."a-b".n, \'it\'\'s "a-b".c\' FROM public.c, "xa-b".d, "a-b" $function$\n'
    )
