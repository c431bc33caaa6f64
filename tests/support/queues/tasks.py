"""What the tasks of the tests do, whatever the queue."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

from tenancy_orm import Tenancy, current_tenant, current_tenant_or_none
from tenancy_orm.errors import CrossTenantError
from tests.support.models import Note


def first_time(what: str) -> bool:
    """Whether this is called the first time with ``what``, in any process."""
    try:
        (Path(os.environ["QUEUE_DIRECTORY"]) / f"once-{what}").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


async def write(tenancy: Tenancy, body: str) -> str:
    """Write a note into the bound tenant's database, not too fast; returns the tenant's slug."""
    async with tenancy.transaction() as session:
        session.add(Note(body=body))
        await session.flush()
        await asyncio.sleep(0.02)
    return current_tenant().slug


async def write_second_time(tenancy: Tenancy, body: str) -> str:
    """Write a note, but fail the first time."""
    if first_time(f"fail-{current_tenant().slug}-{body}"):
        raise RuntimeError("the first time")
    return await write(tenancy, body)


async def write_after_death(tenancy: Tenancy, body: str) -> str:
    """Write a note, but kill the worker the first time."""
    if first_time(f"kill-{current_tenant().slug}-{body}"):
        os.kill(os.getpid(), signal.SIGKILL)
    return await write(tenancy, body)


async def escape(tenancy: Tenancy, other: str) -> str:
    """Try to reach another tenant from inside a task; returns what came of it."""
    try:
        async with tenancy.session(other):
            return "reached"
    except CrossTenantError:
        return "refused"


def bound() -> str | None:
    """The slug of the bound tenant."""
    tenant = current_tenant_or_none()
    return None if tenant is None else tenant.slug


def body_of(note: Any) -> str:
    """The text of a note that came as an argument."""
    return str(note.body)


async def forever() -> None:
    """Wait to be cancelled."""
    await asyncio.Event().wait()
