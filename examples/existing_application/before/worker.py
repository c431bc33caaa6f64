"""Closes tickets that nobody has touched for 30 days; run once a day."""

import asyncio

from sqlalchemy import func, select, text, update

from database import session_factory
from models import Organisation, Ticket

STALE = Ticket.updated_at < func.now() - text("interval '30 days'")


async def close_stale_tickets() -> dict[str, int]:
    closed = {}
    async with session_factory() as db:
        for organisation in await db.scalars(select(Organisation).order_by(Organisation.id)):
            stale = (Ticket.org_id == organisation.id, Ticket.is_open, STALE)
            result = await db.execute(update(Ticket).where(*stale).values(is_open=False))
            closed[organisation.slug] = result.rowcount
            await db.commit()
    return closed


async def main() -> None:
    print(await close_stale_tickets())


if __name__ == "__main__":
    asyncio.run(main())
