"""``tenancy rebuild``."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.cli.test_cli import Cli, cli
from tests.support.postgres import Postgres
from tests.support.projects import NOTES, Project

__all__ = ["cli"]

pytestmark = pytest.mark.new_installation


async def test_a_lost_control_database_is_rebuilt(cli: Cli, postgres: Postgres, empty_url: str, tmp_path: Path) -> None:
    """A dry run lists, a wrong file changes nothing, the slugs of a file are given, and the next command is named."""
    await cli("init")
    Project(tmp_path).add("0001", NOTES, 'op.drop_table("notes")')
    acme, globex = [(await cli("create", slug, "--json")).json["id"] for slug in ("acme", "globex")]
    lost = (await cli("show", "acme", "--json")).json["database"]
    until = (await cli("clone", "acme", "debug", "--ttl", "2d", "--json")).json["expires_at"]
    await postgres.administer(f'DROP DATABASE "{empty_url.rpartition("/")[2]}" WITH (FORCE)')
    name = postgres.new_name()
    new = {"TENANCY_CONTROL_URL": await postgres.create_database(name)}
    await cli("init", **new)

    dry = await cli("rebuild", "--dry-run", **new)
    assert (dry.status, acme in dry.out, lost in dry.out, f"tenant-{acme[-12:]}" in dry.out) == (0, True, True, True)
    assert f"a clone, until {until[:16].replace('T', ' ')} UTC" in dry.out
    slugs = tmp_path / "slugs.toml"
    for wrong in (
        f'"{acme}" = "acme"\n"{globex}" = "acme"',
        f'"{acme}" = "no slug"',
        '"018f0000-0000-7000-8000-000000000000" = "acme"',
        f'"{acme}" = 1',
        '"acme" = "acme"',
        "no toml",
    ):
        slugs.write_text(wrong)
        refused = await cli("rebuild", "--slugs", str(slugs), "--json", **new)
        assert (refused.status, refused.out) == (1, ""), wrong
        assert "ConfigurationError" in refused.err, wrong
    assert (await cli("list", "--json", **new)).json["count"] == 0

    slugs.write_text(f'"{acme}" = "acme"\n"{globex}" = {{ slug = "globex", tier = "pro" }}\n')
    done = await cli("rebuild", "--slugs", str(slugs), **new)
    assert (done.status, "next: tenancy keys issue acme" in done.err) == (0, True), done.err
    shown = (await cli("show", "globex", "--json", **new)).json
    assert (shown["id"], shown["tier"], shown["schema_revision"]) == (globex, "pro", "0001")
    again = await cli("rebuild", "--slugs", str(slugs), "--json", **new)
    assert (again.status, again.json["databases"], again.json["complete"]) == (0, [], True)
    (clone,) = [one for one in (await cli("list", "--json", **new)).json["items"] if one["slug"].startswith("tenant-")]
    shown = (await cli("show", clone["slug"], "--json", **new)).json
    assert (shown["clone_of"], shown["expires_at"]) == (acme, until)
    assert (await cli("keys", "issue", "acme", **new)).status == 0
    await postgres.drop_database(name)
