"""Alembic's version table may have a schema and a name of its own."""

from __future__ import annotations

import pytest

from tenancy_orm.config import TenancyConfig
from tests.support.alembic_program import Alembic
from tests.support.fleet import Fleet, open_fleet
from tests.support.projects import NOTES, Project

# (options of env.py, the table, what the first revision does about the schema)
CASES = {
    "schema": ('version_table_schema="App"', '"App".alembic_version', ""),
    "schema and name": (
        'version_table_schema="app", version_table="revisions"',
        "app.revisions",
        'op.execute("CREATE SCHEMA app")\n',
    ),
    "per migration": (
        'version_table_schema="app", transaction_per_migration=True',
        "app.alembic_version",
        'op.execute("CREATE SCHEMA app; CREATE TABLE app.own (id integer)")\n',
    ),
}


@pytest.mark.parametrize("case", CASES)
async def test_a_version_table_in_a_schema_of_its_own(config: TenancyConfig, project: Project, case: str) -> None:
    """For the template, new and old tenants, every command, and with rights that let the tenant read it alone."""
    options, table, first = CASES[case]
    project.configure("target_metadata=target_metadata, " + options)
    project.add("0001", first + NOTES, 'op.drop_table("notes")')
    async with open_fleet(config, initialise=True) as fleet:
        await fleet.create("acme", "globex")
        project.add("0002", 'op.add_column("notes", sa.Column("rating", sa.Integer))', down="0001")
        # globex loses it all: its schema is made again, as for an adopted database
        schema = table.rpartition(".")[0]
        await fleet.execute("globex", f"DROP SCHEMA {schema} CASCADE; DROP TABLE notes")
        report = await fleet.migrations.upgrade()
        assert {o.slug: (o.before, o.after, o.error) for o in report.outcomes} == {
            "acme": ("0001", "0002", None),
            "globex": (None, "0002", None),
        }
        await fleet.create("initech")
        for slug in ("acme", "globex", "initech"):
            assert await fleet.fetch(slug, f"SELECT version_num FROM {table}") == [("0002",)]
            assert await fleet.fetch(slug, "SELECT to_regclass('public.alembic_version')::text") == [(None,)]
            role = fleet.database(slug)  # a tenant's role is named as its database is
            rights = [
                f"has_schema_privilege('{role}', '{schema}', 'USAGE')".replace('"', ""),
                f"has_table_privilege('{role}', '{table}', 'SELECT')",
                f"has_table_privilege('{role}', '{table}', 'INSERT, UPDATE, DELETE, TRUNCATE')",
                f"pg_get_userbyid(relowner) = '{fleet.services.names.owner}'",
            ]
            found = await fleet.fetch(slug, f"SELECT {', '.join(rights)} FROM pg_class WHERE oid = '{table}'::regclass")
            assert found == [(True, True, False, True)]
        assert (await fleet.migrations.downgrade("-1", tenants=["acme"])).ok
        assert (await fleet.migrations.stamp("head", tenants=["acme"])).ok
        assert [(f.revision, f.at_head, f.is_recorded) for f in await fleet.migrations.status(verify=True)] == [
            ("0002", True, True)
        ] * 3


async def test_alembics_commands_with_a_version_table_in_a_schema(alembic: Alembic, fleet: Fleet) -> None:
    alembic.project.configure(
        'target_metadata=target_metadata, version_table_schema="app", version_table="revisions", include_schemas=True'
    )
    await fleet.execute("acme", "DROP TABLE alembic_version, notes")
    alembic.project.add("0001", "op.execute('CREATE SCHEMA app')\n" + NOTES, 'op.drop_table("notes")')
    await alembic("-x", "tenant=acme", "ensure_version")
    assert await fleet.fetch("acme", "SELECT count(*) FROM app.revisions") == [(0,)]
    await alembic("-x", "tenant=acme", "upgrade", "head")
    assert await alembic("-x", "tenant=acme", "current") == "acme: 0001 (head)\n"
    # its scratch database is a clone of the template, with the version table, which autogenerate leaves out
    assert "revisions" not in await alembic("check", ok=False)

    alembic.variables = {}
    for arguments in (("upgrade", "head"), ("stamp", "head")):
        printed = await alembic(*arguments, "--sql")
        assert printed.count('CREATE SCHEMA IF NOT EXISTS "app";') == 1
        assert printed.index("CREATE SCHEMA") < printed.index("CREATE TABLE app.revisions")
        assert "CREATE SCHEMA app" not in printed, "the revision's own would fail"
    assert "CREATE SCHEMA" not in await alembic("downgrade", "0001:base", "--sql")
