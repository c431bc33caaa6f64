"""A process that drills a restore and is killed: ``python -m tests.support.drills_process``.

It reads what to do as JSON from stdin. At the point that is named there, it kills itself.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import pytest

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.backups import opening, verification
from tenancy_orm.backups.records import BackupRecords
from tenancy_orm.provisioning import scratch
from tests.support.killed import kill_at
from tests.support.models import Base

# by the name of a point: what is wrapped, and whether it dies after it
POINTS: dict[str, tuple[Any, str, bool]] = {
    "once it is decrypted": (opening, "fetch", True),
    "in the empty database": (scratch, "create_for_login", True),
    "in the restored database": (verification, "restore_archive", True),
    "before the result is recorded": (BackupRecords, "note_verified", False),
}


def arrange(patch: pytest.MonkeyPatch, point: str) -> None:
    """Have this process kill itself when it comes to the point."""
    owner, name, after = POINTS[point]
    kill_at(patch, owner, name, after=after)


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
    task = json.load(sys.stdin)
    with pytest.MonkeyPatch.context() as patching:
        arrange(patching, task["at"])
        asyncio.run(main(task))
