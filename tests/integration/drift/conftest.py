"""The fleet of the tests of migrations."""

from __future__ import annotations

from tests.integration.migrations.conftest import alembic, config, fleet, project, variables

__all__ = ["alembic", "config", "fleet", "project", "variables"]
