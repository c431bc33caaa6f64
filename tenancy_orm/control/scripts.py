"""SQL scripts of several statements in an Alembic migration over asyncpg, and SQL that many of them share.

Revisions of the control database import nothing else of the package: what a released one runs must never change.
"""

from __future__ import annotations

from typing import Any

from alembic import op

from ..postgres.quoting import quote_literal
from ..postgres.sqlalchemy_versions import await_


def run_script(sql: str) -> None:
    """Execute ``sql``, any number of statements, in the migration's transaction.

    SQLAlchemy prepares every statement, and PostgreSQL prepares one statement at a time. asyncpg's own ``execute`` uses
    the simple query protocol, which takes a whole script.
    """
    connection = op.get_bind()
    # SQLAlchemy's adapter sends BEGIN with its first statement
    connection.exec_driver_sql("SELECT 1")
    driver: Any = connection.connection.driver_connection
    await_(driver.execute(sql))


def for_applications(statement: str) -> str:
    """Return the SQL that executes ``statement`` for each role that ``grants.grant_application`` was called for.

    A migration that adds a table grants it so to the roles of existing installations. The text is frozen: where later
    revisions need another one, they get another function.

    Args:
        statement: SQL as for PostgreSQL's ``format``, with ``%1$I`` for the role's name, and ``%2$I`` for that of
            its policy (``grants.application_policy``).
    """
    return f"""
    DO $$
    DECLARE
        v_role name;
    BEGIN
        FOR v_role IN
            SELECT r.rolname FROM pg_class AS c
            CROSS JOIN LATERAL aclexplode(c.relacl) AS a
            JOIN pg_roles AS r ON r.oid = a.grantee
            WHERE c.oid = 'tenancy.tenants'::regclass AND a.privilege_type = 'INSERT' AND a.grantee <> c.relowner
        LOOP
            EXECUTE format({quote_literal(statement)}, v_role,
                'application_' || left(encode(sha256(convert_to(v_role, 'UTF8')), 'hex'), 16));
        END LOOP;
    END $$;
    """  # noqa: S608 - quoted
