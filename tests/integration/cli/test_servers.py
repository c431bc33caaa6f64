"""``tenancy servers``, and where ``tenancy create`` says that a tenant is."""

from __future__ import annotations

import base64
import json
import re
import secrets
from collections.abc import Awaitable, Callable
from pathlib import Path

import asyncpg
import pytest
from sqlalchemy.engine import make_url

from tests.support.postgres import Postgres
from tests.support.shell import ROOT, environment
from tests.support.warm import Finished, run_module

Cli = Callable[..., Awaitable[Finished]]


@pytest.fixture
def cli(postgres: Postgres, name_prefix: str, control_url: str, tmp_path: Path) -> Cli:
    """Runs a command of a project with one server in its settings."""
    (tmp_path / "models.py").write_text("from sqlalchemy import MetaData\nmetadata = MetaData()\n")
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

    async def run(*arguments: str, stdin: str = "", **changes: str) -> Finished:
        return await run_module("tenancy_orm.cli", *arguments, cwd=tmp_path, env={**variables, **changes}, stdin=stdin)

    return run


async def test_a_server_is_added_and_removed_by_command(cli: Cli, postgres: Postgres) -> None:
    """Its password comes from a URL, the standard input or a variable; tenants are placed by region, as explained."""
    url = make_url(postgres.admin_url)
    password = url.password or ""
    bare = url._replace(password=None).render_as_string()
    same = ("--same-cluster", "--yes")
    refused = await cli("servers", "add", "eu", postgres.admin_url, "--json")
    assert (
        refused.status == 1
        and "leads to the cluster of server 'default'" in json.loads(refused.err.splitlines()[-1])["message"]
    )
    assert "can see it while it runs" in refused.err and password not in refused.err + refused.out
    wrong = await cli("servers", "add", "eu", bare, "--password-stdin", *same, stdin="wrong\n")
    assert wrong.status == 1 and "28P01" in wrong.err and "wrong" not in wrong.err.replace("wrong password", "")
    added = await cli(
        *(
            "servers",
            "add",
            "eu",
            bare,
            "--password-stdin",
            "--region",
            "eu",
            "--label",
            "disk=nvme",
            "--capacity",
            "3",
        ),
        *same,
        stdin=f"{password}\n",
    )
    assert (added.status, added.out) == (0, f"added server eu at {url.host}:{url.port}\n"), added.err
    added = await cli(
        "servers", "add", "us", "$URL", "--region", "us", "--drain", *same, "--json", URL=postgres.admin_url
    )
    assert added.status == 0 and json.loads(added.out)["state"] == "drain" and not added.err
    created = await cli("create", "acme", "--region", "eu", "--json")
    assert (json.loads(created.out)["server"], json.loads(created.out)["region"]) == ("eu", "eu")
    listed = json.loads((await cli("list", "--region", "eu", "--json")).out)
    assert [tenant["slug"] for tenant in listed["items"]] == ["acme"]

    explained = await cli("servers", "explain", "acme")
    where = "(tier free, region eu) is on eu, and"
    cells = [re.split(" {2,}", line) for line in explained.out.splitlines()[1:]]
    assert cells == [
        ["default", "-", "0", "-", "-", "is in no region, and the tenant belongs to region eu"],
        ["eu", "eu", "1", "3", "-", "chosen (it is there)"],
        ["us", "us", "0", "-", "-", "is in region us, and the tenant belongs to region eu"],
        [f"tenant acme {where} would be placed on eu now: eu is the only server in region eu"],
    ]
    found = await cli("servers", "explain", "--region", "us", "--json", TENANCY_PLACEMENT="fewest_tenants")
    verdicts = {one["server"]: one["refused"] for one in json.loads(found.out)["servers"]}
    assert json.loads(found.out)["chosen"] is None and verdicts["us"] == "accepts no new tenants: it is in drain"

    shown = json.loads((await cli("servers", "show", "eu", "--json")).out)
    assert (shown["addresses_from"], shown["labels"], shown["tenants"]) == ("row", {"disk": "nvme"}, 1)
    changed = await cli("servers", "update", "eu", "--capacity", "none", "--weight", "2.5", "--json")
    assert (json.loads(changed.out)["capacity"], json.loads(changed.out)["weight"]) == (None, 2.5)
    pooler, replica = f"postgresql://{url.host}:1", f"postgresql://{url.host}:2"
    await cli("servers", "update", "eu", "--tenants", pooler, "--replica", replica)
    several = f"postgresql://{url.username}@127.0.0.1:1,{url.host}:{url.port}/{url.database}?sslmode=disable"
    moved = await cli("servers", "update", "eu", "--admin", several, "--password-stdin", "--json", stdin=password)
    assert moved.status == 0 and json.loads(moved.out)["port"] == 1, moved.err
    # a new password, for example, leaves the other addresses
    shown = json.loads((await cli("servers", "show", "eu", "--json")).out)
    assert (shown["tenants_address"], shown["replicas"]) == (f"{url.host}:1", [f"{url.host}:2"])
    await cli("servers", "update", "eu", "--tenants", "", "--replica", "")
    shown = json.loads((await cli("servers", "show", "eu", "--json")).out)
    assert (shown["port"], shown["tenants_address"], shown["replicas"]) == (1, None, [])
    assert (await cli("servers", "activate", "us")).out == "server us is active\n"
    assert (await cli("servers", "drain", "us")).out == "server us is in drain\n"
    assert (await cli("servers", "remove", "eu", "--yes")).status == 1
    assert (await cli("servers", "remove", "us", stdin="n\n")).status == 1
    removed = await cli("servers", "remove", "us", "--yes")
    assert (removed.status, removed.out) == (0, "removed server us\n"), removed.err
    for arguments, message in [
        (("add", "x", bare, "--password-stdin", "--password"), "one place only"),
        (("add", "x", "$NOWHERE"), "the variable NOWHERE is not set"),
        (("add", "x", postgres.admin_url, "--password-variable", "PATH"), "has a password already"),
        (("add", "x", bare, "--capacity", "many"), "neither a whole number"),
        (("add", "x", bare, "--label", "disk"), "a label is name=value"),
        (("update", "eu", "--password-variable", "PATH"), "give --admin as well"),
        (("update", "eu", "--tenants", "postgresql://u@h"), "names a user"),
        (("update", "asia", "--weight", "2"), "'asia' is not known here"),
    ]:
        refused = await cli("servers", *arguments)
        assert refused.status == 1 and message in refused.err, refused.err


