"""The credential decides the tenant, whatever its kind; a request that names another is refused, and recorded."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from tenancy_orm.asgi import TenancyMiddleware
from tenancy_orm.asgi.resolvers import TenantResolver
from tenancy_orm.audit.entries import AuditEvent
from tenancy_orm.config import TenancyConfig
from tenancy_orm.context import set_current
from tenancy_orm.events import ConnectionOpened, CrossTenantRequest, IntrusionSuspected
from tenancy_orm.tenancy import Tenancy
from tenancy_orm.tenants.manager import CreatedTenant
from tests.support.asgi import PARSERS, Wire, serve
from tests.support.callers import KINDS, Caller, Callers, authenticators, believed, options
from tests.support.models import Note
from tests.support.postgres import Postgres

DEADLINE = 10.0
OPTIONS = options()
RESOLVERS: list[TenantResolver] = OPTIONS["resolvers"]


@dataclass
class Two:
    """Two tenants that know nothing of each other."""

    tenancy: Tenancy
    acme: CreatedTenant
    globex: CreatedTenant
    callers: list[Caller]
    """Of acme: one of each kind."""

    def names_of_globex(self) -> list[tuple[str, list[tuple[str, str]]]]:
        """Requests that name globex: a path and headers."""
        return [
            ("/notes", [("Host", "globex.example.com")]),
            ("/notes", [("Host", "GLOBEX.example.com:8000")]),
            ("/notes", [("X-Tenant", "globex")]),
            ("/notes", [("X-Tenant", str(self.globex.id))]),
            ("/t/globex/notes", []),
            (f"/t/{self.globex.id}/notes", []),
            ("/t/globex/notes", [("Host", "acme.example.com"), ("X-Tenant", "acme")]),
            ("/t/acme/notes", [("Host", "acme.example.com"), ("X-Tenant", "globex")]),
            ("/notes/of/globex", []),
            (f"/notes/of/{self.globex.id}", []),
        ]


@pytest.fixture
def tenancy_config(tenancy_config: TenancyConfig) -> TenancyConfig:
    """Refusals are written soon."""
    return tenancy_config.replace(keys={"usage_interval": 0.1})


@pytest.fixture
async def two(tenancy: Tenancy) -> Two:
    """Each with a note of its own."""
    acme, globex = [await tenancy.tenants.create(slug) for slug in ("acme", "globex")]
    for slug in ("acme", "globex"):
        async with tenancy.transaction(slug) as session:
            session.add(Note(body=f"note of {slug}"))
    return Two(tenancy, acme, globex, [await Callers(tenancy).make(kind, "acme") for kind in KINDS])


class TrustingMiddleware:
    """Takes the tenant from whatever the request names, once it has a valid credential: the hole itself (CWE-639)."""

    def __init__(self, app: ASGIApp, *, tenancy: Tenancy) -> None:
        self.app = app
        self.tenancy = tenancy
        self.guard = TenancyMiddleware(app, tenancy=tenancy, authenticators=authenticators())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        headers = dict(scope["headers"])
        own = await believed(self.guard, scope)
        named = [name for resolver in RESOLVERS if (name := resolver.claimed_tenant(scope, headers)) is not None]
        wanted: Any = next((name for name in named if name != "acme"), own)
        if scope["path"].startswith("/notes/of/"):
            wanted = scope["path"].removeprefix("/notes/of/")
        set_current(await self.tenancy.internals.directory.tenant(wanted))
        for resolver in RESOLVERS:
            resolver.adapt_scope(scope)
        await self.app(scope, receive, send)


def build(tenancy: Tenancy, middleware: Middleware) -> Starlette:
    async def notes(request: Request) -> JSONResponse:
        rows = await tenancy.fetch_all("SELECT body FROM notes", tenant=request.path_params.get("tenant"))
        return JSONResponse([row.body for row in rows])

    return Starlette(routes=[Route("/notes", notes), Route("/notes/of/{tenant}", notes)], middleware=[middleware])


def guarded(tenancy: Tenancy) -> Starlette:
    return build(tenancy, Middleware(TenancyMiddleware, tenancy=tenancy, **OPTIONS))


async def audited(tenancy: Tenancy, count: int) -> list[AuditEvent]:
    """The first ``count`` refusals of the audit log."""
    async with asyncio.timeout(DEADLINE):
        while True:
            found = await tenancy.audit.events(action="request.cross_tenant")
            if len(found) >= count:
                return found
            await asyncio.sleep(0.05)


async def test_naming_another_tenant_works_where_the_request_is_trusted(two: Two) -> None:
    """Acme's credential reads globex's notes, by every way of naming it: the attack."""
    app = build(two.tenancy, Middleware(TrustingMiddleware, tenancy=two.tenancy))
    async with serve(app) as port, Wire.to(port) as wire:
        for caller in two.callers:
            for path, headers in two.names_of_globex():
                answer = await wire.request(path, [*caller.headers, *headers])
                assert answer.json() == ["note of globex"], (caller.kind, path, headers)


@pytest.mark.parametrize("parser", PARSERS)
async def test_naming_another_tenant_is_refused(two: Two, postgres: Postgres, parser: str) -> None:
    """With 403 and no word about it, and without one connection to the other tenant's database."""
    two.tenancy.internals.router.retire(two.globex.id)
    opened: list[ConnectionOpened] = []
    two.tenancy.events.subscribe(ConnectionOpened, opened.append)
    async with serve(guarded(two.tenancy), http=parser) as port, Wire.to(port) as wire:
        for caller in two.callers:
            for path, headers in two.names_of_globex():
                answer = await wire.request(path, [*caller.headers, *headers])
                assert answer.status == 403, (caller.kind, path, headers)
                assert answer.json()["type"] == "urn:tenancy:problem:cross-tenant"
                assert b"globex" not in answer.body and str(two.globex.id).encode() not in answer.body
            own = await wire.request("/t/acme/notes", [*caller.headers, ("Host", "acme.example.com")])
            assert own.json() == ["note of acme"]
    assert {event.slug for event in opened} <= {"acme"}


