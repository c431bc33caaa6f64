"""One Alembic configuration is in force for templates, tenants, autogenerate and status, wherever it comes from."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from alembic import command
from alembic.config import Config
from alembic.util.exc import CommandError

from tenancy_orm import Tenancy
from tests.support.alembic_program import Alembic
from tests.support.fleet import Fleet
from tests.support.projects import NOTES, Project

# they list the templates of the installation
pytestmark = pytest.mark.new_installation

BRANCH = """
revision = "b1"
down_revision = None
from alembic import op
def upgrade():
    op.execute("CREATE TABLE branch (id integer)")
"""

APP = """
import sqlalchemy as sa
from tenancy_orm import TenancyConfig

metadata = sa.MetaData()
id = sa.Column("id", sa.Integer, primary_key=True)
sa.Table("notes", metadata, id, sa.Column("body", sa.String(1000), nullable=False))
sa.Table("branch", metadata, sa.Column("id", sa.Integer))
config = TenancyConfig.from_env(metadata=metadata)
"""

WAYS = {"-c": ("-c", "other.ini"), "-n": ("-n", "other"), "ALEMBIC_CONFIG": ()}


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """Revision 0001, and in a directory that only other.ini and the section ``other`` name, the branch b1."""
    project = Project.create(tmp_path / "app", app="demo:config")
    project.add("0001", NOTES, 'op.drop_table("notes")')
    (project.root / "demo.py").write_text(APP)
    (project.root / "branch").mkdir()
    (project.root / "branch" / "b1.py").write_text(BRANCH)
    return project


def configure_branch(project: Project, way: str) -> dict[str, str]:
    """Write the configuration with the branch; return the settings that name it."""
    text = project.ini.read_text()
    start, end = text.index("[alembic]"), text.index("[post_write_hooks]")
    both = text[start:end] + "version_locations = %(here)s/migrations/versions:%(here)s/branch\n"
    if way == "-n":
        project.ini.write_text(text[:end] + both.replace("[alembic]", "[other]") + text[end:])
        return {"alembic_config": str(project.ini), "alembic_section": "other"}
    (project.root / "other.ini").write_text(text[:start] + both + text[end:])
    return {"alembic_config": str(project.root / "other.ini")}


async def templates(fleet: Fleet) -> list[str]:
    """The revisions of all templates of this fleet."""
    prefix = fleet.services.config.name_prefix
    query = (
        "SELECT shobj_description(oid, 'pg_database') FROM pg_database "
        f"WHERE datistemplate AND datname LIKE '{prefix}%' ORDER BY 1"
    )
    return [str(row[0]).partition(":")[2] for row in await fleet.fetch("acme", query)]


@pytest.mark.parametrize("way", WAYS)
async def test_the_template_is_made_by_the_configuration_that_alembic_runs_with(
    alembic: Alembic, fleet: Fleet, way: str
) -> None:
    options, settings = WAYS[way], configure_branch(alembic.project, way)
    if way == "ALEMBIC_CONFIG":
        alembic.variables = {**alembic.variables, way: "other.ini"}
    assert "3 migrated" in await alembic(*options, "upgrade", "heads")
    assert await fleet.revision("acme") == "0001,b1"
    assert await templates(fleet) == ["0001", "0001,b1"]
    # the scratch database of autogenerate is a clone of that template
    assert "No new upgrade operations detected." in await alembic(*options, "check")
    assert "acme: 0001 (head)" not in await alembic(*options, "current", "--check-heads")

    # an application that is told the same file and section has the same template
    async with Tenancy(fleet.services.config.replace(migration=settings)) as tenancy:
        created = await tenancy.tenants.create("hooli")
        assert created.tenant.schema_revision == "0001,b1"
        assert all(found.at_head for found in await tenancy.migrations.status(verify=True))
    assert await templates(fleet) == ["0001", "0001,b1"]


async def test_another_configuration_than_the_applications_is_refused(alembic: Alembic, fleet: Fleet) -> None:
    configure_branch(alembic.project, "-c")
    alembic.variables = {**alembic.variables, "TENANCY_MIGRATIONS": str(alembic.project.migrations)}
    printed = await alembic("-c", "other.ini", "upgrade", "heads", ok=False)
    assert "FAILED: alembic runs" in printed
    assert "new tenants would differ. No tenant was touched." in printed
    assert "set migrations, migration.alembic_config and migration.alembic_section" in printed
    assert await fleet.revision("acme") == "0001"
    assert await templates(fleet) == ["0001"]

    alembic.variables = {**alembic.variables, "TENANCY_MIGRATION_ALEMBIC_CONFIG": "other.ini"}
    await alembic("-c", "other.ini", "upgrade", "heads")
    assert await fleet.revision("acme") == "0001,b1"
    # and now the other way round
    assert "FAILED: alembic runs" in await alembic("downgrade", "b1@base", ok=False)
    assert await fleet.revision("acme") == "0001,b1"


async def test_options_that_are_set_in_memory_are_in_force_for_the_template(fleet: Fleet, project: Project) -> None:
    settings = fleet.services.config.replace(migrations=None)
    python = Config(project.ini, attributes={"tenancy": settings})
    python.set_main_option("version_locations", f"{project.migrations / 'versions'}:{project.root / 'branch'}")
    command.upgrade(python, "heads")
    assert await templates(fleet) == ["0001", "0001,b1"]

    # the application's own Tenancy can have the same Config
    async with Tenancy(fleet.services.config.replace(migration={"alembic_config": python})) as tenancy:
        assert (await tenancy.tenants.create("hooli")).tenant.schema_revision == "0001,b1"
    own = Config(project.ini, attributes={"tenancy": fleet.tenancy})
    own.set_main_option("version_locations", python.get_main_option("version_locations") or "")
    with pytest.raises(CommandError, match="new tenants would differ"):
        command.downgrade(own, "b1@base")


def add_colour(project: Project) -> None:
    body = 'op.add_column("notes", sa.Column(context.get_x_argument(as_dictionary=True).get("name", "x"), sa.Text))'
    project.add("0002", body, down="0001")


async def test_x_arguments_of_the_settings_reach_templates_and_runs(
    alembic: Alembic, fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    add_colour(alembic.project)
    settings = {"x_arguments": ["name=colour"]}
    async with Tenancy(fleet.services.config.replace(migration=settings)) as tenancy:
        with caplog.at_level(logging.WARNING):
            assert (await tenancy.migrations.upgrade(tenants=["acme"])).ok
        assert not caplog.messages
        await tenancy.tenants.create("hooli")
        assert [(await fleet.columns(slug))[-1] for slug in ("acme", "hooli")] == ["colour", "colour"]
    alembic.variables = {**alembic.variables, "TENANCY_MIGRATION_X_ARGUMENTS": "name=colour"}
    await alembic("-x", "tenant=globex", "upgrade", "head")
    assert (await fleet.columns("globex"))[-1] == "colour"


async def test_x_arguments_of_one_run_are_warned_of_if_a_revision_reads_them(alembic: Alembic, fleet: Fleet) -> None:
    """New tenants are made without them."""
    add_colour(alembic.project)
    printed = await alembic("-x", "name=size", "-x", "tenant=acme", "-x", "tenant=globex", "upgrade", "head")
    assert printed.count("new tenants are made without those of this run (name=size); give what") == 1
    assert (await fleet.columns("acme"))[-1] == "size"
    assert "new tenants" not in await alembic("upgrade", "head")
