"""A process that provisions and is killed: ``python -m tests.support.provisioning_process``.

It reads what to do as JSON from stdin. It kills itself, by SIGKILL, where ``at`` says; otherwise it works until its
parent kills it.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn

import pytest

from tenancy_orm.provisioning.creation.warm_records import WarmRecords
from tenancy_orm.provisioning.rights import grants
from tenancy_orm.provisioning.server_objects import access, databases, removal, roles
from tenancy_orm.provisioning.templates.building import Templates
from tenancy_orm.registry.registry import Registry
from tests.support.provisioning import ScriptSchema, Workshop, intercept, open_workshop


def die() -> NoReturn:
    """End this process as the kernel's out-of-memory killer does."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("not reached")


async def die_in_step(*_: object, **__: object) -> None:
    """A hook for ``intercept``."""
    die()


def dying_after(function: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """A function that does its work first."""

    async def wrapped(*args: Any, **options: Any) -> Any:
        await function(*args, **options)
        die()

    return wrapped


def arrange(patch: pytest.MonkeyPatch, at: str) -> None:
    """Make this process die at the point ``at``."""
    when, _, what = at.partition(" ")
    places: dict[str, tuple[object, str]] = {
        "register": (Registry, "register"),
        "complete": (Registry, "complete"),
        "begin_purge": (Registry, "begin_purge"),
        "drop_database": (databases, "drop"),
        "block": (access, "block"),
        "erase": (Registry, "erase_secrets"),
        "retire": (removal, "_retire"),
        "revoke_rights": (removal, "_revoke_rights"),
        "drop_role": (roles, "drop"),
        "finish_purge": (Registry, "finish_purge"),
        "complete_template": (databases, "complete_template"),
        "apply": (Templates, "_apply"),
        "scratch": (Templates, "clone"),
        "add_warm": (WarmRecords, "add"),
        "create_sealed": (roles, "create_sealed"),
        "clone": (Templates, "clone"),
        "open_to_owner": (databases, "open_to_owner"),
        "grant": (grants, "grant_and_mark"),
        "seal": (databases, "seal"),
        "complete_warm": (WarmRecords, "complete"),
        "withdraw": (WarmRecords, "withdraw"),
        "remove_warm": (WarmRecords, "remove"),
    }
    if what in places:
        owner, name = places[what]
        patch.setattr(owner, name, dying_after(getattr(owner, name)) if when == "after" else die_in_step)
    else:
        intercept(patch, what, **{when: die_in_step})


async def create_many(workshop: Workshop, prefix: str) -> None:
    """Create tenants, four at a time, until somebody ends it."""
    for number in itertools.count():
        await asyncio.gather(*(workshop.create(f"{prefix}-{number}-{i}") for i in range(4)))


async def create_and_refill(workshop: Workshop, prefix: str) -> None:
    """Create tenants, two at a time, and fill the pool beside them, until somebody ends it."""

    async def refill() -> None:
        while True:
            await workshop.provisioner.warm_pool.refill()
            await asyncio.sleep(0)

    async def create() -> None:
        for number in itertools.count():
            await asyncio.gather(*(workshop.create(f"{prefix}-{number}-{i}") for i in range(2)))
            await asyncio.sleep(0.1)

    await asyncio.gather(refill(), create())


async def run(task: dict[str, Any]) -> None:
    """Do what ``task`` says."""
    workshop = await open_workshop(
        control_url=task["control_url"],
        admin_url=task["admin_url"],
        name_prefix=task["name_prefix"],
        schema=ScriptSchema(),
        **task.get("config", {}),
    )
    if at := task.get("at"):
        arrange(pytest.MonkeyPatch(), at)
    print("ready", flush=True)
    match task["what"]:
        case "create":
            await workshop.create(task["slug"])
        case "create many":
            await create_many(workshop, task["slug"])
        case "purge":
            await workshop.provisioner.purge(await workshop.registry.find(task["slug"]))
        case "create and refill":
            await create_and_refill(workshop, task["slug"])
        case "refill":
            await workshop.provisioner.warm_pool.refill()
        case "drain":
            await workshop.provisioner.warm_pool.drain()
        case "template":
            await workshop.provisioner.template("default")
        case "scratch":
            async with workshop.provisioner.scratch("default"):
                raise AssertionError("not reached")
    await workshop.close()


if __name__ == "__main__":
    asyncio.run(run(json.load(sys.stdin)))
