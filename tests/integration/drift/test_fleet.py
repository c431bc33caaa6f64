"""The search for drift over a fleet: every tenant is compared with what its revision says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tenancy_orm import TenancyConfig
from tenancy_orm.drift import DriftDetector, DriftReport, detection
from tenancy_orm.drift.mending import TENANT_ROLE
from tenancy_orm.errors import SchemaDriftError, UnknownServerError, UnknownTierError
from tenancy_orm.migrations.database import lock
from tenancy_orm.postgres.quoting import quote_identifier
from tests.integration.migrations.test_data_migrations import COUNT, FILL, has_checkpoints
from tests.integration.migrations.test_data_migrations import add as add_data_migration
from tests.support.alembic_program import Alembic
from tests.support.fleet import Fleet, fleet_config, open_fleet
from tests.support.postgres import Postgres
from tests.support.projects import Project
from tests.support.provisioning import plain_administrator

SECOND = """
op.add_column("notes", sa.Column("pinned", sa.Boolean, server_default="false", nullable=False))
op.create_table("tags", sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("note", sa.Integer, sa.ForeignKey("notes.id", ondelete="CASCADE")),
    sa.Column("mood", sa.Enum("a", "b", name="mood")))
op.execute("CREATE VIEW pinned AS SELECT id FROM notes WHERE pinned")
op.execute("CREATE FUNCTION one() RETURNS integer LANGUAGE sql AS 'SELECT 1'")
op.execute("CREATE SCHEMA app")
op.execute("CREATE TABLE app.things (id bigint GENERATED ALWAYS AS IDENTITY)")
"""
UNDO = """
op.execute("DROP TABLE app.things")
op.execute("DROP SCHEMA app")
op.execute("DROP FUNCTION one")
op.execute("DROP VIEW pinned")
op.drop_table("tags")
op.execute("DROP TYPE mood")
op.drop_column("notes", "pinned")
"""
THIRD = """
with op.get_context().autocommit_block():
    op.create_index("notes_body", "notes", ["body"], postgresql_concurrently=True, if_not_exists=True)
