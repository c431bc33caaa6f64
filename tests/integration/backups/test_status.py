"""How old the newest backups are is said before somebody needs one."""

from __future__ import annotations

import pytest
from sqlalchemy import text

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.backups import Backup
from tenancy_orm.config import BackupConfig
from tenancy_orm.errors import CrossTenantError
from tenancy_orm.events import BackupsChecked
from tests.support.processes import opened

DAY = 86_400.0


async def execute(tenancy: Tenancy, *statements: str) -> None:
    async with tenancy.internals.control.transaction() as connection:
        for statement in statements:
            await connection.execute(text(statement))


async def make_older(tenancy: Tenancy, but: str = "") -> None:
    """Let the tenants be nine days old, which a trigger keeps from being changed."""
    await execute(
        tenancy,
        "ALTER TABLE tenancy.tenants DISABLE TRIGGER USER",
        f"UPDATE tenancy.tenants SET created_at = now() - interval '9 days' WHERE slug <> '{but}'",
        "ALTER TABLE tenancy.tenants ENABLE TRIGGER USER",
    )


async def test_tenants_that_wait_for_too_long_are_counted_named_and_announced(tenancy: Tenancy, backup: Backup) -> None:
    """Those without any, those with a bad one, and the control database; a tenant that is new is none of them."""
    received: list[BackupsChecked] = []
    tenancy.events.subscribe(BackupsChecked, received.append)
    for slug in ("globex", "initech", "new", "gone"):
        await tenancy.tenants.create(slug)
    await tenancy.tenants.delete("gone")
    found = await tenancy.backups.status()
    assert (found.tenants, found.backed_up, found.verified, found.overdue, found.errors) == (4, 1, 0, 0, ())
    assert found.oldest_seconds is not None and 0 < found.oldest_seconds < DAY
    assert (found.control_seconds, found.oldest_verified_seconds) == (None, None)

    await tenancy.backups.run(["initech"])
    await tenancy.backups.verify((await tenancy.backups.list("initech"))[0])
    await make_older(tenancy, but="new")
    await execute(tenancy, "UPDATE tenancy.backups SET started_at = now() - interval '3 days'")
    found = await tenancy.backups.check()
    assert (found.tenants, found.backed_up, found.verified, found.overdue) == (4, 2, 1, 3)
    assert found.overdue_slugs[0] == "globex" and set(found.overdue_slugs) == {"acme", "globex", "initech"}
    assert found.oldest_verified_seconds == pytest.approx(3 * DAY, abs=DAY / 2)
    assert found.control_is_overdue
    first, second = found.errors
    assert first.startswith("3 of 4 tenants have no good backup of the last 172800 s: globex, ")
    assert "the control database" in second
    assert (received[-1].overdue, received[-1].oldest_seconds, received[-1].control_is_overdue) == (
        3,
        found.oldest_seconds,
        True,
    )

    # housekeeping says so, and the job of backups mends it
    report = await tenancy.run_housekeeping()
    assert [error for error in report.errors if error.startswith("check_backups: ")] == [
        f"check_backups: {error}" for error in report.chores["check_backups"].errors
    ]
    assert report.chores["check_backups"].overdue == 3
    assert (await tenancy.backups.run_due()).reasons == {}
    assert (await tenancy.backups.status()).errors == ()
    await execute(tenancy, "UPDATE tenancy.backups SET verify_error = 'bad' WHERE tenant_id IS NOT NULL")
    assert (await tenancy.backups.status()).overdue == 3
    async with tenancy.scope("acme"):
        for method in (tenancy.backups.status, tenancy.backups.check):
            with pytest.raises(CrossTenantError):
                await method()


async def test_the_limit_is_a_setting_or_follows_from_the_schedule(
    tenancy: Tenancy, tenancy_config: TenancyConfig, backup: Backup
) -> None:
    await make_older(tenancy)
    await execute(tenancy, "UPDATE tenancy.backups SET started_at = now() - interval '1 hour'")
    assert BackupConfig().overdue_after == 2 * DAY
    assert BackupConfig(every_seconds=0).overdue_after is None
    assert BackupConfig(every_seconds=0, overdue_seconds=9).overdue_after == 9
    settings = tenancy_config.backup.replace(overdue_seconds=1_800.0)
    async with opened(tenancy_config.replace(backup=settings)) as other:
        assert list((await other.backups.status()).overdue_slugs) == ["acme"]
    async with opened(tenancy_config.replace(backup=tenancy_config.backup.replace(every_seconds=0.0))) as other:
        found = await other.backups.status()
        assert (found.overdue, found.overdue_after, found.errors) == (0, None, ())
