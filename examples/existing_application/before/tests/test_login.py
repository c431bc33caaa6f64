LOGIN = {"email": "mara@acme.example", "password": "correct horse"}


async def test_a_person_logs_in_and_out(acme):
    acme.cookies.clear()
    assert (await acme.get("/tickets")).status_code == 401

    assert (await acme.post("/login", json=LOGIN | {"password": "wrong"})).status_code == 401
    assert (await acme.post("/login", json=LOGIN)).status_code == 200
    assert (await acme.get("/tickets")).status_code == 200
    assert (await acme.get("/me")).json() == {"email": "mara@acme.example", "organisation": "Acme"}

    await acme.post("/logout")
    assert (await acme.get("/tickets")).status_code == 401