"""


def add_revisions(project: Project) -> None:
    project.add("0002", SECOND, UNDO, down="0001")
    project.add("0003", THIRD, 'op.drop_index("notes_body", "notes")', down="0002")


def texts(report: DriftReport) -> dict[tuple[str, ...], list[str]]:
    """The differences in words, by the tenants that have them."""
    return {group.tenants: [difference.text for difference in group.differences] for group in report.groups}


async def test_tenants_that_were_made_in_different_ways_are_equal(fleet: Fleet, project: Project) -> None:
    """Cloned at head, migrated step by step, downgraded; with rows of their own; deleted ones too."""
    add_revisions(project)
    assert (await fleet.migrations.drift()).matching == 3  # behind the migrations, and as their revision says
    (await fleet.migrations.upgrade("0002")).raise_for_failures()
    (await fleet.migrations.upgrade()).raise_for_failures()
    await fleet.create("hooli", "umbrella", "vehement")
    await fleet.execute("hooli", "INSERT INTO notes (id, body) VALUES (1, 'a'); ANALYZE notes")
    (await fleet.migrations.downgrade("0002", tenants=["acme", "umbrella"])).raise_for_failures()
    (await fleet.migrations.downgrade("base", tenants=["globex", "vehement"])).raise_for_failures()
    await fleet.tenancy.tenants.delete("initech")
    report = await fleet.migrations.drift()
    assert (texts(report), report.errors, report.matching, report.ok) == ({}, {}, 6, True)


async def test_tenants_that_drift_are_grouped_compared_and_mended(fleet: Fleet, project: Project) -> None:
    add_revisions(project)
    (await fleet.migrations.upgrade()).raise_for_failures()
    for slug in ("acme", "globex"):
        role = quote_identifier(fleet.database(slug))
        await fleet.execute(
            slug,
            "DROP INDEX notes_body; ALTER TABLE notes ALTER pinned DROP DEFAULT; "
            f"CREATE INDEX slow ON notes (id); REVOKE INSERT ON notes FROM {role}",
        )
    await fleet.execute(
        "initech", "ALTER TABLE notes ALTER body TYPE varchar(80); CREATE TABLE notes_2020 (id integer)"
    )
    report = await fleet.migrations.drift()
    assert texts(report) == {
        ("acme", "globex"): [
            "table notes: column pinned has no default, should have false",
            "table notes: index notes_body is missing",
            "table notes: index slow should not exist",
            "table notes: the tenant's role lacks INSERT",
        ],
        ("initech",): [
            "table notes: column body is varchar(80), should be varchar(1000)",
            "table notes_2020 should not exist",
        ],
    }
    with pytest.raises(
        SchemaDriftError, match=r"of 3 tenants, 3 drifted .*: acme, globex, initech; nothing was changed"
    ):
        report.raise_for_drift()
    first, second = report.groups
    assert first.revision == second.revision == "0003"
    for slug, role in zip(first.tenants, first.roles, strict=True):
        for difference in first.differences:
            assert difference.statements
            for statement in difference.statements:
                await fleet.execute(slug, statement.replace(TENANT_ROLE, quote_identifier(role)))
    assert [d.statements for d in second.differences] == [
        ("ALTER TABLE public.notes ALTER COLUMN body TYPE character varying(1000)",),
        (),
    ]
    assert list(texts(await fleet.migrations.drift())) == [("initech",)]
    # a choice
    assert (await fleet.migrations.drift(tenants=["acme"])).total == 1
    assert (await fleet.migrations.drift(tiers=["pro"])).total == 0
    assert (await fleet.migrations.drift(servers=["default"], tiers=["free"])).total == 3
    with pytest.raises(UnknownTierError):
        await fleet.migrations.drift(tiers=["golden"])
    with pytest.raises(UnknownServerError):
        await fleet.migrations.drift(servers=["nowhere"])


async def test_what_the_setting_names_is_left_out(config: TenancyConfig, project: Project) -> None:
    ignoring = config.replace(migration={"drift_ignore": ["notes_2*", "index notes_tmp"]})
    async with open_fleet(ignoring, initialise=True) as fleet:
        await fleet.create("acme")
        await fleet.execute(
            "acme", "CREATE TABLE notes_2020 (id serial PRIMARY KEY); CREATE INDEX notes_tmp ON notes (id)"
        )
        assert (await fleet.migrations.drift()).ok
        await fleet.execute("acme", "CREATE TABLE more (id integer)")
        assert texts(await fleet.migrations.drift()) == {("acme",): ["table more should not exist"]}


async def test_a_tenant_that_cannot_be_compared_is_an_error(
    config: TenancyConfig, fleet: Fleet, project: Project, postgres: Postgres
) -> None:
    """Its database does not answer, is at a revision that these migrations lack, or has a table that is locked."""
    await fleet.execute("acme", "UPDATE alembic_version SET version_num = '9999'")
    name = quote_identifier(fleet.database("globex"))
    await postgres.administer(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
    try:
        async with (
            open_fleet(config.replace(migration={"lock_timeout": 0.1})) as hasty,
            fleet.connect("initech") as other,
        ):
            async with other.transaction():
                await other.execute("CREATE VIEW seen AS SELECT * FROM notes")
                await other.execute("LOCK TABLE notes")
                report = await hasty.migrations.drift()
            assert report.errors.keys() >= {"acme", "globex"}
            assert "nothing to compare it with at 9999" in report.errors["acme"]
            assert not report.ok
            with pytest.raises(SchemaDriftError, match="could not be compared"):
                report.raise_for_drift()
    finally:
        await postgres.administer(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")


async def test_an_upgrade_that_refuses_drift_touches_no_tenant(
    fleet: Fleet, project: Project, alembic: Alembic
) -> None:
    add_revisions(project)
    await fleet.execute("globex", "ALTER TABLE notes ADD COLUMN own text")
    with pytest.raises(SchemaDriftError, match="globex") as raised:
        await fleet.migrations.upgrade(refuse_drift=True)
    assert raised.value.drifted == ("globex",)
    assert "1 drifted" in await alembic("-x", "refuse_drift=true", "upgrade", "head", ok=False)
    assert [await fleet.revision(slug) for slug in ("acme", "globex", "initech")] == ["0001"] * 3
    # only the tenants that are to be upgraded count
    report = await fleet.migrations.upgrade(tenants=iter(["acme", "initech"]), refuse_drift=True)
    assert report.ok and len(report.changed) == 2
    await fleet.execute("globex", "ALTER TABLE notes DROP COLUMN own")
    assert (await fleet.migrations.upgrade(refuse_drift=True)).ok


async def test_an_unfinished_data_migration_is_no_drift(fleet: Fleet, project: Project) -> None:
    """Its checkpoints are in the database until it is done. An upgrade that refuses drift is what finishes it."""
    await fleet.execute("acme", FILL.format(5) + "; UPDATE notes SET body = 'bad'")
    add_data_migration(project, "0002", COUNT.replace("+ 1", "+ 1 / CASE WHEN body = 'bad' THEN 0 ELSE 1 END"))
    assert [one.slug for one in (await fleet.migrations.upgrade()).failures] == ["acme"]
    assert await has_checkpoints(fleet, "acme")
    assert texts(await fleet.migrations.drift()) == {}
    acme, globex, _ = await fleet.migrations.status(verify=True)
    assert (acme.has_unfinished_data, acme.at_head, acme.is_complete) == (True, True, False)
    assert (globex.has_unfinished_data, globex.is_complete) == (False, True)
    await fleet.execute("acme", "UPDATE notes SET body = 'good'")
    assert (await fleet.migrations.upgrade(refuse_drift=True)).ok
    assert not await has_checkpoints(fleet, "acme")


async def test_a_schema_that_changes_while_it_is_read_is_read_again(
    fleet: Fleet, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A migration that runs at the same time is no drift; without the second look, it would be."""
    read: Callable[..., Any] = DriftDetector._read
    seen: list[str] = []

    async def reading(self: DriftDetector, tenant: Any, **options: Any) -> Any:
        seen.append(tenant.slug)
        if seen.count("acme") == 2 and tenant.slug == "acme":
            await fleet.execute("acme", "ALTER TABLE notes DROP COLUMN passing")
        return await read(self, tenant, **options)

    await fleet.execute("acme", "ALTER TABLE notes ADD COLUMN passing text")
    monkeypatch.setattr(DriftDetector, "_read", reading)
    report = await fleet.migrations.drift()
    assert (report.ok, report.matching, seen.count("acme")) == (True, 3, 3)


