"""What one test gets: its tenants, a session, a client; all of it made in the event loop of the test."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigurationError, MissingExtraError, TenantNotFoundError
from ..tenancy import Tenancy
from ..tenants.manager import CreatedTenant
from ._leftovers import Watch, report, unbind
from ._lending import Lent, remove
from ._run import TestRun
from ._savepoints import running_test
from ._wanted import Wanted


@dataclass(slots=True)
class Provided:
    """The values of the fixtures, those that the test asks for."""

    tenancy: Tenancy
    test: object
    tenant: CreatedTenant | None = None
    tenant_factory: Callable[..., Any] | None = None
    tenant_session: Any = None
    tenant_client: Any = None


class TestTenants:
    """The tenants of one test: borrowed where any will do, else created for it."""

    __test__ = False

    def __init__(self, run: TestRun, watch: Watch, test: object, *, clone: bool) -> None:
        self._run = run
        self._test = test
        self._watch = watch
        self._tenancy = run.application.tenancy
        self._clone = clone
        self._borrowed: list[Lent] = []
        self._created: list[CreatedTenant] = []

    async def create(self, slug: str | None = None, **options: Any) -> CreatedTenant:
        """Return another tenant with an empty database.

        Args:
            slug: Its slug; where None, one that no other has.
            options: Further arguments of ``tenancy.tenants.create``.
        """
        if slug is not None or options:
            made = await self._tenancy.tenants.create(slug or f"test-{secrets.token_hex(6)}", **options)
            self._created.append(made)
            self._watch.ignore(made.id)
            return made
        lent = await self._run.lending.borrow(self._tenancy, clone=self._clone)
        # it is as it was created: the first request need not look it up, over a connection of this event loop
        cache = self._tenancy.internals.directory._cache
        cache.store_tenant(lent.created.tenant, cache._clock())
        self._borrowed.append(lent)
        self._watch.ignore(lent.created.id)
        if not self._clone:
            await self._run.openings.pinned(lent.created.tenant).begin(self._test)
            self._run.lending.keep_apart(lent)
        return lent.created

    async def release(self) -> list[str]:
        """Give back what was borrowed, and remove what was created; returns what the test has left open."""
        left: list[str] = []
        for created in self._created:
            with suppress(TenantNotFoundError):
                await remove(self._tenancy, created.id)
        for lent in self._borrowed:
            # two databases, which need not wait for each other
            found, is_unchanged = await asyncio.gather(
                self._end_transaction(lent), self._run.lending.is_unchanged(self._tenancy, lent)
            )
            left += found
            lent.is_whole = lent.is_whole and is_unchanged
            if not await self._run.lending.give_back(self._tenancy, lent):
                await self._run.openings.unpin(lent.created.tenant)
        return left

    async def _end_transaction(self, lent: Lent) -> list[str]:
        if self._clone:
            return []
        self._run.lending.end_of_transaction(lent)
        is_undone, left = await self._run.openings.pinned(lent.created.tenant).end()
        lent.is_whole = lent.is_whole and is_undone
        return left


@contextmanager
def synchronous_session(provided: Provided) -> Iterator[Any]:
    """A session for a plain function, by ``tenancy.sync``.

    Raises:
        MissingExtraError: psycopg is not installed.
    """
    side: Any = getattr(provided.tenancy, "sync", None)
    if side is None or provided.tenant is None:
        raise MissingExtraError("psycopg", "sync")
    with side.session(provided.tenant.slug) as session:
        yield session


@asynccontextmanager
async def provide(run: TestRun, wanted: Wanted) -> AsyncIterator[Provided]:
    """Prepare what a test asks for in the running event loop, and remove it afterwards."""
    unbind()  # what a test or a fixture outside of this has bound would be refused all that follows
    async with AsyncExitStack() as stack:
        await run.openings.enter(brief=wanted.loop_ends)
        if wanted.loop_ends:
            stack.push_async_callback(run.openings.leave)
        tenancy = run.application.tenancy
        # of the tests before, which used the same tenant, from the same address
        tenancy.internals.rates.forget()
        tenancy.internals.directory.forget_failures()
        watch, test = Watch(tenancy), object()
        running_test.set(test)
        stack.callback(running_test.set, None)  # what the next fixtures start is for no test
        tenants = TestTenants(run, watch, test, clone=wanted.mode == "clone")

        async def release() -> None:
            report([*watch.leased(), *await tenants.release(), *await watch.remove_tenants()])

        run.watch = watch
        stack.push_async_callback(release)
        given = Provided(tenancy, test)
        given.tenant_factory = tenants.create if wanted.asynchronous else _blocking(run, tenants.create)
        if wanted.names & {"tenant", "tenant_session", "tenant_client"}:
            given.tenant = await tenants.create()
        if "tenant_session" in wanted.names and given.tenant and wanted.asynchronous:
            given.tenant_session = await stack.enter_async_context(tenancy.session(given.tenant.tenant))
        if "tenant_client" in wanted.names and given.tenant:
            given.tenant_client = await stack.enter_async_context(_client(run, wanted, given.tenant))
        yield given


def _blocking(run: TestRun, create: Callable[..., Awaitable[CreatedTenant]]) -> Callable[..., CreatedTenant]:
    def tenant_factory(slug: str | None = None, **options: Any) -> CreatedTenant:
        async def work() -> CreatedTenant:
            return await create(slug, **options)

        return run.background.run(work())

    return tenant_factory


@asynccontextmanager
async def _client(run: TestRun, wanted: Wanted, tenant: CreatedTenant) -> AsyncIterator[Any]:
    app = run.application.app
    if app is None:
        raise ConfigurationError(
            "the fixture tenant_client needs an ASGI application: tenancy_app names a Tenancy; name the application"
        )
    try:
        from . import _clients as clients  # httpx takes a while, and most tests of a session need none
    except ImportError as exc:
        raise MissingExtraError(f"the fixture tenant_client: {exc.name or 'httpx'}", "testing") from exc
    headers = [("X-API-Key", tenant.api_key)]
    async with clients.lifespan(app) as started:
        if wanted.asynchronous:
            async with clients.asynchronous(started, headers) as client:
                yield client
        else:
            with clients.synchronous(started, headers, run.background) as sync_client:
                yield sync_client


__all__ = ["Provided", "provide", "synchronous_session"]
