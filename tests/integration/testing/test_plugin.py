"""The pytest plugin, as suites of applications use it: in a pytest of their own, on this run's server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.postgres import Postgres
from tests.support.suites import Suite


@pytest.fixture
async def suite(tmp_path: Path, postgres: Postgres) -> AsyncIterator[Suite]:
    """An empty suite; what its runs keep is dropped."""
    made = Suite(tmp_path, postgres)
    yield made
    await made.remove()


async def test_fixtures_work_in_every_event_loop_and_without_one(suite: Suite) -> None:
    """Loops of a test, of a module and of the run take turns, with anyio's and plain functions in between."""
    suite.settings["asyncio_mode"] = '"strict"'
    suite.write(
        test_shop="""
        import pytest
        from sqlalchemy import select
        from shop import Note

        @pytest.mark.asyncio
        async def test_in_a_loop_of_its_own(tenant_client, tenancy, tenant):
            assert (await tenant_client.post("/notes", json={"text": "a"})).json() == ["a"]
            async with tenancy.session(tenant.slug) as session:
                assert (await session.scalars(select(Note))).one().text == "a"

        @pytest.mark.asyncio(loop_scope="session")
        async def test_in_the_loop_of_the_run(tenant_session, tenant_client):
            tenant_session.add(Note(text="b"))
            await tenant_session.commit()
            assert (await tenant_client.get("/notes")).json() == ["b"]

        def test_without_a_loop(tenant_client, tenant_factory):
            assert tenant_client.post("/notes", json={"text": "c"}).json() == ["c"]
            assert tenant_factory().slug != tenant_factory().slug

        @pytest.mark.asyncio(loop_scope="module")
        async def test_in_the_loop_of_the_module(tenant_client, tenant, tenant_factory):
            assert (await tenant_client.get("/notes")).json() == []
            other = await tenant_factory("other", tier="pro")
            assert (other.slug, other.tenant.tier) == ("other", "pro")

        @pytest.mark.asyncio(loop_scope="session")
        async def test_in_the_loop_of_the_run_again(tenant_client):
            assert (await tenant_client.get("/notes")).json() == []

        @pytest.mark.anyio
        @pytest.mark.parametrize("anyio_backend", ["asyncio"])
        async def test_with_anyio(tenant_session, tenant_client):
            assert (await tenant_client.post("/notes", json={"text": "d"})).json() == ["d"]
            assert (await tenant_session.scalars(select(Note))).one().text == "d"

        def test_without_tenants():
            pass
        """
    )
    first = await suite.run()
    assert first.counts == {"passed": 7}, first.text
