"""Run SQL scripts of several statements inside an Alembic migration over asyncpg."""

from __future__ import annotations

from typing import Any

from alembic import op
from sqlalchemy.util import await_only


def run_script(sql: str) -> None:
    """Execute ``sql``, any number of statements, in the migration's transaction.

    SQLAlchemy prepares what it executes, and PostgreSQL prepares one statement at a time; the simple query protocol,
    which asyncpg's own ``execute`` speaks, takes a whole script.
    """
    connection = op.get_bind()
    # asyncpg's adapter sends BEGIN with the first statement it executes itself
    connection.exec_driver_sql("SELECT 1")
    driver: Any = connection.connection.driver_connection
    await_only(driver.execute(sql))
