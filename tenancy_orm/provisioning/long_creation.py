"""``LongCreation``: what creations have in common whose database is not a clone of a template, and takes its time."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager, nullcontext

from ..cancellation import run_to_completion
from ..postgres import connections, locks
from ..postgres.connections import Connection
from . import grants, roles
from .admin_connections import HOLDING
from .pipeline import Creation, Step, tenant_key


class LongCreation(Creation):
    """The creation of one tenant with steps that may take minutes."""

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
