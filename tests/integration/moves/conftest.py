"""Two servers for each module, and a ``Tenancy`` on them for each test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from tenancy_orm import Tenancy, TenancyConfig
from tests.support.moving import Pair, moving_config, pair_of_servers


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    """Two servers with wal_level = logical."""
    with pair_of_servers() as running:
        yield running


@pytest.fixture
def moving(pair: Pair, control_url: str, name_prefix: str) -> TenancyConfig:
    """A configuration with both servers."""
    return moving_config(pair, control_url, name_prefix)


@pytest.fixture
async def plane(moving: TenancyConfig) -> AsyncIterator[Tenancy]:
    """An open ``Tenancy``; tenants are made on server ``one``."""
    opened = Tenancy(moving)
    await opened.open()
    try:
        yield opened
    finally:
        await opened.close()
