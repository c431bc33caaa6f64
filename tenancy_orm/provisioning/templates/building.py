"""Templates: one database per schema and server, built once, that new tenants are cloned from.

What a template was built from is in the control database: the digest of what is known before the build (the revisions,
the extensions, the rights), and the files that the build used besides. A process uses a template only while all of
these are as they were; otherwise it builds another one. So two releases that run side by side have different templates.

The last thing done to a template is to set PostgreSQL's flag ``datistemplate``. A template without it is incomplete: it
is never cloned, and the next builder, or ``reconcile``, drops it. Each process records from time to time which template
it uses; the others are superseded, and housekeeping drops them.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from contextvars import Context
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import asyncpg
from sqlalchemy.exc import SQLAlchemyError

from ...audit.actor import SYSTEM, Actor
from ...cancellation import run_to_completion
from ...config import TenancyConfig
from ...control.names import Names
from ...errors import TemplateError, TenancyError
from ...postgres import connections, locks
from ...postgres.connections import Connection
from ...postgres.errors import INVALID_CATALOG_NAME, OBJECT_IN_USE, describe, sqlstate_of
from ...servers.server import Server
from ..copies import extensions
from ..rights import event_trigger, grants
from ..rights.tenant_rights import Contents
from ..server_objects import advisory_locks, databases, removal
from ..server_objects.blockers import Blockers
from ..server_objects.databases import DatabaseState, Strategy
from .records import TemplateRecord, TemplateRecords

logger = logging.getLogger("tenancy_orm.provisioning")

_COMMENT = "tenancy-template"

# Building a template runs every migration, once per revision: it may take this many times provisioning.timeout.
BUILD_FACTOR = 10

# How often a process records which templates it uses, in seconds.
USE_SECONDS = 300.0

# Changes when this package builds templates in another way.
_LAYOUT = "2"

Connect: TypeAlias = Callable[[], Awaitable[Connection]]


class SchemaSource(Protocol):
    """Where the schema of a tenant database comes from: Alembic revisions, or a ``MetaData``."""

    def head(self) -> str | None:
        """Return the revision that ``apply`` migrates to; None if the source has no revisions."""

    def fingerprint(self) -> str:
        """Return a text that changes if ``apply`` would create another schema. Called by every creation: be fast."""

    def inputs(self) -> Mapping[str, str]:
        """Return the files that the last ``apply`` used, with their digests, as far as the fingerprint lacks them."""

    def changed_input(self, inputs: Mapping[str, str]) -> str | None:
        """Return the name of one of ``inputs`` that has changed since, or None. Called by every creation: be fast."""

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


@dataclass(frozen=True, slots=True)
class _Ready:
    """The template that this process uses on a server, and what it was built from."""

    info: TemplateInfo
    fingerprint: str
    inputs: Mapping[str, str]


class Templates:
    """Builds templates, and clones them.

    In a process, one task builds a template and the others wait for it. An advisory lock in the server's maintenance
    database does the same between processes.
    """

    def __init__(
        self,
        *,
        config: TenancyConfig,
        names: Names,
        schema: SchemaSource,
        blockers: Callable[[Server], Blockers],
        records: TemplateRecords,
    ) -> None:
        self._records = records
        self._blockers = blockers
        self._config = config
        self._names = names
        self._schema = schema
        # by server
        self._ready: dict[str, _Ready] = {}
        # when its use was recorded last, by server
        self._recorded: dict[str, float] = {}
        # the objects that a GRANT in a clone must name, by template: a complete template does not change
        self._contents: dict[str, Contents] = {}
        # by server: held while a template is searched or built
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._using: asyncio.Task[None] | None = None

    @property
    def build_timeout(self) -> float:
        """How long building a template may take, in seconds."""
        return self._config.provisioning.timeout * BUILD_FACTOR

    def base(self, *, restricted: bool) -> str:
        """Return the digest of what is known of a template before it is built.

        Args:
            restricted: Whether a superuser builds it, who revokes advisory locks from PUBLIC and creates the event
                trigger.
        """
        rights = ("advisory locks restricted", "catalogue guarded") if restricted else ()
        inputs = (_LAYOUT, self._schema.fingerprint(), *sorted(self._config.extensions), *rights)
        return hashlib.sha256("\n".join(inputs).encode()).hexdigest()

    async def ensure(self, server: Server) -> TemplateInfo:
        """Return the template of the current schema on ``server``; it is built if there is none.

        Raises:
            TemplateError: building failed, or another process did not finish building in time.
            ServerUnavailableError: the server does not answer.
            ControlUnavailableError: the control database does not answer.
        """
        if found := self._current(server):
            return found
        async with self._locks[server.name]:
            return self._current(server) or await self._use(server, await self._find_or_build(server))

    async def rebuild(self, server: Server, *, actor: Actor) -> TemplateInfo:
        """Build the template of the current schema again. Other processes use the new one within a few minutes.

        Raises:
            TenancyError: as ``ensure``.
        """
        async with self._locks[server.name]:
            return await self._use(server, await self._find_or_build(server, rebuild=True, actor=actor))

    def invalidate(self, template: TemplateInfo) -> None:
        """Look this template up again the next time: it may have been dropped."""
        self._ready = {name: found for name, found in self._ready.items() if found.info != template}

    def forget(self, server: str) -> None:
        """Look the template on this server up again the next time: its address may have changed."""
        self._ready.pop(server, None)

    def is_current(self, record: TemplateRecord, base: str) -> bool:
        """Whether this process would use a recorded template now, if it is complete."""
        return record.base == base and not record.retired and self._schema.changed_input(record.inputs) is None

    async def close(self) -> None:
        """Stop recording which templates this process uses."""
        if self._using is not None:
            self._using.cancel()
            await asyncio.gather(self._using, return_exceptions=True)
            self._using = None

    def _current(self, server: Server) -> TemplateInfo | None:
        found = self._ready.get(server.name)
        if found is None or found.fingerprint != self._schema.fingerprint():
            return None
        # of a process that slept, as between requests on some platforms, the others think that it has ended
        if time.time() - self._recorded[server.name] > 2 * USE_SECONDS:
            return None
        return None if self._schema.changed_input(found.inputs) is not None else found.info

    async def _use(self, server: Server, found: _Ready) -> TemplateInfo:
        self._ready[server.name] = found
        self._recorded[server.name] = time.time()
        if self._using is None:
            # unbound: whichever tenant's creation runs now
            self._using = asyncio.get_running_loop().create_task(self._record_use(), context=Context())
        return found.info

    async def _record_use(self) -> None:
        """Record the templates of this process as used, so that none is dropped while the process runs."""
        while True:
            await asyncio.sleep(USE_SECONDS)
            for found in tuple(self._ready.values()):
                try:
                    if await self._records.touch(found.info.server, found.info.name):
                        self._recorded[found.info.server] = time.time()
                    else:
                        self.invalidate(found.info)
                except (TenancyError, SQLAlchemyError) as exc:
                    logger.debug("the use of template %s could not be recorded: %s", found.info.name, describe(exc))

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
    async def scratch(self, ready: Callable[[], Awaitable[Server]], *, empty: bool = False) -> AsyncIterator[str]:
        """Yield the name of a clone of the template, which is dropped afterwards, also after a cancellation.

        Connect to it by ``server.connect_admin(name, role=<owner>)``. If the process dies, the advisory lock of the
        connection opened here is released, and ``reconcile`` drops the clone.

        Args:
            ready: Returns the server, prepared.
            empty: Make it as a template is before its schema is applied.

        Raises:
            TemplateError: see ``ensure`` and ``clone``.
            ServerUnavailableError: the server does not answer.
        """
        server = await ready()
        template = None if empty else await self.ensure(server)
        name = self._names.scratch(secrets.token_hex(8))
        connection = await self._blockers(server).connect()
        try:
            await locks.lock(connection, locks.lock_key(name), timeout=self._config.provisioning.timeout)
            async with asyncio.timeout(self._config.provisioning.timeout):
                if template is not None:
                    await self.clone(connection, template, name)
                    await databases.open_to_owner(connection, name)
                else:
                    await self._create_empty(server, connection, name)
            yield name
        finally:
            await run_to_completion(self._drop(server, connection, name))

    # --- building ---------------------------------------------------------------------------------------------------

    async def _find_or_build(self, server: Server, *, rebuild: bool = False, actor: Actor = SYSTEM) -> _Ready:
        connection = await self._blockers(server).connect()
        try:
            fingerprint = self._schema.fingerprint()
            base = self.base(restricted=await advisory_locks.may_restrict(connection))
            await locks.lock(connection, locks.lock_key(f"template:{base}"), timeout=self.build_timeout)
            async with asyncio.timeout(self.build_timeout):
                record = None if rebuild else await self._find(connection, server, base)
                if record is not None:
                    return _Ready(TemplateInfo(server.name, record.name, record.revision), fingerprint, record.inputs)
                info, inputs = await self._build(server, connection, base, replaces=rebuild, actor=actor)
                return _Ready(info, fingerprint, inputs)
        except TenancyError:
            raise
        except TimeoutError as exc:
            raise TemplateError(
                f"the template on server {server.name!r} was not built within {self.build_timeout:g} s, by this "
                "process or by the one that builds it; raise provisioning.timeout"
            ) from exc
        except Exception as exc:
            raise TemplateError(f"the template on server {server.name!r} could not be built: {describe(exc)}") from exc
        finally:
            await run_to_completion(connections.close(connection))

    async def _find(self, connection: Connection, server: Server, base: str) -> TemplateRecord | None:
        """Return a complete template of the base that was built from the same files, and record its use."""
        for record in await self._records.of_base(server.name, base):
            changed = self._schema.changed_input(record.inputs)
            if changed is not None:
                logger.info("template %s on server %s is not used: %s has changed", record.name, server.name, changed)
                continue
            state = await databases.state(connection, record.name)
            if state is not None and state.is_template and await self._records.touch(server.name, record.name):
                return record
        return None

    async def _build(
        self, server: Server, connection: Connection, base: str, *, replaces: bool, actor: Actor
    ) -> tuple[TemplateInfo, Mapping[str, str]]:
        """Build a template under the lock of its base. Its name is new, since processes remember what it contains."""
        await extensions.check_available(connection, self._config.extensions, server=server.name)
        await self._drop_abandoned(server, connection)
        name = self._names.template(secrets.token_hex(8))
        # an incomplete template that nobody holds the lock of is abandoned
        await locks.lock(connection, locks.lock_key(name), timeout=self.build_timeout)
        logger.info("building template %s on server %s", name, server.name)
        try:
            await self._create_empty(server, connection, name)
            revision, inputs = await self._apply(server, name)
            if self.base(restricted=await advisory_locks.may_restrict(connection)) != base:
                raise TemplateError(
                    f"the migrations changed while the template on server {server.name!r} was built; try again"
                )
            await databases.complete_template(connection, name, comment=f"{_COMMENT}:{revision or ''}")
            await self._records.add(
                server.name, name, base=base, revision=revision, inputs=inputs, replaces=replaces, actor=actor
            )
        except BaseException:
            await run_to_completion(self._drop_partial(server, connection, name))
            raise
        return TemplateInfo(server.name, name, revision), inputs

    async def _create_empty(self, server: Server, connection: Connection, name: str) -> None:
        """Create a database that has all but the schema."""
        await databases.create(
            connection, name, template="template0", owner=self._names.owner, open_to_connections=False
        )
        await databases.open_to_owner(connection, name)
        await self._prepare(server, name)

    async def _prepare(self, server: Server, name: str) -> None:
        connection = await self._blockers(server).connect(name)
        try:
            await grants.prepare_schema(connection, self._names.owner)
            await advisory_locks.restrict(connection, self._names.owner, server=server.name)
            await event_trigger.install(connection, self._names.owner)
            await extensions.install(connection, self._config.extensions, server=server.name)
        finally:
            await run_to_completion(connections.close(connection))

    async def _apply(self, server: Server, name: str) -> tuple[str | None, Mapping[str, str]]:
        opened: list[Connection] = []

        async def connect() -> Connection:
            connection = await self._blockers(server).connect(name, role=self._names.owner)
            opened.append(connection)
            return connection

        try:
            # at once: the next build, for another server, has other inputs
            return await self._schema.apply(connect), self._schema.inputs()
        finally:
            # an open connection makes every clone fail
            for connection in opened:
                await run_to_completion(connections.close(connection))

    async def _drop_abandoned(self, server: Server, connection: Connection) -> None:
        """Drop incomplete templates of builders that died, as ``reconcile`` does."""
        for state in await databases.states(connection, self._names.template("")):
            key = locks.lock_key(state.name)
            if state.is_template or not await locks.try_lock(connection, key):
                continue
            found = await databases.state(connection, state.name)
            if found is not None and not found.is_template:
                await self._drop_partial(server, connection, state.name)
            await locks.unlock(connection, key)

    async def _drop_partial(self, server: Server, connection: Connection, name: str) -> None:
        try:
            async with asyncio.timeout(self._config.provisioning.timeout):
                await removal.drop_database(connection, self._blockers(server), name)
        except Exception as exc:  # noqa: BLE001 - the builder's error is the one to raise
            # without the flag, the next builder or reconcile drops it
            logger.warning("the incomplete template %s stays until reconcile: %s", name, describe(exc))

    async def _drop(self, server: Server, connection: Connection, name: str) -> None:
        """Drop a scratch database; if that fails, it is left to ``reconcile``."""
        try:
            async with asyncio.timeout(self._config.provisioning.timeout):
                if connection.is_closed():
                    connection = await self._blockers(server).connect()
                await removal.drop_database(connection, self._blockers(server), name)
        except Exception as exc:  # noqa: BLE001 - as above
            logger.warning("scratch database %s stays until reconcile: %s", name, describe(exc))
        finally:
            await connections.close(connection)


def revision_of(state: DatabaseState) -> str | None:
    """Return the revision in a template's comment."""
    kind, _, revision = (state.comment or "").partition(":")
    return revision or None if kind == _COMMENT else None
