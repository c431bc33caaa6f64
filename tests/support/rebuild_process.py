"""A process that registers tenants again and is killed: ``python -m tests.support.rebuild_process``.

It reads what to do as JSON from stdin. At the point that is named there, it kills itself.
"""

from __future__ import annotations

from typing import Any
from uuid import UUID

from tenancy_orm import Tenancy
from tenancy_orm.control import installation
from tenancy_orm.control.database import ControlDatabase
from tenancy_orm.operations import Operations
from tenancy_orm.provisioning.reconciling import marked_databases
from tenancy_orm.provisioning.server_objects import roles
from tenancy_orm.registry.registry import Registry
from tenancy_orm.restores import RegistryRebuilding
from tenancy_orm.secrets.sealed import SealedPasswords
from tests.support.killed import run_until_killed
from tests.support.runs_process import config_of

# by the name of a point: what is wrapped, at which call, and whether it dies after it
POINTS: dict[str, tuple[Any, str, int, bool]] = {
    "before the id is committed": (installation, "take", 1, True),
    "after the id": (RegistryRebuilding, "take_installation", 1, True),
    "before the viewer": (ControlDatabase, "upgrade", 1, False),
    "before the row": (Registry, "register_again", 1, False),
    "after the row": (Registry, "register_again", 1, True),
    "before a clone's end": (Operations, "record_again", 1, False),
    "before the role has the password": (roles, "set_password", 1, False),
    "after the role has the password": (roles, "set_password", 1, True),
    "after the rotation": (SealedPasswords, "finish_rotation", 1, True),
    "before the proof": (marked_databases, "prove", 1, False),
    "before the end": (Registry, "end_rebuilding", 1, False),
    "after the end": (Registry, "end_rebuilding", 1, True),
}


async def main(task: dict[str, Any]) -> None:
    """Register all tenants again, as ``tenancy rebuild`` does."""
    slugs = {UUID(name): slug for name, slug in task["slugs"].items()}
    tenancy = Tenancy(config_of(task))
    await tenancy.open()
    report = await tenancy.rebuilding.look(slugs=slugs)
    if await tenancy.rebuilding.take_installation(report.installation):
        await tenancy.close()
        await tenancy.open(initialise=True)
    await tenancy.rebuilding.run(slugs=slugs)


if __name__ == "__main__":
    run_until_killed(main, POINTS)
