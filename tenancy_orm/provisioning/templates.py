"""Templates: one database per schema and server, built once, that new tenants are cloned from.

A template's name comes from the fingerprint of the schema, of the extensions and of the rights in it. So a new revision
gets a new template, and two releases that run side by side have different ones. The last thing done to a template is to
set PostgreSQL's flag ``datistemplate``. A template without it is incomplete: it is never cloned, and the next builder
drops it.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import asyncpg

from ..cancellation import run_to_completion
from ..config import TenancyConfig
from ..control.names import Names
from ..errors import TemplateError, TenancyError
from ..postgres import connections, locks
from ..postgres.connections import Connection
from ..postgres.errors import INVALID_CATALOG_NAME, OBJECT_IN_USE, sqlstate_of
from ..routing.servers import Server
from . import advisory_locks, databases, event_trigger, extensions, grants, removal
from .blockers import Blockers
from .databases import Strategy
from .grants import Contents

logger = logging.getLogger("tenancy_orm.provisioning")

_COMMENT = "tenancy-template"

# Building a template runs every migration, once per revision: it may take this many times provisioning.timeout.
BUILD_FACTOR = 10

Connect: TypeAlias = Callable[[], Awaitable[Connection]]


class SchemaSource(Protocol):
    """Where the schema of a tenant database comes from: Alembic revisions, or a ``MetaData``."""

    def head(self) -> str | None:
        """Return the revision that ``apply`` migrates to; None if the source has no revisions."""

    def fingerprint(self) -> str:
        """Return a text that changes if ``apply`` would create another schema. Called by every creation: be fast."""

    async def apply(self, connect: Connect) -> str | None:
        """Migrate an empty database to the head, and return its revision.

        Args:
            connect: Opens a connection to the database, as the role that will own the tables.
        """


@dataclass(frozen=True, slots=True)
class TemplateInfo:
    """A complete template: its server, its database's name, and the schema's revision."""

    server: str
    name: str
    revision: str | None


class Templates:
    """Builds templates, and clones them.

    In a process, one task builds a template and the others wait for it. An advisory lock in the server's maintenance
    database does the same between processes.
    """

    def __init__(
        self, *, config: TenancyConfig, names: Names, schema: SchemaSource, blockers: Callable[[Server], Blockers]
    ) -> None:
        self._blockers = blockers
        self._config = config
        self._names = names
        self._schema = schema
        self._ready: dict[tuple[str, str], TemplateInfo] = {}
        # the objects that a GRANT in a clone must name, by template: a complete template does not change
        self._contents: dict[str, Contents] = {}
        # by server: held while a template is searched or built
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    @property
    def build_timeout(self) -> float:
        """How long building a template may take, in seconds."""
        return self._config.provisioning.timeout * BUILD_FACTOR

    def name(self, *, restricted: bool) -> str:
        """Return the name of the template for the current schema.

        Args:
            restricted: Whether a superuser builds it, who revokes advisory locks from PUBLIC and creates the event
                trigger.
        """
        rights = ("advisory locks restricted", "catalogue guarded") if restricted else ()
        inputs = (self._schema.fingerprint(), *sorted(self._config.extensions), *rights)
        return self._names.template(hashlib.sha256("\n".join(inputs).encode()).hexdigest())

    async def ensure(self, server: Server) -> TemplateInfo:
        """Return the template of the current schema on ``server``; it is built if it is missing.

        Raises:
            TemplateError: building failed, or another process did not finish building in time.
            ServerUnavailableError: the server does not answer.
        """
        wanted = (server.name, self._schema.fingerprint())
        if found := self._ready.get(wanted):
            return found
        async with self._locks[server.name]:
            if wanted not in self._ready:
                self._ready[wanted] = await self._find_or_build(server)
            return self._ready[wanted]

    def invalidate(self, template: TemplateInfo) -> None:
        """Look this template up again the next time: it may have been dropped."""
        self._ready = {wanted: found for wanted, found in self._ready.items() if found != template}

    async def clone(
        self,
        connection: Connection,
        template: TemplateInfo,
        name: str,
        *,
        strategy: Strategy = "wal_log",
    ) -> None:
        """Clone a template to a database that nobody can connect to yet.

        Raises:
            DatabaseExistsError: a database of that name exists.
            TemplateError: the template was dropped, or somebody is connected to it; the next creation builds it again.
        """
        try:
            await databases.create(
                connection,
                name,
                template=template.name,
                owner=self._names.owner,
                strategy=strategy,
                open_to_connections=False,
            )
        except asyncpg.PostgresError as exc:
            if sqlstate_of(exc) not in (INVALID_CATALOG_NAME, OBJECT_IN_USE):
                raise
            self.invalidate(template)
            raise TemplateError(
                f"template {template.name!r} on server {template.server!r} cannot be cloned: it was dropped, or "
                "somebody is connected to it; try again"
            ) from exc

    async def contents(self, connection: Connection, template: TemplateInfo) -> Contents:
        """Return the objects that a GRANT in a clone of ``template`` must name; ``connection`` is to such a clone."""
        found = self._contents.get(template.name)
        if found is None:
            found = self._contents[template.name] = await grants.contents(connection, self._names.owner)
        return found

    @asynccontextmanager
    async def scratch(self, ready: Callable[[], Awaitable[Server]]) -> AsyncIterator[str]:
        """Yield the name of a clone of the template, which is dropped afterwards, also after a cancellation.

        Connect to it by ``server.connect_admin(name, role=<owner>)``. If the process dies, the advisory lock of the
        connection opened here is released, and ``reconcile`` drops the clone.

        Raises:
            TemplateError: see ``ensure`` and ``clone``.
            ServerUnavailableError: the server does not answer.
        """
        server = await ready()
        template = await self.ensure(server)
        name = self._names.scratch(secrets.token_hex(8))
        connection = await self._blockers(server).connect()
        try:
            await locks.lock(connection, locks.lock_key(name), timeout=self._config.provisioning.timeout)
            async with asyncio.timeout(self._config.provisioning.timeout):
                await self.clone(connection, template, name)
                await databases.open_to_owner(connection, name)
            yield name
        finally:
            await run_to_completion(self._drop(server, connection, name))

    # --- building ---------------------------------------------------------------------------------------------------

    async def _find_or_build(self, server: Server) -> TemplateInfo:
        connection = await self._blockers(server).connect()
        name = "for the current schema"
        try:
            name = self.name(restricted=await advisory_locks.may_restrict(connection))
            await locks.lock(connection, locks.lock_key(name), timeout=self.build_timeout)
            async with asyncio.timeout(self.build_timeout):
                state = await databases.state(connection, name)
                if state is not None and state.is_template:
                    return TemplateInfo(server.name, name, _revision(state.comment))
                return TemplateInfo(server.name, name, await self._build(server, connection, name))
        except TenancyError:
            raise
        except TimeoutError as exc:
            raise TemplateError(
                f"template {name!r} on server {server.name!r} was not built within {self.build_timeout:g} s, by this "
                "process or by the one that builds it; raise provisioning.timeout"
            ) from exc
        except Exception as exc:
            raise TemplateError(f"template {name!r} on server {server.name!r} could not be built: {exc}") from exc
        finally:
            await run_to_completion(connections.close(connection))

    async def _build(self, server: Server, connection: Connection, name: str) -> str | None:
        """Build a template under its lock, and return its revision. An existing, incomplete one is dropped first."""
        await extensions.check_available(connection, self._config.extensions, server=server.name)
        logger.info("building template %s on server %s", name, server.name)
        await removal.drop_database(connection, self._blockers(server), name)
        try:
            await databases.create(
                connection, name, template="template0", owner=self._names.owner, open_to_connections=False
            )
            await databases.open_to_owner(connection, name)
            await self._prepare(server, name)
            revision = await self._apply(server, name)
            await databases.complete_template(connection, name, comment=_comment(revision))
        except BaseException:
            await run_to_completion(self._drop_partial(server, connection, name))
            raise
        return revision

    async def _prepare(self, server: Server, name: str) -> None:
        connection = await self._blockers(server).connect(name)
        try:
            await grants.prepare_schema(connection, self._names.owner)
            await advisory_locks.restrict(connection, self._names.owner, server=server.name)
            await event_trigger.install(connection, self._names.owner)
            await extensions.install(connection, self._config.extensions)
        finally:
            await run_to_completion(connections.close(connection))

    async def _apply(self, server: Server, name: str) -> str | None:
        opened: list[Connection] = []

        async def connect() -> Connection:
            connection = await self._blockers(server).connect(name, role=self._names.owner)
            opened.append(connection)
            return connection

        try:
            return await self._schema.apply(connect)
        finally:
            # an open connection makes every clone fail
            for connection in opened:
                await run_to_completion(connections.close(connection))

    async def _drop_partial(self, server: Server, connection: Connection, name: str) -> None:
        try:
            async with asyncio.timeout(self._config.provisioning.timeout):
                await removal.drop_database(connection, self._blockers(server), name)
        except Exception as exc:  # noqa: BLE001 - the builder's error is the one to raise
            # without the flag, the next builder or reconcile drops it
            logger.warning("the incomplete template %s stays until reconcile: %s", name, exc)

    async def _drop(self, server: Server, connection: Connection, name: str) -> None:
        """Drop a scratch database; if that fails, it is left to ``reconcile``."""
        try:
            async with asyncio.timeout(self._config.provisioning.timeout):
                if connection.is_closed():
                    connection = await self._blockers(server).connect()
                await removal.drop_database(connection, self._blockers(server), name)
        except Exception as exc:  # noqa: BLE001 - as above
            logger.warning("scratch database %s stays until reconcile: %s", name, exc)
        finally:
            await connections.close(connection)


def _comment(revision: str | None) -> str:
    return f"{_COMMENT}:{revision or ''}"


def _revision(comment: str | None) -> str | None:
    """The revision in a template's comment: another process may have built the template."""
    kind, _, revision = (comment or "").partition(":")
    return revision or None if kind == _COMMENT else None
