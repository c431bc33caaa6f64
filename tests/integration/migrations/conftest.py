"""A fleet whose schema is an Alembic project of the test's own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tenancy_orm.config import TenancyConfig
from tests.support.fleet import Fleet, fleet_config, open_fleet
from tests.support.postgres import Postgres
from tests.support.projects import NOTES, Project


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """An Alembic project with one revision, 0001, that makes the table ``notes``."""
    project = Project.create(tmp_path / "app")
    project.add("0001", NOTES, 'op.drop_table("notes")')
    return project


@pytest.fixture
def config(postgres: Postgres, name_prefix: str, control_url: str, project: Project) -> TenancyConfig:
    return fleet_config(postgres, control_url, name_prefix, project)


@pytest.fixture
async def fleet(config: TenancyConfig) -> AsyncIterator[Fleet]:
    """Three tenants at 0001: acme, globex and initech."""
    async with open_fleet(config, initialise=True) as opened:
        await opened.create("acme", "globex", "initech")
        yield opened
