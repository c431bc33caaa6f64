"""The fleet of the tests of migrations."""

from __future__ import annotations

from tests.integration.migrations.conftest import config, fleet, project, variables

__all__ = ["config", "fleet", "project", "variables"]
