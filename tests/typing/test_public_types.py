"""What a type checker sees of the public surface: mypy reads this file; pytest only defines its functions."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Annotated, Any, assert_type
from uuid import UUID

from fastapi import FastAPI
from fastapi.security import APIKeyCookie
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response

from tenancy_orm import Limit, Tenancy, Tenant, Tier, current_tenant
from tenancy_orm.asgi import (
    ApiKeyAuthenticator,
    Credential,
    JwtAuthenticator,
    TenancyMiddleware,
    credential_of,
    demand_scopes,
    require_scope,
)
from tenancy_orm.errors import QueryFailure
from tenancy_orm.integrations.fastapi import CurrentCredential, RequireScope, TenantSession, set_security_schemes
from tenancy_orm.queries import Rows

if TYPE_CHECKING:
    import tenancy_orm
    from tenancy_orm import Tenency  # type: ignore[attr-defined]  # noqa: F401 - names are imported lazily, and checked

    assert_type(tenancy_orm.errors.NoTenantError(), tenancy_orm.errors.NoTenantError)

    async def sessions(tenancy: Tenancy) -> None:
        """Sessions are ordinary ones."""
        async with tenancy.session() as session:
            assert_type(session, AsyncSession)
        async with tenancy.transaction("acme") as session:
            assert_type(session, AsyncSession)
        async with tenancy.scope("acme") as tenant:
            assert_type(tenant, Tenant)
        async for tenant in tenancy.each():
            assert_type(tenant, Tenant)

    async def asking(tenancy: Tenancy) -> None:
        """An answer is a pair, and an object with names."""
        async for tenant, rows in tenancy.query_all(select(1)):
            assert_type(tenant, Tenant)
            assert_type(rows, Rows)
            assert_type(rows.truncated, bool)
        async with tenancy.query_all("SELECT 1", yield_errors=True) as answers:
            async for answer in answers:
                assert_type(answer.rows.error, QueryFailure | None)
        tenancy.query_all(1)  # type: ignore[arg-type]

    async def double(number: int) -> int:
        """A coroutine function."""
        return number * 2

    def triple(number: int) -> int:
        """A plain function."""
        return number * 3

    async def running(tenancy: Tenancy) -> None:
        """``run`` has the function's own result, and checks its arguments."""
        assert_type(await tenancy.run("acme", double, 1), int)
        assert_type(await tenancy.run("acme", triple, 1), int)
        await tenancy.run("acme", triple, "one")  # type: ignore[call-overload]

    async def wrapping(tenancy: Tenancy) -> None:
        """``wrap`` keeps the function's own arguments and result."""
        assert_type(tenancy.wrap(triple)(1), int)
        assert_type(await tenancy.wrap(double, "acme")(1), int)
        tenancy.wrap(triple)("one")  # type: ignore[arg-type]

    async def managing(tenancy: Tenancy) -> AsyncIterator[Tenant]:
        """Managers return values."""
        created = await tenancy.tenants.create("acme", tier="pro")
        assert_type(created.tenant, Tenant)
        assert_type(created.api_key, str)
        assert_type(await tenancy.fetch_value("SELECT 1"), Any)
        yield current_tenant()

    class Sessions:
        """An authenticator of the application's own; what it calls its argument is its own affair."""

        async def authenticate(self, request: HTTPConnection) -> Credential | None:
            """Read the session."""
            person = request.session.get("person")
            return None if person is None else Credential("session", person, tenants=("acme",))

    class Blocking:
        """No authenticator: it is not async."""

        def authenticate(self, connection: HTTPConnection) -> Credential | None:
            """Block."""
            return None

    async def tenants_of(claims: Any) -> list[str]:
        """Find the tenants of a token."""
        return [claims["org"]]

    def serving(tenancy: Tenancy) -> None:
        """Every way to give the middleware its authenticators."""
        tokens = JwtAuthenticator(
            issuer="https://issuer.test", audience="api", tenants_claim=tenants_of, scopes_claim=lambda claims: {"*"}
        )
        app = Starlette(
            middleware=[
                Middleware(
                    TenancyMiddleware, tenancy=tenancy, authenticators=[ApiKeyAuthenticator(), tokens, Sessions()]
                )
            ]
        )
        TenancyMiddleware(app, tenancy=tenancy, authenticators=[Sessions()])
        TenancyMiddleware(app, tenancy=tenancy, authenticators=[Blocking()])  # type: ignore[list-item]
        set_security_schemes(FastAPI(), APIKeyCookie(name="session"))

    @require_scope("notes:read")
    async def endpoint(request: Request) -> Response:
        """What a request gives."""
        assert_type(credential_of(request), Credential | None)
        credential = demand_scopes(request)
        assert_type(credential.tenant, Tenant)
        assert_type(credential.tenants, tuple[str | UUID, ...] | None)
        assert_type([one.tenant for one in credential.memberships], list[Tenant])
        return Response()

    async def path_operation(
        credential: CurrentCredential,
        session: TenantSession,
        scoped: Annotated[Credential, RequireScope("notes:read")],
    ) -> None:
        """What FastAPI's dependencies give."""
        assert_type(credential, Credential)
        assert_type(session, AsyncSession)
        assert_type(scoped, Credential)


def test_numbers_are_limits() -> None:
    """A number is short for a limit; what is read is always a ``Limit``."""
    tier = Tier("small", {"users": 3, "calls": Limit(5, "day"), "free": None})
    assert_type(tier.limits["users"], Limit)
    assert tier.limits["users"] == Limit(3)
