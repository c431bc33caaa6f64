"""``FilledCreation``: the creation of a tenant with contents from elsewhere, all or nothing.

In place of the clone of a template, the step "filled" makes an empty database, lets the caller bring contents in, and
hands them over: see ``new_databases``. A process that dies leaves what ``reconcile`` removes, or
completes where all is done, as any creation does.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from uuid import UUID

from ...servers import Server
from ...tenant import Tenant
from ..copies.database_properties import DatabaseProperties
from ..copies.empty_databases import InstalledExtension
from ..rights.role_settings import RoleSettings
from ..server_objects import databases, roles
from .long_creation import LongCreation
from .new_databases import ContentsPolicy, NewDatabase, NewDatabases
from .pipeline import CreationRequest, ProvisioningServices, Step


@dataclass(frozen=True, slots=True, kw_only=True)
class Filling:
    """Where the contents of a new tenant come from.

    Attributes:
        fill: Brings the contents in, as ``new.login``.
        policy: Decides whether they may become the tenant's.
        timeout: Seconds that all of it may take, beside ``provisioning.timeout``.
        extensions: The extensions that the database needs, beside the configured ones.
        finish: Awaited with the tenant before its first login: runs missing revisions, for example.
        like: The locale and the settings that the database gets, where it is a copy of one.
        copied_from: The tenant that they are a copy of, which its row says from the first.
    """

    fill: Callable[[NewDatabase], Awaitable[None]]
    policy: ContentsPolicy
    timeout: float
    extensions: Sequence[InstalledExtension] = ()
    finish: Callable[[Tenant], Awaitable[None]] | None = None
    like: DatabaseProperties | None = None
    copied_from: UUID | None = None


class FilledCreation(LongCreation):
    """The creation of one tenant with contents from elsewhere.

    Args:
        services: Of provisioning.
        server: Where it is created.
        request: What is created.
        settings: The settings of its role.
        new_databases: Makes the database.
        filling: Where its contents come from.
    """

    def __init__(
        self,
        services: ProvisioningServices,
        server: Server,
        request: CreationRequest,
        settings: RoleSettings,
        *,
        new_databases: NewDatabases,
        filling: Filling,
    ) -> None:
        super().__init__(services, server, request, settings, timeout=filling.timeout)
        self._new_databases = new_databases
        self._filling = filling

    def _making_steps(self) -> tuple[Step, ...]:
        return (
            Step("role", self._create_role, self._drop_role),
            Step("filled", self._fill, self._drop_database),
            Step("finished", self._finish, self._end_connections),
        )

    async def _fill(self) -> None:
        draft, filling = self._draft, self._filling
        tenant = await self._services.registry.get(draft.id)
        async with self._new_databases.open(
            tenant,
            draft.server,
            draft.database,
            extensions_of=filling.extensions,
            like=filling.like,
            timeout=self._services.config.provisioning.timeout,
            valid_for=filling.timeout,
            lock_held=True,
        ) as new:
            await filling.fill(new)
            await new.hand_over(tenant, draft.role, policy=filling.policy)
        await databases.open_to_role(self._admin, draft.database, role=draft.role)

    async def _finish(self) -> None:
        if self._filling.finish is not None:
            await self._filling.finish(await self._services.registry.get(self._draft.id))
        await self._read_revision()
        await roles.set_finished(self._admin, self._draft.role)


__all__ = ["FilledCreation", "Filling"]
