"""``tenancy adopt --where`` and ``--plan``."""

from __future__ import annotations

from pathlib import Path

from tests.integration.cli.test_cli import Cli, cli
from tests.support.postgres import Postgres
from tests.support.projects import Project
from tests.support.shared_database import SHARED, TABLES
from tests.support.sources import foreign_database

__all__ = ["cli"]

MAPPING = """
shared = ["countries"]
exclude = ["sessions"]
[tables.orgs]
rename = "organisation"
columns = { name = "title" }
values = { plan = "pro" }
[tables.audit]
strays = "leave"
"""
PLAN = """
from = "$OLD_URL"
mapping = "mapping.toml"
query = "SELECT lower(name), id FROM public.orgs ORDER BY id"
where = "org_id = {key}"
"""


async def test_rows_are_counted_then_adopted_one_customer_or_a_fleet(
    cli: Cli, postgres: Postgres, tmp_path: Path
) -> None:
    await cli("init")
    Project(tmp_path).add("0001", f"op.execute('''\n{TABLES}\n''')")
    mapping, plan = tmp_path / "mapping.toml", tmp_path / "fleet.toml"
    mapping.write_text(MAPPING)
    plan.write_text(PLAN)
    async with foreign_database(postgres, SHARED) as source:
        url = {"OLD_URL": source.url}
        one = ("adopt", "first", "--from", "$OLD_URL", "--where", "org_id = 1")
        looked = await cli(*one, "--dry-run", **url)
        assert looked.status == 1 and "nothing reaches table public.countries with 2 rows" in looked.out
        looked = await cli(*one, "--mapping", str(mapping), "--dry-run", **url)
        assert looked.status == 0, looked.out + looked.err
        assert "21 rows of" in looked.out and "nothing was changed" in looked.out
        made = await cli(*one, "--mapping", str(mapping), "--json", **url)
        assert made.status == 0, made.out + made.err
        assert made.json["tenant"]["slug"] == "first" and made.json["api_key"]

        await source.execute("UPDATE tasks SET project_id = 1 WHERE id = 3")
        for options in (["--dry-run"], []):
            fleet = await cli("adopt", "--plan", str(plan), *options, **url)
            # the planted row refers to acme's project, so that neither is clear
            assert fleet.status == 1, fleet.out + fleet.err
            assert "tasks (id = 3)" in fleet.out and "2 failed" in fleet.out
            assert source.password not in fleet.out + fleet.err
        await source.execute("UPDATE tasks SET project_id = 3 WHERE id = 3")
        again = await cli("adopt", "--plan", str(plan), "--json", "--concurrency", "1", **url)
        assert again.status == 0, again.out + again.err
        assert [one["state"] for one in again.json["tenants"]] == ["adopted", "adopted"]
        for wrong in (
            ("adopt", "acme", "--plan", str(plan)),
            ("adopt", "acme"),
            (*one, "--in-place"),
            (*one, "--mapping", "nowhere.toml"),
            ("adopt", "--plan", "nowhere.toml"),
        ):
            assert (await cli(*wrong, **url)).status != 0
        assert source.password not in again.out + again.err
