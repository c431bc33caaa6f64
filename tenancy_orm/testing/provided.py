"""What one test gets: its tenants, a session, a client; all of it made in the event loop of the test."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigurationError
from ..tenancy import Tenancy
from ..tenants.manager import CreatedTenant
from . import clients
from .run import TestRun
from .wanted import Wanted


@dataclass(slots=True)
class Provided:
    """The values of the fixtures, those that the test asks for."""

    tenancy: Tenancy
    tenant: CreatedTenant | None = None
    tenant_factory: Callable[..., Any] | None = None
    tenant_session: Any = None
    tenant_client: Any = None


@dataclass(slots=True)
class _Tenants:
    """The tenants of one test."""

    tenancy: Tenancy
    created: list[CreatedTenant] = field(default_factory=list)

    async def create(self, slug: str | None = None, **options: Any) -> CreatedTenant:
        """Create a tenant; the arguments are those of ``tenancy.tenants.create``."""
        made = await self.tenancy.tenants.create(slug or f"test-{secrets.token_hex(6)}", **options)
        self.created.append(made)
        return made

    async def remove(self) -> None:
        """Remove them all."""
        for tenant in self.created:
            await self.tenancy.tenants.delete(tenant.id)
            await self.tenancy.tenants.purge(tenant.id)


@asynccontextmanager
async def provide(run: TestRun, wanted: Wanted) -> AsyncIterator[Provided]:
    """Prepare what a test asks for in the running event loop, and remove it afterwards."""
    async with AsyncExitStack() as stack:
        await run.openings.enter()
        if wanted.loop_ends:
            stack.push_async_callback(run.openings.leave)
        tenancy = run.application.tenancy
        tenants = _Tenants(tenancy)
        stack.push_async_callback(tenants.remove)
        given = Provided(tenancy)
        given.tenant_factory = tenants.create if wanted.asynchronous else _blocking(run, tenants.create)
        if wanted.names & {"tenant", "tenant_session", "tenant_client"}:
            given.tenant = await tenants.create()
        if "tenant_session" in wanted.names and given.tenant:
            if not wanted.asynchronous:
                raise ConfigurationError("the fixture tenant_session needs an asynchronous test")
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
    headers = [("X-API-Key", tenant.api_key)]
    async with clients.lifespan(app) as started:
        if wanted.asynchronous:
            async with clients.asynchronous(started, headers) as client:
                yield client
        else:
            with clients.synchronous(started, headers, run.background) as sync_client:
                yield sync_client


__all__ = ["Provided", "provide"]