async def test_one_address_is_changed_by_command(cli: Cli, postgres: Postgres) -> None:
    """The others stay, from the row or from the settings; an empty one is removed."""
    pooler, standby = "postgresql://pooler.example:6432?statement_cache_size=0", "postgresql://standby.example"
    first = await cli("servers", "update", "default", "--tenants", pooler)
    assert first.status == 0, first.err
    assert "the addresses of server default are in its row from now on" in first.err
    second = await cli("servers", "update", "default", "--replica", standby, "--peer", "postgresql://inside.example")
    assert (second.status, second.err) == (0, "")
    # the administrative one alone
    assert (await cli("servers", "update", "default", "--admin", "$URL", URL=postgres.admin_url)).status == 0

    async def shown() -> tuple[str, str | None, list[str], str | None]:
        fields = json.loads((await cli("servers", "show", "default", "--json")).out)
        return fields["addresses_from"], fields["tenants_address"], fields["replicas"], fields["peer_address"]

    assert await shown() == ("row", "pooler.example:6432", ["standby.example:5432"], "inside.example:5432")
    line = (await cli("servers", "list")).out.splitlines()[1]
    assert re.split(" {2,}", line)[2:5] == ["pooler.example:6432", "1", "row"]
    moved = await cli("servers", "update", "default", "--admin", "$URL", "--accept-identity", URL=postgres.admin_url)
    assert moved.status == 1 and "give --tenants and --replica and --peer as well, '' for none" in moved.err
    removed = await cli("servers", "update", "default", "--tenants", "", "--replica", "", "--peer", "")
    assert removed.status == 0 and await shown() == ("row", None, [], None)


async def test_what_keeps_a_tenant_out_is_the_reason(cli: Cli, postgres: Postgres) -> None:
    """Also where the rule without a policy has chosen the server; the remedy is one that helps."""
    both = {"TENANCY_SERVERS": f"default={postgres.admin_url} eu={postgres.admin_url}"}
    assert (await cli("servers", "update", "eu", "--region", "eu", **both)).status == 0
    found = (await cli("servers", "explain", **both)).out
    rule = "where default_server is not set, it is the server called default"
    assert f"not chosen: {rule}" in found and f"would be placed on default: {rule}" in found
    assert (await cli("servers", "drain", "eu", **both)).status == 0
    found = (await cli("servers", "explain", "--region", "eu", **both)).out
    assert "would not be placed: server eu accepts no new tenants: it is in drain" in found
    refused = await cli("create", "acme", "--region", "eu", **both)
    assert refused.status == 1 and "end it: tenancy servers activate eu; or add a server in region eu" in refused.err
    assert (await cli("servers", "update", "eu", "--capacity", "0", **both)).status == 0
    assert (await cli("servers", "activate", "eu", **both)).status == 0
    refused = await cli("create", "acme", "--region", "eu", **both)
    assert refused.status == 1 and "tenancy servers update eu --capacity NUMBER" in refused.err


async def test_servers_by_command(cli: Cli, postgres: Postgres, empty_url: str) -> None:
    """A second server gets tenants by name alone; a changed maintenance database is refused until it is recorded."""
    both = f"default={postgres.admin_url} eu={postgres.admin_url}"
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


async def test_who_has_how_many_connections_is_shown(cli: Cli, control_url: str) -> None:
    """Of every process but the command itself, with the caps that they share."""
    connection = await asyncpg.connect(control_url)
    try:
        await connection.execute(
            "INSERT INTO tenancy.connection_caps (server, others) VALUES ('default', 7), ('gone', 0), ('default/1', 0);"
            "INSERT INTO tenancy.connection_leases "
            "(server, process, host, pid, granted, guaranteed, wanted, in_use, expires_at) "
            "VALUES ('default', gen_random_uuid(), 'web-1', 4711, 30, 20, 40, 29, 'infinity')"
        )
    finally:
        await connection.close()
    [server] = json.loads((await cli("servers", "connections", "--json")).out)
    [lease] = server["leases"]
    assert (server["others"], lease["host"], lease["pid"], lease["borrowed"]) == (7, "web-1", 4711, 10)
    assert server["cap"] < server["accepted"] - 7
    shown = (await cli("servers", "connections")).out
    assert all(word in shown for word in ("USED BY OTHERS", "LEASED", "web-1", "4711", "lost"))
    # neither a removed server nor a replica that there is no more
    assert "gone" not in shown and "default/1" not in shown
