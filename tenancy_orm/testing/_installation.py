"""The installation that a process of a test run has for itself: a control database, and tenants of its own.

Each process takes the first place, 0, 1, 2 and so on, that no other process has. An advisory lock says which are taken,
and PostgreSQL releases it with the connection: so the place of a process that was killed is free for the next one,
which removes what was left there. All names of a place begin with the same prefix, in which the checkout is named. What
makes a run start fast, the control database's tables and the templates, stays for the next run.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass, field
from importlib.metadata import version

import asyncpg
from sqlalchemy.engine import make_url

from ..config import TenancyConfig
from ..errors import ConfigurationError
from ..postgres import connections, locks, login
from ..postgres.connections import Connection
from ..postgres.dsn import Dsn
from ..postgres.poolers import connect_directly
from ..postgres.quoting import quote_identifier, quote_literal
from ..provisioning.server_objects import databases
from ._cloning import SNAPSHOTS
from ._server import DSN_SETTINGS

_POOLER = (
    "the server of the tests must be PostgreSQL itself, and a connection pooler answers at {address}: {reason}; "
    "name the server's own address in tenancy_test_dsn"
)
_PLACES = 100
_SECONDS = 30.0


@dataclass(slots=True)
class Installation:
    """A place on the server: its URLs and its key.

    Args:
        server_url: The administrator's URL of the server.
        prefix: What all names of the place begin with; ``TenancyConfig.name_prefix``.
        is_new: Whether its control database was created just now.
        connection: Holds the lock; it belongs to the background loop.
        is_initialised: Whether this version of the package has initialised it.
    """

    server_url: str = field(repr=False)
    prefix: str
    is_new: bool
    connection: Connection = field(repr=False)
    is_initialised: bool = False

    @classmethod
    async def claim(cls, server_url: str, project: str) -> Installation:
        """Take the first free place, and create its control database where there is none.

        Args:
            server_url: The administrator's URL of the server.
            project: What the run tests, the directory of the checkout.

        Raises:
            PoolerError: the URL leads to a connection pooler.
            ConfigurationError: the server does not answer, or every place is taken.
        """
        try:
            connection = await connect_directly(
                Dsn.parse(server_url), refusal=_POOLER, purpose="tenancy-tests", timeout=_SECONDS
            )
        except (OSError, asyncpg.PostgresError) as exc:
            raise ConfigurationError(
                f"the server of the tests at {Dsn.parse(server_url)} does not answer: {login.reason_of(exc)}; "
                f"{DSN_SETTINGS} names the server: without either, the tests start one"
            ) from exc
        try:
            # locks of different databases do not meet, so the names must not either
            database = await connection.fetchval("SELECT current_database()")
            digits = hashlib.sha256(f"{project}/{database}".encode()).hexdigest()[:8]
            for place in range(_PLACES):
                prefix = f"t{digits}x{place}"
                if await connection.fetchval("SELECT pg_try_advisory_lock($1)", locks.lock_key(prefix)):
                    made = cls(server_url, prefix, False, connection)
                    await made._drop_snapshots()
                    made.is_new = await made._create_control()
                    return made
        except BaseException:
            await connections.close(connection)
            raise
        raise ConfigurationError(f"{_PLACES} processes test this project on one server already")

    @property
    def database(self) -> str:
        """The name of the control database."""
        return f"{self.prefix}_control"

    @property
    def control_url(self) -> str:
        """Its URL."""
        return make_url(self.server_url).set(database=self.database).render_as_string(hide_password=False)

    @property
    def encryption_key(self) -> str:
        """A key for tenants' passwords, the same in every run; it protects nothing but tests."""
        return base64.b64encode(hashlib.sha256(f"tenancy-tests:{self.prefix}".encode()).digest()).decode()

    def redirect(self, config: TenancyConfig) -> TenancyConfig:
        """The same configuration with the addresses, the secrets and the names of this installation."""
        return config.replace(
            control_url=self.control_url,
            servers=dict.fromkeys(config.server_names, self.server_url),
            name_prefix=self.prefix,
            encryption_keys={"1": self.encryption_key},
            control={"listen_url": None},
            pool={"warm_tenants": 0},
            secrets={"provider": None, "options": None, "key_wrapper": None},
            keys={"peppers": None, "pepper_current": None},
        )

    async def recreate(self) -> None:
        """Drop everything of this place, and create an empty control database."""
        await self.drop()
        await self._create_control()
        self.is_new = True

    async def drop(self) -> None:
        """Drop every database and role of this place."""
        connection = self.connection
        for name in await self._databases("_"):
            await databases.drop(connection, name)
        for (name,) in await connection.fetch(
            "SELECT rolname FROM pg_roles WHERE starts_with(rolname::text, $1)", f"{self.prefix}_"
        ):
            quoted = quote_identifier(name)
            try:
                await connection.execute(f"DROP ROLE IF EXISTS {quoted}")
            except asyncpg.DependentObjectsStillExistError:  # it has rights on a database that stays
                await connection.execute(f"DROP OWNED BY {quoted}; DROP ROLE {quoted}")

    async def note_initialised(self) -> None:
        """Remember for the next run that the control database is initialised: that takes a hundred statements."""
        comment = quote_literal(_initialised_by())
        await self.connection.execute(f"COMMENT ON DATABASE {quote_identifier(self.database)} IS {comment}")
        self.is_initialised = True

    async def release(self) -> None:
        """Give the place up."""
        await connections.close(self.connection)

    async def _drop_snapshots(self) -> None:
        """Drop what a run that was killed has kept of its tenants' databases."""
        for name in await self._databases(SNAPSHOTS):
            await databases.drop(self.connection, name)

    async def _databases(self, beginning: str) -> list[str]:
        rows = await self.connection.fetch(
            "SELECT datname FROM pg_database WHERE starts_with(datname::text, $1)", f"{self.prefix}{beginning}"
        )
        return [name for (name,) in rows]

    async def _create_control(self) -> bool:
        found = await self.connection.fetchrow(
            "SELECT shobj_description(oid, 'pg_database') AS comment FROM pg_database WHERE datname = $1", self.database
        )
        if found is None:
            await self.connection.execute(f"CREATE DATABASE {quote_identifier(self.database)}")
        self.is_initialised = found is not None and found["comment"] == _initialised_by()
        return found is None


def _initialised_by() -> str:
    return f"tenancy-orm {version('tenancy-orm')}"


__all__ = ["Installation"]
