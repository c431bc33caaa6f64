async def test_tickets_have_comments(acme):
    number = (await acme.post("/tickets", json={"title": "Printer on fire"})).json()
    assert (await acme.post(f"/tickets/{number}/comments", json={"text": "Again?"})).status_code == 201
    assert (await acme.get(f"/tickets/{number}")).json() == {
        "title": "Printer on fire",
        "is_open": True,
        "comments": ["Again?"],
    }


async def test_each_organisation_lists_its_own(acme, globex):
    await acme.post("/tickets", json={"title": "Printer on fire"})
    await globex.post("/tickets", json={"title": "No coffee"})
    assert [ticket["title"] for ticket in (await acme.get("/tickets")).json()] == ["Printer on fire"]
    assert [ticket["title"] for ticket in (await globex.get("/tickets")).json()] == ["No coffee"]


async def test_nobody_comments_on_a_ticket_of_others(acme, globex):
    number = (await acme.post("/tickets", json={"title": "Printer on fire"})).json()
    assert (await globex.post(f"/tickets/{number}/comments", json={"text": "Ha"})).status_code == 404
