"""PgBouncer's console, which speaks the simple query protocol alone: psycopg does, and asyncpg does not."""

from __future__ import annotations

import psycopg

from ..errors import ConfigurationError, ServerUnavailableError
from ..postgres.dsn import Dsn
from ..postgres.login import check


def read_console(url: str, *, timeout: float = 10.0) -> tuple[str, dict[str, str]]:
    """Return the version and the configuration that a running PgBouncer shows.

    Args:
        url: Of its console: ``postgresql://user:password@host:6432/pgbouncer``, as a user of ``stats_users``.
        timeout: Seconds that this may take.

    Raises:
        ConfigurationError: the URL is malformed.
        ServerUnavailableError: it does not answer, or refuses.
    """
    dsn = Dsn.parse(url)
    if not dsn.hosts:
        raise ConfigurationError("the console's URL names no host")
    check(dsn, user=dsn.user, database=dsn.database)
    try:
        with psycopg.connect(
            url, dbname=dsn.database or "pgbouncer", autocommit=True, connect_timeout=max(2, round(timeout))
        ) as connection:
            version = connection.execute("SHOW VERSION").fetchone()
            shown = connection.execute("SHOW CONFIG").fetchall()
    except psycopg.Error as exc:
        reason = str(exc).strip().splitlines()[-1]
        raise ServerUnavailableError(
            server="pgbouncer", address=dsn.address(), reason=reason, tenant=None, sqlstate=exc.sqlstate
        ) from None
    return str(version[0] if version else ""), {str(row[0]): str(row[1] or "") for row in shown}


__all__ = ["read_console"]
