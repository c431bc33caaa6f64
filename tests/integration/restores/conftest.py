"""A fleet with a tenant acme, which has 100 notes and a large object, and its neighbour globex."""

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
    made = Project.create(tmp_path / "app")
    made.add("0001", NOTES, 'op.drop_table("notes")')
    return made


@pytest.fixture
def config(postgres: Postgres, name_prefix: str, control_url: str, project: Project) -> TenancyConfig:
    return fleet_config(postgres, control_url, name_prefix, project)


@pytest.fixture
async def fleet(config: TenancyConfig) -> AsyncIterator[Fleet]:
    async with open_fleet(config) as opened:
        await opened.create("acme", "globex")
        await opened.execute("acme", "INSERT INTO notes (body) SELECT 'note ' || n FROM generate_series(1, 100) n")
        yield opened
