"""A process that moves a tenant and is killed: ``python -m tests.support.move_process``.

It reads what to do as JSON from stdin. It kills itself, by SIGKILL, at the point that is named there.
"""

from __future__ import annotations

from typing import Any

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.moves import making
from tenancy_orm.moves.streams import Stream
from tenancy_orm.operations import Switch
from tenancy_orm.provisioning.creation.new_databases import NewDatabase
from tenancy_orm.registry.registry import Registry
from tests.support.killed import run_until_killed
from tests.support.models import Base

# by the name of a point: what is wrapped, at which call, and whether the signal comes after it
POINTS: dict[str, tuple[Any, str, int, bool]] = {
    "recorded": (Registry, "record_database", 1, True),
    "login": (Stream, "create_login", 1, True),
    "slot": (making, "make_copy", 1, False),
    "handed over": (NewDatabase, "hand_over", 1, True),
    "subscribed": (Stream, "subscribe", 1, True),
    "way back": (Stream, "create_slot", 1, True),
    "closed": (Switch, "_close", 1, True),
    "before the switch": (Registry, "switch_database", 1, False),
    "after the switch": (Registry, "switch_database", 1, True),
    "switched": (Stream, "drop", 1, False),
    "followed": (Stream, "subscribe", 2, True),
    "back: before the switch": (Registry, "switch_database", 1, False),
    "back: after the switch": (Registry, "switch_database", 1, True),
    "confirm: dropped": (Stream, "drop", 1, True),
}


def config_of(task: dict[str, Any]) -> TenancyConfig:
    """The configuration of the test."""
    return TenancyConfig(metadata=Base.metadata, **task["config"])


async def main(task: dict[str, Any]) -> None:
    """Move the tenant, or go back, or confirm."""
    async with Tenancy(config_of(task)) as tenancy:
        if task["at"].startswith("back"):
            await tenancy.moves.rollback("acme")
        elif task["at"].startswith("confirm"):
            await tenancy.moves.confirm("acme")
        else:
            await tenancy.moves.move("acme", to="two", offline=task.get("offline", False))


if __name__ == "__main__":
    run_until_killed(main, POINTS)
