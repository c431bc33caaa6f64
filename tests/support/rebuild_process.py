"""A process that registers tenants again and is killed: ``python -m tests.support.rebuild_process``.

It reads what to do as JSON from stdin. At the point that is named there, it kills itself.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any
from uuid import UUID

import pytest

from tenancy_orm import Tenancy
from tenancy_orm.control import installation
from tenancy_orm.control.database import ControlDatabase
from tenancy_orm.provisioning import marked_databases, roles
from tenancy_orm.registry.registry import Registry
from tenancy_orm.restores import RegistryRebuilding
from tenancy_orm.secrets.sealed import SealedPasswords
from tests.support.killed import kill_at
from tests.support.runs_process import config_of

# by the name of a point: what is wrapped, and whether it dies after it
POINTS: dict[str, tuple[Any, str, bool]] = {
    "before the id is committed": (installation, "take", True),
    "after the id": (RegistryRebuilding, "take_installation", True),
    "before the viewer": (ControlDatabase, "upgrade", False),
    "before the row": (Registry, "register_again", False),
    "after the row": (Registry, "register_again", True),
    "before the role has the password": (roles, "set_password", False),
    "after the role has the password": (roles, "set_password", True),
    "after the rotation": (SealedPasswords, "finish_rotation", True),
    "before the proof": (marked_databases, "prove", False),
    "before the end": (Registry, "end_rebuilding", False),
    "after the end": (Registry, "end_rebuilding", True),
}


def arrange(patch: pytest.MonkeyPatch, point: str) -> None:
    """Have this process kill itself when it comes to the point."""
    owner, name, after = POINTS[point]
    kill_at(patch, owner, name, after=after)


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
    given = json.loads(sys.stdin.read())
    with pytest.MonkeyPatch.context() as patching:
        arrange(patching, given["at"])
        asyncio.run(main(given))
