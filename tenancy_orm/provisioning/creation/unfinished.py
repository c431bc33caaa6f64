"""Creations and purges that dead processes have left: finished, or removed, or left alone and reported.

What a creation has made is not judged by its row. That may be of an older backup of the control database, made while
the tenant was being created, and the database have been a customer's for a long time since.
"""

from __future__ import annotations

import asyncio
import logging
from datetime import UTC, datetime
from functools import partial
from typing import Literal

from ...audit.actor import Actor
from ...errors import LoginRefusedError, ProvisioningError, TenancyError
from ...events import TenantCreated, TenantPurged
from ...postgres import connections, locks
from ...postgres.connections import Connection
from ...postgres.errors import INVALID_PASSWORD, describe
from ...postgres.failures import SERVER_FAILURES
from ...registry.creation import UNDOING
from ...registry.rows import Unfinished
from ...routing import marker
from ...tenant import Placement, Tenant
from ..checks.report import Findings
from ..rights import grants
from ..server_objects import removal, roles
from ..server_objects.blockers import Blockers
from ..server_objects.scram import scram_verifier
from .new_databases import drop_all_beside
from .older_rows import find_another, is_whole
from .pipeline import ProvisioningServices, prove, tenant_key

logger = logging.getLogger("tenancy_orm.provisioning")


