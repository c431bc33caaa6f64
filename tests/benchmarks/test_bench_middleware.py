"""What the middleware costs.

Run it with ``make bench ARGS='-k middleware'``. The applications are called directly: a client would cost more than
what is measured. Everything that is compared is called in turns, in one process, so that what else the machine does
falls on all alike.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from operator import sub, truediv
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tenancy_orm.asgi import ApiKeyAuthenticator, HeaderResolver, SubdomainResolver, TenancyMiddleware
from tenancy_orm.asgi.tokens import JwtAuthenticator
from tenancy_orm.authentication.credential import Credential
from tenancy_orm.tenancy import Tenancy
from tenancy_orm.tenants.manager import CreatedTenant
from tests.support.asgi import http_scope
from tests.support.models import Note
from tests.support.postgres import Postgres

HEADERS = [
    ("Host", "acme.example.com"),
    ("User-Agent", "benchmark/1.0"),
    ("Accept", "*/*"),
    ("Accept-Encoding", "gzip, deflate, br"),
    ("Connection", "keep-alive"),
]


@pytest.fixture
async def acme(tenancy: Tenancy) -> CreatedTenant:
    """A tenant with one row."""
    created = await tenancy.tenants.create("acme")
    async with tenancy.transaction("acme") as session:
        session.add(Note(id=1, body="note of acme"))
    return created


async def receive() -> Message:
    return {"type": "http.request", "body": b"", "more_body": False}


async def send(message: Message) -> None:
    assert message.get("status", 200) == 200


def calling(app: ASGIApp, path: str, headers: list[tuple[str, str]]) -> Callable[[], Awaitable[None]]:
    """A function that makes one request; a server, too, makes a new scope for each."""
    made = http_scope(path, headers)

    async def call() -> None:
        await app(dict(made), receive, send)

    return call


@dataclass
class Figures:
    """Microseconds per call, one figure per round: by the clock, and of the processor alone."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


async def in_turns(calls: Mapping[str, Callable[[], Awaitable[None]]], *, rounds: int, each: int) -> dict[str, Figures]:
    """Call everything in turns, after a round that does not count."""
    figures = {name: Figures() for name in calls}
    for call in calls.values():
        for _ in range(each):
            await call()
    gc.collect()
    for _ in range(rounds):
        for name, call in calls.items():
            wall, cpu = time.perf_counter(), time.thread_time()
            for _ in range(each):
                await call()
            figures[name].cpu.append((time.thread_time() - cpu) / each * 1e6)
            figures[name].wall.append((time.perf_counter() - wall) / each * 1e6)
    return figures


def median_of(combine: Callable[[float, float], float], values: list[float], base: list[float]) -> float:
    """The median over the rounds of what two figures of the same round give."""
    return statistics.median(combine(value, of) for value, of in zip(values, base, strict=True))


def report(capsys: pytest.CaptureFixture[str], title: str, lines: list[str]) -> None:
    with capsys.disabled():
        print(f"\n{title}")
        for line in lines:
            print(f"  {line}")


async def test_the_middleware_alone(tenancy: Tenancy, acme: CreatedTenant, capsys: pytest.CaptureFixture[str]) -> None:
    """Over an application that does nothing, with a key that is known. The goal is under 5 us."""

    async def bare(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})

    plain = TenancyMiddleware(bare, tenancy=tenancy)
    named = TenancyMiddleware(bare, tenancy=tenancy, resolvers=[SubdomainResolver("example.com"), HeaderResolver()])
    labelled = TenancyMiddleware(bare, tenancy=tenancy, request_id=True)
    headers = [*HEADERS, ("X-API-Key", acme.api_key)]
    figures = await in_turns(
        {
            "bare": calling(bare, "/", headers),
            "middleware": calling(plain, "/", headers),
            "with sub-domain and header": calling(named, "/", headers),
            "with an id for each request": calling(labelled, "/", headers),
            "exempt path": calling(plain, "/healthz", headers),
        },
        rounds=100,
        each=500,
    )
    lines = [f"{'':28} {'clock':>8} {'added':>7} {'cpu':>8} {'added':>7}   (us)"]
    for name, found in figures.items():
        wall = median_of(sub, found.wall, figures["bare"].wall)
        cpu = median_of(sub, found.cpu, figures["bare"].cpu)
        medians = statistics.median(found.wall), statistics.median(found.cpu)
        lines.append(f"{name:28} {medians[0]:8.2f} {wall:7.2f} {medians[1]:8.2f} {cpu:7.2f}")
    report(capsys, "middleware over a bare ASGI application, known key", lines)


