"""``WarmPool``: databases cloned ahead of need, sealed, with their roles, until creations claim them.

A warm database has the name of a tenant's database, with a number of its own in place of a tenant's id. Nobody can
connect to it, its role has neither a password nor LOGIN, and its comment says that no tenant has had it. The row in the
control database says for which recipe it was made: template, rights, settings. A creation claims one of its own recipe
only, so that two releases, or processes with other settings, can run side by side.

Each of them asks for its own recipe from time to time. Those that nobody has asked for lately are dropped: after an
upgrade of the fleet, for example, those with the former schema.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from contextvars import Context
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Final
from uuid import UUID

from ..cancellation import run_to_completion
from ..context import refuse_while_bound
from ..control.names import Names
from ..errors import DatabaseExistsError, TenancyError
from ..postgres import connections, locks
from ..postgres.connections import Connection, version
from ..postgres.errors import describe
from ..postgres.failures import FAILURES, SERVER_FAILURES
from ..registry.rows import uuid7
from ..routing import marker
from ..servers.server import Server
from .creation.pipeline import ProvisioningServices, tenant_key
from .creation.warm_creation import recipe
from .creation.warm_records import WarmRecord
from .preparation.prepared_servers import PreparedServers
from .rights import grants
from .rights.role_settings import RoleSettings
from .rights.tenant_rights import TenantRights
from .server_objects import databases, removal, roles
from .server_objects.blockers import Blockers
from .templates.building import TemplateInfo

logger = logging.getLogger("tenancy_orm.provisioning")

WANTED_SECONDS: Final = 900.0
"""How long warm databases are kept that no process has asked for."""

_WINDOW: Final = 600.0  # seconds; the pool holds what the busiest one of a day has used
_DAY: Final = 86_400.0
_PAUSE_SECONDS: Final = 0.5  # between a creation and the filling that it asks for: others may follow at once
_LOOK_SECONDS: Final = 0.2  # how often a filling that waits looks whether it may go on
_PATIENCE_SECONDS: Final = 30.0  # how long it waits
_CREATION_SECONDS: Final = 30.0  # for which one it waits: an older one takes long, or is dead
_MOST_OTHERS: Final = 5  # how many times the largest pool other recipes have together


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmStatus:
    """The warm databases of one server.

    Attributes:
        server: Its name.
        ready: How many a creation of this configuration can claim.
        target: How many there should be.
        incomplete: How many are being made or dropped, or were left so by a process that was killed.
        others: How many belong to other releases or settings.
        oldest: When the oldest ready one was made.
    """

    server: str
    ready: int
    target: int
    incomplete: int
    others: int
    oldest: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmReport:
    """What a refill, or a drain, has done.

    Attributes:
        made: The databases that were made, by name.
        dropped: The databases that were dropped: nobody asks for them, or they were incomplete.
        errors: What failed, with its server.
    """

    made: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    errors: tuple[str, ...] = ()


@dataclass(slots=True)
class _Findings:
    made: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


class WarmPool:
    """Makes and drops warm databases (``tenancy.warm_pool``).

    Args:
        services: Of provisioning.
        prepared: Makes servers ready for creations.
        is_busy: Whether creations or requests wait for a server in this process.
    """

    def __init__(
        self,
        services: ProvisioningServices,
        *,
        prepared: PreparedServers,
        is_busy: Callable[[str], bool],
    ) -> None:
        self._services = services
        self._records = services.warm_records
        self._prepared = prepared
        self._is_busy = is_busy
        self._config = services.config.provisioning
        self._refilling: dict[str, asyncio.Task[None]] = {}
        self._again: set[str] = set()  # servers on which tenants were created since their refilling began
        self._closed = False

    @property
    def _names(self) -> Names:
        return self._services.names

    def _blockers(self, server: Server) -> Blockers:
        return self._services.blockers(server)

    def _chosen(self, servers: Iterable[str] | None) -> list[str]:
        known = self._services.servers
        return [known[name].name for name in (known if servers is None else servers)]

    # --- what there is ----------------------------------------------------------------------------------------------

    async def status(self, *, servers: Iterable[str] | None = None) -> list[WarmStatus]:
        """Return how many warm databases there are, by server.

        Raises:
            UnknownServerError: no such server is configured.
            ServerUnavailableError, ControlUnavailableError: a server does not answer.
        """
        refuse_while_bound("looking at the warm pool")
        return [await self._status(name) for name in self._chosen(servers)]

    async def _status(self, name: str) -> WarmStatus:
        server, settings = await self._prepared.with_settings(name)
        connection = await self._blockers(server).connect()
        try:
            wanted = recipe(
                self._services, await self._services.templates.ensure(server), settings, version(connection)
            )
        finally:
            await run_to_completion(connections.close(connection))
        found = await self._records.of_server(name)
        ready = [one for one in found if one.state == "ready" and one.recipe == wanted]
        return WarmStatus(
            server=name,
            ready=len(ready),
            target=await self.target(name),
            incomplete=sum(one.state != "ready" for one in found),
            others=sum(one.state == "ready" and one.recipe != wanted for one in found),
            oldest=min((one.created_at for one in ready), default=None),
        )

    async def target(self, name: str) -> int:
        """Return how many warm databases a server should have.

        It is as many as tenants were created on it in the busiest ten minutes of the last day, but at least
        ``provisioning.warm_pool`` and at most ``provisioning.warm_pool_max``; none while it is in drain.

        Raises:
            UnknownServerError: no such server is configured.
            ControlUnavailableError: the control database does not answer.
        """
        refuse_while_bound("looking at the warm pool")
        least, most = self._config.warm_pool, max(self._config.warm_pool, self._config.warm_pool_max)
        server = self._services.servers[name]
        if not least or (server.row is not None and server.row.state != "active"):
            return 0
        if least == most:
            return least
        first = UUID(int=int((time.time() - _DAY) * 1e3) << 80)
        return min(max(least, await self._records.busiest(name, first=str(first), window=_WINDOW)), most)

    # --- in the background ------------------------------------------------------------------------------------------

    def refill_soon(self, name: str) -> None:
        """Refill the pool of a server in the background, once its creations have ended: this process has created."""
        if not self._config.warm_pool or not self._config.warm_pool_background or self._closed:
            return
        if name in self._refilling:
            self._again.add(name)
            return
        # unbound: whoever happens to run now
        task = asyncio.get_running_loop().create_task(self._refill_until_full(name), context=Context())
        self._refilling[name] = task

    async def _refill_until_full(self, name: str) -> None:
        try:
            while True:
                self._again.discard(name)
                await asyncio.sleep(_PAUSE_SECONDS)
                if await self._may_work(name):
                    await self._on_each([name], partial(self._refill, replace=False))
                if name not in self._again:
                    return
        except FAILURES as exc:
            logger.warning("the warm pool of server %s is not refilled now: %s", name, describe(exc))
        finally:
            del self._refilling[name]

    async def close(self) -> None:
        """End what refills the pool in the background; what it is making is removed."""
        self._closed = True
        tasks = list(self._refilling.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- filling ----------------------------------------------------------------------------------------------------

    async def refill(self, *, servers: Iterable[str] | None = None, replace: bool = False) -> WarmReport:
        """Make what is missing, and drop what nobody asks for; a server that fails does not stop the others.

        One process at a time does this on a server; for the others there is nothing to do. It stops as soon as
        creations or requests wait, and is meant to be repeated.

        Args:
            servers: Only these.
            replace: Drop at once what belongs to other releases or settings, also if processes still use it.

        Raises:
            UnknownServerError: no such server is configured.
        """
        refuse_while_bound("filling the warm pool")
        return await self._on_each(self._chosen(servers), partial(self._refill, replace=replace))

    async def prune(self, *, servers: Iterable[str] | None = None) -> WarmReport:
        """Drop what nobody asks for, and make nothing: for a process that uses no warm pool, too.

        Raises:
            UnknownServerError: as ``refill``.
        """
        refuse_while_bound("pruning the warm pool")
        return await self._on_each(self._chosen(servers), self._prune)

    async def drain(self, *, servers: Iterable[str] | None = None) -> WarmReport:
        """Drop every warm database of ``servers``, or of all; a later refill makes new ones.

        Raises:
            UnknownServerError: as ``refill``.
        """
        refuse_while_bound("draining the warm pool")
        return await self._on_each(self._chosen(servers), self._drain)

    async def _on_each(self, names: list[str], work: Callable[[str, _Findings], Awaitable[None]]) -> WarmReport:
        found = _Findings()

        async def attempt(name: str) -> None:
            try:
                await work(name, found)
            except FAILURES as exc:
                logger.warning("the warm pool of server %s: %s", name, describe(exc))
                found.errors.append(f"{name}: {describe(exc)}")

        await asyncio.gather(*map(attempt, names))
        return WarmReport(made=tuple(found.made), dropped=tuple(found.dropped), errors=tuple(found.errors))

    async def _refill(self, name: str, found: _Findings, *, replace: bool) -> None:
        if not self._config.warm_pool:
            return await self._prune(name, found)
        if not await self.target(name):
            return await self._drain(name, found)  # the server takes no tenants
        server, settings = await self._prepared.with_settings(name)
        async with self._alone(server) as connection:
            if connection is None:
                return None
            template, wanted = await self._ask(name, server, settings, connection)
            target = await self.target(name)
            records = await self._records.of_server(name)
            for one in self._due(records, wanted, target, replace=replace):
                await self._drop(server, one, found)
            ready = sum(one.state == "ready" and one.recipe == wanted for one in records)
            makers = min(self._config.warm_pool_concurrency, target - ready)
            missing = iter(range(target - ready))

            async def make() -> None:
                for _ in missing:
                    if not await self._may_work(name):
                        return
                    found.made.append(await self._make(server, settings, template, wanted))

            ended = await asyncio.gather(*(make() for _ in range(makers)), return_exceptions=True)
            if failed := [error for error in ended if error is not None]:
                raise failed[0]
        return None

    async def _prune(self, name: str, found: _Findings) -> None:
        records = await self._records.of_server(name)
        # no server is connected to where there is nothing to do
        if not any(self._due(records, None, 0, replace=False)):
            return
        server = self._services.servers[name]
        async with self._alone(server) as connection:
            if connection is None:
                return
            if self._config.warm_pool:
                # other processes of these settings use it, and ask again only when they create a tenant
                await self._ask(name, *await self._prepared.with_settings(name), connection)
                records = await self._records.of_server(name)
            for one in self._due(records, None, 0, replace=False):
                await self._drop(server, one, found)

    async def _ask(
        self, name: str, server: Server, settings: RoleSettings, connection: Connection
    ) -> tuple[TemplateInfo, str]:
        """Note that what this process's settings make is in use; return its template and its recipe."""
        template = await self._services.templates.ensure(server)
        wanted = recipe(self._services, template, settings, version(connection))
        await self._records.want(name, wanted)
        return template, wanted

    async def _drain(self, name: str, found: _Findings) -> None:
        server = self._services.servers[name]
        for one in await self._records.of_server(name):
            await self._drop(server, one, found)

    def _due(
        self, records: Iterable[WarmRecord], wanted: str | None, target: int, *, replace: bool
    ) -> Iterator[WarmRecord]:
        """Which are to be dropped: incomplete ones, too many, and those that nobody asks for."""
        own = [one for one in records if one.state == "ready" and one.recipe == wanted]
        # a target that falls a little is no reason; the oldest ones go
        surplus = own[: len(own) - target] if len(own) > 2 * target else []
        others = [one for one in records if one.state == "ready" and one.recipe != wanted]
        others.sort(key=lambda one: one.wanted_seconds)
        most = _MOST_OTHERS * max(self._config.warm_pool, self._config.warm_pool_max)
        for number, one in enumerate(others):
            # the bound is for a grant hook with another answer at each call
            if replace or one.wanted_seconds > WANTED_SECONDS or (wanted is not None and number >= most):
                yield one
        yield from surplus
        yield from (one for one in records if one.state != "ready")

    @asynccontextmanager
    async def _alone(self, server: Server) -> AsyncIterator[Connection | None]:
        """A connection with which only one process at a time fills the pool of a server; None if another one does."""
        connection = await self._blockers(server).connect(purpose="tenancy-warm-pool")
        try:
            key = locks.lock_key(f"warm-pool:{self._services.installation}")
            yield connection if await locks.try_lock(connection, key) else None
        finally:
            await run_to_completion(connections.close(connection))

    async def _may_work(self, name: str) -> bool:
        """Wait until nothing waits for this server, but not for long; return whether that is so."""
        deadline = asyncio.get_running_loop().time() + _PATIENCE_SECONDS
        while self._is_busy(name) or await self._records.is_creating(name, seconds=_CREATION_SECONDS):
            if asyncio.get_running_loop().time() > deadline:
                logger.info("the warm pool of server %s is not filled now: creations or requests wait", name)
                return False
            await asyncio.sleep(_LOOK_SECONDS)
        return True

    # --- one database -----------------------------------------------------------------------------------------------

    async def _make(self, server: Server, settings: RoleSettings, template: TemplateInfo, wanted: str) -> str:
        number = uuid7()
        name, key = self._names.tenant(number), tenant_key(number)
        admins = self._services.admin_connections
        connection = await admins.acquire(server, key, timeout=self._config.timeout)
        try:
            await self._records.add(
                name, server=server.name, template=template.name, recipe=wanted, revision=template.revision
            )
            try:
                async with asyncio.timeout(self._config.timeout):
                    await self._build(connection, server, name, settings, template)
                    await self._records.complete(name)
            except DatabaseExistsError:
                # it is not this one's, and must not be dropped
                await run_to_completion(self._records.remove(name))
                raise
            except BaseException:
                await run_to_completion(self._try_to_remove(connection, server, name))
                raise
        finally:
            await run_to_completion(admins.release(server, connection, key))
        return name

    async def _build(
        self, connection: Connection, server: Server, name: str, settings: RoleSettings, template: TemplateInfo
    ) -> None:
        await roles.create_sealed(connection, name, settings=settings.statements(name))
        await self._services.templates.clone(connection, template, name)
        await databases.open_to_owner(connection, name)
        # the first connection to a database builds files that the later ones, a tenant's first one too, only read
        inside = await self._blockers(server).connect(name, role=self._names.owner)
        try:
            await grants.grant_and_mark(
                inside,
                name,
                role=name,
                rights=TenantRights.of(self._services.config, self._names.owner),
                what=await self._services.templates.contents(inside, template),
                marker=marker.warm_text(self._services.installation),
            )
        finally:
            await run_to_completion(connections.close(inside))
        await databases.seal(connection, name)

    async def _try_to_remove(self, connection: Connection, server: Server, name: str) -> None:
        try:
            await self._remove(connection, server, name)
        except (TenancyError, *SERVER_FAILURES) as exc:
            logger.warning("the incomplete warm database %s stays until reconcile: %s", name, describe(exc))

    async def _drop(self, server: Server, record: WarmRecord, found: _Findings) -> None:
        """Drop a warm database, unless it is being made, or a creation claims it."""
        number = self._names.parse(record.name)
        if number is None:
            return
        key = tenant_key(number)
        connection = await self._services.admin_connections.connect(server)
        try:
            if await locks.try_lock(connection, key) and await self._records.withdraw(record.name):
                await self._remove(connection, server, record.name)
                found.dropped.append(record.name)
        finally:
            await run_to_completion(self._services.admin_connections.release(server, connection, key))

    async def _remove(self, connection: Connection, server: Server, name: str) -> None:
        deadline = asyncio.get_running_loop().time() + self._config.timeout
        async with asyncio.timeout_at(deadline):
            if not await removal.is_foreign(connection, name, marker.warm_text(self._services.installation)):
                await removal.remove(
                    connection, self._blockers(server), self._names, database=name, role=name, deadline=deadline
                )
            await self._records.remove(name)


__all__ = ["WarmPool", "WarmReport", "WarmStatus"]
