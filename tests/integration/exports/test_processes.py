"""Exports by processes of their own: what a kill leaves, how one goes on, and how much memory one needs."""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.errors import ExportError
from tenancy_orm.operations import Operations
from tests.integration.exports.conftest import Execute, Unpacked, inside, names_in
from tests.support.served import variables
from tests.support.shell import ROOT, environment
from tests.support.warm import start_module

SECONDS = 120.0


async def process(config: TenancyConfig, task: dict[str, Any]) -> tuple[int, bytes]:
    """Run one; return its status and what it printed."""
    child = await start_module(
        "tests.support.export_process",
        cwd=ROOT,
        env=environment(**variables(config)),
        after=["tenancy_orm", "tests.support.models"],
    )
    try:
        child.stdin.write(json.dumps(task).encode())
        child.stdin.close()
        async with asyncio.timeout(SECONDS):
            printed = await child.stdout.read()
            return await child.wait(), printed
    finally:
        child.kill()
        await child.wait()


@pytest.mark.parametrize("name", ["acme.zip", "acme"])
async def test_an_export_goes_on_after_a_kill_and_says_what_is_of_which_moment(
    tenancy: Tenancy, tenancy_config: TenancyConfig, execute: Execute, tmp_path: Path, name: str
) -> None:
    acme = (await tenancy.tenants.create("acme")).tenant
    await execute(
        acme,
        "CREATE TABLE a (n int, body text); CREATE TABLE b (n int PRIMARY KEY, body text); CREATE TABLE c (n int);"
        "INSERT INTO a VALUES (1, repeat('x', 1500000)); INSERT INTO b SELECT n, repeat('y', 1500000) FROM "
        "generate_series(1, 3) n; INSERT INTO c VALUES (1)",
    )
    to, control = tmp_path / name, tenancy.internals.control
    status, _ = await process(tenancy_config, {"kill": "public.c", "to": str(to)})
    assert status == -signal.SIGKILL
    assert not (to / "manifest.json").exists()
    assert name == "acme" or not to.exists()
    with pytest.raises(ExportError, match="--resume"):
        await tenancy.exports.write("acme", to)
    await execute(acme, "ALTER TABLE a ADD x int")
    with pytest.raises(ExportError, match="another schema or rules"):
        await tenancy.exports.write("acme", to, resume=True)
    await execute(acme, "ALTER TABLE a DROP x; UPDATE a SET n = 2; DELETE FROM b; INSERT INTO c VALUES (2)")
    async with control.transaction() as connection:
        await connection.execute(text("UPDATE tenancy.operations SET claimed_until = now() WHERE claim IS NOT NULL"))

    report = await tenancy.exports.write("acme", to, resume=True)
    assert names_in(tmp_path) == [name]
    found = Unpacked(to)
    # what was complete is as it was then, and the rest as it is now; the manifest says so
    assert [row["n"] for row in found.rows("public.a")] == [1]
    assert [row["n"] for row in found.rows("public.b")] == [1, 2, 3]
    assert [row["n"] for row in found.rows("public.c")] == [1, 2]
    assert found["values/public.b/body/3.txt"] == b"y" * 1_500_000
    of = {e["path"]: e["snapshot"] for e in found.manifest["files"]}
    assert {path for path, number in of.items() if number == 1} >= {"data/public.a.jsonl", "values/public.b/body/3.txt"}
    assert of["data/public.c.jsonl"] == 2
    assert found.manifest["is_of_one_moment"] is False
    first, second = report.snapshots
    assert first < second
    assert of.keys() | {"manifest.json", "SHA256SUMS"} == found.files.keys()
    ended = await Operations(control).list(tenant_id=acme.id)
    assert [one.state for one in ended].count("done") == 1
    assert {one.state for one in ended} == {"done", "failed"}
    assert "the process that made it has ended" in [one.error for one in ended]

    # what the killed process has left on the server
    scratch = tenancy.internals.provisioner.names.scratch("")
    leftover = "SELECT count(*) FROM pg_roles WHERE starts_with(rolname, $1)"
    async with inside(tenancy, acme) as connection:
        assert await connection.fetchval(leftover, scratch) == 1
        await tenancy.internals.provisioner.reconcile()
        assert await connection.fetchval(leftover, scratch) == 0


async def test_what_is_not_as_it_was_left_is_not_resumed(
    tenancy: Tenancy, tenancy_config: TenancyConfig, execute: Execute, tmp_path: Path
) -> None:
    acme = (await tenancy.tenants.create("acme")).tenant
    await execute(acme, "CREATE TABLE a (n int); CREATE TABLE b (n int)")
    for name, file in (("a.zip", "a.zip.partial"), ("a", "a/data/public.a.jsonl")):
        await process(tenancy_config, {"kill": "public.b", "to": str(tmp_path / name)})
        path = tmp_path / file
        path.write_bytes(path.read_bytes()[:-1] if name == "a.zip" else b"{}")
        with pytest.raises(ExportError, match="changed after the export was interrupted"):
            await tenancy.exports.write("acme", tmp_path / name, resume=True)


async def test_memory_does_not_grow_with_the_data(
    tenancy: Tenancy, tenancy_config: TenancyConfig, execute: Execute, tmp_path: Path
) -> None:
    """A tenant of 100 MB against an empty one, in one process; the last figure shows that the measure sees growth."""
    small, large = [(await tenancy.tenants.create(slug)).tenant for slug in ("small", "large")]
    await execute(small, "CREATE TABLE big (n int, body text, raw bytea)")
    await execute(
        large,
        "CREATE TABLE big (n int, body text, raw bytea);"
        "INSERT INTO big SELECT n, repeat(md5(n::text), 30) FROM generate_series(1, 70000) n;"
        "INSERT INTO big SELECT 0, NULL, decode(repeat(md5(n::text), 2000000), 'hex') FROM generate_series(1, 1) n",
    )
    status, printed = await process(tenancy_config, {"measure": ["small", "large"], "to": str(tmp_path)})
    assert status == 0
    base, exported, fetched = json.loads(printed)
    mib = 1 << 20
    assert exported - base < 40 * mib
    assert fetched - exported > 60 * mib
    assert len(Unpacked(tmp_path / "large.zip").rows("public.big")) == 70_001
