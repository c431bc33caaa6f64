"""What is due is backed up by one process, what is old is removed, and what a killed process leaves is cleared away."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

from sqlalchemy import text

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.backups import Backup
from tests.support.processes import opened
from tests.support.shell import environment
from tests.support.waiting import until


async def execute(tenancy: Tenancy, sql: str) -> None:
    async with tenancy.internals.control.transaction() as connection:
        await connection.execute(text(sql))


async def test_each_tenant_that_is_due_is_backed_up_by_one_of_two_processes(
    tenancy: Tenancy, tenancy_config: TenancyConfig
) -> None:
    for slug in ("a1", "b1", "c1"):
        await tenancy.tenants.create(slug)
    async with opened(tenancy_config) as other:
        reports = await asyncio.gather(tenancy.backups.run_due(), other.backups.run_due())
        assert [report.reasons for report in reports] == [{}, {}]
        done = [one.slug for report in reports for one in report.done]
        assert sorted(done, key=str) == [None, "a1", "b1", "c1"] or sorted(map(str, done)) == ["None", "a1", "b1", "c1"]
        assert (await other.backups.run_due()).done == ()
    await execute(tenancy, "UPDATE tenancy.backups SET started_at = now() - interval '25 hours' WHERE state = 'done'")
    job = next(one for one in tenancy._lifetime.parts.built_in_jobs if one.name == "backups")
    result = await job.run()
    assert result is not None and (dict(result.result), result.errors) == ({"made": 4, "pruned": 0}, [])
    # no more at once on one server than are allowed, by all processes together
    await tenancy.tenants.create("d1")
    await execute(
        tenancy,
        "INSERT INTO tenancy.backups (id, tenant_id, server, store, path, key_id, claimed_until) "
        "SELECT gen_random_uuid(), id, 'default', 's', 'p', 'k', now() + interval '1 hour' FROM tenancy.tenants "
        "WHERE slug IN ('a1', 'b1')",
    )
    waiting = asyncio.create_task(tenancy.backups.run(["d1"]))
    done_early, _ = await asyncio.wait([waiting], timeout=2)
    assert not done_early
    await execute(
        tenancy,
        "DELETE FROM tenancy.backups WHERE store = 's' AND tenant_id IN (SELECT id FROM "
        "tenancy.tenants WHERE slug = 'a1')",
    )
    assert [one.slug for one in (await waiting).done] == ["d1"]


async def test_old_backups_go_and_the_last_good_one_stays(tenancy: Tenancy, backup: Backup, tmp_path: Path) -> None:
    made = [backup, *[(await tenancy.backups.run(["acme"])).done[0] for _ in range(4)]]
    now = datetime.now(UTC)
    for age, one in zip((400, 399, 3, 2, 1), made, strict=True):
        then = (now - timedelta(days=age)).isoformat()
        await execute(tenancy, f"UPDATE tenancy.backups SET started_at = '{then}' WHERE id = '{one.id}'")
    kept = await tenancy.backups.keep(made[0], now + timedelta(days=1))
    assert kept.kept_until is not None
    tenancy.backups._pruner._config = tenancy.config.backup.replace(
        keep_last=1, keep_daily=2, keep_weekly=0, keep_monthly=0
    )
    planned = await tenancy.backups.prune(dry_run=True)
    assert [one.id for one in planned.pruned] == [made[1].id, made[2].id]
    assert len(await tenancy.backups.list()) == 5
    report = await tenancy.backups.prune()
    assert (len(report.pruned), report.freed_bytes > 0, report.errors) == (2, True, ())
    left = {path.parent.name for path in (tmp_path / "store").rglob("dump.tar.age")}
    assert left == {str(made[0].id), str(made[3].id), str(made[4].id)}
    # one that is bad counts for nothing
    for one in made[3:]:
        (tmp_path / "store" / one.archive_path).write_bytes(b"x")
        assert not (await tenancy.backups.verify(one, restore=False)).is_good
    assert [one.id for one in (await tenancy.backups.prune()).pruned] == []
    assert (await tenancy.backups.get(made[1].id)).pruned_at is not None
    assert (await tenancy.run_housekeeping()).chores["prune_backups"].pruned == 0


async def test_what_a_killed_process_leaves_is_cleared_away(
    tenancy: Tenancy, tenancy_config: TenancyConfig, acme: str, tmp_path: Path
) -> None:
    """Rows, temporary space, and what is half written in the store."""
    async with tenancy.transaction("acme") as session:
        await session.execute(
            text("INSERT INTO notes (body) SELECT repeat(md5(n::text), 30) FROM generate_series(1, 20000) n")
        )
    given = {
        "control_url": tenancy_config.control_url,
        "server": dict(tenancy_config.servers or {})["default"],
        "keys": dict(tenancy_config.encryption_keys or {}),
        "prefix": tenancy_config.name_prefix,
        "backup": {"store": tenancy_config.backup.store, "directory": str(tenancy_config.backup.directory)},
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.support.backups_process",
        stdin=asyncio.subprocess.PIPE,
        env=environment(PYTHONPATH=os.environ["PYTHONPATH"]),
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps(given).encode())
    process.stdin.close()
    assert await process.wait() == -9
    (row,) = await tenancy.backups.list("acme")
    assert row.state == "running"
    spool, store = tmp_path / "spool", tmp_path / "store"
    assert list(spool.glob("tenancy-backup-*/*")) and list(store.rglob("*.part"))
    await execute(tenancy, "UPDATE tenancy.backups SET claimed_until = now()")
    (again,) = (await tenancy.backups.run(["acme"])).done
    assert list(spool.iterdir()) == []
    await tenancy.backups.prune()
    states = {one.id: (one.state, one.error) for one in await tenancy.backups.list("acme")}
    assert states == {again.id: ("done", None), row.id: ("failed", "the process that made it has died")}
    assert not (store / row.path).exists()
    # pg_dump may end a little later than the process that has started it
    await until(lambda: not list(spool.iterdir()))