async def test_other_credentials(tenancy: Tenancy, acme: CreatedTenant, capsys: pytest.CaptureFixture[str]) -> None:
    """Beside a key, all of them known. The goal is at most 10 us more than a key."""
    private = rsa.generate_private_key(public_exponent=65_537, key_size=2_048)
    public = private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    claims = {"iss": "https://issuer.example/", "aud": "api", "sub": "ada", "org": "acme", "exp": time.time() + 3_600}
    token = jwt.encode({**claims, "jti": "1", "iat": time.time()}, private, algorithm="RS256")
    options: dict[str, Any] = {"issuer": claims["iss"], "audience": "api", "keys": public}
    await tenancy.members.add("acme", "ada")

    class Login:
        async def authenticate(self, connection: HTTPConnection) -> Credential | None:
            return Credential("session", "ada")

    async def bare(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})

    def guarded(*authenticators: Any, **more: Any) -> TenancyMiddleware:
        return TenancyMiddleware(bare, tenancy=tenancy, authenticators=authenticators, **more)

    by_claim = guarded(ApiKeyAuthenticator(), JwtAuthenticator(**options, tenants_claim="org"))
    by_member = guarded(ApiKeyAuthenticator(), JwtAuthenticator(**options, tenants_claim=None))
    by_host = guarded(
        JwtAuthenticator(**options, tenants_claim=None, cookie="__Host-token"),
        resolvers=[SubdomainResolver("example.com")],
    )
    bearer = [*HEADERS, ("Authorization", f"Bearer {token}")]
    calls = {
        "key": calling(by_claim, "/", [*HEADERS, ("X-API-Key", acme.api_key)]),
        "token, tenant in a claim": calling(by_claim, "/", bearer),
        "token of a member": calling(by_member, "/", bearer),
        "... in a cookie, by host": calling(by_host, "/", [*HEADERS, ("Cookie", f"a=b; __Host-token={token}; c=d")]),
        "session, does nothing itself": calling(guarded(Login()), "/", HEADERS),
    }
    figures = await in_turns(calls, rounds=60, each=300)
    lines = [f"{'':28} {'clock':>8} {'more':>7} {'cpu':>8} {'more':>7}   (us)"]
    for name, found in figures.items():
        wall, cpu = (
            median_of(sub, of, base)
            for of, base in [(found.wall, figures["key"].wall), (found.cpu, figures["key"].cpu)]
        )
        medians = statistics.median(found.wall), statistics.median(found.cpu)
        lines.append(f"{name:28} {medians[0]:8.2f} {wall:7.2f} {medians[1]:8.2f} {cpu:7.2f}")
    report(capsys, "middleware with each kind of credential, known", lines)


async def test_a_one_row_request(
    tenancy: Tenancy, acme: CreatedTenant, postgres: Postgres, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through middleware and session, against the same route on a hand-made engine. The goal is at most 1.05 times."""
    placement = acme.tenant.placement
    assert placement is not None
    engine = create_async_engine(postgres.url(placement.database, driver="asyncpg"))
    sessions = async_sessionmaker(engine)

    async def by_hand(request: Request) -> JSONResponse:
        async with sessions() as session:
            note = await session.get_one(Note, 1)
            return JSONResponse({"body": note.body})

    async def by_tenancy(request: Request) -> JSONResponse:
        async with tenancy.session() as session:
            note = await session.get_one(Note, 1)
            return JSONResponse({"body": note.body})

    static = Starlette(routes=[Route("/", by_hand)])
    tenanted = Starlette(routes=[Route("/", by_tenancy)], middleware=[Middleware(TenancyMiddleware, tenancy=tenancy)])
    below = Starlette(routes=[Route("/", by_hand)], middleware=[Middleware(TenancyMiddleware, tenancy=tenancy)])
    headers = [*HEADERS, ("X-API-Key", acme.api_key)]
    try:
        figures = await in_turns(
            {
                "one engine": calling(static, "/", headers),
                "... below the middleware": calling(below, "/", headers),
                "middleware and session": calling(tenanted, "/", headers),
            },
            rounds=100,
            each=20,
        )
    finally:
        await engine.dispose()
    lines = [f"{'':28} {'clock':>8} {'ratio':>7} {'cpu':>8} {'ratio':>7}   (us)"]
    for name, found in figures.items():
        wall = median_of(truediv, found.wall, figures["one engine"].wall)
        cpu = median_of(truediv, found.cpu, figures["one engine"].cpu)
        medians = statistics.median(found.wall), statistics.median(found.cpu)
        lines.append(f"{name:28} {medians[0]:8.1f} {wall:7.3f} {medians[1]:8.1f} {cpu:7.3f}")
    report(capsys, "a request that reads one row by its key", lines)
