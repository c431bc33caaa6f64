"""The tenants of a process, which its tests borrow one after the other."""

from __future__ import annotations

import asyncio
import secrets
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from uuid import UUID

from ..errors import TenantNotFoundError
from ..tenancy import Tenancy
from ..tenants.manager import CreatedTenant
from ._background import BackgroundLoop
from ._cloning import Cloner, Snapshot
from ._states import States
from .errors import RollbackModeError

_CLONED = 3  # tenants that tests in mode clone take in turn


@dataclass(slots=True)
class Lent:
    """A tenant of the process."""

    created: CreatedTenant
    state: str
    snapshot: Snapshot | None = None
    replacing: Future[None] | None = None
    is_whole: bool = True
    """Whether nothing that a test has done to the tenant or in its database stays for the next one."""


@dataclass(slots=True)
class Lending:
    """Creates the tenants of a process, and lends them to its tests.

    Args:
        background: Where databases are replaced while tests run.
    """

    background: BackgroundLoop
    cloner: Cloner | None = None
    states: States = field(default_factory=States)
    _whole: list[Lent] = field(default_factory=list)  # for mode rollback
    _cloned: list[Lent] = field(default_factory=list)  # for mode clone; those replaced longest ago first
    _in_transaction: dict[str, Lent] = field(default_factory=dict)  # by the database, in mode rollback

    async def borrow(self, tenancy: Tenancy, *, clone: bool) -> Lent:
        """Lend a tenant that no test has now, with an empty database."""
        free = self._cloned if clone else self._whole
        if not clone:
            return free.pop() if free else await self._create(tenancy)
        ready = next((one for one in free if one.replacing is None or one.replacing.done()), None)
        if ready is None and len(free) < _CLONED:
            ready = await self._create(tenancy)
            assert self.cloner is not None  # noqa: S101 - for the type checker: there is a server by now
            ready.snapshot = await self.background.call(self.cloner.snapshot(tenancy, ready.created.tenant))
            return ready
        if ready is None:
            ready = free[0]
        free.remove(ready)
        if ready.replacing is not None:
            await asyncio.wrap_future(ready.replacing)
        return ready

    def keep_apart(self, lent: Lent) -> None:
        """From now on the tenant has one connection, in a transaction; ``end_of_transaction`` ends this."""
        self._in_transaction[_database_of(lent)] = lent

    def end_of_transaction(self, lent: Lent) -> None:
        """Let other connections reach the tenant's database again."""
        self._in_transaction.pop(_database_of(lent), None)

    def check(self, user: str | None, database: str | None) -> None:
        """Look at another connection before it is opened: what it writes is not rolled back.

        One of an administrator's, as for a migration, is let through, and no other test gets the tenant.

        Raises:
            RollbackModeError: it is for a session of a tenant that a test in mode rollback has.
        """
        lent = self._in_transaction.get(database or "")
        if lent is None:
            return
        place = lent.created.tenant.placement
        if place is not None and user == place.role:
            raise RollbackModeError(
                f"tenancy.sync, or a Tenancy that is not the application's, needs a connection of its own to tenant "
                f"{lent.created.slug!r}"
            )
        lent.is_whole = False

    async def is_unchanged(self, tenancy: Tenancy, lent: Lent) -> bool:
        """Whether the control database has of a tenant what it had when the tenant was created."""
        return await self._state(tenancy, lent.created.id) == lent.state

    async def give_back(self, tenancy: Tenancy, lent: Lent) -> bool:
        """Take a tenant back, and return True; one that a test has changed is removed instead."""
        if not lent.is_whole:
            await self.remove(tenancy, lent)
            return False
        if lent.snapshot is None:
            self._whole.append(lent)
            return True
        tenancy.internals.router.retire(lent.created.id)
        assert self.cloner is not None  # noqa: S101 - as above
        lent.replacing = asyncio.run_coroutine_threadsafe(self.cloner.replace(lent.snapshot), self.background.loop)
        self._cloned.append(lent)
        return True

    async def remove(self, tenancy: Tenancy, lent: Lent) -> None:
        """Purge a tenant."""
        if lent.snapshot is not None and self.cloner is not None:
            # first: its role has rights in it, and could not be dropped
            await self.background.call(self.cloner.drop(lent.snapshot))
        with suppress(TenantNotFoundError):  # the test has purged it
            await remove(tenancy, lent.created.id)

    async def remove_all(self, tenancy: Tenancy) -> None:
        """Purge every tenant, at the end of the run."""
        lent, self._whole, self._cloned = [*self._whole, *self._cloned], [], []
        for one in lent:
            if one.replacing is not None:
                await asyncio.wait([asyncio.wrap_future(one.replacing)])
            await self.remove(tenancy, one)

    async def _create(self, tenancy: Tenancy) -> Lent:
        created = await tenancy.tenants.create(f"test-{secrets.token_hex(6)}")
        return Lent(created, await self._state(tenancy, created.id))

    async def _state(self, tenancy: Tenancy, tenant_id: UUID) -> str:
        return await self.background.call(self.states.read(tenancy.config.control_url, tenant_id))


def _database_of(lent: Lent) -> str:
    place = lent.created.tenant.placement
    return place.database if place is not None else ""


async def remove(tenancy: Tenancy, tenant_id: UUID) -> None:
    """Purge a tenant, whatever its status."""
    await tenancy.tenants.delete(tenant_id)
    await tenancy.tenants.purge(tenant_id)


__all__ = ["Lending", "Lent", "remove"]
