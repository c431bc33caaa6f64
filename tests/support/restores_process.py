"""A process that restores a tenant and is killed: ``python -m tests.support.restores_process``.

It reads what to do as JSON from stdin. At the point that is named there, it kills itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tenancy_orm import Tenancy
from tenancy_orm.operations import Operations
from tenancy_orm.provisioning.creation import new_databases
from tenancy_orm.provisioning.creation.new_databases import NewDatabase, NewDatabases
from tenancy_orm.provisioning.rights import grants
from tenancy_orm.provisioning.server_objects import access
from tenancy_orm.registry.registry import Registry
from tenancy_orm.restores import DumpSource, making
from tests.support.killed import run_until_killed
from tests.support.runs_process import config_of

# by the name of a point: what is wrapped, at which call, and whether it dies after it
POINTS: dict[str, tuple[Any, str, int, bool]] = {
    "before the row": (Registry, "record_database", 1, False),
    "after the row": (Registry, "record_database", 1, True),
    "after the empty database": (new_databases, "create_for_login", 1, True),
    "after the contents": (making, "restore_archive", 1, True),
    "after the rights": (grants, "grant_and_mark", 1, True),
    "after all is handed over": (NewDatabase, "hand_over", 1, True),
    "before the upgrade": (Operations, "advance", 1, True),
    "before the swap": (Operations, "advance", 2, True),
    "once the old one is closed": (access, "close_database", 1, True),
    "before the proof": (NewDatabases, "prove", 1, False),
    "before the row changes": (Registry, "switch_database", 1, False),
    "after the row has changed": (Registry, "switch_database", 1, True),
    "before the old one is sealed": (NewDatabases, "set_connect", 2, False),
    "before the end": (Operations, "finish", 1, False),
}
UNDONE = tuple(POINTS)[: tuple(POINTS).index("before the swap")]
FINISHED = tuple(POINTS)[len(UNDONE) :]


async def main(task: dict[str, Any]) -> None:
    """Restore, or undo a restore."""
    async with Tenancy(config_of(task)) as tenancy:
        if task["what"] == "undo":
            await tenancy.restores.undo("acme")
        elif task["what"] == "as":
            acme = await tenancy.tenants.get("acme")
            await tenancy.restores.restore_as("copy", DumpSource(Path(task["archive"]), acme.id))
        else:
            await tenancy.restores.restore("acme", DumpSource(Path(task["archive"])))


if __name__ == "__main__":
    run_until_killed(main, POINTS)
