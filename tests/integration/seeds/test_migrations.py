"""Seeds and reference data of an application with migrations, and of an administrator who is no superuser."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from sqlalchemy import func, insert, select, text
from sqlalchemy.ext.asyncio import AsyncSession

from tenancy_orm import Tenant
from tenancy_orm.config import ReferenceTable
from tests.integration.seeds.conftest import COUNTRIES, METADATA, ROLES, Configure
from tests.support.alembic_program import Alembic
from tests.support.fleet import fleet_config, open_fleet
from tests.support.postgres import Postgres
from tests.support.projects import Project
from tests.support.provisioning import plain_administrator
from tests.support.shell import ROOT, environment, python_path
from tests.support.walkthrough import blocks
from tests.support.warm import run_module

TABLES = """
op.create_table(
    "countries",
    sa.Column("code", sa.String(2), primary_key=True),
    sa.Column("name", sa.String(), nullable=False),
    sa.Column("part_of", sa.String(2), sa.ForeignKey("countries.code")),
    sa.Column("seen", sa.Integer, server_default="0", nullable=False),
)
op.create_table("roles", sa.Column("name", sa.String(), primary_key=True), sa.Column("note", sa.String()))
op.create_table(
    "customers",
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("country", sa.String(2), sa.ForeignKey("countries.code", ondelete="CASCADE")),
)
"""


async def test_tables_that_a_migration_makes_are_filled(
    postgres: Postgres, control_url: str, name_prefix: str, tmp_path: Path, countries: Path
) -> None:
    """Migrated first and seeded then; before that, the tenants are listed as failed. Autogenerate sees no records."""
    project = Project.create(tmp_path / "app")
    project.configure("include_schemas=True, target_metadata=target_metadata")
    project.add("0001", "pass")
    base = fleet_config(postgres, control_url, name_prefix, project).replace(metadata=METADATA)
    async with open_fleet(base, initialise=True) as fleet:
        await fleet.create("acme", "globex")
    project.add("0002", TABLES, down="0001")
    (tmp_path / "roles.sql").write_text("INSERT INTO roles VALUES ('owner')", "utf-8")
    reference = {"countries": ReferenceTable(table="countries", key=("code",), source=countries)}
    config = base.replace(reference=reference, provisioning={"seeds": [tmp_path / "roles.sql"]})
    async with open_fleet(config) as fleet:
        early = await fleet.tenancy.seeds.apply()
        assert [x.sqlstate for x in early.outcomes] == ["42P01", "42P01"]
        assert (await fleet.migrations.upgrade()).ok
        assert [dict(x.applied).keys() for x in (await fleet.tenancy.seeds.apply()).outcomes] == [
            {"countries", "roles"},
            {"countries", "roles"},
        ]
        await fleet.create("initech")
        for slug in ("acme", "globex", "initech"):
            assert await fleet.fetch(slug, "SELECT count(*) FROM countries, roles") == [(3,)]
            assert await fleet.revision(slug) == "0002"
        assert (await fleet.provisioner.reconcile()).clean
    variables = {
        "TENANCY_CONTROL_URL": control_url,
        "TENANCY_SERVERS": f"default={postgres.admin_url}",
        "TENANCY_ENCRYPTION_KEYS": ",".join(
            f"{key}:{value!s}" for key, value in (config.encryption_keys or {}).items()
        ),
        "TENANCY_NAME_PREFIX": name_prefix,
        "TENANCY_METADATA": "tests.integration.seeds.conftest:METADATA",
        "TENANCY_PROVISIONING_SEEDS": str(tmp_path / "roles.sql"),
    }
    assert "No new upgrade operations detected" in await Alembic(project, variables)("check")


@pytest.mark.parametrize("seeds_first", [True, False])
async def test_the_page_is_followed_in_an_empty_project(
    postgres: Postgres, control_url: str, name_prefix: str, tmp_path: Path, seeds_first: bool
) -> None:
    """Seeds and reference data before the first revision, or after it; and later, with the table that they need."""
    named = (re.match(r"(?:#|--) (\S+\.(?:py|sql|toml))\n", block.text) for block in blocks(ROOT / "docs/seeds.md"))
    texts: dict[str, str] = {}
    for block, match in zip(blocks(ROOT / "docs/seeds.md"), named, strict=True):
        if match is not None:
            texts[match[1]] = texts.get(match[1], "") + block.text
    variables = environment(
        TENANCY_CONTROL_URL=control_url,
        TENANCY_SERVERS=f"default={postgres.admin_url}",
        TENANCY_ENCRYPTION_KEYS="1:" + "a2V5" * 10 + "a2U=",
        TENANCY_NAME_PREFIX=name_prefix,
        PYTHONPATH=python_path(ROOT),
        COLUMNS="200",
        NO_COLOR="1",
    )

    async def run(module: str, *arguments: str) -> str:
        done = await run_module(module, *arguments, cwd=tmp_path, env=variables, stdin="")
        assert done.status == 0, done.out + done.err
        return done.out

    async def make_revision() -> None:
        await run("alembic", "revision", "--autogenerate", "-m", "tables")
        assert "No new upgrade operations detected" in await run("alembic", "check")

    for place in ("seeds", "reference"):
        (tmp_path / place).mkdir()
    settings = texts.pop("tenancy.toml")
    texts["reference/countries.csv"] = "code,name\nAT,Austria\nBE,Belgium\n"
    for name, text_ in texts.items():
        (tmp_path / name).write_text(text_, "utf-8")
    await run("tenancy_orm.cli", "init")
    toml = tmp_path / "tenancy.toml"
    toml.write_text(toml.read_text("utf-8") + 'metadata = "models:Base.metadata"\n', "utf-8")
    if not seeds_first:
        await make_revision()
        await run("tenancy_orm.cli", "create", "acme")
    toml.write_text(toml.read_text("utf-8") + settings, "utf-8")
    if seeds_first:
        await run("tenancy_orm.cli", "template", "list")
        await make_revision()
        await run("tenancy_orm.cli", "create", "acme")

    plan = """

