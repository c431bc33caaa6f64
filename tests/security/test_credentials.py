"""Attacks on what is new with tokens, sessions and members; other protections are tested with each kind elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.asgi import ApiKeyAuthenticator, JwtAuthenticator, TenancyMiddleware
from tenancy_orm.authentication.credential import Credential
from tenancy_orm.context import current_tenant
from tests.support.asgi import Answer, request, serve
from tests.support.callers import COOKIE, SESSION, Caller, Callers, Sessions, options
from tests.support.issuer import Issuer

FAILURES = 20
"""Of one source until it is slowed down, by default."""


@pytest.fixture
async def tenancy(tenancy_config: TenancyConfig) -> AsyncIterator[Tenancy]:
    """An open one, with two tenants."""
    async with Tenancy(tenancy_config.replace(keys={"usage_interval": 0.1})) as opened:
        for slug in ("acme", "globex"):
            await opened.tenants.create(slug)
        yield opened


@pytest.fixture
def callers(tenancy: Tenancy) -> Callers:
    """Makes callers of them."""
    return Callers(tenancy)


def build(tenancy: Tenancy, **more: Any) -> TenancyMiddleware:
    """An application that says who its caller is."""

    async def whoami(incoming: Request) -> JSONResponse:
        credential: Credential = incoming.scope["tenancy"]
        return JSONResponse([credential.kind, credential.tenant.slug])

    async def socket(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.send_text(current_tenant().slug)
        await websocket.close()

    app = Starlette(routes=[WebSocketRoute("/ws", socket), Route("/{path:path}", whoami, methods=["GET", "POST"])])
    return TenancyMiddleware(app, tenancy=tenancy, **options(**more))


async def ask(app: TenancyMiddleware, *headers: tuple[str, str], source: str = "192.0.2.1", **more: Any) -> Answer:
    """Make one request."""
    return await request(app, headers=headers, client=(source, 50_000), **more)


def cookie_of(caller: Caller) -> str:
    """The value of its cookie."""
    return caller.headers[0][1].partition("=")[2]


# --- guesses --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def issuer() -> Iterator[Issuer]:
    """A real identity provider."""
    with Issuer() as running:
        yield running


async def test_a_flood_of_unknown_keys_of_an_issuer_causes_one_fetch_a_minute(tenancy: Tenancy, issuer: Issuer) -> None:
    """Through the middleware, from one source, which is slowed down, and from many; a valid one is always served."""
    signed = JwtAuthenticator(issuer=issuer.url, audience=issuer.audience, tenants_claim="org_id")
    app = build(tenancy, authenticators=[ApiKeyAuthenticator(), signed])

    def bearer(number: int | None, **claims: Any) -> tuple[str, str]:
        headers = None if number is None else {"kid": f"made-up-{number}"}
        return "Authorization", f"Bearer {issuer.token(org_id='acme', headers=headers, **claims)}"

    known = bearer(None)
    assert (await ask(app, known)).json() == ["token", "acme"]
    assert issuer.fetches == 1
    at_once = await asyncio.gather(*(ask(app, bearer(number)) for number in range(100)))
    assert sorted(answer.status for answer in at_once) == [401] * FAILURES + [429] * (100 - FAILURES)
    for number in range(100, 200):
        assert (await ask(app, bearer(number), source=f"198.51.100.{number}")).status == 401
    assert issuer.fetches == 1, "the first fetch was less than a minute ago"
    assert (await ask(app, known)).json() == ["token", "acme"]
    assert (await ask(app, bearer(None, jti="new"))).json() == ["token", "acme"]
    # an hour later one token of an unknown key causes one fetch, and the flood no more
    signed._keys._tried_at -= 3_600  # type: ignore[attr-defined]
    for number in range(200, 220):
        assert (await ask(app, bearer(number), source=f"198.51.100.{number}")).status == 401
    assert issuer.fetches == 2


async def test_guesses_of_every_kind_slow_their_source_down(tenancy: Tenancy, callers: Callers) -> None:
    """For all kinds together. A new key from there waits; a valid signature is no guess, and other sources go on."""
    app = build(tenancy)
    for number, kind in enumerate(("token", "cookie", "member", "session")):
        source = f"192.0.2.{number}"
        statuses = []
        for _ in range(FAILURES + 1):
            guess = (await callers.make(kind, "acme", member=False)).forged()
            statuses.append((await ask(app, *guess, source=source)).status)
        assert statuses == [401] * FAILURES + [429], kind
        for other in ("token", "session"):
            assert (await ask(app, *(await callers.make(other, "acme")).forged(), source=source)).status == 429
        key = await callers.make("key", "acme")
        assert (await ask(app, *key.headers, source=source)).status == 429, kind
        assert (await ask(app, *key.headers, source="198.51.100.1")).status == 200
        new = await callers.make(kind, "acme")
        assert (await ask(app, *new.headers, source=source)).status == 200


async def test_an_office_that_wakes_up_is_not_locked_out(tenancy: Tenancy, callers: Callers) -> None:
    """Expired and revoked tokens were somebody's own: they are no guesses."""
    app = build(tenancy)
    for kind in ("token", "cookie", "member", "session"):
        for _ in range(FAILURES):
            old = await callers.make(kind, "acme", expires=-60.0, member=False)
            assert (await ask(app, *old.headers)).status == 401
        assert (await ask(app, *(await callers.make(kind, "acme")).headers)).status == 200, kind


