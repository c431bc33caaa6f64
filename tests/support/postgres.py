"""The PostgreSQL server of a test run, and what tests make on it."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import asyncpg
from sqlalchemy.engine import make_url

if TYPE_CHECKING:
    from tenancy_orm.control.names import Names

# How many templates of past tests a worker keeps; they take memory, 8 MB each.
KEPT_TEMPLATES = 12

_numbers = itertools.count(1)
_DEPENDENT_DATABASES = (
    "SELECT DISTINCT d.datname FROM pg_shdepend s JOIN pg_database d ON d.oid = s.dbid "
    "JOIN pg_roles r ON s.refclassid = 'pg_authid'::regclass AND r.oid = s.refobjid WHERE r.rolname = $1"
)


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

    async def create_database(self, name: str, *, template: str = "template1", owner: str | None = None) -> str:
        """Create a database and return its URL, the superuser's."""
        async with self.connect() as connection:
            # Copying the files is cheaper than copying through the write-ahead log, the default since PostgreSQL 15.
            strategy = "STRATEGY file_copy" if connection.get_server_version() >= (15,) else ""
            owned = f'OWNER "{owner}"' if owner else ""
            await connection.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}" {owned} {strategy}')
        return self.url(name)

    async def drop_database(self, name: str, *, but: str | None = None) -> None:
        """Drop a database, with its connections and a control database's viewer role, whether or not it exists.

        Args:
            name: The database.
            but: What the name of a role that stays begins with.
        """
        async with self.connect() as connection:
            viewers = await connection.fetch(
                "SELECT DISTINCT r.rolname FROM pg_shdepend s JOIN pg_database d ON d.oid = s.dbid "
                "JOIN pg_roles r ON s.refclassid = 'pg_authid'::regclass AND r.oid = s.refobjid "
                "WHERE d.datname = $1 AND r.rolname LIKE '%\\_viewer'",
                name,
            )
            await connection.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')
            for (viewer,) in viewers:
                if but is None or not viewer.startswith(but):
                    await connection.execute(f'DROP ROLE IF EXISTS "{viewer}"')

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
        async with self.connect() as connection:
            databases = await connection.fetch(
                "SELECT datname, datistemplate FROM pg_database WHERE starts_with(datname, $1)", f"{prefix}_"
            )
            if but is not None:
                prefix_of_templates = but.template("")
                kept = [name for name, is_template in databases if is_template and name.startswith(prefix_of_templates)]
                if len(kept) > KEPT_TEMPLATES:
                    kept = []
                databases = [database for database in databases if database["datname"] not in kept]
            for database in databases:
                if database["datistemplate"]:
                    await connection.execute(f'ALTER DATABASE "{database["datname"]}" IS_TEMPLATE false')
                await connection.execute(f'DROP DATABASE IF EXISTS "{database["datname"]}" WITH (FORCE)')
            roles = await connection.fetch("SELECT rolname FROM pg_roles WHERE starts_with(rolname, $1)", f"{prefix}_")
            for role in roles:
                if but is not None and role["rolname"] in (but.owner, but.viewer):
                    continue
                # rights on shared objects, such as CONNECT on another database, keep a role from being dropped
                await connection.execute(f'DROP OWNED BY "{role["rolname"]}"')
                # and so do the viewer's in a control database that is dropped later
                for database in await connection.fetch(_DEPENDENT_DATABASES, role["rolname"]):
                    async with self.connect(database["datname"]) as inside:
                        await inside.execute(f'DROP OWNED BY "{role["rolname"]}"')
                await connection.execute(f'DROP ROLE "{role["rolname"]}"')
        return kept
