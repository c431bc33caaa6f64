"""``tenancy servers``, and where ``tenancy create`` says that a tenant is."""

from __future__ import annotations

import base64
import json
import secrets
from pathlib import Path

from tests.support.postgres import Postgres
from tests.support.shell import ROOT, environment
from tests.support.warm import Finished, run_module


async def test_servers_by_command(
    postgres: Postgres, name_prefix: str, control_url: str, empty_url: str, tmp_path: Path
) -> None:
    """A second server gets tenants by name alone; a changed maintenance database is refused until it is recorded."""
    (tmp_path / "models.py").write_text("from sqlalchemy import MetaData\nmetadata = MetaData()\n")
    both = f"default={postgres.admin_url} eu={postgres.admin_url}"
    variables = environment(
        TENANCY_CONTROL_URL=control_url,
        TENANCY_SERVERS=f"default={postgres.admin_url}",
        TENANCY_METADATA="models:metadata",
        TENANCY_ENCRYPTION_KEYS="1:" + base64.b64encode(secrets.token_bytes(32)).decode(),
        TENANCY_NAME_PREFIX=name_prefix,
        PYTHONPATH=str(ROOT),
        COLUMNS="200",
        NO_COLOR="1",
    )

    async def cli(*arguments: str, stdin: str = "", **changes: str) -> Finished:
        return await run_module("tenancy_orm.cli", *arguments, cwd=tmp_path, env={**variables, **changes}, stdin=stdin)

    created = await cli("create", "acme", TENANCY_SERVERS=both)
    assert created.status == 0, created.err
    assert created.out.startswith("created acme (free) on server default as ")
    created = await cli("create", "globex", "--server", "eu", "--json", TENANCY_SERVERS=both)
    assert json.loads(created.out)["server"] == "eu"
    refused = await cli("create", "initech", TENANCY_SERVERS=f"us={postgres.admin_url} eu={postgres.admin_url}")
    assert refused.status == 1 and "there are several servers, us, eu: set default_server" in refused.err

    other = empty_url.rpartition("/")[2]
    moved = {"TENANCY_SERVERS": f"default={empty_url}"}
    refused = await cli("list", **moved)
    assert refused.status == 1 and f"tenancy servers set-maintenance-database default {other}" in refused.err
    asked = await cli("servers", "set-maintenance-database", "default", other, stdin="n\n", **moved)
    assert asked.status == 1 and "nothing was changed" in asked.err
    changed = await cli("servers", "set-maintenance-database", "default", other, "--yes", **moved)
    assert changed.status == 0, changed.err
    assert changed.out == f"the maintenance database of default was postgres and is {other}\n"
    listed = await cli("servers", "list", "--json", **moved)
    assert [(row["name"], row["maintenance_database"], row["tenants"]) for row in json.loads(listed.out)] == [
        ("default", other, 1),
        ("eu", "postgres", 1),
        ("us", "postgres", 0),
    ]
    table = await cli("servers", "list", **moved)
    assert other in table.out
    unknown = await cli("servers", "set-maintenance-database", "asia", other, "--yes", **moved)
    assert unknown.status == 1 and "'asia'" in unknown.err
