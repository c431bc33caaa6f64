"""The PostgreSQL server of a test run, and what tests make on it."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import asyncpg
import psycopg
from sqlalchemy.engine import make_url

if TYPE_CHECKING:
    from tenancy_orm.control.names import Names

# How many templates of past tests a worker keeps; they take memory, 8 MB each.
KEPT_TEMPLATES = 12

ENDED = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)
"""What asyncpg raises for a statement on a connection that the server has ended: the last one where it has read the
server's last message, and not yet the end of the stream."""

_numbers = itertools.count(1)
_DEPENDENT_DATABASES = (
    "SELECT DISTINCT d.datname FROM pg_shdepend s JOIN pg_database d ON d.oid = s.dbid "
    "JOIN pg_roles r ON s.refclassid = 'pg_authid'::regclass AND r.oid = s.refobjid WHERE r.rolname = %s"
)

# One connection to each server for what every test makes and drops: a new one takes 5 ms of the server's processor, as
# long as the work itself. Of psycopg, since it belongs to no event loop.
_administrators: dict[str, psycopg.Connection[tuple[Any, ...]]] = {}


def close_administrators() -> None:
    """Close the kept connections."""
    while _administrators:
        _administrators.popitem()[1].close()


@dataclass(frozen=True)
class Postgres:
    """A server that tests may do anything to, as its superuser.

    Args:
        admin_url: The superuser's URL of the database ``postgres``.
        version: The server's full version.
        run: Four hexadecimal digits of this test run: two runs may share one server.
        worker: The xdist worker, ``gw0`` and so on, or ``main``.
        bin_dir: Where psql and pg_dump of the server's version are; None for a server of somebody else.
        data_dir: The embedded server's directory, or None.
    """

    admin_url: str = field(repr=False)
    version: str
    run: str
    worker: str
    bin_dir: Path | None = None
    data_dir: Path | None = None

    def url(
        self,
        database: str = "postgres",
        *,
        user: str | None = None,
        password: str | None = None,
        driver: str | None = None,
    ) -> str:
        """The URL of ``database``, as the superuser or as ``user``."""
        url = make_url(self.admin_url).set(
            drivername=f"postgresql+{driver}" if driver else "postgresql", database=database
        )
        if user is not None:
            # URL.set cannot take a password away
            url = url._replace(username=user, password=password)
        return url.render_as_string(hide_password=False)

    def new_name(self, kind: str = "test") -> str:
        """A name for a database or role that nothing else has."""
        return f"{kind}_{self.run}_{self.worker}_{next(_numbers)}"

    @asynccontextmanager
    async def connect(self, database: str = "postgres") -> AsyncIterator[asyncpg.Connection]:
        """A superuser's connection."""
        connection = await asyncpg.connect(self.url(database), timeout=30)
        try:
            yield connection
        finally:
            await connection.close()

    async def administer(self, statement: str, parameters: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        """Run one statement in the database ``postgres``, over a connection that is kept, and return its rows."""
        return await asyncio.to_thread(self._administer, statement, parameters)

    def _administer(self, statement: str, parameters: Sequence[object]) -> list[tuple[Any, ...]]:
        connection = _administrators.get(self.admin_url)
        if connection is None or connection.closed:
            connection = _administrators[self.admin_url] = psycopg.connect(self.url(), autocommit=True)
        try:
            cursor = connection.execute(statement.encode(), parameters or None)
        except psycopg.OperationalError:
            if not connection.closed:
                raise
            # a test has restarted the server, or ended all its connections
            connection = _administrators[self.admin_url] = psycopg.connect(self.url(), autocommit=True)
            cursor = connection.execute(statement.encode(), parameters or None)
        return cursor.fetchall() if cursor.description else []

    async def create_database(self, name: str, *, template: str = "template1", owner: str | None = None) -> str:
        """Create a database and return its URL, the superuser's."""
        # Copying the files is cheaper than copying through the write-ahead log, the default since PostgreSQL 15.
        strategy = "STRATEGY file_copy" if int(self.version.split(".")[0]) >= 15 else ""
        owned = f'OWNER "{owner}"' if owner else ""
        await self.administer(f'CREATE DATABASE "{name}" TEMPLATE "{template}" {owned} {strategy}')
        return self.url(name)

    async def drop_database(self, name: str, *, but: str | None = None) -> None:
        """Drop a database, with its connections and a control database's viewer role, whether or not it exists.

        Args:
            name: The database.
            but: What the name of a role that stays begins with.
        """
        viewers = await self.administer(
            "SELECT DISTINCT r.rolname FROM pg_shdepend s JOIN pg_database d ON d.oid = s.dbid "
            "JOIN pg_roles r ON s.refclassid = 'pg_authid'::regclass AND r.oid = s.refobjid "
            "WHERE d.datname = %s AND r.rolname LIKE '%%\\_viewer'",
            (name,),
        )
        await self.administer(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')
        for (viewer,) in viewers:
            if but is None or not viewer.startswith(but):
                await self.administer(f'DROP ROLE IF EXISTS "{viewer}"')

    @staticmethod
    def database_of(url: str) -> str:
        """The name of the database of a URL."""
        return make_url(url).database or "postgres"

    async def drop_all(self, prefix: str, *, but: Names | None = None) -> list[str]:
        """Drop every database and role whose name begins with ``prefix`` and an underscore.

        Args:
            prefix: Of their names.
            but: An installation that the next test goes on with: its owner, its viewer and its complete templates stay.

        Returns:
            The names of the templates that stay.
        """
        kept: list[str] = []
        databases = await self.administer(
            "SELECT datname, datistemplate FROM pg_database WHERE starts_with(datname, %s)", (f"{prefix}_",)
        )
        if but is not None:
            prefix_of_templates = but.template("")
            kept = [name for name, is_template in databases if is_template and name.startswith(prefix_of_templates)]
            if len(kept) > KEPT_TEMPLATES:
                kept = []
        for name, is_template in databases:
            if name in kept:
                continue
            if is_template:
                await self.administer(f'ALTER DATABASE "{name}" IS_TEMPLATE false')
            await self.administer(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')
        for (role,) in await self.administer(
            "SELECT rolname FROM pg_roles WHERE starts_with(rolname, %s)", (f"{prefix}_",)
        ):
            if but is not None and role in (but.owner, but.viewer):
                continue
            # rights on shared objects, such as CONNECT on another database, keep a role from being dropped
            await self.administer(f'DROP OWNED BY "{role}"')
            # and so do the viewer's in a control database that is dropped later
            for (database,) in await self.administer(_DEPENDENT_DATABASES, (role,)):
                async with self.connect(database) as inside:
                    await inside.execute(f'DROP OWNED BY "{role}"')
            await self.administer(f'DROP ROLE "{role}"')
        return kept
