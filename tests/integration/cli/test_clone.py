"""``tenancy clone`` and ``tenancy drill``."""

from __future__ import annotations

from pathlib import Path

from tests.integration.cli.test_cli import Cli, cli
from tests.support.projects import NOTES, Project

__all__ = ["cli"]


async def test_a_tenant_is_cloned_shown_and_drilled(cli: Cli, tmp_path: Path) -> None:
    """The clone's key is printed once, its end is shown; a drill fails until there is a backup, and then passes."""
    await cli("init")
    Project(tmp_path).add("0001", NOTES, 'op.drop_table("notes")')
    await cli("create", "acme")
    rules = tmp_path / "rules.toml"
    rules.write_text('[tables.notes]\nbodies = "null"\n')
    wrong = await cli("clone", "acme", "debug", "--ttl", "2d", "--anonymise", str(rules))
    assert (wrong.status, "public.notes.bodies" in wrong.err) == (1, True), wrong.err
    rules.write_text('[tables.notes]\nid = "keep"\n')
    refused = await cli("clone", "acme", "debug", "--ttl", "2d", "--anonymise", str(rules), "--require-rules")
    assert (refused.status, "public.notes.body" in refused.err) == (1, True), refused.err
    assert (await cli("clone", "acme", "debug", "--ttl", "2y")).status == 1
    assert (await cli("clone", "acme", "debug", "--ttl", "2d", "--require-rules")).status == 1
    rules.write_text('[tables.notes]\nbody = "hash"\n')
    made = await cli("clone", "acme", "debug", "--ttl", "2d", "--anonymise", str(rules), "--require-rules", "--json")
    assert made.status == 0, made.err
    shown = (await cli("show", "debug", "--json")).json
    assert shown["clone_of"] == (await cli("show", "acme", "--json")).json["id"] == made.json["clone_of"]
    assert shown["expires_at"] and shown["anonymised_columns"] == ["public.notes.body"] and "api_key" not in shown
    assert "clone_of" not in (await cli("show", "acme", "--json")).json
    plain = await cli("clone", "acme", "plain", "--ttl", "2d")
    assert (plain.status, "API key" in plain.out) == (0, True), plain.err

    with (tmp_path / "tenancy.toml").open("a") as settings:
        settings.write(f'\n[backup]\nstore = "file:{tmp_path / "store"}"\n')
    # of a random tenant, which is no clone
    none = await cli("drill", "--json")
    assert (none.status, none.json["tenant"], none.json["error"]) == (1, "acme", "there is no backup")
    assert (await cli("backup", "run", "acme")).status == 0
    good = await cli("drill", "--json", "--max-age", "26h")
    assert (good.status, good.json["good"], good.json["tables"]) == (0, True, 2), good.err
    late = await cli("drill", "acme", "--max-age", "0.000001s")
    assert (late.status, "old" in late.out) == (1, True)
    backup = (await cli("backup", "list", "acme", "--json")).json[0]
    archive = tmp_path / "store" / backup["path"] / "dump.tar.age"
    archive.write_bytes(archive.read_bytes()[:-1])
    assert (await cli("drill", "acme")).status == 1
    audited = await cli("audit", "list", "--tenant", "acme", "--action", "backup.drill", "--json")
    assert audited.out.count("backup.drill") == 4
