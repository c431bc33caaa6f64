"""Waves, looking ahead, undo and progress from the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.cli.test_cli import Cli, cli
from tests.integration.migrations.conftest import alembic, config, fleet, project, variables
from tests.support.alembic_program import Alembic
from tests.support.fleet import Fleet
from tests.support.projects import NOTES, Project

__all__ = ["alembic", "cli", "config", "fleet", "project", "variables"]

PLAN = """
max_failures = 5

[[wave]]
name = "canary"
tenant = "acme"
command = "sh -c 'cat > report.json'"

[[wave]]
tier = "free"
pause = true
"""


@pytest.fixture
async def prepared(cli: Cli, tmp_path: Path) -> Project:
    """Three tenants, and a revision that they do not have."""
    await cli("init")
    found = Project(tmp_path)
    found.add("0001", NOTES, 'op.drop_table("notes")')
    for slug, tier in (("acme", "pro"), ("globex", "free"), ("initech", "pro")):
        assert (await cli("create", slug, "--tier", tier)).status == 0
    add_title(found)
    return found


def add_title(project: Project) -> None:
    """The second revision."""
    column = 'op.add_column("notes", sa.Column("title", sa.Text))'
    project.add("0002", column, 'op.drop_column("notes", "title")', down="0001")


async def test_a_run_by_a_file(cli: Cli, prepared: Project, tmp_path: Path) -> None:
    """Look ahead, migrate to the pause, go on, undo; each with its exit status, and progress in lines."""
    (tmp_path / "waves.toml").write_text(PLAN)
    ahead = await cli("migrate", "upgrade", "--plan", "waves.toml", "--dry-run")
    assert (ahead.status, ahead.err) == (0, "")
    lines = [line.split() for line in ahead.out.splitlines()]
    assert lines[0][:6] == ["upgrade", "head:", "3", "tenants,", "nothing", "is"]
    assert [line[:3] for line in lines[2:5]] == [["1", "canary", "1"], ["2", "tier=free", "1"], ["3", "rest", "1"]]
    assert lines[6] == ["0001", "3", "0002", "up", "0002", "a", "change"]
    sql = await cli("migrate", "upgrade", "--sql")
    assert sql.out.startswith("-- 3 tenants at 0001: acme, globex, initech\nBEGIN;")
    assert "ALTER TABLE notes ADD COLUMN title TEXT;" in sql.out
    (json,) = (await cli("migrate", "downgrade", "base", "--sql", "--json")).json["starts"]
    assert "DROP TABLE notes" in json["sql"]

    paused = await cli("migrate", "upgrade", "--plan", "waves.toml")
    assert paused.status == 3, paused.err
    assert (
        "run 1 is paused: paused before wave 3 (rest), as planned; continue with: tenancy migrate resume 1"
        in paused.err
    )
    assert "upgrade head, wave 3 of 3 (rest): 2 of 3 done, 0 failed, 0 running" in paused.err
    assert '"tenants": ["acme"]' in (tmp_path / "report.json").read_text()
    shown = [line.split() for line in (await cli("migrate", "show", "1")).out.splitlines()]
    assert ["wave", "3", "of", "3", "(rest)"] in shown
    assert ["wave", "2", "tier=free:", "none", "failed,", "pause"] in shown
    assert ["tenant", "state", "wave"] in [[word.lower() for word in line[:3]] for line in shown]
    assert {tuple(line[:3]) for line in shown} >= {("acme", "done", "1"), ("initech", "waiting", "3")}
    found = (await cli("migrate", "show", "1", "--json")).json
    assert (found["wave"], "seal" in found["plan"], {one["wave"] for one in found["tenants"]}) == (3, False, {1, 2, 3})
    resumed = await cli("migrate", "resume", "1")
    assert (resumed.status, "3 migrated" in resumed.out) == (0, True), resumed.err
    assert "continue with" not in resumed.err

    ahead = await cli("migrate", "undo", "1", "--dry-run")
    assert (ahead.status, "undo run 1: 3 tenants go back, nothing is changed" in ahead.out) == (0, True)
    waves = ("--wave", "tenant=globex pause")
    ahead = await cli("migrate", "undo", "1", *waves, "--dry-run", "--json")
    assert [(one["name"], one["tenants"]) for one in ahead.json["waves"]] == [
        ("tenant=globex", ["globex"]),
        ("rest", ["acme", "initech"]),
    ]
    assert "tenant=globex" in (await cli("migrate", "undo", "1", *waves, "--dry-run")).out
    undone = await cli("migrate", "undo", "1", *waves, "--json")
    assert (undone.status, undone.err, undone.json["state"]) == (3, "run 2\n", "paused")
    cancelled = await cli("migrate", "cancel", "2")
    assert cancelled.out == "run 2 is cancelled: 1 done, 2 skipped\n"
    joined = await cli("migrate", "join", "2")
    assert (joined.status, "not started:" in joined.out, "2 not started" in joined.out) == (1, False, True)
    assert "run 2 is cancelled: cancelled by cli:" in joined.err
    assert "continue with: tenancy migrate resume 2 (those that were not started)" in joined.err
    assert (await cli("migrate", "resume", "2")).status == 0
    new = await cli("migrate", "upgrade", "0001", "--join")
    assert (new.status, "run 3 was started: there was none to join" in new.err) == (0, True), new.err
    status = await cli("migrate", "status", "--json")
    assert {one["revision"] for one in status.json} == {"0001"}


async def test_alembic_takes_waves(alembic: Alembic, fleet: Fleet, project: Project) -> None:
    """As arguments of -x, or the name of a file; a pause fails the command, since tenants are left."""
    add_title(project)
    (project.root / "waves.toml").write_text("[[wave]]\ntenant = 'acme'\npause = true\n")
    printed = await alembic("-x", "waves=waves.toml", "-x", "max_failures=3", "upgrade", "head", ok=False)
    assert (
        "run 1 is paused: paused before wave 2 (rest), as planned; continue with: tenancy migrate resume 1" in printed
    )
    assert "FAILED globex" not in printed
    actor = (await fleet.migrations.get_run(1)).actor
    assert (actor.kind, (actor.id or "").partition(":")[0]) == ("operator", "cli")
    assert [await fleet.revision(slug) for slug in ("acme", "globex")] == ["0002", "0001"]
    await fleet.migrations.resume(1)
    await alembic("-x", "wave=tenant=acme command=true", "-x", "wave=rest", "downgrade", "0001")
    assert [await fleet.revision(slug) for slug in ("acme", "globex")] == ["0001", "0001"]
    for given, message in (
        (("wave=5%", "waves=waves.toml"), "by -x wave=... or by -x waves=..., not by both"),
        (("wave=everybody",), "'everybody' is not understood"),
        (("max_failures=0",), "give a number of at least 1"),
    ):
        arguments = [part for one in given for part in ("-x", one)]
        assert message in await alembic(*arguments, "upgrade", "head", ok=False)


async def test_what_does_not_hold_is_said(cli: Cli, prepared: Project) -> None:
    """A check that fails, words that cannot be meant, an undo that is refused."""
    failed = await cli("migrate", "upgrade", "--wave", "canary: tenant=acme command=false")
    assert failed.status == 1
    assert "run 1 is paused: command 'false' exited with status 1" in failed.err
    assert (await cli("migrate", "resume", "1", "--skip-checks")).status == 0
    for arguments, message in (
        (("--wave", "5%", "--plan", "waves.toml"), "by --wave or by --plan, not by both"),
        (("--plan", "waves.toml"), "waves.toml"),
        (("--wave", "everybody"), "'everybody' is not understood"),
        (("--wave", "tenant=acmee"), "not a tenant of this run"),
        (("--wave", "tenant=acme command=./smoke.sh"), "'./smoke.sh' is not a program that can be executed here"),
        (("--dry-run", "--wave", "tenant=acme command=./smoke.sh"), "'./smoke.sh' is not a program"),
    ):
        refused = await cli("migrate", "upgrade", *arguments)
        assert (refused.status, message in refused.err) == (1, True), refused.err
    path = prepared.migrations / "versions" / "0002.py"
    path.write_text(path.read_text().replace('op.drop_column("notes", "title")', "pass"))
    ahead = await cli("migrate", "undo", "1", "--dry-run")
    assert (ahead.status, "its downgrade() does nothing" in ahead.out) == (1, True)
    assert "undo run 1: would be refused, no tenant would go back, nothing is changed" in ahead.out
    assert "or add --stamp-irreversible" in ahead.err
    ahead = await cli("migrate", "undo", "1", "--dry-run", "--stamp-irreversible")
    assert (ahead.status, "its downgrade() does nothing" in ahead.out) == (0, True)
    assert "undo run 1: 3 tenants go back, nothing is changed" in ahead.out
    refused = await cli("migrate", "undo", "1", "--json")
    assert (refused.status, "UndoRefusedError" in refused.err) == (1, True)
    assert (await cli("migrate", "undo", "99")).status == 1


async def test_no_option_is_ignored_in_silence(cli: Cli) -> None:
    """What shows another thing is refused together, before anything is read; the others are named."""
    for options, message in (
        (("--dry-run", "--rehearse", "1"), "give only one of --rehearse, --dry-run and --sql"),
        (("--dry-run", "--sql"), "give only one of --dry-run and --sql"),
    ):
        refused = await cli("migrate", "upgrade", *options)
        assert (refused.status, message in refused.err) == (1, True), refused.err
    await cli("init")
    ignoring = await cli("migrate", "upgrade", "--order", "busiest", "--refuse-drift", "--wave", "50%", "--dry-run")
    assert (ignoring.status, ignoring.err) == (0, "--dry-run ignores --order, --refuse-drift\n")


async def test_a_dry_run_names_preflights_and_data_migrations(cli: Cli, prepared: Project) -> None:
    """They take time, and a failed check stops the run; a downgrade runs only what reverses."""
    path = prepared.migrations / "versions" / "0002.py"
    code = """
from tenancy_orm.migrations import Check, data_migration

def preflight():
    yield Check("none", "SELECT 1 FROM notes WHERE false")

@data_migration(table="notes")
def fill(batch):
    return f"UPDATE notes SET title = '' WHERE {batch.rows}"
"""
    path.write_text(path.read_text() + code)
    ahead = await cli("migrate", "upgrade", "--dry-run")
    assert (ahead.status, "up 0002 a change (preflight, data migration fill)" in ahead.out) == (0, True), ahead.out
    (start,) = (await cli("migrate", "upgrade", "--dry-run", "--json")).json["starts"]
    assert start["revisions"] == [
        {"revision": "0002", "up": True, "doc": "a change", "data_migrations": ["fill"], "has_checks": True}
    ]
    assert (await cli("migrate", "upgrade")).status == 0
    ahead = await cli("migrate", "downgrade", "0001", "--dry-run")
    assert "down 0002 a change\n" in ahead.out