async def test_a_tenant_that_does_not_exist_is_answered_alike(two: Two) -> None:
    """So that one tenant's callers cannot find out who the others are."""
    async with serve(guarded(two.tenancy), date_header=False) as port, Wire.to(port) as wire:
        answers = set()
        for name in ("globex", "nobody", "00000000-0000-7000-8000-000000000000"):
            for path, headers in (
                ("/notes", [("X-Tenant", name)]),
                (f"/t/{name}/notes", []),
                (f"/notes/of/{name}", []),
            ):
                for caller in two.callers:
                    answer = await wire.request(path, [*caller.headers, *headers])
                    # what is left of a rate tells the caller about its own tenant alone
                    shown = tuple(header for header in answer.headers if not header[0].startswith(b"ratelimit"))
                    answers.add((answer.status, shown, answer.body))
    assert len(answers) == 1


async def test_a_refusal_is_recorded(two: Two) -> None:
    """As an event at once, in the audit log soon, with who, from where, and whom."""
    seen: list[CrossTenantRequest] = []
    two.tenancy.events.subscribe(CrossTenantRequest, seen.append)
    async with serve(guarded(two.tenancy)) as port, Wire.to(port) as wire:
        named: list[tuple[str, list[tuple[str, str]]]] = [
            ("/notes", [("Host", "globex.example.com")]),
            ("/notes", [("X-Tenant", "globex")]),
            ("/t/globex/notes", []),
            ("/notes/of/globex", []),
        ]
        for caller in two.callers:
            for path, headers in named:
                await wire.request(path, [*caller.headers, *headers])
    resolvers = ["subdomain", "header", "path", "application"]
    # what is refused before its tenant is chosen has none
    slugs = {caller.subject: "acme" if caller.kind == "key" else None for caller in two.callers}
    assert [(event.subject, event.kind, event.slug, event.named, event.resolver, event.source) for event in seen] == [
        (
            caller.subject,
            "token" if caller.kind in ("cookie", "member") else caller.kind,
            "acme" if resolver == "application" else slugs[caller.subject],
            "globex",
            resolver,
            "127.0.0.1",
        )
        for caller in two.callers
        for resolver in resolvers
    ]
    assert {event.credential_id for event in seen} == {caller.id for caller in two.callers}
    entries = await audited(two.tenancy, 4 * len(two.callers))
    found = {
        (entry.actor.id, entry.actor.source, entry.detail["resolver"], entry.detail["named"])
        for entry in entries
        if entry.detail
    }
    assert found == {(one.subject, "127.0.0.1", resolver, "globex") for one in two.callers for resolver in resolvers}
    assert {(entry.slug, entry.tenant_id) for entry in entries if entry.actor.kind == "key"} == {("acme", two.acme.id)}


async def test_one_caller_that_names_many_tenants_raises_the_alarm(two: Two) -> None:
    """It is no mistake any more."""
    seen: list[IntrusionSuspected] = []
    two.tenancy.events.subscribe(IntrusionSuspected, seen.append)
    async with serve(guarded(two.tenancy)) as port, Wire.to(port) as wire:
        for caller in two.callers:
            for name in ("globex", "initech", "umbrella"):
                await wire.request("/notes", [*caller.headers, ("X-Tenant", name)])
    names = {"globex", "initech", "umbrella"}
    assert [(event.subject, set(event.named)) for event in seen] == [(one.subject, names) for one in two.callers]