# --- what browsers send by themselves -------------------------------------------------------------------------------


class Unmarked(Sessions):
    """Says that its cookie is not sent by browsers, which turns the check of the origin off."""

    async def authenticate(self, connection: HTTPConnection) -> Credential | None:
        """Read it."""
        found = await super().authenticate(connection)
        return None if found is None else replace(found, sent_by_browser=False)


async def test_another_sites_page_cannot_open_a_websocket_with_a_login(tenancy: Tenancy, callers: Callers) -> None:
    """Cross-site websocket hijacking: browsers send cookies with the handshake, and CORS does not cover it."""
    session, cookie = [await callers.make(kind, "acme") for kind in ("session", "cookie")]
    token = await callers.make("token", "acme")

    async def handshake(port: int, caller: Caller, **sent: str) -> object:
        headers = [*caller.headers, *((name.replace("_", "-"), value) for name, value in sent.items())]
        try:
            async with connect(f"ws://127.0.0.1:{port}/ws", additional_headers=headers) as opened:
                return await opened.recv()
        except InvalidStatus as refused:
            return refused.response.status_code

    async with serve(build(tenancy, authenticators=[Unmarked()])) as port:
        assert await handshake(port, session, Origin="https://evil.example") == "acme", "the attack must work"
    async with serve(build(tenancy, trusted_origins=["https://app.example.net"])) as port:
        own = f"http://127.0.0.1:{port}"
        for caller in (session, cookie):
            for attack in (
                {"Origin": "https://evil.example"},
                {"Origin": "null"},
                {"Origin": "https://evil.example", "Sec_Fetch_Site": "cross-site"},
                {"Origin": f"{own}.evil.example"},
                {"Origin": own, "Sec_Fetch_Site": "same-site"},
                {"Sec_Fetch_Site": "cross-site"},
            ):
                assert await handshake(port, caller, **attack) == 403, (caller.kind, attack)
            for fair in ({}, {"Origin": own}, {"Origin": "https://app.example.net", "Sec_Fetch_Site": "cross-site"}):
                assert await handshake(port, caller, **fair) == "acme", (caller.kind, fair)
        # no page of another site can send it
        assert await handshake(port, token, Origin="https://evil.example") == "acme"


async def test_another_sites_form_cannot_change_anything_with_a_login(tenancy: Tenancy, callers: Callers) -> None:
    """By a cookie of the identity provider's as by the application's own; each of the two beside a key is not used."""
    app = build(tenancy)
    evil = [("Origin", "https://evil.example"), ("Sec-Fetch-Site", "cross-site")]
    key = await callers.make("key", "globex")
    for kind in ("session", "cookie"):
        caller = await callers.make(kind, "acme")
        assert (await ask(app, *caller.headers, *evil, method="POST")).status == 403
        assert (await ask(app, *caller.headers, method="POST")).json()[1] == "acme"
        assert (await ask(app, *caller.headers, *key.headers, *evil, method="POST")).json() == ["key", "globex"]


# --- several credentials --------------------------------------------------------------------------------------------


