"""A process that seeds tenants and is killed: ``python -m tests.support.seeding_process``.

It reads what to do as JSON from stdin, and kills itself, by SIGKILL, at the point that is named there.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from tenancy_orm import Tenancy, TenancyConfig, Tenant
from tenancy_orm.config import ProvisioningConfig
from tenancy_orm.seeds import Seed, seed
from tests.support.models import Base
from tests.support.provisioning import intercept
from tests.support.provisioning_process import arrange, die_in_step

ADD = text("INSERT INTO notes (body) VALUES (:body)")


def seeds_of(at: str) -> list[Seed]:
    """Three seeds, the second of which dies where ``at`` says so: in the tenant of that name, or in all."""

    @seed(template=True)
    async def base(session: AsyncSession) -> None:
        await session.execute(ADD, {"body": "base"})

    @seed
    async def first(session: AsyncSession) -> None:
        await session.execute(ADD, {"body": "first"})

    @seed
    async def second(session: AsyncSession, tenant: Tenant) -> None:
        await session.execute(ADD, {"body": "second"})
        if at in (f"in {tenant.slug}", "in any"):
            os.kill(os.getpid(), signal.SIGKILL)

    return [base, first, second]


def config_of(task: dict[str, Any], seeds: list[Seed]) -> TenancyConfig:
    """The configuration of an application with these seeds."""
    return TenancyConfig(
        control_url=task["control_url"],
        servers={"default": task["admin_url"]},
        metadata=Base.metadata,
        encryption_keys={"1": "a2V5" * 10 + "a2U="},
        name_prefix=task["name_prefix"],
        provisioning=ProvisioningConfig(seeds=tuple(seeds)),
    )


async def run(task: dict[str, Any]) -> None:
    """Do what ``task`` says."""
    at = task["at"]
    if at in ("before seeds", "after seeds"):
        intercept(pytest.MonkeyPatch(), "seeds", **{at.split()[0]: die_in_step})
    elif at == "before complete":
        arrange(pytest.MonkeyPatch(), at)
    tenancy = Tenancy(config_of(task, seeds_of(at)))
    async with tenancy:
        if task["what"] == "create":
            await tenancy.tenants.create("acme")
        else:
            await tenancy.seeds.apply(concurrency=1)


if __name__ == "__main__":
    asyncio.run(run(json.load(sys.stdin)))
