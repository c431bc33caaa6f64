"""``RecoveryManager``: base backups, WAL, and one tenant's database at a point in time (``tenancy.recovery``)."""

from __future__ import annotations

import asyncio
import logging
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from ...audit.actor import SYSTEM, Actor
from ...audit.log import AuditLog
from ...config import TenancyConfig
from ...context import refuse_while_bound
from ...control.database import ControlDatabase
from ...control.names import Names
from ...errors import (
    ConfigurationError,
    ControlUnavailableError,
    OperationStateError,
    RecoveryError,
    TenancyError,
    UnknownServerError,
)
from ...loops import HomeLoop
from ...postgres.errors import describe
from ...postgres.failures import SERVER_FAILURES
from ...registry.registry import Registry
from ...servers import Server, Servers
from ...tenant import Tenant, TenantRef
from .barman import BarmanRecovery
from .base_backups import BackupDirectory, BaseBackup, BaseBackups
from .history import check_target, database_at
from .point_in_time import PointInTime
from .providers import DirectoryRecovery, Recovery, RecoveryRequest, RecoveryWindow, ScratchOptions
from .recovered_servers import RecoveredServer
from .scratch import RecoveredDatabase
from .wal_receiver import WalEvent, WalReceiver

logger = logging.getLogger("tenancy_orm.recovery")

