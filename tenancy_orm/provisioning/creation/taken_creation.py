"""``TakenCreation``: the creation of a tenant of a database that exists already, which stays where it is.

It never drops the database: an undo brings it back to how it was, and ``reconcile`` leaves it to the operation that
takes it over, see ``Registry.is_taken_over``.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

from ...cancellation import run_to_completion
from ...errors import TenancyError
from ...postgres.errors import describe
from ...postgres.failures import SERVER_FAILURES
from ...servers import Server
from ...tenant import Tenant
from ..rights.role_settings import RoleSettings
from ..server_objects import roles
from .long_creation import LongCreation
from .pipeline import CreationRequest, ProvisioningServices, Step
from .takeover import DatabaseTakeover, Takeover

logger = logging.getLogger("tenancy_orm.provisioning")


class TakenCreation(LongCreation):
    """The creation of one tenant of an existing database.

    Args:
        services: Of provisioning.
        server: Where it is.
        request: What is created.
        settings: The settings of its role.
        takeover: The database.
    """

    def __init__(
        self,
        services: ProvisioningServices,
        server: Server,
        request: CreationRequest,
        settings: RoleSettings,
        *,
        takeover: Takeover,
    ) -> None:
        super().__init__(services, server, request, settings, timeout=takeover.timeout)
        self._takeover = takeover
        self._state: Mapping[str, Any] | None = None

    @property
    def _proof_name(self) -> str:
        return "taken"  # which no reconcile removes, or finishes before it is the tenant's

    def _making_steps(self) -> tuple[Step, ...]:
        return (
            Step("role", self._create_role, self._drop_role),
            Step("takeover", self._take, self._give_back),
        )

    async def _register(self) -> None:
        await super()._register()
        await self._takeover.begin(await self._services.registry.get(self._draft.id))

    def _database(self) -> DatabaseTakeover:
        draft = self._draft
        return DatabaseTakeover(self._services, draft.server, self._takeover.database, draft.role)

    async def _take(self) -> None:
        database, draft, takeover = self._database(), self._draft, self._takeover
        found = await database.undo_statements()
        state = {**found, "statements": [*takeover.undo, *found["statements"]]}
        await takeover.record(state)
        self._state = state
        tenant = await self._services.registry.get(draft.id)
        await database.take(tenant, takeover, self._admin, name=draft.database)
        await self._read_revision()

    async def run(self) -> Tenant:
        """Create the tenant, or bring the database back to how it was; see ``Creation``."""
        tenant = await super().run()
        # not before: until it is the tenant's for good, an undo brings it back to how it was
        await run_to_completion(self._set_finished())
        return tenant

    async def _set_finished(self) -> None:
        """Take the comment back; reconcile does so too."""
        try:
            async with (
                asyncio.timeout(self._services.config.pool.connect_timeout),
                self._services.admin_connections.use(self._server) as connection,
            ):
                await roles.set_finished(connection, self.role)
        except (TenancyError, *SERVER_FAILURES) as exc:
            logger.warning("role %s keeps the comment of a creation until reconcile: %s", self.role, describe(exc))

    async def _give_back(self) -> None:
        if self._state is not None:
            await self._database().undo(self._state, self._admin, name=self._draft.database)


__all__ = ["TakenCreation"]
