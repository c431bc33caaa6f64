"""Operators pass maintenance, over HTTP as elsewhere; nobody else does."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.types import Scope

from tenancy_orm import Tenancy
from tenancy_orm.asgi import TenancyMiddleware
from tenancy_orm.authentication.credential import Credential
from tenancy_orm.errors import TenantMaintenanceError
from tenancy_orm.events import OperatorAdmitted


def is_operator(scope: Scope, credential: Credential) -> bool:
    """As an application might decide: by something that no tenant's key can bring about."""
    return (b"x-operator", b"yes") in scope["headers"]


Endpoint = Callable[[Request], Awaitable[PlainTextResponse]]


def client(tenancy: Tenancy, key: str, *, read: Endpoint | None = None, **options: Any) -> httpx.AsyncClient:
    """A client of an application that counts notes, and has ``read`` for ``/read``."""

    async def count(request: Request) -> PlainTextResponse:
        return PlainTextResponse(str(await tenancy.fetch_value("SELECT count(*) FROM notes")))

    app = Starlette(
        routes=[Route("/count", count), Route("/read", read or count)],
        middleware=[Middleware(TenancyMiddleware, tenancy=tenancy, **options)],
    )
    return httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://api.example", headers={"X-API-Key": key}
    )


async def test_an_operator_is_served_during_maintenance(tenancy: Tenancy) -> None:
    """With sessions, and an event that says who it was; the tenant's own requests get 503."""
    created = await tenancy.tenants.create("acme")
    key = (await tenancy.keys.issue("acme", scopes=["*"])).text
    seen: list[OperatorAdmitted] = []
    tenancy.events.subscribe(OperatorAdmitted, seen.append)
    async with client(tenancy, key, operators=is_operator) as http:
        assert (await http.get("/count", headers={"X-Operator": "yes"})).text == "0"
        assert seen == []
        await tenancy.tenants.start_maintenance("acme")
        refused = await http.get("/count")
        assert (refused.status_code, "retry-after" in refused.headers) == (503, True)
        served = await http.get("/count", headers={"X-Operator": "yes"})
        assert (served.status_code, served.text) == (200, "0")
        assert [(event.slug, event.tenant_id) for event in seen] == [("acme", created.id)]


async def test_nobody_passes_maintenance_without_a_rule(tenancy: Tenancy) -> None:
    """Not with a key that may do everything either."""
    await tenancy.tenants.create("acme")
    key = (await tenancy.keys.issue("acme", scopes=["*"])).text
    await tenancy.tenants.start_maintenance("acme")
    async with client(tenancy, key) as http:
        assert (await http.get("/count", headers={"X-Operator": "yes"})).status_code == 503


async def test_an_operator_passes_nothing_but_maintenance(tenancy: Tenancy) -> None:
    """A suspended tenant is refused to all, PostgreSQL itself included."""
    created = await tenancy.tenants.create("acme")
    await tenancy.tenants.suspend("acme")
    async with client(tenancy, created.api_key, operators=lambda scope, credential: True) as http:
        assert (await http.get("/count")).status_code == 403


async def test_a_scope_alone_makes_no_operator(tenancy: Tenancy) -> None:
    """Jobs are bound without a request; textual SQL takes the word of whoever calls it."""
    await tenancy.tenants.create("acme")
    await tenancy.tenants.start_maintenance("acme")
    async with tenancy.scope("acme"):
        with pytest.raises(TenantMaintenanceError):
            await tenancy.fetch_value("SELECT 1")
        assert await tenancy.fetch_value("SELECT 1", operator=True) == 1


async def test_a_request_that_maintenance_ended_gets_no_operators_session(tenancy: Tenancy) -> None:
    """It was let in as the tenant's own, and has lost that; code outside of it is an operator's."""
    created = await tenancy.tenants.create("acme")
    inside, go_on = asyncio.Event(), asyncio.Event()

    async def read(request: Request) -> PlainTextResponse:
        assert await tenancy.fetch_value("SELECT 1", operator=True) == 1
        inside.set()
        await go_on.wait()
        with pytest.raises(TenantMaintenanceError):
            await tenancy.fetch_value("SELECT 1", operator=True)
        return PlainTextResponse("refused")

    async with client(tenancy, created.api_key, read=read) as http:
        asked = asyncio.create_task(http.get("/read"))
        await inside.wait()
        await tenancy.tenants.start_maintenance("acme")
        go_on.set()
        assert (await asked).text == "refused"
    assert await tenancy.fetch_value("SELECT 1", tenant="acme", operator=True) == 1
