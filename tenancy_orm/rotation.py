"""Rotation of the passwords of tenants' roles, and of the keys that seal them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from uuid import UUID

from .audit.actor import SYSTEM, Actor
from .audit.log import AuditLog
from .backups import BackupKeys
from .cancellation import run_to_completion
from .config import TenancyConfig
from .context import refuse_while_bound, run_unbound
from .control.names import Names
from .errors import ConfigurationError, ProvisioningError, TenancyError, TenantNotFoundError
from .postgres.errors import describe
from .postgres.failures import SERVER_FAILURES
from .provisioning.creation.pipeline import tenant_key
from .provisioning.rights import role_settings
from .provisioning.server_objects import roles
from .provisioning.server_objects.admin_connections import AdminConnections
from .provisioning.server_objects.blockers import Blockers
from .provisioning.server_objects.scram import scram_verifier
from .registry.reading import TenantFilter
from .registry.registry import Registry
from .secrets.data_keys import DataKeys
from .secrets.keyring import Keyring
from .secrets.sealed import ResealReport, SealedPasswords
from .servers import Servers
from .servers.sealed import SealedAddresses
from .tenant import Placement, Status, Tenant, placement_of

logger = logging.getLogger("tenancy_orm.secrets")

CONCURRENCY = 4
_ROTATED = tuple(status for status in Status if status not in (Status.PROVISIONING, Status.PURGED))


@dataclass(frozen=True, slots=True)
class RotationReport:
    """How many passwords were rotated, and why others were not, by slug."""

    rotated: int
    failed: Mapping[str, str] = field(default_factory=dict)


class SecretManager:
    """Rotates passwords and keys while requests are served; ``tenancy.secrets``.

    A PostgreSQL role has one password. So that no request fails, the new password is stored first, beside the old one;
    then the role gets it; then the old one is deleted. A process that logs in with the old password too late is
    refused, reads the registry again, and logs in with the new one. Open connections are not affected.
    """

    def __init__(
        self,
        *,
        config: TenancyConfig,
        registry: Registry,
        sealed: SealedPasswords,
        servers: Servers,
        names: Names,
        keyring: Keyring,
        data_keys: DataKeys | None = None,
        addresses: SealedAddresses | None = None,
        audit: AuditLog | None = None,
        backup_keys: BackupKeys | None = None,
    ) -> None:
        self._addresses = addresses
        self._backup_keys = backup_keys
        self._audit = audit
        self._timeout = config.provisioning.timeout
        self._role_settings = config.provisioning.role_settings
        self._registry = registry
        self._sealed = sealed
        self._servers = servers
        self._keyring = keyring
        self._data_keys = data_keys
        self._blockers = partial(Blockers, names=names, registry=registry)
        self._admin_connections = AdminConnections(self._blockers, keep=CONCURRENCY)

    # --- passwords --------------------------------------------------------------------------------------------------

    async def rotate_password(self, tenant: str | UUID | Tenant, *, actor: Actor = SYSTEM) -> None:
        """Give a tenant's role a new random password, and remove the settings that it has given itself.

        To finish an interrupted rotation, repeat it; both passwords are stored until then.

        Args:
            tenant: The tenant: a slug, an id, or a ``Tenant``.
            actor: Who does this, for the audit log.

        Raises:
            TenantNotFoundError: no such tenant, or it has been purged.
            InvalidTransitionError: it is still being created.
            ProvisioningError: its server refused, or did not finish within ``provisioning.timeout``.
            ServerUnavailableError, ControlUnavailableError: a server does not answer.
        """
        tenant = await self._registry.find(tenant)
        placement = placement_of(tenant)
        try:
            deadline = asyncio.get_running_loop().time() + self._timeout
            async with asyncio.timeout_at(deadline):
                await run_unbound(self._rotate(tenant.id, placement, deadline, actor))
        except SERVER_FAILURES as exc:
            raise ProvisioningError(
                f"the password of tenant {tenant.slug!r} was not rotated ({describe(exc)}); try again",
                tenant=tenant.slug,
                step="password",
            ) from exc

    async def rotate_passwords(
        self,
        tenants: Iterable[str | UUID | Tenant] | None = None,
        *,
        concurrency: int = CONCURRENCY,
        progress: Callable[[int], None] | None = None,
        actor: Actor = SYSTEM,
    ) -> RotationReport:
        """Give every tenant's role a new random password. One tenant's failure does not stop the others.

        Args:
            tenants: These, by slug, id or ``Tenant``; all where None.
            concurrency: How many at once.
            progress: Called with the number of tenants done so far.
            actor: Who does this, for the audit log.

        Raises:
            TenantNotFoundError: one of ``tenants`` does not exist; nothing was rotated.
            ControlUnavailableError: the control database does not answer.
        """
        if tenants is None:
            refuse_while_bound("rotating all passwords")
        if concurrency < 1:
            raise ConfigurationError("concurrency must be at least 1")
        # looked up first, to tell an unknown slug from a tenant that is purged during the rotation
        if tenants is None:
            found = [tenant async for tenant in self._registry.iterate(TenantFilter(status=_ROTATED))]
        else:
            found = [await self._registry.find(tenant) for tenant in tenants]
        queue = iter(found)
        rotated, failed = 0, {}

        async def work() -> None:
            nonlocal rotated
            for tenant in queue:
                try:
                    await self.rotate_password(tenant, actor=actor)
                    rotated += 1
                except TenantNotFoundError:
                    continue  # purged since it was listed
                except TenancyError as exc:
                    logger.error("the password of tenant %s was not rotated: %s", tenant.slug, exc)
                    failed[tenant.slug] = str(exc)
                if progress is not None:
                    progress(rotated + len(failed))

        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(work())
        return RotationReport(rotated, failed)

    async def finish_rotations(self, *, actor: Actor = SYSTEM) -> RotationReport:
        """Finish interrupted rotations of passwords.

        Raises:
            ControlUnavailableError: the control database does not answer.
        """
        refuse_while_bound("rotating all passwords")
        pending = [await self._registry.get(tenant_id) for tenant_id in await self._sealed.pending_rotations()]
        return await self.rotate_passwords(pending, actor=actor)

    async def _rotate(self, tenant_id: UUID, placement: Placement, deadline: float, actor: Actor) -> None:
        moved_to: Placement | None = placement
        while moved_to is not None:
            moved_to = await self._rotate_at(tenant_id, moved_to, deadline, actor)

    async def _rotate_at(
        self, tenant_id: UUID, placement: Placement, deadline: float, actor: Actor
    ) -> Placement | None:
        """Rotate the password of the role on this server; returns where the tenant is instead, if it was moved."""
        server, key = self._servers[placement.server], tenant_key(tenant_id)
        # the lock that creation and purge take: one process at a time changes a tenant's role
        connection = await self._admin_connections.acquire(server, key, timeout=self._timeout)
        try:
            now = (await self._registry.get(tenant_id)).placement
            if now is not None and (now.server, now.role) != (placement.server, placement.role):
                return now  # while this waited for the lock
            # no variable holds the password: an error's traceback would have it in its frames
            verifier = scram_verifier(await self._sealed.start_rotation(tenant_id))
            change = partial(roles.set_password, connection, placement.role, verifier=verifier)
            await self._blockers(server).run(connection, change, role=placement.role)
            await self._sealed.finish_rotation(tenant_id, actor=actor)
            await role_settings.try_restore(
                connection, self._blockers(server), placement.role, self._role_settings, deadline=deadline
            )
            return None
        finally:
            await run_to_completion(self._admin_connections.release(server, connection, key))

    # --- keys -------------------------------------------------------------------------------------------------------

    async def rotate_encryption_key(self, *, actor: Actor = SYSTEM) -> ResealReport:
        """Seal all passwords, the addresses in the rows of servers and the keys of backups under the newest key.

        With envelope encryption, a new data key is created first. Without it, the newest key is the last of
        ``encryption_keys``: every process must know that key before it becomes the last one.

        Read the report before you remove an old key: ``failed`` has the passwords that were not sealed again, and
        ``remaining`` the old keys that a password is still sealed under, such as one that another process has just
        created.

        Raises:
            SecretProviderError: the new data key cannot be wrapped, or does not unwrap; nothing is sealed under it.
            ControlUnavailableError: the control database does not answer; call ``reseal`` to go on.
        """
        refuse_while_bound("rotating keys")
        if self._data_keys is not None:
            self._keyring.add_keys(await self._data_keys.rotate())
        return await self._reseal(actor)

    async def reseal(self, *, actor: Actor = SYSTEM) -> ResealReport:
        """Seal every tenant's password, and servers' addresses, under the newest existing key: after an interruption.

        Raises:
            ControlUnavailableError: the control database does not answer; repeat the call to go on.
        """
        refuse_while_bound("sealing passwords again")
        if self._data_keys is not None:
            await self._data_keys.update(self._keyring)
        return await self._reseal(actor)

    async def _reseal(self, actor: Actor) -> ResealReport:
        report = await self._sealed.reseal(actor=actor)
        if self._addresses is None or self._audit is None:
            return report
        servers = await self._addresses.reseal(self._audit, actor=actor)
        if self._backup_keys is not None:
            backups = await self._backup_keys.reseal(self._audit, actor=actor)
            report = replace(
                report,
                resealed=report.resealed + backups.resealed,
                failed={**report.failed, **{f"backup key {name}": reason for name, reason in backups.failed.items()}},
                keys_in_use=report.keys_in_use | await self._backup_keys.keys_in_use(),
            )
        return replace(
            report,
            resealed=report.resealed + servers.resealed,
            failed={**report.failed, **{f"server {name}": reason for name, reason in servers.failed.items()}},
            keys_in_use=report.keys_in_use | await self._addresses.keys_in_use(),
        )

    async def keys_in_use(self) -> frozenset[str]:
        """Return the ids of the keys that tenants' passwords, servers' addresses and backup keys are sealed under.

        Every other key can be removed.

        Raises:
            ControlUnavailableError: the control database does not answer.
        """
        refuse_while_bound("listing keys")
        servers = frozenset[str]() if self._addresses is None else await self._addresses.keys_in_use()
        backups = frozenset[str]() if self._backup_keys is None else await self._backup_keys.keys_in_use()
        return servers | backups | await self._sealed.keys_in_use()

    async def forget_unused_keys(self) -> list[str]:
        """Delete the data keys that nothing is sealed under, except the newest; return their ids.

        Call it an hour or more after a rotation: other processes read the keys every few minutes, and until then seal
        new tenants' passwords under the old key.

        Raises:
            ConfigurationError: there is no envelope encryption; remove the key from ``encryption_keys`` instead.
            ControlUnavailableError: the control database does not answer.
        """
        refuse_while_bound("removing keys")
        if self._data_keys is None:
            raise ConfigurationError("there are no data keys; remove unused keys from encryption_keys")
        deleted = await self._data_keys.delete_unused()
        await self._data_keys.update(self._keyring)
        return deleted

    async def close(self) -> None:
        """Close the administrative connections that are kept open between rotations."""
        await self._admin_connections.close()


__all__ = ["CONCURRENCY", "RotationReport", "SecretManager"]
