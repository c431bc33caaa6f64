"""A process that makes or ends a clone and is killed: ``python -m tests.support.clones_process``.

It reads what to do as JSON from stdin. At the point that is named there, it kills itself.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from tenancy_orm import Tenancy
from tenancy_orm.clones import manager
from tenancy_orm.clones.transfer import CloneTransfer
from tenancy_orm.operations import Operations
from tenancy_orm.postgres import programs
from tenancy_orm.provisioning.creation import new_databases
from tenancy_orm.provisioning.creation.new_databases import NewDatabase
from tenancy_orm.provisioning.rights import grants
from tenancy_orm.provisioning.server_objects import databases, removal
from tenancy_orm.registry.registry import Registry
from tenancy_orm.tenants.manager import TenantManager
from tests.support.killed import run_until_killed
from tests.support.runs_process import config_of

RULES = {"tables": {"notes": {"body": "hash"}}}

# by the name of a point: what is wrapped, at which call, and whether it dies after it
REMOVED: dict[str, tuple[Any, str, int, bool]] = {
    "once the tables are read": (manager, "read_extensions", 1, True),
    "after the empty database": (new_databases, "create_for_login", 1, True),
    "after its end is recorded": (Operations, "begin", 1, True),
    "after the schema": (CloneTransfer, "_restore", 1, True),
    "while rows come": (programs, "_start", 5, True),
    "before the values": (CloneTransfer, "_anonymise", 1, False),
    "after the values": (CloneTransfer, "_anonymise", 1, True),
    "after the indexes": (CloneTransfer, "_restore", 2, True),
    "between the audit entries": (Registry, "record", 1, True),
    "after the copying": (Operations, "finish", 1, True),
    "after the rights": (grants, "grant_and_mark", 1, True),
    "after all is handed over": (NewDatabase, "hand_over", 1, True),
    "once its role may connect": (databases, "open_to_role", 1, True),
}
KEPT: dict[str, tuple[Any, str, int, bool]] = {
    "before it is active": (Registry, "complete", 1, False),
    "after it is active": (Registry, "complete", 1, True),
}
ENDED: dict[str, tuple[Any, str, int, bool]] = {
    "before it is deleted": (TenantManager, "delete", 1, False),
    "after it is deleted": (TenantManager, "delete", 1, True),
    "before its purge": (TenantManager, "purge_due", 1, False),
    "in its purge": (removal, "drop_database", 1, True),
}
POINTS = {**REMOVED, **KEPT, **ENDED}


async def main(task: dict[str, Any]) -> None:
    """Make a clone, or end those that have expired."""
    async with Tenancy(config_of(task)) as tenancy:
        if task["what"] == "expire":
            await tenancy.run_housekeeping()
        else:
            await tenancy.clones.create("acme", "clone", ttl=timedelta(hours=1), rules=RULES)


if __name__ == "__main__":
    run_until_killed(main, POINTS)
