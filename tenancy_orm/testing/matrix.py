"""The tenancy matrix: every route of an application, called for one tenant's data by somebody who is not that tenant's.

``pytest --tenancy-matrix`` runs ``check`` and prints the report; call it yourself where there is no pytest:

```python
report = await check(app, tenancy)
print(report)
assert not report.leaks
```

Two tenants are created for it. The *owner* has rows and gets answers with values that nobody else has. The *other*
tenant asks each route for them: it names the owner by host, header, path, query and body, and the owner's objects by
the ids that the owner's own answers have. So does a caller without a key, and one with a key of the owner's that is
revoked. A route leaks where such a caller is shown one of these values, or where a row of the owner's changes.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import AsyncExitStack, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from starlette.types import ASGIApp

from ..asgi.exempt import ExemptPaths
from ..asgi.resolvers import SubdomainResolver
from ..errors import ConfigurationError, TenancyError
from ..quotas.overrides import REQUEST_RATE
from ..tenant import Tenant
from ._matrix_client import Client, lifespan_of
from ._matrix_learning import Side
from ._matrix_report import Finding, Report
from ._matrix_routes import inner_path, key_header_of, resolvers_of, routes_of
from ._matrix_rows import Rows
from ._matrix_values import Owned
from ._matrix_walk import Walk

if TYPE_CHECKING:
    from ..tenancy import Tenancy

THROW_AWAY: Final = "tenancy_matrix"
"""The key in a tenant's metadata that says that the walk may change and destroy all that the tenant has."""

_REQUESTS_PER_SECOND: Final = 1_000_000.0

Credentials = Callable[["Tenancy", Tenant], Awaitable[Mapping[str, str]]]
"""Returns the headers of somebody who may do everything in a tenant: of a person who is logged in, say."""


async def check(
    app: ASGIApp,
    tenancy: Tenancy,
    *,
    public: Iterable[str] = (),
    examples: Mapping[str, Any] | None = None,
    credentials: Credentials | None = None,
    beside_others: bool = False,
    timeout: float = 30.0,
) -> Report:
    """Create two tenants, walk all routes of an application with them, purge them, and return what answered.

    For test installations: the routes do what they do, and some may reach what is not in a tenant's database.

    Args:
        app: The application; its lifespan is run.
        tenancy: The one that the application's ``TenancyMiddleware`` has.
        public: Paths that are expected to answer everybody: ``/healthz``, ``/p/*``. They are not tried.
        examples: Bodies that routes take, where no OpenAPI document says so, by method and path:
            ``{"POST /notes": {"text": "hello"}}``; messages of websockets by ``WEBSOCKET /live``, a list. Or a function
            of an ``Owned``, which has texts and ids of one tenant:
            ``lambda own: {"text": own.text(), "folder_id": str(own.id("folders"))}``.
        credentials: Who calls for a tenant; whoever has its API key with all scopes where None.
        beside_others: Walk although there are other tenants.
        timeout: How long an answer may take, in seconds.

    Raises:
        ConfigurationError: the installation has other tenants; or the application has no routes, or takes no API keys
            and ``credentials`` is None.
        TenancyError: a tenant cannot be created.
    """
    async with tenancy, AsyncExitStack() as stack:
        if not beside_others and await tenancy.tenants.count() > await tenancy.tenants.count(
            metadata={THROW_AWAY: True}
        ):
            raise ConfigurationError(
                "the walk changes and deletes what routes can reach, and this installation has tenants: run it on an "
                "installation for tests, or with beside_others=True"
            )
        # what the walk calls is a lot, and a limit that it meets is no refusal
        tier = max(tenancy.config.tiers.values(), key=lambda tier: tier.requests_per_second or float("inf"))
        quotas: dict[str, Any] = {name: {"amount": None} for name in tier.limits} | {REQUEST_RATE: _REQUESTS_PER_SECOND}
        made = []
        for role in ("owner", "other"):
            slug = f"matrix-{role}-{secrets.token_hex(4)}"
            created = await tenancy.tenants.create(slug, tier=tier.name, metadata={THROW_AWAY: True}, quotas=quotas)
            stack.push_async_callback(_purge, tenancy, created.tenant)
            made.append(created.tenant)
        return await walk(
            app,
            tenancy,
            *made,
            public=public,
            examples=examples,
            credentials=credentials,
            timeout=timeout,
        )


async def walk(
    app: ASGIApp,
    tenancy: Tenancy,
    owner: Tenant,
    other: Tenant,
    *,
    public: Iterable[str] = (),
    examples: Mapping[str, Any] | None = None,
    credentials: Credentials | None = None,
    timeout: float = 30.0,
) -> Report:
    """Walk all routes with two tenants that exist, and return what answered. ``check`` creates and purges them.

    Args:
        app: As for ``check``.
        tenancy: As for ``check``.
        owner: The tenant that others try to reach.
        other: The tenant that tries. Both have ``{THROW_AWAY: True}`` in their metadata.
        public: As for ``check``.
        examples: As for ``check``.
        credentials: As for ``check``.
        timeout: As for ``check``.

    Raises:
        ConfigurationError: as for ``check``; or one of the tenants is not to be thrown away.
    """
    for tenant in (owner, other):
        if not tenant.metadata.get(THROW_AWAY):
            raise ConfigurationError(
                f"the walk changes and deletes what tenant {tenant.slug!r} has: give one that was created with "
                f"metadata={{{THROW_AWAY!r}: True}}"
            )
    expected = ExemptPaths(public, purpose="tenancy_matrix_public")
    async with tenancy, AsyncExitStack() as stack:
        state = await stack.enter_async_context(lifespan_of(app))
        routes, resolvers = routes_of(app), resolvers_of(app)
        if not routes:
            raise ConfigurationError(
                "the application has no routes that can be listed: give the Starlette, FastAPI or Litestar application"
            )
        send_key = key_header_of(app)
        if send_key is None and credentials is None:
            raise ConfigurationError(
                "the application reads API keys from no header: say by credentials= who calls for a tenant"
            )

        async def _key(tenant: Tenant, *, revoked: bool = False) -> Mapping[str, str]:
            issued = await tenancy.keys.issue(tenant, name="tenancy matrix", scopes=["*"])
            if revoked:
                await tenancy.keys.revoke(issued.key_id)
            name, prefix = send_key or ("", "")
            return {name: prefix + issued.text}

        async def headers(tenant: Tenant) -> Mapping[str, str]:
            if credentials is not None:
                return await credentials(tenancy, tenant)
            return await _key(tenant)

        sides = []
        for tenant in (owner, other):
            owned = Owned(tenant.slug, tenant.id)
            side = Side(tenant, owned, Rows(tenancy, tenant, owned), partial(headers, tenant))
            side.headers = await side.log_in()
            sides.append(side)
        host = next((one.domain for one in resolvers if isinstance(one, SubdomainResolver)), "testserver")
        walking = Walk(
            Client(app, state, host=host, timeout=timeout),
            routes,
            resolvers,
            owner=sides[0],
            other=sides[1],
            revoked=None if send_key is None else lambda: _key(owner, revoked=True),
            examples=examples or {},
            public=lambda route: expected.has(inner_path(route.path, resolvers)),
        )
        return await walking.run()


async def _purge(tenancy: Tenancy, tenant: Tenant) -> None:
    # an administrative route may have removed it already
    with suppress(TenancyError):
        await tenancy.tenants.delete(tenant.id)
    await tenancy.tenants.purge(tenant.id)


__all__ = ["THROW_AWAY", "Finding", "Owned", "Report", "check", "walk"]
