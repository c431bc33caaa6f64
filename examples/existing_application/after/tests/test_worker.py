from sqlalchemy import text

from worker import close_stale_tickets


async def test_stale_tickets_are_closed(acme, globex, database_of):
    await acme.post("/tickets", json={"title": "Printer on fire"})
    async with database_of("acme") as db:
        await db.execute(text("UPDATE tickets SET updated_at = now() - interval '31 days'"))
        await db.commit()
    await globex.post("/tickets", json={"title": "No coffee"})

    assert await close_stale_tickets() == {"acme": 1, "globex": 0}
    assert [ticket["is_open"] for ticket in (await acme.get("/tickets")).json()] == [False]
    assert [ticket["is_open"] for ticket in (await globex.get("/tickets")).json()] == [True]
