# tests/test_leak.py
async def test_nobody_reads_a_ticket_of_others(acme, globex):
    number = (await acme.post("/tickets", json={"title": "Printer on fire"})).json()
    assert (await globex.get(f"/tickets/{number}")).status_code == 404
