"""A fleet whose schema is an Alembic project of the test's own, as for the tests of migrations."""

from tests.integration.migrations.conftest import config, fleet, project

__all__ = ["config", "fleet", "project"]