_NO_DIRECTORY = (
    "recovery.provider names no directory for base backups and WAL: set it to directory:/var/backups/recovery, for "
    "example"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseReport:
    """What ``RecoveryManager.take_base`` has done.

    Attributes:
        taken: The base backup that was taken.
        pruned: Those that were deleted, since no time that is kept needs them.
    """

    taken: BaseBackup
    pruned: tuple[BaseBackup, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DueBases:
    """What ``RecoveryManager.take_due_bases`` has taken, and why others were not, a line each."""

    taken: tuple[BaseReport, ...] = ()
    errors: tuple[str, ...] = ()


class RecoveryManager:
    """Takes base backups, receives WAL, and recovers one tenant's database at a point in time.

    Args:
        config: The sections ``recovery`` and ``provisioning`` are read from it.
        control: The open control database.
        registry: The rows of tenants.
        servers: The servers by name.
        names: Of this installation.
        audit: Records base backups.
    """

    def __init__(
        self,
        config: TenancyConfig,
        control: ControlDatabase,
        registry: Registry,
        servers: Servers,
        names: Names,
        audit: AuditLog,
    ) -> None:
        self._config = config
        self._control = control
        self._registry = registry
        self._servers = servers
        self._names = names
        self._audit = audit
        self._home = HomeLoop()

    # --- base backups and WAL ---------------------------------------------------------------------------------------

    async def take_base(self, server: str | None = None, *, actor: Actor = SYSTEM) -> BaseReport:
        """Take a base backup of a server, verify it, and delete what no time needs that is kept.

        Args:
            server: The server's name; the only or the default one where None.
            actor: Who does this.

        Raises:
            RecoveryError: the server refuses, or the disk is too small.
            ConfigurationError: there is no directory for them, or there are no programs of the server's version.
            OperationStateError: another process takes one now, or reads one.
            ServerUnavailableError: the server does not answer.
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("copying a whole server")
        self._home.check()
        bases = self._bases(self._server(server))
        taken = await bases.take()
        try:
            pruned = await bases.prune(keep_seconds=self._config.recovery.keep_seconds)
        except OperationStateError as exc:
            # a recovery reads one of them; what is taken is good
            logger.warning(
                "old base backups of server %s could not be deleted; the next base backup tries again: %s",
                taken.server,
                exc,
            )
            pruned = []
        async with self._control.transaction() as connection:
            await self._audit.append(
                connection,
                action="server.base_backup",
                actor=actor,
                detail={"server": taken.server, "base": taken.id, "pruned": [backup.id for backup in pruned]},
            )
        return BaseReport(taken=taken, pruned=tuple(pruned))

    async def take_due_bases(self, *, actor: Actor = SYSTEM) -> DueBases:
        """Take a base backup of each server with none of the last ``recovery.base_seconds``, one after the other.

        One from which the newest WAL is not reached counts as none: the server is another cluster since, or was
        recovered to an earlier time. A server that ``receive_wal`` has never received in this directory is left out:
        without its WAL, a base backup brings it back to one time alone.

        Raises:
            ControlUnavailableError: the control database does not answer.
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("copying whole servers")
        self._home.check()
        every, root = self._config.recovery.base_seconds, self._config.recovery.base_directory
        taken, errors = list[BaseReport](), list[str]()
        for server in list(self._servers.values()) if every and root is not None else ():
            directory = self._directory(server)
            try:
                if not await asyncio.to_thread(directory.wal_directories):
                    continue
                present = await asyncio.to_thread(directory.base_backups)
                if (
                    present
                    and (datetime.now(UTC) - present[-1].started_at).total_seconds() < every
                    and await asyncio.to_thread(directory.leads_on, present[-1])
                ):
                    continue
                taken.append(await self.take_base(server.name, actor=actor))
            except ControlUnavailableError:
                raise
            except (TenancyError, *SERVER_FAILURES) as exc:
                errors.append(f"server {server.name}: {describe(exc)}")
        return DueBases(taken=tuple(taken), errors=tuple(errors))

    async def bases(self, server: str | None = None) -> Sequence[BaseBackup]:
        """Return the base backups of a server, the oldest first."""
        refuse_while_bound("listing copies of a whole server")
        return await asyncio.to_thread(self._directory(self._server(server)).base_backups)

    async def verify_base(self, server: str | None = None, *, base: str | None = None) -> BaseBackup:
        """Compare the files of a base backup with its checksums.

        Args:
            server: The server's name; the only or the default one where None.
            base: The base backup's id; the newest one where None.

        Raises:
            RecoveryError: there is none, or a file was changed, is missing or is in the way.
        """
        refuse_while_bound("reading a copy of a whole server")
        found = self._server(server)
        backups = await asyncio.to_thread(self._directory(found).base_backups)
        chosen = next((backup for backup in reversed(backups) if base in (None, backup.id)), None)
        if chosen is None:
            raise RecoveryError(f"there is no base backup {base or ''} of server {found.name!r}".replace("  ", " "))
        await self._bases(found).verify(chosen)
        return chosen

    async def receive_wal(
        self, server: str | None = None, *, progress: Callable[[WalEvent], None] | None = None
    ) -> None:
        """Receive the WAL of a server until this is cancelled.

        Args:
            server: The server's name; the only or the default one where None.
            progress: Called with what happens.

        Raises:
            RecoveryError, ConfigurationError, OperationStateError: as ``take_base``.
        """
        refuse_while_bound("receiving the WAL of a whole server")
        self._home.check()
        await self._receiver(self._server(server), progress).run()

    async def drop_slot(self, server: str | None = None) -> None:
        """Let a server keep no WAL any more for a ``receive_wal`` that does not come back."""
        refuse_while_bound("changing a server")
        await self._receiver(self._server(server), None).drop_slot()

    async def window(self, server: str | None = None) -> RecoveryWindow:
        """Return the times that a server can be recovered at."""
        refuse_while_bound("reading copies of a whole server")
        return await self._provider().window(self._server(server).name)

    # --- recoveries -------------------------------------------------------------------------------------------------

    async def source(
        self, tenant: TenantRef, to: str | datetime | None = None, *, recovered_server: str | None = None
    ) -> PointInTime:
        """Return what ``tenancy.restores.restore`` restores: the tenant's database as it was at a time.

        What cannot be recovered is refused here, before anything is started.

        Args:
            tenant: The tenant.
            to: The time: ISO 8601 with its offset from UTC, or an aware datetime. Of a recovered server that is given
                it only says which database the tenant had; None is now.
            recovered_server: The URL of a server that somebody else has recovered at that time, a managed one.

        Raises:
            RecoveryTargetError: the time has no offset, is in the future, or cannot be reached.
            RecoveryError: a server cannot be recovered, or the one that is given does not answer.
            MarkerMismatchError: the database on the server that is given is not this tenant's.
            ConfigurationError: there is no provider, or there are no programs.
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("recovering a whole server")
        provider, request, found = await self._request(tenant, to, recovered_server)
        await provider.check(request)
        return PointInTime(
            provider,
            request,
            owner=self._names.owner,
            role=None if found.placement is None else found.placement.role,
            description={"recovered_server": True} if recovered_server is not None else {},
            max_bytes=self._config.recovery.max_bytes,
            client_programs=self._config.provisioning.client_programs,
        )

    @asynccontextmanager
    async def open(
        self, tenant: TenantRef, to: str | datetime | None = None, *, recovered_server: str | None = None
    ) -> AsyncIterator[RecoveredDatabase]:
        """Recover the database that a tenant had at a time, and let one login read it, for the body.

        Args:
            tenant: As for ``source``.
            to: As for ``source``.
            recovered_server: As for ``source``.

        Raises:
            TenancyError: as ``source``; and where the server could not be recovered.
            MarkerMismatchError: the database that was found is not this tenant's.
        """
        refuse_while_bound("recovering a whole server")
        provider, request, _ = await self._request(tenant, to, recovered_server)
        async with provider.recover(request) as recovered:
            yield recovered

    async def _request(
        self, ref: TenantRef, to: str | datetime | None, recovered_server: str | None
    ) -> tuple[Recovery, RecoveryRequest, Tenant]:
        self._home.check()
        if recovered_server is None and to is None:
            raise ConfigurationError("name the time that the tenant is brought back to")
        target = datetime.now(UTC) if to is None else check_target(to)
        tenant = await self._registry.find(ref)
        server, database = await database_at(self._control, tenant, target)
        request = RecoveryRequest(
            server=server,
            database=database,
            time=target,
            installation=self._names.installation,
            tenant_id=tenant.id,
            slug=tenant.slug,
        )
        if recovered_server is None:
            return self._provider(), request, tenant
        directory = self._scratch_directory()
        provider = RecoveredServer(recovered_server, self._servers, self._names, directory, is_timed=to is not None)
        return provider, request, tenant

    def _scratch_directory(self) -> Path:
        return Path(self._config.recovery.directory or tempfile.gettempdir())

    def _provider(self) -> Recovery:
        config = self._config.recovery
        options = ScratchOptions(
            directory=self._scratch_directory(),
            account=config.account,
            settings=config.settings,
            max_bytes=config.max_bytes,
            client_programs=self._config.provisioning.client_programs,
        )
        if config.base_directory is not None:
            return DirectoryRecovery(Path(config.base_directory), self._servers, options)
        if config.barman_name is not None:
            return BarmanRecovery(options, name=config.barman_name, command=config.barman_command)
        if config.provider is None:
            raise ConfigurationError(
                "recovery.provider is not set: set it to directory:/var/backups/recovery or barman, or name a server "
                "that was recovered with --recovered-server"
            )
        provider: Recovery = config.provider
        return provider

    # --- parts ------------------------------------------------------------------------------------------------------

    def _server(self, name: str | None) -> Server:
        if name is None:
            if len(self._servers) == 1:
                return next(iter(self._servers.values()))
            name = self._config.default_server or "default"
        if name not in self._servers:
            raise UnknownServerError(name)
        return self._servers[name]

    def _directory(self, server: Server) -> BackupDirectory:
        root = self._config.recovery.base_directory
        if root is None:
            raise ConfigurationError(_NO_DIRECTORY)
        return BackupDirectory(Path(root), server.name)

    def _bases(self, server: Server) -> BaseBackups:
        programs = self._config.provisioning.client_programs
        return BaseBackups(server, self._directory(server), client_programs=programs)

    def _receiver(self, server: Server, progress: Callable[[WalEvent], None] | None) -> WalReceiver:
        return WalReceiver(
            server,
            self._directory(server),
            slot=f"{self._names.stem}_wal",
            client_programs=self._config.provisioning.client_programs,
            look_seconds=self._config.recovery.heartbeat_seconds,
            progress=progress,
        )


__all__ = ["BaseReport", "DueBases", "RecoveryManager"]