async def test_a_tenant_that_is_being_migrated_is_not_compared(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """An index that a run builds at this moment is no drift; whoever asks again later sees the result."""
    monkeypatch.setattr(detection, "_LOCK_SECONDS", 0.1)
    await fleet.execute("acme", "CREATE INDEX half ON notes (body)")
    async with fleet.connect("acme") as run:
        await lock(run, timeout=5)
        report = await fleet.migrations.drift()
    assert (report.matching, list(report.errors), report.groups) == (2, ["acme"], ())
    assert "a run migrates it" in report.errors["acme"]
    assert texts(await fleet.migrations.drift()) == {("acme",): ["table notes: index half should not exist"]}


async def test_an_administrator_without_superuser_rights_finds_drift(
    postgres: Postgres, name_prefix: str, empty_url: str, project: Project
) -> None:
    """With a grant hook, and a tenant that is behind; nothing is left behind on the server."""
    async with plain_administrator(postgres) as url:
        config = fleet_config(postgres, empty_url, name_prefix, project).replace(
            servers={"default": url},
            provisioning={
                "revoke_public": False,
                "tenant_privileges": ["TEMPORARY", "TRUNCATE"],
                "grants": lambda target: [f"GRANT REFERENCES ON notes TO {target.role}"],
            },
        )
        async with open_fleet(config, initialise=True) as fleet:
            await fleet.create("acme")
            add_revisions(project)
            await fleet.create("globex")
            # of this test's name: other tests make and drop theirs on the same server
            present = (
                "SELECT 'database ' || datname FROM pg_database WHERE starts_with(datname::text, %s) "
                "UNION ALL SELECT 'role ' || rolname FROM pg_roles WHERE starts_with(rolname::text, %s) ORDER BY 1"
            )
            before = await postgres.administer(present, (name_prefix, name_prefix))
            assert len(before) > 4
            assert (await fleet.migrations.drift()).ok
            assert await postgres.administer(present, (name_prefix, name_prefix)) == before
            for slug in ("acme", "globex"):
                owner = quote_identifier(fleet.services.names.owner)
                await fleet.execute(slug, f"SET ROLE {owner}; ALTER TABLE notes ALTER body DROP NOT NULL")
            assert texts(await fleet.migrations.drift()) == {
                ("acme",): ["table notes: column body may be NULL, should be NOT NULL"],
                ("globex",): ["table notes: column body may be NULL, should be NOT NULL"],
            }
