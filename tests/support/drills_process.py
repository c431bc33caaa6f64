"""A process that drills a restore and is killed: ``python -m tests.support.drills_process``.

It reads what to do as JSON from stdin. At the point that is named there, it kills itself.
"""

from __future__ import annotations

from typing import Any

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.backups import opening, verification
from tenancy_orm.backups.records import BackupRecords
from tenancy_orm.provisioning.templates import scratch
from tests.support.killed import run_until_killed
from tests.support.models import Base

# by the name of a point: what is wrapped, at which call, and whether it dies after it
POINTS: dict[str, tuple[Any, str, int, bool]] = {
    "once it is decrypted": (opening, "fetch", 1, True),
    "in the empty database": (scratch, "create_for_login", 1, True),
    "in the restored database": (verification, "restore_archive", 1, True),
    "before the result is recorded": (BackupRecords, "note_verified", 1, False),
}


async def main(given: dict[str, Any]) -> None:
    """Drill."""
    config = TenancyConfig(
        control_url=given["control_url"],
        servers={"default": given["server"]},
        metadata=Base.metadata,
        encryption_keys=given["keys"],
        name_prefix=given["prefix"],
        backup=given["backup"],
    )
    async with Tenancy(config) as tenancy:
        await tenancy.backups.drill()


if __name__ == "__main__":
    run_until_killed(main, POINTS)
