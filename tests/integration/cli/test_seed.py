"""``tenancy seed``, and what ``create``, ``show`` and ``migrate status`` say of seeds."""

from __future__ import annotations

import base64
import json
import secrets
from pathlib import Path
from typing import Any

import pytest

from tests.support.postgres import Postgres
from tests.support.shell import ROOT, environment, python_path
from tests.support.warm import Finished, run_module

SETTINGS = """
metadata = "tests.integration.seeds.conftest:METADATA"

[provisioning]
seeds = ["seeds/", "shop:owner_role"]

[reference.countries]
table = "countries"
key = ["code"]
source = "reference/countries.csv"
"""
SHOP = """
from sqlalchemy import text

def owner_role(session, tenant):
    session.execute(text("INSERT INTO roles VALUES ('owner', :slug)"), {"slug": tenant.slug})
"""


class Shop:
    """A project with settings in a file, and the command line in a directory of it."""

    def __init__(self, place: Path, variables: dict[str, str]) -> None:
        self.place = place
        self._variables = variables
        (place / "inner").mkdir()
        self.write("tenancy.toml", SETTINGS)
        self.write("shop.py", SHOP)
        self.write("seeds/0001_roles.sql", "INSERT INTO roles VALUES ('member')")
        self.write("reference/countries.csv", "code,name\nAT,Austria\n")

    def write(self, name: str, content: str) -> None:
        """Write a file of the project."""
        (self.place / name).parent.mkdir(exist_ok=True)
        (self.place / name).write_text(content, "utf-8")

    async def run(self, *arguments: str) -> Finished:
        """Run ``tenancy``."""
        return await run_module("tenancy_orm.cli", *arguments, cwd=self.place / "inner", env=self._variables, stdin="")

    async def json(self, *arguments: str, status: int = 0) -> Any:
        """Run ``tenancy`` with ``--json``; what it prints."""
        done = await self.run(*arguments, "--json")
        assert done.status == status, done.err
        return json.loads(done.out)


@pytest.fixture
def shop(postgres: Postgres, name_prefix: str, control_url: str, tmp_path: Path) -> Shop:
    """The project."""
    variables = environment(
        TENANCY_CONTROL_URL=control_url,
        TENANCY_SERVERS=f"default={postgres.admin_url}",
        TENANCY_ENCRYPTION_KEYS="1:" + base64.b64encode(secrets.token_bytes(32)).decode(),
        TENANCY_NAME_PREFIX=name_prefix,
        PYTHONPATH=python_path(ROOT),
        COLUMNS="200",
        NO_COLOR="1",
    )
    return Shop(tmp_path, variables)


async def test_the_life_of_seeds_by_command(shop: Shop) -> None:
    """Paths are relative to the settings file; what is outstanding is shown, brought, and audited."""
    await shop.json("create", "acme")
    await shop.json("create", "globex", "--no-seed", "--tier", "pro")
    shown = await shop.json("show", "globex")
    assert shown["seeds_outstanding"] == ["owner_role"]
    assert set(shown["seeds"]) == {"0001_roles", "countries"}
    shop.write("seeds/0001_roles.sql", "-- seed: version=2\nINSERT INTO roles VALUES ('guest')")
    shop.write("reference/countries.csv", "code,name\nAT,Österreich\nBE,Belgien\n")
    status = await shop.run("migrate", "status", "--verify")
    assert status.status == 0, status.err
    lines = [line.split() for line in status.out.splitlines()]
    assert lines[0][-3:] == ["LACKS", "SEEDS", "ERROR"]
    assert [line[-5:-1] for line in lines[1:]][1][-3:] == ["countries,", "0001_roles,", "owner_role"]
    fields = await shop.json("migrate", "status", "--verify")
    assert [x["seeds_outstanding"] for x in fields] == [
        ["countries", "0001_roles"],
        ["countries", "0001_roles", "owner_role"],
    ]

    planned = await shop.run("seed", "--all", "--dry-run")
    assert planned.out.startswith("seed: 2 tenants, 2 to be seeded, 0 unchanged, 0 failed")
    only = await shop.json("seed", "--tier", "pro", "--only", "owner_role")
    assert [(x["slug"], x["applied"]) for x in only["outcomes"]] == [("globex", {"owner_role": 1})]
    done = await shop.run("seed", "acme", "globex", "--concurrency", "2")
    assert done.status == 0, done.err
    assert "seed: 2 tenants, 2 seeded, 0 unchanged, 0 failed" in done.out
    again = await shop.json("seed", "--status", "active")
    assert [x["applied"] for x in again["outcomes"]] == [{}, {}]
    entries = await shop.json("audit", "list", "--action", "tenant.seed")
    assert len(entries["items"] if isinstance(entries, dict) else entries) == 3


async def test_failures_are_listed_with_an_exit_status(shop: Shop) -> None:
    """So are arguments that do not fit together."""
    await shop.json("create", "acme")
    shop.write("shop.py", SHOP + "def broken(session):\n    raise LookupError('nothing there')\n")
    shop.write("tenancy.toml", SETTINGS.replace('"shop:owner_role"', '"shop:owner_role", "shop:broken"'))
    failed = await shop.run("seed", "--all")
    assert failed.status == 1
    # once, in the table, which names the tenant
    assert "acme    seed 'broken' failed: LookupError: nothing there\n" in failed.out
    assert failed.err == ""
    shop.write("tenancy.toml", SETTINGS)
    for mistake, reason in (
        (
            "SELECT 1;\n\nINSERT INTO roles\nVALUE ('x');",
            ', line 4) failed: syntax error at or near "VALUE" (SQLSTATE 42601)',
        ),
        (
            "SELECT 1;\n\nINSERT INTO plans DEFAULT VALUES",
            'plans" does not exist (SQLSTATE 42P01); seeds and reference',
        ),
    ):
        shop.write("seeds/0002_bad.sql", mistake)
        refused = await shop.run("create", "globex")
        assert refused.status == 1
        assert f"seed '0002_bad' ({shop.place / 'seeds/0002_bad.sql'}" in refused.err
        assert reason in refused.err
    shop.write("seeds/0002_bad.sql", "-- seed: template=false\nSELECT 1;\nSELECT 1 / 0")
    failed = await shop.run("seed", "--all")
    assert "line 3) failed: division by zero (SQLSTATE 22012)\n" in failed.out
    for arguments, message in (
        ((), "no tenants are named: give slugs or ids, --tier, --status or --all"),
        (("acme", "--all"), "not both"),
        (("--tier", "gold"), "gold"),
        (("--all", "--force"), "--force needs --only"),
        (("--all", "--only", "x"), "there is no seed and no reference table 'x'; there are: countries, 0001_roles"),
        (("nobody",), "nobody"),
    ):
        refused = await shop.run("seed", *arguments)
        assert refused.status == 1
        assert message in refused.err
    shop.write("tenancy.toml", SETTINGS.replace('"seeds/"', '"sides/"'))
    refused = await shop.run("list")
    assert refused.status == 1
    assert "sides' is neither a directory nor a file" in refused.err
