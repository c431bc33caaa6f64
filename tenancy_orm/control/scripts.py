"""SQL scripts of several statements in an Alembic migration over asyncpg."""

from __future__ import annotations

from typing import Any

from alembic import op
from sqlalchemy.util import await_only


def run_script(sql: str) -> None:
    """Execute ``sql``, any number of statements, in the migration's transaction.

    SQLAlchemy prepares every statement, and PostgreSQL prepares one statement at a time. asyncpg's own ``execute`` uses
    the simple query protocol, which takes a whole script.
    """
    connection = op.get_bind()
    # SQLAlchemy's adapter sends BEGIN with its first statement
    connection.exec_driver_sql("SELECT 1")
    driver: Any = connection.connection.driver_connection
    await_only(driver.execute(sql))
