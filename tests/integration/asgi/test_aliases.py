"""Former slugs and domains of a tenant's own, as a request sees them."""

from __future__ import annotations

import httpx
import pytest
from sqlalchemy import text
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from tenancy_orm import Tenancy, current_tenant
from tenancy_orm.asgi import SubdomainResolver, TenancyMiddleware


async def whoami(request: Request) -> PlainTextResponse:
    """Name the bound tenant."""
    return PlainTextResponse(current_tenant().slug)


def client(tenancy: Tenancy, key: str, *, custom_domains: bool = False, redirect: bool = False) -> httpx.AsyncClient:
    """A client of an application on example.test."""
    resolver = SubdomainResolver("example.test", custom_domains=custom_domains, redirect=redirect)
    app = Starlette(
        routes=[Route("/who/{rest:path}", whoami)],
        middleware=[Middleware(TenancyMiddleware, tenancy=tenancy, resolvers=[resolver])],
    )
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), headers={"X-API-Key": key})


async def test_a_former_slugs_host_is_served_while_it_redirects(tenancy: Tenancy) -> None:
    """Both hosts reach the tenant; a stranger's is refused."""
    created = await tenancy.tenants.create("acme")
    await tenancy.tenants.create("globex")
    await tenancy.tenants.rename("acme", "acme-corp")
    async with client(tenancy, created.api_key) as http:
        for slug, status in (("acme", 200), ("acme-corp", 200), ("globex", 403)):
            assert (await http.get(f"http://{slug}.example.test/who/")).status_code == status


async def test_a_former_slugs_host_can_redirect(tenancy: Tenancy) -> None:
    """With 308, to the same path and query on the present host; never to another host."""
    created = await tenancy.tenants.create("acme")
    await tenancy.tenants.rename("acme", "acme-corp")
    async with client(tenancy, created.api_key, redirect=True) as http:
        moved = await http.get("http://acme.example.test:8000/who/a%20b//evil.example?x=1&y=%20")
        assert moved.status_code == 308
        assert moved.headers["location"] == "//acme-corp.example.test:8000/who/a%20b//evil.example?x=1&y=%20"
        slash = await http.get("http://acme.example.test/who/a%2Fb")
        assert slash.headers["location"] == "//acme-corp.example.test/who/a%2Fb"
        assert (await http.get("http://acme-corp.example.test/who/")).text == "acme-corp"
        hostile = await http.get("http://acme.example.test//evil.example/x")
        assert hostile.headers["location"].startswith("//acme-corp.example.test/")


async def test_a_host_of_the_applications_own_names_no_tenant(tenancy: Tenancy) -> None:
    """A probe with a key comes by the container's name; all other hosts must be the tenant's."""
    created = await tenancy.tenants.create("acme")
    resolver = SubdomainResolver("example.test", custom_domains=True, hosts=["Web.internal", "127.0.0.1"])
    app = Starlette(
        routes=[Route("/who/{rest:path}", whoami)],
        middleware=[Middleware(TenancyMiddleware, tenancy=tenancy, resolvers=[resolver])],
    )
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), headers={"X-API-Key": created.api_key}) as http:
        for host, status in (("web.internal", 200), ("127.0.0.1:8000", 200), ("other.internal", 403)):
            assert (await http.get(f"http://{host}/who/")).status_code == status


async def test_a_former_slug_is_refused_after_its_time(tenancy: Tenancy) -> None:
    """It names nobody any more, so it does not name the key's tenant."""
    created = await tenancy.tenants.create("acme")
    await tenancy.tenants.rename("acme", "acme-corp", redirect_seconds=0)
    async with client(tenancy, created.api_key) as http:
        assert (await http.get("http://acme.example.test/who/")).status_code == 403


@pytest.mark.parametrize(("host", "status"), [("app.acme.example", 200), ("app.globex.example", 403), ("x.test", 403)])
async def test_only_a_verified_domain_of_its_own_is_served(tenancy: Tenancy, host: str, status: int) -> None:
    """Another tenant's domain, and an unknown one, are refused for this key."""
    created = await tenancy.tenants.create("acme")
    globex = await tenancy.tenants.create("globex")
    for tenant, domain in ((created.tenant, "app.acme.example"), (globex.tenant, "app.globex.example")):
        await tenancy.domains.claim(tenant, domain)
    async with client(tenancy, created.api_key, custom_domains=True) as http:
        assert (await http.get(f"http://{host}/who/")).status_code == 403
        async with tenancy.internals.control.transaction() as connection:
            await connection.execute(text("UPDATE tenancy.domains SET verified_at = now()"))
        tenancy.internals.directory.invalidate(tenant_id=created.id)
        assert (await http.get(f"http://{host}/who/")).status_code == status
