"""``tenancy migrate status``, ``drift`` and ``upgrade --refuse-drift``, as a user runs them."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable

import pytest

from tenancy_orm.postgres.quoting import quote_identifier
from tests.integration.migrations.conftest import config, fleet, project, variables
from tests.support.fleet import Fleet
from tests.support.postgres import Postgres
from tests.support.projects import Project
from tests.support.shell import ROOT, environment, python_path
from tests.support.warm import Finished, run_module

__all__ = ["config", "fleet", "project", "variables"]

Migrate = Callable[..., Awaitable[Finished]]


@pytest.fixture
def migrate(project: Project, variables: dict[str, str]) -> Migrate:
    """Run ``tenancy migrate`` with the given arguments."""
    env = environment(
        **variables, TENANCY_MIGRATIONS=str(project.migrations), PYTHONPATH=python_path(ROOT), NO_COLOR="1"
    )

    async def run(*arguments: str) -> Finished:
        return await run_module("tenancy_orm.cli", "migrate", *arguments, cwd=project.root, env=env, stdin="")

    return run


async def test_status_is_read_from_the_registry_unless_it_is_to_be_verified(
    migrate: Migrate, fleet: Fleet, project: Project, postgres: Postgres
) -> None:
    """Counts first, then who is behind; a database that was changed by other means is seen by --verify alone."""
    project.add("0002", down="0001")
    (await fleet.migrations.upgrade(tenants=["acme", "globex"])).raise_for_failures()
    found = await migrate("status")
    assert found.status == 1
    assert [line.split() for line in found.out.splitlines()] == [
        ["REVISION", "TENANTS", "AT", "HEAD"],
        ["0002", "2", "yes"],
        ["0001", "1", "no"],
        [],
        ["TENANT", "REVISION", "AT", "HEAD", "SERVER"],
        ["initech", "0001", "no", "default"],
    ]
    assert "--verify asks the databases" in found.err
    listed = await migrate("status", "--all")
    assert [line.split()[0] for line in listed.out.splitlines()[5:]] == ["acme", "globex", "initech"]
    (await fleet.migrations.upgrade()).raise_for_failures()
    assert (await migrate("status")).status == 0

    await fleet.execute("acme", "UPDATE alembic_version SET version_num = '0001'")
    name = quote_identifier(fleet.database("globex"))
    await postgres.administer(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
    try:
        assert (await migrate("status")).status == 0
        recorded = json.loads((await migrate("status", "--json")).out)
        verified = await migrate("status", "--verify", "--json")
    finally:
        await postgres.administer(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
    assert [(x["slug"], x["revision"], x["at_head"], x["verified"]) for x in recorded] == [
        (slug, "0002", True, False) for slug in ("acme", "globex", "initech")
    ]
    assert verified.status == 1
    assert [(x["slug"], x["revision"], x["recorded"], x["at_head"]) for x in json.loads(verified.out)] == [
        ("acme", "0001", "0002", False),
        ("globex", None, "0002", None),
        ("initech", "0002", "0002", True),
    ]


async def test_drift_is_printed_with_what_mends_it(migrate: Migrate, fleet: Fleet, project: Project) -> None:
    project.add("0002", "op.execute('CREATE FUNCTION two() RETURNS integer LANGUAGE sql AS $$SELECT 2$$')", down="0001")
    (await fleet.migrations.upgrade()).raise_for_failures()
    clean = await migrate("drift")
    assert (clean.status, clean.out) == (0, clean.out)
    assert clean.out.startswith("drift: 3 tenants, 3 as their revision says, 0 drifted, 0 failed")
    for slug in ("acme", "globex"):
        await fleet.execute(
            slug,
            "ALTER TABLE notes ALTER body TYPE text; CREATE INDEX extra ON notes (body); "
            "CREATE OR REPLACE FUNCTION two() RETURNS integer LANGUAGE sql AS 'SELECT 22'; "
            f"REVOKE SELECT ON notes FROM {quote_identifier(fleet.database(slug))}",
        )
    await fleet.execute("initech", 'CREATE TABLE "\x1b[31mred" (id integer)')
    found = await migrate("drift")
    assert found.status == 1
    lines = found.out.splitlines()
    assert lines[:6] == [
        "acme, globex (at 0002):",
        "  function two() has another definition",
        "    -AS $function$SELECT 2$function$",
        "    +AS $function$SELECT 22$function$",
        "    CREATE OR REPLACE FUNCTION public.two()",
        "     RETURNS integer",
    ]
    assert lines[8:] == [
        "  table notes: column body is text, should be varchar(1000)",
        "    no safe statement",
        "  table notes: index extra should not exist",
        "    DROP INDEX CONCURRENTLY public.extra;",
        "  table notes: the tenant's role lacks SELECT",
        '    GRANT SELECT ON TABLE public.notes TO :"tenant_role";',
        "",
        "initech (at 0002):",
        '  table "\\x1b[31mred" should not exist',
        "    no safe statement",
        "",
        lines[-1],
    ]
    assert "-v tenant_role=" in found.err
    # of one tenant, the role is known
    single = await migrate("drift", "acme")
    assert f'GRANT SELECT ON TABLE public.notes TO "{fleet.database("acme")}";' in single.out
    report = json.loads((await migrate("drift", "--json", "--tier", "free", "--server", "default")).out)
    assert [group["tenants"] for group in report["groups"]] == [["acme", "globex"], ["initech"]]
    assert report["groups"][0]["differences"][1]["found"] == "text"

    project.add("0003", down="0002")
    refused = await migrate("upgrade", "--refuse-drift")
    assert refused.status == 1
    assert "3 drifted" in refused.err and "acme, globex, initech" in refused.err
    assert [await fleet.revision(slug) for slug in fleet.tenants] == ["0002"] * 3
