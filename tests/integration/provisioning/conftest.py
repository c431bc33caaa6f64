"""A provisioner of its own for each test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from tests.support.postgres import Postgres
from tests.support.provisioning import VERSIONS, Workshop, open_workshop, running_server


@pytest.fixture
async def workshop(postgres: Postgres, control_url: str, name_prefix: str) -> AsyncIterator[Workshop]:
    """A provisioner without tenants, on the server of the run."""
    opened = await open_workshop(control_url=control_url, admin_url=postgres.admin_url, name_prefix=name_prefix)
    try:
        yield opened
    finally:
        await opened.close()


@pytest.fixture(scope="module")
def own_server(postgres: Postgres) -> Iterator[Postgres]:
    """A server of this module's own, for what other tests on the run's server would notice."""
    with running_server(max(VERSIONS), f"{postgres.worker}-own") as server:
        yield server


@pytest.fixture(scope="module", params=VERSIONS, ids=lambda version: f"pg{version}")
def versioned(request: pytest.FixtureRequest, postgres: Postgres) -> Iterator[Postgres]:
    """A server of each PostgreSQL version that can be run here, of this module's own."""
    with running_server(request.param, postgres.worker) as server:
        yield server