class UnfinishedWork:
    """Settles creations and purges that nobody does any more.

    Args:
        services: Of provisioning.
        findings: Takes what is found and done.
        actor: Who does this, for the audit log.
        check: Whether only to find out what would be done.
        drop_unknown: Whether to remove what has its marker, and refuses the tenant's login.
    """

    def __init__(
        self,
        services: ProvisioningServices,
        findings: Findings,
        *,
        actor: Actor,
        check: bool = False,
        drop_unknown: bool = False,
    ) -> None:
        self._services = services
        self._findings = findings
        self._actor = actor
        self._check = check
        self._drop_unknown = drop_unknown
        self._timeout = services.config.provisioning.timeout

    async def settle_creation(self, tenant: Tenant) -> bool:
        """Finish or remove one tenant's interrupted creation; False if a process does it now.

        Raises:
            ProvisioningError: it could not be removed, or is kept.
            ServerUnavailableError: the server does not answer.
        """
        one = await self._services.registry.find_unfinished(tenant.id)
        if one is None or one.tenant.placement is None:
            return True
        connection = await self._blockers(one.tenant.placement.server).connect()
        try:
            async with asyncio.timeout(self._timeout):
                await self.settle(connection, one)
        finally:
            await connections.close(connection)
        if self._findings.errors:
            raise ProvisioningError("; ".join(self._findings.errors), tenant=tenant.slug)
        return await self._services.registry.find_unfinished(tenant.id) is None

    def _deadline(self) -> float:
        return asyncio.get_running_loop().time() + self._timeout

    def _blockers(self, server: str) -> Blockers:
        return self._services.blockers(self._services.servers[server])

    async def settle(self, connection: Connection, found: Unfinished) -> None:
        """Finish or remove one of them, unless a process does it now.

        Args:
            connection: An administrative one, to its server.
            found: As the registry had it; it is read again under the tenant's lock.

        Raises:
            TenancyError, asyncpg.PostgresError, OSError: it could not be done.
        """
        async with locks.try_locked(connection, tenant_key(found.tenant.id)) as free:
            if not free:
                return  # under way
            one = await self._services.registry.find_unfinished(found.tenant.id)
            if one is None or one.tenant.placement is None:
                return
            place = one.tenant.placement
            decision = await self._decide(connection, one, place)
            if decision is None:
                return
            if not self._check:
                if decision == "purged":
                    await self._finish_purge(connection, one.tenant, place)
                elif decision == "finished":
                    await self._finish_creation(one.tenant, place)
                else:
                    await self._remove_creation(connection, one, place)
            done = {
                "purged": self._findings.purged,
                "finished": self._findings.finished,
                "removed": self._findings.removed,
            }
            done[decision].append(one.tenant.slug)

    async def _decide(
        self, connection: Connection, one: Unfinished, placement: Placement
    ) -> Literal["purged", "finished", "removed"] | None:
        """Return what becomes of a creation or purge; None where it is left alone, which is reported."""
        tenant = one.tenant
        if one.kind == "purging":
            return "purged"
        if await self._is_whole(connection, one, placement):
            failure = await self._failure_of_proof(connection, tenant, placement)
            if failure is None:
                return "finished"
            if self._drop_unknown and isinstance(failure, LoginRefusedError):
                return "removed"
            self._keep_creation(tenant, placement, failure)
        elif await self._services.registry.is_taken_over(tenant.id):
            self._findings.errors.append(
                f"{tenant.slug}: an adoption in place was interrupted, and its database is left alone; repeat the "
                "command, which brings it back or goes on"
            )
        elif (why := await find_another(self._services, connection, tenant.id, placement)) is not None:
            self._findings.errors.append(
                f"{tenant.slug}: the row of its creation is of an older backup, and nothing is removed: {why}; run: "
                "tenancy rebuild --dry-run"
            )
        else:
            return "removed"
        return None

    async def _is_whole(self, connection: Connection, one: Unfinished, placement: Placement) -> bool:
        return one.step != UNDOING and await is_whole(self._services, connection, one.tenant.id, placement)

    async def _failure_of_proof(
        self, connection: Connection, tenant: Tenant, placement: Placement
    ) -> BaseException | None:
        """Return why the tenant cannot log in to its database; None where it can, with the password of its row."""
        try:
            try:
                await connections.close(await prove(self._services, tenant.id, tenant.slug, placement))
            except LoginRefusedError as exc:
                if exc.sqlstate != INVALID_PASSWORD:
                    raise
                if self._check:
                    return None  # most likely: what follows mends it
                # it may have been changed since the backup that the row is of
                if not await roles.exists(connection, placement.role):
                    return ProvisioningError(
                        f"role {placement.role!r} does not exist: create it, with LOGIN, and GRANT CONNECT"
                    )
                password = self._services.keyring.open_password(tenant.id, placement.sealed_password)
                change = partial(roles.set_password, connection, placement.role, verifier=scram_verifier(password))
                await self._blockers(placement.server).run(connection, change, role=placement.role)
                await connections.close(await prove(self._services, tenant.id, tenant.slug, placement))
                logger.warning(
                    "tenant %s has the password again that it had when it was created; if somebody knows it, run: "
                    "tenancy secrets rotate-passwords",
                    tenant.slug,
                )
        except (TenancyError, *SERVER_FAILURES) as exc:
            return exc
        return None

    def _keep_creation(self, tenant: Tenant, placement: Placement, failure: BaseException) -> None:
        logger.error("reconcile: tenant %s cannot log in to its database: %s", tenant.slug, failure)
        remedy = "correct that"
        if isinstance(failure, LoginRefusedError):
            remedy = (
                "correct that (if it was suspended or deleted since: GRANT CONNECT, and LOGIN), or remove it by "
                "reconcile(drop_unknown=True)"
            )
        self._findings.errors.append(
            f"{tenant.slug}: its creation was interrupted, or its row is of an older backup; database "
            f"{placement.database!r} has its marker and is kept, and cannot be used: {describe(failure)}; {remedy}"
        )

    async def _finish_creation(self, tenant: Tenant, placement: Placement) -> None:
        revision = await self._revision(placement)
        await self._services.registry.complete(tenant.id, revision=revision, key=None, actor=self._actor)
        seconds = 0.0 if tenant.created_at is None else (datetime.now(UTC) - tenant.created_at).total_seconds()
        self._services.events.emit(TenantCreated(tenant_id=tenant.id, slug=tenant.slug, seconds=seconds))

    async def _remove_creation(self, connection: Connection, one: Unfinished, placement: Placement) -> None:
        installation = self._services.installation
        own = (marker.warm_text(installation), marker.marker_text(installation, one.tenant.id))
        if not await removal.is_foreign(connection, placement.database, *own):
            await removal.remove(
                connection,
                self._blockers(placement.server),
                self._services.names,
                database=placement.database,
                role=placement.role,
                deadline=self._deadline(),
            )
        error = "interrupted; removed by reconcile"
        await self._services.registry.discard(
            one.tenant.id, step=one.step or "registered", error=error, actor=self._actor
        )

    async def _finish_purge(self, connection: Connection, tenant: Tenant, placement: Placement) -> None:
        await drop_all_beside(self._services, connection, placement.server, tenant.id, timeout=self._timeout)
        await removal.purge(
            connection,
            self._blockers(placement.server),
            self._services.names,
            self._services.registry,
            tenant.id,
            placement,
            deadline=self._deadline(),
            actor=self._actor,
        )
        self._services.events.emit(TenantPurged(tenant_id=tenant.id, slug=tenant.slug))

    async def _revision(self, placement: Placement) -> str | None:
        connection = await self._blockers(placement.server).connect(placement.database)
        try:
            return await grants.revision(connection, self._services.names.owner)
        finally:
            await connections.close(connection)


__all__ = ["UnfinishedWork"]
