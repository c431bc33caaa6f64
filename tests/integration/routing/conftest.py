"""Tenants without a control database: their databases are made by plain SQL."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tenancy_orm.config import TenancyConfig
from tenancy_orm.routing import Router
from tests.support import databases as support
from tests.support.postgres import Postgres


@pytest.fixture
def config(postgres: Postgres, name_prefix: str) -> TenancyConfig:
    """A small budget."""
    return support.configuration(postgres, name_prefix)


@pytest.fixture
async def made(postgres: Postgres, config: TenancyConfig) -> AsyncIterator[support.Databases]:
    """A maker of tenants."""
    async with support.databases(postgres, config) as made:
        yield made


@pytest.fixture
async def router(made: support.Databases, config: TenancyConfig) -> AsyncIterator[Router]:
    """A router to them."""
    async with support.router(made, config) as router:
        yield router
