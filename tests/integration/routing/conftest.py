"""Tenants without a control database: plain SQL creates their databases."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tenancy_orm.config import TenancyConfig
from tenancy_orm.routing import Router
from tests.support import databases as support
from tests.support.postgres import Postgres


@pytest.fixture
def config(postgres: Postgres, name_prefix: str) -> TenancyConfig:
    """A configuration with a small budget."""
    return support.configuration(postgres, name_prefix)


@pytest.fixture
async def made(postgres: Postgres, config: TenancyConfig) -> AsyncIterator[support.Databases]:
    """Creates tenants' databases."""
    async with support.databases(postgres, config) as made:
        yield made


@pytest.fixture
async def router(made: support.Databases, config: TenancyConfig) -> AsyncIterator[Router]:
    """A router to these databases."""
    async with support.router(made, config) as router:
        yield router
