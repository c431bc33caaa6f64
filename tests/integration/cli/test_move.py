"""``tenancy move`` and ``tenancy rebalance``, between two real servers."""

from __future__ import annotations

import base64
import json
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.moving import Pair, pair_of_servers, rows
from tests.support.shell import ROOT, environment
from tests.support.warm import Finished, run_module

pytestmark = pytest.mark.new_installation


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    """Two servers with wal_level = logical."""
    with pair_of_servers() as running:
        yield running


async def test_a_tenant_is_moved_back_and_confirmed_by_command(
    pair: Pair, control_url: str, name_prefix: str, tmp_path: Path
) -> None:
    (tmp_path / "models.py").write_text("from tests.support.models import Base\nmetadata = Base.metadata\n")
    variables = environment(
        TENANCY_CONTROL_URL=control_url,
        TENANCY_SERVERS=f"one={pair.one.url('postgres')},two={pair.two.url('postgres')}",
        TENANCY_DEFAULT_SERVER="one",
        TENANCY_METADATA="models:metadata",
        TENANCY_ENCRYPTION_KEYS="1:" + base64.b64encode(secrets.token_bytes(32)).decode(),
        TENANCY_NAME_PREFIX=name_prefix,
        PYTHONPATH=str(ROOT),
        COLUMNS="200",
        NO_COLOR="1",
    )

    async def cli(*arguments: str, stdin: str = "") -> Finished:
        return await run_module("tenancy_orm.cli", *arguments, cwd=tmp_path, env=variables, stdin=stdin)

    async def told(*arguments: str) -> Any:
        done = await cli(*arguments, "--json")
        assert done.status == 0, done.err
        return json.loads(done.out)

    await told("create", "acme")
    (database,) = (one.partition(":")[2] for one in pair.databases(name_prefix))
    owner = rows(
        pair.one, database, "SELECT pg_get_userbyid(datdba) FROM pg_database WHERE datname = current_database()"
    )[0][0]
    rows(pair.one, database, f'SET ROLE "{owner}"; CREATE UNLOGGED TABLE cart (id int); CREATE TABLE paid (n numeric)')
    for arguments in (("acme", "--all-from", "one"), ("acme", "--rollback", "--confirm")):
        refused = await cli("move", *arguments)
        assert refused.status == 1 and "error:" in refused.err
    moved = await cli("move", "acme", "--to", "two")
    assert moved.status == 0 and moved.out.startswith("acme is on two, it was on one; its sessions waited for "), (
        moved.err
    )
    told_of = " ".join((moved.err + moved.out).split())
    assert "tenancy move acme --rollback; or: --confirm" in told_of
    assert "copied within the pause: 0 large objects, 1 unlogged tables" in told_of
    assert "no key: public.paid; where rows are equal but not identical" in told_of
    number = str((await told("operations", "list"))["items"][0]["operation"])
    for steered in (("show", number), ("resume", number), ("undo", number, "--yes")):
        advised = await cli("operations", *steered)
        assert "with: tenancy move acme --confirm; or go back with: tenancy move acme --rollback" in advised.err
        assert "tenancy operations" not in advised.err
    back = await cli("move", "acme", "--rollback")
    assert (back.status, back.out) == (0, "acme is on one again\n"), back.err
    assert (await told("move", "acme", "--to", "two"))["state"] == "waiting"
    over = await cli("operations", "undo", number, "--yes")
    assert over.err == f"error: operation {number} (move of 'acme'): it is undone\n"
    sure = await cli("move", "acme", "--confirm", "--yes")
    assert (sure.status, sure.out) == (0, "acme stays on two; its database on one was dropped\n"), sure.err
    await told("create", "globex")
    await told("create", "hooli")
    await told("create", "umbrel")
    plan = await told("rebalance")
    assert [(one["from"], one["to"]) for one in plan["moves"]] == [("one", "two")]
    applied = await cli("rebalance", "--apply", "--yes", "--offline")
    assert "one holds 75% of the tenants, and its weight is 50%; two holds 25%" in applied.out
    assert applied.status == 0 and "moved 1, failed 0" in applied.out, applied.err
    assert "it was moved by a dump" in applied.out
    await told("servers", "drain", "one")
    online = await told("move", "--all-from", "one", "--to", "two")
    assert [one["error"] for one in online["outcomes"]] == [None, None]
    refused = await cli("move", online["outcomes"][0]["slug"], "--rollback")
    assert refused.status == 1 and "tenancy servers activate one" in refused.err
    await told("servers", "activate", "one")
    for one in online["outcomes"]:
        assert (await told("show", one["slug"]))["server"] == "two"
        await told("move", one["slug"], "--rollback")
    await told("servers", "drain", "one")
    emptied = await told("move", "--all-from", "one", "--to", "two", "--no-way-back")
    ended = [(one["error"], one["reverse"]) for one in emptied["outcomes"]]
    assert ended == [(None, "it was moved without a way back")] * 2
    assert pair.left(name_prefix) == []
