"""A fleet whose schema is an Alembic project of the test's own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tenancy_orm.config import TenancyConfig
from tests.support.alembic_program import Alembic
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
    async with open_fleet(config) as opened:
        await opened.create("acme", "globex", "initech")
        yield opened


@pytest.fixture
def variables(config: TenancyConfig) -> dict[str, str]:
    """The ``TENANCY_*`` variables of the fleet."""
    assert config.servers is not None
    assert config.encryption_keys is not None
    return {
        "TENANCY_CONTROL_URL": config.control_url,
        "TENANCY_SERVERS": " ".join(f"{name}={url}" for name, url in config.servers.items()),
        "TENANCY_ENCRYPTION_KEYS": ",".join(f"{key}:{value!s}" for key, value in config.encryption_keys.items()),
        "TENANCY_NAME_PREFIX": config.name_prefix,
    }


@pytest.fixture
def alembic(project: Project, fleet: Fleet, variables: dict[str, str]) -> Alembic:
    return Alembic(project, variables)
