"""Closes tickets that nobody has touched for 30 days; run once a day."""

import asyncio

from sqlalchemy import func, text, update

from database import tenancy
from models import Ticket

STALE = Ticket.updated_at < func.now() - text("interval '30 days'")


async def close_stale_tickets() -> dict[str, int]:
    closed = {}
    async for tenant in tenancy.each():
        async with tenancy.transaction() as db:
            result = await db.execute(update(Ticket).where(Ticket.is_open, STALE).values(is_open=False))
            closed[tenant.slug] = result.rowcount
    return closed


async def main() -> None:
    async with tenancy:
        print(await close_stale_tickets())


if __name__ == "__main__":
    asyncio.run(main())
