"""Extensions that are configured after tenants exist, on a server with one trusted extension and one that is not."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from tenancy_orm import TenancyConfig
from tenancy_orm.errors import ContentsRefusedError, ExtensionUnavailableError, MigrationError, ProvisioningError
from tenancy_orm.restores import DumpSource
from tests.support.control_databases import create_control_database
from tests.support.dumps import dump, rewrite
from tests.support.fleet import Fleet, count_queries, fleet_config, open_fleet
from tests.support.postgres import Postgres
from tests.support.projects import NOTES, Project
from tests.support.provisioning import VERSIONS, placement, plain_workshop, running_server

GUARDED = """
CREATE TYPE pair AS (a int, b int);
CREATE FUNCTION guarded_answer() RETURNS int LANGUAGE sql RETURN 42;
CREATE FUNCTION guarded_secret() RETURNS int LANGUAGE sql RETURN 7;
REVOKE EXECUTE ON FUNCTION guarded_secret() FROM PUBLIC;
CREATE TABLE guarded_units (name text);
GRANT SELECT ON guarded_units TO PUBLIC;
CREATE SEQUENCE guarded_numbers;
"""

# whatever a dump of rights would show, by name and not by oid
CATALOGUE = """
SELECT 'extension', extname::text, extowner::regrole::text, extnamespace::regnamespace::text, extversion
FROM pg_extension
UNION ALL SELECT 'function', oid::regprocedure::text, proowner::regrole::text, proacl::text, NULL
FROM pg_proc WHERE pronamespace = 'public'::regnamespace
UNION ALL SELECT 'relation', oid::regclass::text, relowner::regrole::text, relacl::text, relkind::text
FROM pg_class WHERE relnamespace = 'public'::regnamespace
UNION ALL SELECT 'type', oid::regtype::text, typowner::regrole::text, typacl::text, NULL
FROM pg_type WHERE typnamespace = 'public'::regnamespace
ORDER BY 1, 2
"""


@pytest.fixture(scope="module")
def server(postgres: Postgres) -> Iterator[Postgres]:
    """A server with two extensions of this module's: ``guarded``, and ``trusty``, which an owner may create."""
    # not below pytest's own directory, which the server's user may not enter
    with tempfile.TemporaryDirectory(prefix="tenancy-extensions-") as share:
        directory = Path(share, "extension")
        directory.mkdir()
        Path(share).chmod(0o755)
        for name, trusted, script in (
            ("guarded", "false", GUARDED),
            ("trusty", "true", "CREATE TABLE trusty_rows ();"),
        ):
            control = f"default_version = '1.0'\nrelocatable = true\ntrusted = {trusted}\n"
            (directory / f"{name}.control").write_text(control)
            (directory / f"{name}--1.0.sql").write_text(script)
        settings = {"extension_control_path": f"$system:{share}"}  # of PostgreSQL 18
        with running_server(max(VERSIONS), f"{postgres.worker}-extensions", **settings) as running:
            yield running


@pytest.fixture
def project(tmp_path: Path) -> Project:
    project = Project.create(tmp_path / "app")
    project.add("0001", NOTES)
    return project


@pytest.fixture
async def config(server: Postgres, name_prefix: str, project: Project) -> TenancyConfig:
    return fleet_config(server, await create_control_database(server, server.new_name()), name_prefix, project)


@pytest.fixture
async def fleet(config: TenancyConfig) -> AsyncIterator[Fleet]:
    """Two tenants, made before any extension was configured."""
    async with open_fleet(config, initialise=True) as opened:
        await opened.create("acme", "globex")
        yield opened


@asynccontextmanager
async def reopened(fleet: Fleet, **changes: Any) -> AsyncIterator[Fleet]:
    """The same fleet, in a process with another configuration."""
    async with open_fleet(fleet.tenancy.config.replace(**changes)) as opened:
        opened.tenants.update(fleet.tenants)
        yield opened


async def catalogue(fleet: Fleet, slug: str) -> list[list[str]]:
    """What a tenant's database has and who may use it, the tenant's own name left out."""
    rows = await fleet.fetch(slug, CATALOGUE)
    return [[str(value).replace(fleet.database(slug), "tenant") for value in row] for row in rows]


async def lacking(fleet: Fleet) -> dict[str, tuple[str, ...]]:
    return {one.slug: one.missing_extensions for one in await fleet.migrations.status(verify=True)}


