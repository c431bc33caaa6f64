"""An application with seeds and reference data, on files of the test's own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Column, ForeignKey, Integer, MetaData, String, Table

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.config import ProvisioningConfig
from tests.support.fleet import Fleet
from tests.support.postgres import Postgres

METADATA = MetaData()
ROLES = Table("roles", METADATA, Column("name", String, primary_key=True), Column("note", String))
COUNTRIES = Table(
    "countries",
    METADATA,
    Column("code", String(2), primary_key=True),
    Column("name", String, nullable=False),
    Column("part_of", String(2), ForeignKey("countries.code")),
    Column("seen", Integer, server_default="0", nullable=False),
)
CUSTOMERS = Table(
    "customers",
    METADATA,
    Column("id", Integer, primary_key=True),
    Column("country", String(2), ForeignKey("countries.code", ondelete="CASCADE")),
)

Configure = Callable[..., TenancyConfig]
Opened = Callable[..., Any]


@pytest.fixture
def configure(postgres: Postgres, name_prefix: str, control_url: str) -> Configure:
    """Make a configuration with seeds and reference tables."""

    def make(seeds: Any = (), reference: Any = None, **provisioning: Any) -> TenancyConfig:
        return TenancyConfig(
            control_url=control_url,
            servers={"default": postgres.admin_url},
            metadata=METADATA,
            encryption_keys={"1": "a2V5" * 10 + "a2U="},
            name_prefix=name_prefix,
            provisioning=ProvisioningConfig(seeds=seeds, **provisioning),
            reference=reference or {},
        )

    return make


@pytest.fixture
def opened(configure: Configure) -> Opened:
    """Open a fleet, with the arguments of ``configure``."""

    @asynccontextmanager
    async def open_one(*args: Any, **kwargs: Any) -> AsyncIterator[Fleet]:
        tenancy = Tenancy(configure(*args, **kwargs))
        await tenancy.open()
        try:
            yield Fleet(tenancy)
        finally:
            await tenancy.close()

    return open_one


@pytest.fixture
def countries(tmp_path: Path) -> Path:
    """A CSV of countries."""
    path = tmp_path / "countries.csv"
    path.write_text("code,name\nAT,Austria\nBE,Belgium\nCH,Switzerland\n", "utf-8")
    return path
