"""A fleet with an env.py that was written for plain Alembic: the tenants are migrated, its own database is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tenancy_orm.errors import ConfigurationError, MigrationError, TemplateError
from tests.support import shell
from tests.support.env_files import PLAIN, URL, make_project
from tests.support.fleet import Fleet
from tests.support.postgres import Postgres
from tests.support.projects import NOTES, Project
from tests.support.warm import run_module

RATING = 'op.add_column("notes", sa.Column("rating", sa.Integer))'


@pytest.fixture
def project(tmp_path: Path, empty_url: str) -> Project:
    """Alembic's own async template with one revision, and a database of its own."""
    directory = make_project(tmp_path / "app", "async", directory="migrations")
    (directory / "env.py").write_text(
        PLAIN["own URL"].replace(URL, empty_url.replace("postgresql:", "postgresql+asyncpg:"))
    )
    project = Project(tmp_path / "app")
    project.add("0001", NOTES, 'op.drop_table("notes")')
    return project


async def version_table(postgres: Postgres, url: str) -> str | None:
    """The version table of the env.py's own database, if it has one."""
    async with postgres.connect(url.rpartition("/")[2].partition("?")[0]) as connection:
        return await connection.fetchval("SELECT to_regclass('alembic_version')::text")  # type: ignore[no-any-return]


async def test_the_tenants_are_migrated_and_its_own_database_is_not(
    fleet: Fleet, project: Project, postgres: Postgres, empty_url: str
) -> None:
    """Templates, creation, upgrade, downgrade and status, with an env.py that knows nothing of a fleet."""
    project.add("0002", RATING, 'op.drop_column("notes", "rating")', down="0001")
    report = await fleet.migrations.upgrade()
    report.raise_for_failures()
    await fleet.create("umbrella")
    for slug in ("acme", "globex", "initech", "umbrella"):
        assert await fleet.revision(slug) == "0002"
        assert await fleet.columns(slug) == ["id", "body", "rating"]
    (await fleet.migrations.downgrade("-1", tenants=["acme"])).raise_for_failures()
    assert [x.at_head for x in await fleet.migrations.status(verify=True)] == [False, True, True, True]
    assert await version_table(postgres, empty_url) is None


async def test_the_alembic_program_migrates_its_own_database_and_no_tenant(
    fleet: Fleet, project: Project, postgres: Postgres, empty_url: str
) -> None:
    """It is as before; and no tenant is taken for migrated by that."""
    project.add("0002", RATING, down="0001")
    done = await run_module("alembic", "upgrade", "head", cwd=project.root, env=shell.environment())
    assert done.status == 0, done.err
    assert await version_table(postgres, empty_url) == "alembic_version"
    status = await fleet.migrations.status(verify=True)
    assert [(x.revision, x.recorded, x.at_head) for x in status] == [("0001", "0001", False)] * 3


async def test_an_env_py_that_cannot_be_used_fails_before_any_tenant(fleet: Fleet, project: Project) -> None:
    """A migration and a creation both say why, and what to change."""
    env = project.migrations / "env.py"
    env.write_text(
        env.read_text().replace(
            "    context.configure(", "    connection.exec_driver_sql('SET x = 1')\n    context.configure("
        )
    )
    project.add("0002", RATING, down="0001")
    message = r"env\.py cannot be used: it executes 'SET x = 1' .* let it call environment\.run"
    with pytest.raises(ConfigurationError, match=message):
        await fleet.migrations.upgrade()
    with pytest.raises((ConfigurationError, TemplateError), match=message):
        await fleet.create("umbrella")
    assert await fleet.revision("acme") == "0001"


async def test_revisions_run_as_the_owner_role(fleet: Fleet, project: Project) -> None:
    """It owns the database and what is in it; it is no superuser, whatever user a URL of env.py names."""
    who = (
        "CREATE TABLE who AS SELECT current_user::text AS name, "
        "rolsuper OR rolcreatedb OR rolcreaterole OR rolcanlogin AS more, "
        "has_database_privilege(current_database(), 'CREATE') FROM pg_roles WHERE rolname = current_user"
    )
    allowed = ("CREATE SCHEMA audit", "CREATE FUNCTION one() RETURNS int LANGUAGE sql AS 'SELECT 1'", who)
    project.add("0002", "\n".join(f"op.execute({text!r})" for text in allowed), down="0001")
    (await fleet.migrations.upgrade()).raise_for_failures()
    assert await fleet.fetch("acme", "SELECT * FROM who") == [(fleet.services.names.owner, False, True)]
    for refused in ("CREATE ROLE x", "COPY notes TO '/tmp/notes'"):
        project.add("0003", f"op.execute({refused!r})", down="0002")
        with pytest.raises(MigrationError, match=r"0002 -> 0003: .*SQLSTATE 42501"):
            await fleet.migrations.upgrade()
