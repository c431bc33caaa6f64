"""SIGKILL at every step of a drill: neither a database, a login nor anything that was decrypted is left."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.backups import Backup
from tests.integration.backups.conftest import acme, backup, tenancy_config
from tests.support.drills_process import POINTS
from tests.support.killed import run_killed
from tests.support.waiting import until

__all__ = ["acme", "backup", "tenancy_config"]

# what is left on the server is compared as a whole
pytestmark = [pytest.mark.new_installation, pytest.mark.timeout(600)]

SECONDS = 120.0
PRESENT = """
SELECT datname::text FROM pg_database WHERE starts_with(datname::text, $1)
UNION SELECT rolname::text FROM pg_roles WHERE starts_with(rolname::text, $1)
"""


# as if the time for which they hold had passed
CLAIMS_END = text(
    "UPDATE tenancy.backups SET readers = (SELECT jsonb_object_agg(key, jsonb_set(value, '{until}', "
    "to_jsonb(now() - interval '1 second'))) FROM jsonb_each(readers))"
)


async def present(tenancy: Tenancy) -> set[str]:
    """Databases and roles of this installation."""
    connection = await tenancy.internals.provisioner.connect_admin("default")
    try:
        names = tenancy.internals.provisioner.names
        return {row[0] for row in await connection.fetch(PRESENT, names.stem)}
    finally:
        await connection.close()


async def killed(task: dict[str, Any], at: str) -> None:
    """Run another process that dies at a given point."""
    await run_killed("drills_process", {**task, "at": at})


async def test_what_a_killed_drill_leaves_is_cleared_away(
    tenancy: Tenancy, tenancy_config: TenancyConfig, backup: Backup, tmp_path: Path
) -> None:
    """By reconcile, and on its machine by the next housekeeping."""
    task = {
        "control_url": tenancy_config.control_url,
        "server": dict(tenancy_config.servers or {})["default"],
        "keys": dict(tenancy_config.encryption_keys or {}),
        "prefix": tenancy_config.name_prefix,
        "backup": {"store": tenancy_config.backup.store, "directory": str(tenancy_config.backup.directory)},
    }
    before, spool = await present(tenancy), tmp_path / "spool"

    async def is_tidy() -> bool:
        return (await tenancy.internals.provisioner.reconcile()).clean

    for at in POINTS:
        await killed(task, at)
        assert list(spool.iterdir()) or at == "before the result is recorded", at
        await until(is_tidy, seconds=SECONDS)
        assert await present(tenancy) == before, at
        await tenancy.run_housekeeping()
        assert list(spool.iterdir()) == [], at
    drilled = await tenancy.backups.drill()
    assert drilled.is_good and drilled.verification is not None and drilled.verification.rows == 100
    assert await present(tenancy) == before and list(spool.iterdir()) == []
    assert len(await tenancy.audit.events(tenant="acme", action="backup.drill")) == 1
    # nobody knows here that it was cleared away: each machine does so for itself
    async with tenancy.internals.control.transaction() as connection:
        await connection.execute(CLAIMS_END)
    await tenancy.tenants.delete("acme")
    await tenancy.tenants.purge("acme")
    assert backup.tenant_id is not None
    found = await tenancy.erasures.complete(backup.tenant_id)
    left = (
        f"what a process on {socket.gethostname()} may have left of backup {backup.id}, decrypted, when it was killed"
    )
    # at the last point nothing is decrypted any more
    assert [one.is_readable for one in found.remains if one.what == left] == [True] * (len(POINTS) - 1)
