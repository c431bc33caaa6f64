"""``pytest --tenancy-matrix``, as suites of applications use it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.postgres import Postgres
from tests.support.suites import APPLICATION, Suite

LEAKING = APPLICATION.replace(
    "        return JSONResponse([note.text",
    "        seen.extend([note.text for note in await session.scalars(select(Note))])\n"
    "        return JSONResponse(seen + [note.text",
).replace("async def notes(", "seen = []\n\n\nasync def notes(")
EXAMPLES = 'EXAMPLES = {"POST /notes": lambda own: {"text": own.text()}}'


@pytest.fixture
async def suite(tmp_path: Path, postgres: Postgres) -> AsyncIterator[Suite]:
    """An empty suite; what its runs keep is dropped."""
    made = Suite(tmp_path, postgres)
    made.settings["tenancy_matrix_examples"] = '"examples:EXAMPLES"'
    yield made
    await made.remove()


async def test_the_walk_is_a_test_that_fails_where_a_route_leaks(suite: Suite) -> None:
    """The report names route, status, what was named and the remedy; the status is 1, in a worker of xdist too."""
    test = """
        async def test_notes(tenant_client):
            assert (await tenant_client.get("/notes")).json() == []
        """
    suite.write(examples=EXAMPLES, test_shop=test)
    safe = await suite.run("--tenancy-matrix")
    assert (safe.status, safe.counts) == (0, {"passed": 2}), safe.text
    assert "3 routes, " in safe.text
    assert "no route leaks" in safe.text

    suite.write(examples=EXAMPLES, shop=LEAKING)
    for more in ([], ["-n", "2"]):
        leaking = await suite.run("--tenancy-matrix", "-k", "tenancy_matrix", *more)
        assert leaking.status == 1, leaking.text
        assert "routes leak: GET /notes, POST /notes" in leaking.text
        assert (
            "GET /notes shows the owner's data: 200\n  called with another tenant's key; named nothing" in leaking.text
        )
        assert "remedy: the answer comes from what all tenants share" in leaking.text

    suite.settings["tenancy_matrix_public"] = '["/notes"]'
    suite.write(examples=EXAMPLES, shop=LEAKING)
    public = await suite.run("--tenancy-matrix", "-k", "tenancy_matrix")
    assert (public.status, public.counts) == (0, {"passed": 1}), public.text
    assert "public, and so not tried: GET /notes, HEAD /notes, POST /notes" in public.text

    del suite.settings["tenancy_app"]
    suite.write()
    unset = await suite.run("--tenancy-matrix")
    assert (unset.status, "--tenancy-matrix needs tenancy_app" in unset.text) == (4, True), unset.text
