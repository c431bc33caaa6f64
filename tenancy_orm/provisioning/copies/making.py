"""``Copies``: short-lived copies of tenants' databases, beside them on the same server.

A tenant's database is dumped by ``pg_dump`` and restored by ``pg_restore``. It is not cloned as a template, since
nobody may be connected to a template. What is dumped is one snapshot; the tenant goes on to work. The programs run
where this process runs. The data flows through a pipe; the schema, with statistics where those are copied, is a file in
a temporary directory that only this process's user can read.

The tenant's contents gain no rights by this, see ``copy_logins``. No tenant's role may connect to a copy.
"""

from __future__ import annotations

import asyncio
import secrets
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ...cancellation import run_to_completion
from ...config import TenancyConfig
from ...context import refuse_while_bound
from ...control.names import Names
from ...errors import ProvisioningError, TenancyError
from ...loops import HomeLoop
from ...postgres import connections, locks
from ...postgres.connections import Connection
from ...postgres.failures import SERVER_FAILURES
from ...postgres.programs import SCHEMA_ONLY, Programs, find_programs, run_piped, run_program
from ...postgres.quoting import quote_pattern
from ...postgres.snapshots import begin_snapshot, readable_tables
from ...servers import Server, Servers
from ...tenant import Placement, Tenant, placement_of
from ..logins.copy_logins import HIDES_ROWS, UNBOUNDED, CopyLogin, create_reader, end_login, see_all_rows
from ..rights import event_trigger
from ..server_objects import databases, removal
from ..server_objects.admin_connections import HOLDING
from ..server_objects.blockers import Blockers
from . import archives
from .database_properties import read_properties
from .empty_databases import InstalledExtension, create_for_login, read_extensions
from .materialized_views import fill_views, filled_views

Content = Literal["data", "schema", "nothing"]
"""What a copy has: everything; or the schema alone, with statistics from PostgreSQL 18 on; or only ``extensions``."""

_STATISTICS_VERSION = 18


@dataclass(frozen=True, slots=True, kw_only=True)
class DatabaseCopy:
    """A copy of a tenant's database.

    Attributes:
        server: The server's name.
        login: The login that owns everything in the copy. Nobody else but administrators can connect to it.
        content: What it has.
        has_statistics: Whether the planner's statistics are those of the tenant, or were made by ANALYZE.
        left_out: What the copy lacks of the tenant's database, as ``pg_restore`` lists it: "EVENT TRIGGER - name".
        seconds: How long it took to make.
    """

    server: str
    login: CopyLogin
    content: Content
    has_statistics: bool
    left_out: tuple[str, ...]
    seconds: float

    @property
    def database(self) -> str:
        """The name of the database."""
        return self.login.database