async def test_an_upgrade_brings_extensions_to_tenants_first(fleet: Fleet, project: Project) -> None:
    """As administrator, with the rights that a fresh clone has; and a revision that needs them then works."""
    project.add(
        "0002", 'op.execute("ALTER TABLE notes ADD COLUMN spot pair DEFAULT (1, guarded_answer())")', down="0001"
    )
    with pytest.raises(MigrationError, match="no tenant was touched"):
        await fleet.migrations.upgrade()
    wanted = ("guarded", "trusty")
    async with reopened(fleet, extensions=wanted) as later:
        await later.create("hooli")
        assert await lacking(later) == {"acme": wanted, "globex": wanted, "hooli": ()}
        report = await later.migrations.upgrade(tenants=["acme"])
        assert [(x.slug, x.after, x.changed, x.extensions) for x in report.outcomes] == [("acme", "0002", True, wanted)]
        assert await lacking(later) == {"acme": (), "globex": wanted, "hooli": ()}
        (await later.migrations.upgrade()).raise_for_failures()
        fresh = await catalogue(later, "hooli")
        assert any("guarded_secret()" in row for row in fresh)
        for slug in ("acme", "globex"):
            assert await catalogue(later, slug) == fresh
            assert await later.tenancy.fetch_value("SELECT guarded_answer()", tenant=slug) == 42
            with pytest.raises(sa.exc.DBAPIError, match="permission denied"):
                await later.tenancy.fetch_value("SELECT guarded_secret()", tenant=slug)
        report = await later.migrations.upgrade()
        assert report.changed == ()