async def test_two_credentials_never_mix(tenancy: Tenancy, callers: Callers) -> None:
    """One decides, by the order of the authenticators, and no other lends it a tenant; two of a kind are refused."""
    app = build(tenancy)
    acme = {kind: await callers.make(kind, "acme") for kind in ("key", "token", "cookie", "member", "session")}
    globex = {kind: await callers.make(kind, "globex") for kind in acme}
    order: list[tuple[str, str]] = [("key", "cookie"), ("key", "session"), ("member", "session")]
    for first, second in order:
        both = (*acme[first].headers, *globex[second].headers)
        answer = await ask(app, *both)
        assert answer.json()[1] == "acme", (first, second)
        assert (await ask(app, *both, ("X-Tenant", "globex"))).status == 403, (first, second)
    # a token in the header and another in the cookie: one of the two was planted
    planted = await ask(app, *acme["token"].headers, *globex["cookie"].headers)
    assert (planted.status, planted.json()["type"]) == (401, "urn:tenancy:problem:ambiguous-credential")
    # an invalid first one is not made good by a second
    assert (await ask(app, *acme["key"].forged(), *globex["cookie"].headers)).status == 401
    assert (await ask(app, *acme["member"].forged(), *globex["session"].headers)).status == 401


async def test_a_cookie_that_is_there_twice_is_refused(tenancy: Tenancy, callers: Callers) -> None:
    """Another host of the domain may have set one of them; in one header or, as HTTP/2 allows, in two."""
    app = build(tenancy)
    own, planted = [await callers.make("cookie", slug) for slug in ("acme", "globex")]
    values = (cookie_of(own), cookie_of(planted))
    for first, second in (values, values[::-1]):
        one = [("Cookie", f"a=b; {COOKIE}={first}; {COOKIE}={second}")]
        two = [("Cookie", f"{COOKIE}={first}"), ("Cookie", f"a=b; {COOKIE}={second}")]
        for headers in (one, two):
            assert (await ask(app, *headers)).status == 401, headers
    same = [("Cookie", f"{COOKIE}={values[0]}"), ("Cookie", f"{COOKIE}={values[0]}")]
    assert (await ask(app, *same)).json() == ["token", "acme"]
    # another name is another cookie
    for name in (f"x{COOKIE}", f"{COOKIE}x", COOKIE.upper(), f"{SESSION}.{COOKIE}"):
        assert (await ask(app, ("Cookie", f"{name}={values[1]}; {COOKIE}={values[0]}"))).json() == ["token", "acme"]


# --- several tenants ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["token", "cookie", "member", "session"])
async def test_two_tenants_that_are_both_allowed_are_not_confused(
    tenancy: Tenancy, callers: Callers, kind: str
) -> None:
    """Named both, neither is served; named one, it is that one, whatever was asked before; named none, it is asked."""
    app = build(tenancy)
    both = await callers.make(kind, "acme", "globex")
    hosts: dict[str, Callable[[str], tuple[str, str]]] = {
        "host": lambda slug: ("Host", f"{slug}.example.com"),
        "header": lambda slug: ("X-Tenant", slug),
    }
    for _ in range(2):  # looked up, and from memory
        for name in hosts.values():
            for slug in ("acme", "globex", "acme"):
                assert (await ask(app, *both.headers, name(slug))).json()[1] == slug
        for slug in ("acme", "globex"):
            assert (await ask(app, *both.headers, path=f"/t/{slug}/x")).json()[1] == slug
        for mixed in (
            [("Host", "acme.example.com"), ("X-Tenant", "globex")],
            [("Host", "globex.example.com"), ("X-Tenant", "acme")],
        ):
            assert (await ask(app, *both.headers, *mixed)).status == 403
            assert (await ask(app, *both.headers, mixed[0], path=f"/t/{mixed[1][1]}/x")).status == 403
        answer = await ask(app, *both.headers)
        assert (answer.status, answer.json()["tenants"]) == (409, ["acme", "globex"])
    if kind == "member":
        await callers.remove(both)
        directory = tenancy.internals.directory
        directory.invalidate_subject(both.subject)  # as the notification does
        assert (await ask(app, *both.headers, ("X-Tenant", "acme"))).status == 403
        assert (await ask(app, *both.headers)).json()[1] == "globex"