class Copies:
    """Makes copies (``tenancy.internals.provisioner.copies``).

    Args:
        config: ``provisioning.client_programs`` and ``provisioning.timeout`` are read from it.
        servers: The servers by name.
        names: Of this installation.
        blockers: Returns the ``Blockers`` of a server.
    """

    def __init__(
        self, config: TenancyConfig, servers: Servers, names: Names, blockers: Callable[[Server], Blockers]
    ) -> None:
        self._config = config
        self._servers = servers
        self._names = names
        self._blockers = blockers
        self._home = HomeLoop()

    async def size(self, tenant: Tenant) -> int:
        """Return the size of a tenant's database in bytes, which a copy of its data needs at most, bloat included.

        Raises:
            TenancyError: as ``open``.
        """
        refuse_while_bound("measuring a tenant's database")
        self._home.check()
        place = placement_of(tenant)
        connection = await self._blockers(self._servers[place.server]).connect(purpose="tenancy-copy")
        try:
            found = await databases.sizes(connection, [place.database])
        finally:
            await run_to_completion(connections.close(connection))
        if place.database not in found:
            raise ProvisioningError(f"the database of tenant {tenant.slug!r} is missing", tenant=tenant.slug)
        return found[place.database]

    @asynccontextmanager
    async def open(
        self,
        tenant: Tenant,
        *,
        content: Content = "data",
        extensions: Sequence[str] = (),
        timeout: float,
        valid_for: float,
    ) -> AsyncIterator[DatabaseCopy]:
        """Copy a tenant's database for the body; the copy is dropped at the end, also after a cancellation.

        If the process dies, ``reconcile`` drops it. Sizes are not looked at: see ``size``.

        Args:
            tenant: The tenant.
            content: What is copied.
            extensions: Extensions that the copy has, beside those of the tenant's database where that is copied.
            timeout: Seconds that making the copy may take.
            valid_for: Seconds for which its login is valid after that.

        Raises:
            ConfigurationError: there are no programs of the server's version.
            ProvisioningError: the database could not be dumped or restored, or not in time.
            TenantNotFoundError: the tenant has been purged.
            ServerUnavailableError: the server does not answer.
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("copying a tenant's database")
        self._home.check()
        place = placement_of(tenant)
        server = self._servers[place.server]
        blockers = self._blockers(server)
        connection = await blockers.connect(settings=HOLDING, purpose="tenancy-copy")
        copying = _Copying(self._config, self._names, server, blockers, connection, tenant, place)
        try:
            try:
                async with asyncio.timeout(timeout):
                    copy = await copying.make(content, extensions, seconds=timeout + valid_for)
            except TenancyError:
                raise
            except TimeoutError as exc:
                raise copying.failed(f"not done within {timeout:g} s; raise rehearsal.timeout") from exc
            except SERVER_FAILURES as exc:
                reason = str(exc.args[0]) if exc.args else type(exc).__name__
                raise copying.failed(f"{reason} ({getattr(exc, 'sqlstate', None)})") from exc
            yield copy
        finally:
            await run_to_completion(copying.remove())


class _Copying:
    """One copy that is made and removed. ``connection`` holds the locks that tell ``reconcile`` that it is in use."""

    def __init__(
        self,
        config: TenancyConfig,
        names: Names,
        server: Server,
        blockers: Blockers,
        connection: Connection,
        tenant: Tenant,
        place: Placement,
    ) -> None:
        self._config = config
        self._names = names
        self._server = server
        self._blockers = blockers
        self._connection = connection
        self._tenant = tenant
        self._place = place
        self._name = names.scratch(secrets.token_hex(8))  # of the copy, and of its login
        self._reader = names.scratch(secrets.token_hex(8))

    def failed(self, reason: str) -> ProvisioningError:
        return ProvisioningError(
            f"tenant {self._tenant.slug!r} could not be copied: {reason}", tenant=self._tenant.slug, step="copy"
        )

    async def make(self, content: Content, wanted: Sequence[str], *, seconds: float) -> DatabaseCopy:
        started = time.monotonic()
        version = connections.version(self._connection)
        for name in (self._name, self._reader):
            await locks.lock(self._connection, locks.lock_key(name), timeout=self._config.provisioning.timeout)
        extensions, locale = ((), None) if content == "nothing" else await self._look()
        restorer = await self._create(seconds, extensions, wanted, locale)
        if content == "nothing":
            return self._copy(restorer, content, (), started)
        # in a thread: it looks at many directories, and starts the programs
        programs = await asyncio.to_thread(find_programs, version, self._config.provisioning.client_programs)
        with_statistics = content == "schema" and min(version, programs.version) >= _STATISTICS_VERSION
        reader = await create_reader(
            self._connection, self._server.dsn, self._names, self._reader, self._place, seconds=seconds
        )
        try:
            schemas = {one.schema for one in extensions}
            left_out = await self._transfer(programs, reader, restorer, content, with_statistics, schemas)
        except ProvisioningError as exc:
            raise self.failed(str(exc)) from exc
        finally:
            await run_to_completion(self._drop_role(self._reader))
        has_statistics = content == "data" or with_statistics
        return self._copy(restorer, content, left_out, started, has_statistics=has_statistics)

    def _copy(
        self,
        login: CopyLogin,
        content: Content,
        left_out: tuple[str, ...],
        started: float,
        *,
        has_statistics: bool = False,
    ) -> DatabaseCopy:
        return DatabaseCopy(
            server=self._server.name,
            login=login,
            content=content,
            has_statistics=has_statistics,
            left_out=left_out,
            seconds=time.monotonic() - started,
        )

    async def remove(self) -> None:
        """Drop everything, over another connection if the first one was lost."""
        connection = self._connection
        try:
            async with asyncio.timeout(self._config.provisioning.timeout):
                if not await connections.is_alive(connection):
                    connection.terminate()
                    self._connection = connection = await self._blockers.connect(purpose="tenancy-copy")
                # first: who is no superuser cannot drop a database with sessions of others
                for role in (self._reader, self._name):
                    await end_login(connection, self._blockers, role)
                await removal.drop_database(connection, self._blockers, self._name)
                for role in (self._reader, self._name):
                    await self._drop_role(role)
        finally:
            await connections.close(connection)

    # --- databases and roles ----------------------------------------------------------------------------------------

    async def _create(
        self,
        seconds: float,
        extensions: Sequence[InstalledExtension],
        wanted: Sequence[str],
        locale: databases.Locale | None,
    ) -> CopyLogin:
        return await create_for_login(
            self._connection,
            self._blockers,
            self._server,
            self._names,
            database=self._name,
            login=self._name,
            seconds=seconds,
            extensions=extensions,
            wanted=wanted,
            locale=locale,
        )

    async def _look(self) -> tuple[tuple[InstalledExtension, ...], databases.Locale]:
        inside = await self._blockers.connect(self._place.database, purpose="tenancy-copy")
        try:
            return await read_extensions(inside), (await read_properties(inside)).locale
        finally:
            await run_to_completion(connections.close(inside))

    async def _drop_role(self, role: str) -> None:
        connection = self._connection
        async with asyncio.timeout(self._config.provisioning.timeout):
            await end_login(connection, self._blockers, role)
            await removal.drop_retired(connection, self._blockers, self._names, role)

    # --- contents ---------------------------------------------------------------------------------------------------

    async def _transfer(
        self,
        programs: Programs,
        reader: CopyLogin,
        restorer: CopyLogin,
        content: Content,
        with_statistics: bool,
        schemas: set[str],
    ) -> tuple[str, ...]:
        """Copy the contents, and return what is left out."""
        timeout = self._config.pool.connect_timeout
        # both dumps are of this snapshot, which is there as long as its transaction
        holding = await reader.connect(timeout=timeout, settings=UNBOUNDED)
        try:
            if connections.version(holding) >= 17:
                await holding.execute("SET transaction_timeout = 0")
            await begin_snapshot(holding, readable_tables)
            snapshot = await holding.fetchval("SELECT pg_catalog.pg_export_snapshot()")
            if content == "data" and await holding.fetchval(HIDES_ROWS):
                await see_all_rows(self._connection, reader.role)
            filled = await filled_views(holding)
            dump = programs.dump_command(f"--exclude-schema={quote_pattern(event_trigger.NAME)}", snapshot=snapshot)
            exact = programs.version == connections.version(self._connection)
            restore = programs.restore_command(restorer.database, exact=exact)
            with tempfile.TemporaryDirectory(prefix="tenancy-copy-") as directory:
                schema, listing = f"{directory}/schema.dump", Path(directory, "list")
                kinds = ("--no-data", "--statistics", *SCHEMA_ONLY[1:]) if with_statistics else SCHEMA_ONLY
                await run_program([*dump, *kinds, f"--file={schema}"], reader.environment())
                left_out = await archives.write_list(programs, schema, listing, schemas)
                parts = [*restore, f"--use-list={listing}"]
                await run_program([*parts, "--section=pre-data", schema], restorer.environment())
                if content == "data":
                    await run_piped(
                        [*dump, "--data-only", "--compress=0"],
                        [*restore, "--data-only"],
                        reader.environment(),
                        restorer.environment(),
                    )
                await run_program([*parts, "--section=post-data", schema], restorer.environment())
                if with_statistics:
                    # last: CREATE INDEX counts the rows of its table, and there are none
                    await run_program([*parts, "--section=data", schema], restorer.environment())
        finally:
            await run_to_completion(connections.close(holding))
        if content == "data":
            # only PostgreSQL 18 dumps the statistics
            await fill_views(restorer, filled, timeout=timeout)
        return left_out


__all__ = ["Content", "Copies", "DatabaseCopy"]