async def test_a_fleet_that_has_them_all_costs_one_connection_and_one_select(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with reopened(fleet, extensions=("guarded",)) as later:
        await later.migrations.upgrade()
        queries = count_queries(later.services.servers["default"], monkeypatch)
        await later.migrations.upgrade()
        # the server itself is asked once which extensions it has
        assert {name: len(asked) for name, asked in queries.items()} == {
            None: 1,
            later.database("acme"): 1,
            later.database("globex"): 1,
        }


async def test_an_extension_that_the_server_lacks_is_found_before_any_tenant_is_touched(
    fleet: Fleet, project: Project
) -> None:
    """Also where the template exists and has it: the server may have lost it since."""
    project.add("0002", 'op.add_column("notes", sa.Column("n", sa.Integer))', down="0001")
    async with reopened(fleet, extensions=("guarded", "no-such")) as later:
        for upgrade in (
            later.migrations.upgrade(),
            later.migrations.upgrade("0001"),
            later.migrations.install_extensions(),
        ):
            with pytest.raises(
                MigrationError, match=r"no tenant was touched: server 'default' .*'no-such'.* package"
            ) as caught:
                await upgrade
            assert isinstance(caught.value.__cause__, ExtensionUnavailableError)
            assert caught.value.__cause__.extensions == ("no-such",)
        for slug in ("acme", "globex"):
            assert await later.revision(slug) == "0001"
            assert await later.fetch(slug, "SELECT 1 FROM pg_extension WHERE extname = 'guarded'") == []


async def test_an_extension_that_is_not_configured_any_more_is_left_alone_and_shown(fleet: Fleet) -> None:
    async with reopened(fleet, extensions=("guarded",)) as later:
        await later.migrations.upgrade()
    await fleet.migrations.upgrade()
    found = await fleet.migrations.status(verify=True, tenants=["acme"])
    assert [(x.other_extensions, x.missing_extensions, x.is_complete) for x in found] == [(("guarded",), (), True)]


async def test_a_failure_to_install_is_reported_for_that_tenant_alone(fleet: Fleet) -> None:
    """Something in the way of the extension's objects: the others get it all the same."""
    await fleet.execute("acme", "CREATE TABLE public.guarded_units ()")
    async with reopened(fleet, extensions=("guarded",)) as later:
        for run in (later.migrations.upgrade, later.migrations.install_extensions):
            report = await run()
            assert list(report.reasons) == ["acme"]
            assert "guarded could not be installed" in report.reasons["acme"]
        assert await lacking(later) == {"acme": ("guarded",), "globex": ()}


async def test_without_migrations_a_method_brings_them(server: Postgres, config: TenancyConfig) -> None:
    metadata = sa.MetaData()
    sa.Table("notes", metadata, sa.Column("id", sa.Integer, primary_key=True))
    async with open_fleet(config.replace(migrations=None, metadata=metadata), initialise=True) as fleet:
        await fleet.create("acme", "globex")
        async with reopened(fleet, extensions=("guarded",)) as later:
            assert await lacking(later) == {"acme": ("guarded",), "globex": ("guarded",)}
            report = await later.migrations.install_extensions()
            assert [(x.slug, x.extensions, x.ok) for x in report.outcomes] == [
                ("acme", ("guarded",), True),
                ("globex", ("guarded",), True),
            ]
            assert (await later.migrations.install_extensions()).changed == ()
            await later.create("hooli")
            found = await later.migrations.status(verify=True)
            assert [one.is_complete for one in found] == [True, True, True]
            assert await later.tenancy.fetch_value("SELECT guarded_answer()", tenant="globex") == 42


async def test_an_administrator_who_is_no_superuser_installs_trusted_ones(server: Postgres) -> None:
    """The error about another one says what the administrator lacks; templates can be listed and dropped too."""
    async with plain_workshop(server) as workshop:
        tenant = await workshop.create("acme")
        later = workshop.provisioner_of(extensions=("trusty",))
        await later.extensions.install("default", placement(tenant).database, ["trusty"])
        async with workshop.connect(tenant) as connection:
            assert await connection.fetchval("SELECT extversion FROM pg_extension WHERE extname = 'trusty'") == "1.0"
        with pytest.raises(ProvisioningError, match=r"may not create extension 'guarded'.*superuser"):
            await later.extensions.install("default", placement(tenant).database, ["guarded"])
        with pytest.raises(ProvisioningError, match=r"may not create extension 'guarded'.*superuser"):
            await workshop.provisioner_of(extensions=("guarded",)).template("default")
        former, current = await workshop.provisioner.template("default"), await later.template("default")
        async with workshop.control.transaction() as connection:
            await connection.execute(sa.text("UPDATE tenancy.templates SET last_used_at = now() - interval '1 day'"))
        assert [one.name for one in (await later.templates.prune(unused_seconds=60)).removed] == [former.name]
        assert [(one.name, (one.size_bytes or 0) > 0) for one in await later.templates.list()] == [(current.name, True)]


# --- CREATE EXTENSION in revisions ----------------------------------------------------------------------------------


async def test_a_revision_that_creates_an_extension_passes_where_it_is_configured(
    fleet: Fleet, project: Project
) -> None:
    """Without the setting it fails on the template, with the remedy."""
    script = " -- for notes\\n create extension Guarded with schema public; SELECT 1"
    project.add("0002", f'op.execute("{script.partition(";")[0]};")\nop.execute("{script}")', down="0001")
    with pytest.raises(MigrationError, match=r"42501.*add 'guarded' to the setting extensions"):
        await fleet.migrations.upgrade()
    async with reopened(fleet, extensions=("guarded",)) as later:
        (await later.migrations.upgrade()).raise_for_failures()
        assert [await later.revision(slug) for slug in ("acme", "globex")] == ["0002", "0002"]
        project.add("0003", 'op.execute("DROP EXTENSION guarded")', down="0002")
        with pytest.raises(MigrationError, match=r"belongs to the administrator.*leave this statement out"):
            await later.migrations.upgrade()


async def test_a_trusted_extension_can_be_created_by_a_revision_and_an_unknown_one_not(
    fleet: Fleet, project: Project
) -> None:
    project.add(
        "0002",
        'op.execute("CREATE EXTENSION trusty")\nop.execute("CREATE EXTENSION IF NOT EXISTS trusty")',
        down="0001",
    )
    (await fleet.migrations.upgrade()).raise_for_failures()
    assert [one.other_extensions for one in await fleet.migrations.status(verify=True)] == [("trusty",), ("trusty",)]
    project.add("0003", 'op.execute(sa.text("CREATE EXTENSION nowhere"))', down="0002")
    with pytest.raises(MigrationError, match="does not have extension 'nowhere': install its package"):
        await fleet.migrations.upgrade()
    # in a script the hint is only for the extension that the error is about
    project.add("0003", 'op.execute("CREATE EXTENSION trusty; CREATE EXTENSION nowhere; SELECT 1")', down="0002")
    with pytest.raises(MigrationError, match="does not have extension 'nowhere': install its package"):
        await fleet.migrations.upgrade()
    project.add("0003", 'op.execute("CREATE EXTENSION trusty; CREATE DATABASE x")', down="0002")
    with pytest.raises(MigrationError) as failed:
        await fleet.migrations.upgrade()
    assert "extension" not in str(failed.value)


async def test_an_extension_hides_no_code_of_an_archive(fleet: Fleet, project: Project, tmp_path: Path) -> None:
    """Who creates a trusted extension adds functions to it, and what belongs to one is not compared."""
    project.add("0002", 'op.execute("CREATE EXTENSION trusty")', down="0001")
    (await fleet.migrations.upgrade()).raise_for_failures()
    placeholder = "x" * 400
    async with fleet.connect("acme") as connection:
        await connection.execute(f"COMMENT ON TABLE notes IS '{placeholder}'")
    archive = await dump(fleet, "acme", tmp_path / "dump")
    sql = (
        "CREATE EXTENSION trusty SCHEMA public; CREATE FUNCTION public.who() RETURNS text LANGUAGE sql SECURITY "
        "DEFINER AS 'SELECT CURRENT_USER::text'; ALTER EXTENSION trusty ADD FUNCTION public.who(); --"
    )
    rewrite(archive, f"COMMENT ON TABLE public.notes IS '{placeholder}';", sql)
    rewrite(archive, "CREATE EXTENSION IF NOT EXISTS trusty WITH SCHEMA public;", "SELECT 1; --")
    with pytest.raises(ContentsRefusedError, match=r"who\(\) of an extension"):
        await fleet.tenancy.restores.restore("acme", DumpSource(archive))
