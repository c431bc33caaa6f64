"""A process that recovers a tenant and waits, to be killed: ``python -m tests.support.recovery_process SLUG TIME``."""

from __future__ import annotations

import asyncio
import sys

from tenancy_orm import Tenancy, TenancyConfig


async def main(slug: str, time: str) -> None:
    """Recover the tenant, say so, and wait for ever."""
    async with Tenancy(TenancyConfig.from_env()) as tenancy, tenancy.recovery.open(slug, time):
        print("recovered", flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