class Plan(Base):
    __tablename__ = "plans"

    name: Mapped[str] = mapped_column(primary_key=True)
"""
    (tmp_path / "models.py").write_text(texts["models.py"] + plan, "utf-8")
    (tmp_path / "seeds/0004_plans.sql").write_text("INSERT INTO plans VALUES ('free')", "utf-8")
    assert "0004_plans" in await run("tenancy_orm.cli", "migrate", "status", "--verify")
    await make_revision()
    for arguments in (("migrate", "upgrade"), ("seed", "--all"), ("create", "globex")):
        await run("tenancy_orm.cli", *arguments)
    query = "SELECT (SELECT count(*) FROM roles), (SELECT count(*) FROM countries), (SELECT name FROM plans)"
    assert (await run("tenancy_orm.cli", "sql", query, "--all", "--csv")).splitlines()[1:] == [
        "acme,3,2,free",
        "globex,3,2,free",
    ]
    revisions = [path.read_text("utf-8") for path in (tmp_path / "migrations/versions").glob("*.py")]
    assert sorted(re.findall(r"create_table\(\s*['\"](\w+)", "".join(revisions))) == ["countries", "plans", "roles"]


@pytest.mark.new_installation
async def test_an_administrator_who_is_no_superuser(
    postgres: Postgres, control_url: str, name_prefix: str, configure: Configure, countries: Path
) -> None:
    """As on a managed service: the template, a creation, existing tenants and protection."""

    async def owner_role(session: AsyncSession, tenant: Tenant) -> None:
        await session.execute(insert(ROLES).values(name="owner", note=tenant.slug))

    async with plain_administrator(postgres) as admin_url:
        base = configure(revoke_public=False).replace(servers={"default": admin_url})
        async with open_fleet(base, initialise=True) as fleet:
            await fleet.create("old")
        reference = {"countries": ReferenceTable(table="countries", key=("code",), source=countries)}
        async with open_fleet(base.replace(reference=reference, provisioning={"seeds": [owner_role]})) as fleet:
            await fleet.create("new")
            assert (await fleet.tenancy.seeds.apply()).ok
            for slug in ("old", "new"):
                async with fleet.tenancy.session(slug) as session:
                    assert await session.scalar(select(func.count()).select_from(COUNTRIES)) == 3
                    assert await session.scalar(select(ROLES.c.note)) == slug
                    assert not await session.scalar(text("SELECT has_table_privilege('countries', 'INSERT')"))
        await postgres.drop_all(name_prefix)
        name = admin_url.rpartition("/")[2].partition("?")[0]
        async with postgres.connect() as connection:
            await connection.execute(f'DROP DATABASE "{name}"')
            await connection.execute(f'DROP ROLE "{name}"')
