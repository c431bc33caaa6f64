"""``LongCreation``: what creations have in common that do not clone a template, and take their time."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import replace

from ...cancellation import run_to_completion
from ...postgres import connections, locks
from ...postgres.connections import Connection
from ...servers import Server
from ..rights import grants
from ..rights.role_settings import RoleSettings
from ..server_objects import roles
from ..server_objects.admin_connections import HOLDING
from ..templates.building import TemplateInfo
from .pipeline import Creation, CreationRequest, ProvisioningServices, Step, tenant_key


class LongCreation(Creation):
    """The creation of one tenant with steps that may take minutes. It has no template, and runs no seeds.

    Args:
        services: Of provisioning.
        server: Where it is created.
        request: What is created.
        settings: The settings of its role.
        timeout: Seconds that it may take beside ``provisioning.timeout``.
    """

    def __init__(
        self,
        services: ProvisioningServices,
        server: Server,
        request: CreationRequest,
        settings: RoleSettings,
        *,
        timeout: float,
    ) -> None:
        no_template = TemplateInfo(request.draft.server, "", None)
        super().__init__(services, server, no_template, replace(request, seed=False), settings)
        self._timeout += timeout

    def _ending(self, step: Step) -> AbstractAsyncContextManager[None]:
        # others' statements take long in the steps after the role, and wait for nobody
        return super()._ending(step) if step.name == "role" else nullcontext()

    async def _lock(self) -> Connection:
        # a connection of its own: one that is kept for the next creation would be idle for too long
        connection = await self._blockers.connect(settings=HOLDING)
        try:
            await locks.lock(connection, tenant_key(self._draft.id), timeout=self._timeout)
        except BaseException:
            await run_to_completion(connections.close(connection))
            raise
        return connection

    @property
    def _unfinished(self) -> tuple[str, ...]:
        return (roles.unfinished_statement(self._draft.role),)

    async def _read_revision(self) -> None:
        """Take the revision from the database: it is not that of a template."""
        owner = self._services.names.owner
        connection = await self._blockers.connect(self._draft.database, role=owner)
        try:
            self._revision = await grants.revision(connection, owner)
        finally:
            await run_to_completion(connections.close(connection))


__all__ = ["LongCreation"]
