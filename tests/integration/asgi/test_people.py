"""People who log in: credentials of the application's own, members, and the choice of the tenant."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import jwt
import pytest
from sqlalchemy import text
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.sessions import SessionMiddleware
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.asgi import (
    ApiKeyAuthenticator,
    HeaderResolver,
    PathPrefixResolver,
    Presented,
    SubdomainResolver,
    TenancyMiddleware,
    TextAuthenticator,
)
from tenancy_orm.asgi.resolvers import Headers
from tenancy_orm.asgi.tokens import JwtAuthenticator
from tenancy_orm.authentication.admission import Admission
from tenancy_orm.authentication.credential import Credential
from tenancy_orm.authentication.issuer import IssuerKeys
from tenancy_orm.context import current_tenant, current_tenant_or_none
from tenancy_orm.errors import ConfigurationError
from tenancy_orm.events import CredentialRejected, CrossTenantRequest
from tests.support.asgi import Answer, http_scope, request, websocket_scope
from tests.support.connections import Server
from tests.support.issuer import Issuer
from tests.support.waiting import until


class LoginAs:
    """Whoever the header says, as a login of the application would."""

    def __init__(self, make: Callable[[str], Credential] = lambda who: Credential("session", who)) -> None:
        self.make = make

    async def authenticate(self, connection: HTTPConnection) -> Credential | None:
        who = connection.headers.get("x-login")
        return None if who is None else self.make(who)


def tokens_of(issuer: str, subject_prefix: str = "") -> JwtAuthenticator:
    """An authenticator of an issuer's tokens."""
    return JwtAuthenticator(
        issuer=issuer, audience="api", secret="s" * 32, algorithms=["HS256"], subject_prefix=subject_prefix
    )


async def whoami(incoming: Request) -> JSONResponse:
    """What the application sees of its caller."""
    credential: Credential | None = incoming.scope["tenancy"]
    bound = current_tenant_or_none()
    return JSONResponse(
        {
            "tenant": bound and bound.slug,
            "kind": credential and credential.kind,
            "subject": credential and credential.subject,
            "scopes": sorted(credential.scopes) if credential else None,
            "roles": sorted(credential.roles) if credential else None,
            "memberships": [one.tenant.slug for one in credential.memberships] if credential else None,
        }
    )


@pytest.fixture
async def tenancy(tenancy_config: TenancyConfig) -> AsyncIterator[Tenancy]:
    """An open one with two tenants, of which ada is a member of one, and bob of both."""
    # a look-up that waits for a lock of the test must not end before it, however slow the machine is
    config = tenancy_config.replace(
        members={"roles": {"owner": ["*"], "clerk": ["orders:read"]}}, directory={"timeout": 60.0}
    )
    async with Tenancy(config) as opened:
        for slug in ("acme", "globex"):
            await opened.tenants.create(slug)
        async with opened.internals.control.transaction() as connection:
            for slug, subject, roles in (
                ("acme", "ada", ["clerk"]),
                ("acme", "bob", ["owner"]),
                ("globex", "bob", ["clerk", "gone"]),
            ):
                await connection.execute(
                    text(
                        "INSERT INTO tenancy.members (tenant_id, subject, roles) "
                        "SELECT id, :subject, :roles FROM tenancy.tenants WHERE slug = :slug"
                    ),
                    {"slug": slug, "subject": subject, "roles": roles},
                )
        yield opened


def build(tenancy: Tenancy, **options: Any) -> TenancyMiddleware:
    """The application below the middleware."""
    options.setdefault("authenticators", [ApiKeyAuthenticator(), LoginAs()])
    app = Starlette(routes=[Route("/{path:path}", whoami, methods=["GET", "POST"])])
    return TenancyMiddleware(app, tenancy=tenancy, **options)


def login(who: str, *more: tuple[str, str]) -> list[tuple[str, str]]:
    """Headers of a person."""
    return [("X-Login", who), *more]


async def test_a_member_of_one_tenant_needs_to_name_none(tenancy: Tenancy) -> None:
    """The credential is bound to it, with the scopes of its roles."""
    answer = await request(build(tenancy), headers=login("ada"))
    assert answer.json() == {
        "tenant": "acme",
        "kind": "session",
        "subject": "ada",
        "scopes": ["orders:read"],
        "roles": ["clerk"],
        "memberships": ["acme"],
    }


async def test_a_member_of_several_names_one(tenancy: Tenancy) -> None:
    """By host, path or header; without that the answer lists them."""
    app = build(tenancy, resolvers=[SubdomainResolver("example.com"), PathPrefixResolver(), HeaderResolver()])
    for path, named in (
        ("/", ("Host", "globex.example.com")),
        ("/t/globex/x", ("A", "b")),
        ("/", ("X-Tenant", "globex")),
    ):
        found = (await request(app, path, login("bob", named))).json()
        assert (found["tenant"], found["scopes"], found["memberships"]) == (
            "globex",
            ["orders:read"],
            ["acme", "globex"],
        )
    found = (await request(app, headers=login("bob", ("X-Tenant", "acme")))).json()
    assert (found["tenant"], found["scopes"]) == ("acme", ["*"])
    answer = await request(app, headers=login("bob"))
    assert (answer.status, answer.json()["type"]) == (409, "urn:tenancy:problem:tenant-not-named")
    assert answer.json()["tenants"] == ["acme", "globex"]


async def test_a_tenant_that_a_person_may_not_use_is_refused_and_recorded(tenancy: Tenancy) -> None:
    """Alike whether or not it exists."""
    seen: list[CrossTenantRequest] = []
    tenancy.events.subscribe(CrossTenantRequest, seen.append)
    app = build(tenancy, resolvers=[HeaderResolver()])
    refused = [await request(app, headers=login("ada", ("X-Tenant", name))) for name in ("globex", "nobody")]
    assert [(answer.status, answer.body) for answer in refused] == [(403, refused[0].body)] * 2
    assert [(event.named, event.kind, event.subject, event.tenant_id) for event in seen] == [
        ("globex", "session", "ada", None),
        ("nobody", "session", "ada", None),
    ]
    await tenancy.internals.directory.flush()
    entries = await tenancy.audit.events(action="request.cross_tenant")
    assert sorted(str((entry.detail or {})["named"]) for entry in entries) == ["globex", "nobody"]
    assert {(entry.actor.kind, entry.actor.id) for entry in entries} == {("session", "ada")}
    nobody = await request(app, headers=login("eve"))
    assert (nobody.status, nobody.json()["type"]) == (403, "urn:tenancy:problem:no-tenant")
    # allowed by the first name, refused by the second
    both = build(tenancy, resolvers=[HeaderResolver(), SubdomainResolver("example.com")])
    mixed = await request(both, headers=login("bob", ("X-Tenant", "acme"), ("Host", "globex.example.com")))
    assert (mixed.status, mixed.json()["type"]) == (403, "urn:tenancy:problem:cross-tenant")


async def test_a_removed_member_is_refused_at_once(tenancy: Tenancy) -> None:
    """And one with other roles has other scopes, in a process that did neither."""
    app = build(tenancy)
    assert (await request(app, headers=login("ada"))).status == 200
    async with tenancy.internals.control.transaction() as connection:
        await connection.execute(text("UPDATE tenancy.members SET roles = '{owner}' WHERE subject = 'ada'"))

    async def scopes() -> Any:
        return (await request(app, headers=login("ada"))).json()["scopes"]

    async def has_all() -> bool:
        return bool(await scopes() == ["*"])

    await until(has_all)
    async with tenancy.internals.control.transaction() as connection:
        await connection.execute(text("DELETE FROM tenancy.members WHERE subject = 'ada'"))

    async def is_refused() -> bool:
        return (await request(app, headers=login("ada"))).status == 403

    await until(is_refused)


async def test_a_removal_that_overtakes_the_look_up_counts(tenancy: Tenancy) -> None:
    """It comes after the membership was read, and before the tenant was: what was read is not cached."""
    app, directory = build(tenancy), tenancy.internals.directory
    directory.invalidate()
    async with tenancy.internals.control.transaction() as blocking:
        await blocking.execute(text("LOCK TABLE tenancy.former_slugs IN ACCESS EXCLUSIVE MODE"))
        asking = asyncio.create_task(request(app, headers=login("ada")))
        await until(lambda: directory.subjects._rows.entries)
        async with tenancy.internals.control.transaction() as connection:
            await connection.execute(text("DELETE FROM tenancy.members WHERE subject = 'ada'"))
        await until(lambda: not directory.subjects._rows.entries)
    assert (await asking).status == 200
    assert (await request(app, headers=login("ada"))).status == 403


async def test_what_a_credential_says_itself_limits_it(tenancy: Tenancy) -> None:
    """Its scopes limit those of the roles; tenants that it names need no membership, and have no scopes by default."""
    limited = build(
        tenancy, authenticators=[LoginAs(lambda who: Credential("token", who, scopes=frozenset({"orders:read", "x"})))]
    )
    assert (await request(limited, headers=login("ada"))).json()["scopes"] == ["orders:read"]
    own = build(tenancy, authenticators=[LoginAs(lambda who: Credential("token", who, tenants=("globex", "nobody")))])
    found = (await request(own, headers=login("ada"))).json()
    assert (found["tenant"], found["scopes"], found["roles"]) == ("globex", [], [])


async def test_it_ends_with_its_time_and_by_revocation(tenancy: Tenancy) -> None:
    """Expired, revoked itself, or issued before its person was revoked."""
    now = datetime.now(UTC)
    past, future = now - timedelta(seconds=1), now + timedelta(hours=1)
    seen: list[CredentialRejected] = []
    tenancy.events.subscribe(CredentialRejected, seen.append)

    async def ask(**about: Any) -> Answer:
        app = build(tenancy, authenticators=[LoginAs(lambda who: Credential("session", who, **about))])
        return await request(app, headers=login("ada"))

    assert (await ask(expires_at=future, id="s1", issued_at=past)).status == 200
    assert (await ask(expires_at=past)).status == 401
    soon = datetime.now(UTC) + timedelta(seconds=0.5)
    assert (await ask(expires_at=soon)).status == 200  # and is cached from then on
    async with tenancy.internals.control.transaction() as connection:
        await connection.execute(text("INSERT INTO tenancy.revocations (kind, value) VALUES ('token', 's1')"))
    first = tenancy.internals.directory

    async def refused(**about: Any) -> bool:
        return (await ask(**about)).status == 401

    await until(lambda: refused(expires_at=soon))
    await until(lambda: refused(expires_at=future, id="s1", issued_at=past))
    # another session that is the same but for its id is served, and does not bring the revoked one back
    assert (await ask(expires_at=future, id="s2", issued_at=past)).status == 200
    assert await refused(expires_at=future, id="s1", issued_at=past)
    assert (await ask(id="s2", issued_at=past)).status == 200
    async with tenancy.internals.control.transaction() as connection:
        await connection.execute(text("INSERT INTO tenancy.revocations (kind, value) VALUES ('subject', 'ada')"))
    await until(lambda: refused(id="s2", issued_at=past))
    assert (await ask()).status == 401
    assert (await ask(issued_at=future)).status == 200
    assert {event.reason for event in seen} == {"expired", "revoked"}
    assert first.statistics.locked == 0


async def test_invalid_tokens_slow_their_source_down_and_no_valid_one(tenancy: Tenancy) -> None:
    """A signing key that has changed makes every browser of an office fail: whoever logs in again is served."""
    app = build(tenancy, authenticators=[tokens_of("https://a.example")])

    def signed(secret: str, **more: Any) -> list[tuple[str, str]]:
        claims = {"iss": "https://a.example", "aud": "api", "sub": "ada", "exp": time.time() + 60, **more}
        return [("Authorization", f"Bearer {jwt.encode(claims, secret * 32, algorithm='HS256')}")]

    statuses = [(await request(app, headers=signed("t", jti=str(number)))).status for number in range(22)]
    assert statuses[0] == 401 and statuses[-1] == 429
    assert (await request(app, headers=signed("s"))).status == 200
    # what was valid once is no guess
    elsewhere: dict[str, Any] = {"client": ("198.51.100.9", 1)}
    expired = [(await request(app, headers=signed("s", exp=time.time() - 60), **elsewhere)).status for _ in range(22)]
    assert set(expired) == {401}


@pytest.mark.parametrize(("own", "others"), [("", "b|"), ("b", "b|")])
async def test_an_issuer_cannot_name_another_issuers_people(tenancy: Tenancy, own: str, others: str) -> None:
    """By a subject that begins with the other's prefix, also where its token is cached; alone, it may."""
    seen: list[CredentialRejected] = []
    tenancy.events.subscribe(CredentialRejected, seen.append)
    await tenancy.members.add("acme", f"{others}ada", ["owner"])
    first, second = tokens_of("https://a.example", own), tokens_of("https://b.example", others)

    def signed(issuer: str, subject: str) -> list[tuple[str, str]]:
        claims = {"iss": f"https://{issuer}.example", "aud": "api", "sub": subject, "jti": "1", "exp": 4_000_000_000}
        return [("Authorization", f"Bearer {jwt.encode(claims, 's' * 32, algorithm='HS256')}")]

    forged = signed("a", f"{others}ada".removeprefix(own))
    assert (await request(build(tenancy, authenticators=[first]), headers=forged)).json()["subject"] == f"{others}ada"
    app = build(tenancy, authenticators=[first, second])
    assert (await request(app, headers=signed("b", "ada"))).json()["tenant"] == "acme"
    assert [(await request(app, headers=forged)).status for _ in range(2)] == [401, 401]
    assert [(event.reason, event.credential_id) for event in seen] == [("subject", "1")] * 2


async def test_paths_without_a_tenant_need_a_credential_alone(tenancy: Tenancy) -> None:
    """Nothing is bound there, and no scope of a role holds."""
    app = build(tenancy, without_tenant=["/me/*"], resolvers=[PathPrefixResolver(), HeaderResolver()])
    for path in ("/me/tenants", "/t/acme/me/tenants"):
        found = (await request(app, path, login("bob"))).json()
        assert (found["tenant"], found["scopes"], found["memberships"]) == (None, [], ["acme", "globex"])
    # who was removed from a tenant can log out at its address
    assert (await request(app, "/t/globex/me/tenants", login("ada"))).json()["memberships"] == ["acme"]
    assert (await request(app, "/me/tenants", login("ada", ("X-Tenant", "globex")))).status == 403
    assert (await request(app, "/me/tenants", login("eve"))).json()["memberships"] == []
    assert (await request(app, "/me/tenants")).status == 401
    key = await tenancy.keys.issue("acme", scopes=["a"])
    found = (await request(app, "/me/tenants", [("X-API-Key", key.text)])).json()
    assert (found["tenant"], found["kind"], found["memberships"]) == (None, "key", ["acme"])
    assert (await request(app, "/t/globex/me/tenants", [("X-API-Key", key.text)])).status == 403


async def test_public_paths_bind_the_tenant_of_the_address(tenancy: Tenancy) -> None:
    """To a visitor without scopes, whatever credential there is; and all that is no tenant to visit is the same."""
    app = build(
        tenancy, public=["/p/*"], resolvers=[SubdomainResolver("example.com"), PathPrefixResolver(), HeaderResolver()]
    )
    at_acme = ("Host", "acme.example.com")
    for path, headers in (
        ("/p/x", [at_acme]),
        ("/t/acme/p/x", []),
        ("/p/x", [at_acme, ("X-Login", "eve")]),
        ("/p/x", [at_acme, ("X-API-Key", "no such key")]),
    ):
        found = (await request(app, path, headers)).json()
        assert (found["tenant"], found["kind"], found["scopes"]) == ("acme", "anonymous", [])
    assert (await request(app, "/q/x", [at_acme])).status == 401
    await tenancy.tenants.create("idle")
    await tenancy.tenants.suspend("idle")
    refused = [
        await request(app, path, headers)
        for path, headers in (
            ("/p/x", [("Host", "nobody.example.com")]),
            ("/p/x", [("Host", "idle.example.com")]),
            ("/p/x", [("Host", "example.com")]),
            ("/t/acme/p/x", [("Host", "globex.example.com")]),
            ("/p/x", [at_acme, ("X-Tenant", "globex")]),
            ("/p/x", [("X-Tenant", "acme")]),
        )
    ]
    assert {(answer.status, answer.body) for answer in refused} == {(404, refused[0].body)}


async def test_what_a_visitor_has_open_ends_with_the_tenants_status(tenancy: Tenancy) -> None:
    """A websocket and a stream; one to another tenant goes on."""

    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()
        async for _ in websocket.iter_text():
            await websocket.send_text(current_tenant().slug)

    async def parts() -> AsyncIterator[bytes]:
        while True:
            yield current_tenant().slug.encode()
            await asyncio.sleep(0.01)

    async def stream(incoming: Request) -> StreamingResponse:
        return StreamingResponse(parts())

    inner = Starlette(routes=[WebSocketRoute("/p/talk", talk), Route("/p/stream", stream)])
    app = TenancyMiddleware(inner, tenancy=tenancy, public=["/p/*"], resolvers=[PathPrefixResolver()])
    servers = {
        (kind, slug): Server(make(f"/t/{slug}/p/{kind}"))
        for kind, make in (("talk", websocket_scope), ("stream", http_scope))
        for slug in ("acme", "globex")
    }
    for (kind, _), server in servers.items():
        first = {"type": "websocket.connect"} if kind == "talk" else {"type": "http.request", "body": b""}
        server.incoming.put_nowait(first)
    tasks = {key: server.serve(app) for key, server in servers.items()}
    await until(lambda: all(server.sent for server in servers.values()))
    await tenancy.tenants.suspend("acme")
    await asyncio.wait_for(tasks["talk", "acme"], 10)
    assert servers["talk", "acme"].sent[-1]["code"] == 4403
    with pytest.raises(ClientDisconnect):  # what Starlette makes of it: the server cuts the answer short
        await asyncio.wait_for(tasks["stream", "acme"], 10)
    assert servers["stream", "acme"].sent[-1]["more_body"]
    servers["talk", "globex"].incoming.put_nowait({"type": "websocket.receive", "text": "still there?"})
    await until(lambda: servers["talk", "globex"].sent[-1].get("text") == "globex")
    assert not tasks["stream", "globex"].done()
    servers["talk", "globex"].incoming.put_nowait({"type": "websocket.disconnect", "code": 1000})
    await asyncio.wait_for(tasks["talk", "globex"], 10)
    tasks["stream", "globex"].cancel()
    await asyncio.wait([tasks["stream", "globex"]])


async def test_visitors_are_rated_by_address(tenancy_config: TenancyConfig) -> None:
    """Before their tenant is looked up; those of another address, and the tenant's own requests, are not concerned."""
    async with Tenancy(tenancy_config.replace(quotas={"address_requests_per_second": 2})) as tenancy:
        created = await tenancy.tenants.create("acme")
        app = build(tenancy, public=["/p/*"], resolvers=[SubdomainResolver("example.com")])
        headers = [("Host", "acme.example.com")]
        statuses = [(await request(app, "/p/x", headers)).status for _ in range(4)]
        assert statuses.count(200) >= 2 and statuses[-1] == 429
        assert (await request(app, "/p/x", [("Host", "nobody.example.com")])).status == 429
        assert (await request(app, "/p/x", headers, client=("198.51.100.1", 1))).status == 200
        assert (await request(app, headers=[*headers, ("X-API-Key", created.api_key)])).status == 200
        # nor does a tenant's rate count a person who is a member of none
        away: dict[str, Any] = {"client": ("203.0.113.1", 1)}
        answers = [await request(app, headers=login("eve", *host), **away) for host in ([], headers) * 3]
        assert answers[0].status == answers[1].status == 403 and answers[-1].status == 429
        assert dict(answers[0].headers)[b"ratelimit-policy"].startswith(b'"address"')


async def test_a_limit_that_meets_a_proxy_is_logged(
    tenancy_config: TenancyConfig, caplog: pytest.LogCaptureFixture
) -> None:
    """Once: behind one that the server does not trust, all callers share the rate of visitors, and the lock-out."""
    limits = {"quotas": {"address_requests_per_second": 1}, "lockout": {"failures": 2}}
    async with Tenancy(tenancy_config.replace(**limits)) as tenancy:
        created = await tenancy.tenants.create("acme")
        wrong = created.api_key[:-1] + ("a" if created.api_key[-1] != "a" else "b")

        async def logged(path: str, *headers: tuple[str, str], client: str) -> list[str]:
            app = build(tenancy, public=["/p/*"], resolvers=[SubdomainResolver("example.com")])
            caplog.clear()
            sent = [("Host", "acme.example.com"), *headers]
            statuses = [(await request(app, path, sent, client=(client, 0))).status for _ in range(6)]
            assert statuses[-1] == 429
            return [record.getMessage() for record in caplog.records if record.name == "tenancy_orm.asgi"]

        forwarded = ("X-Forwarded-For", "198.51.100.1, 203.0.113.9:443")
        [warning] = await logged("/p/x", forwarded, client="10.0.0.9")
        assert "10.0.0.9" in warning and "--forwarded-allow-ips" in warning
        assert len(await logged("/x", forwarded, ("X-API-Key", wrong), client="10.0.0.9")) == 1
        # a server that trusts the proxy, and one without a proxy
        assert await logged("/p/x", forwarded, client="203.0.113.9") == []
        assert await logged("/p/x", client="10.0.0.10") == []


async def test_another_origins_page_cannot_use_a_login(tenancy: Tenancy) -> None:
    """Where the check is off it does; a page of the same origin, a program and a trusted origin may."""
    app = build(tenancy, trusted_origins=["https://APP.example.net:443"], resolvers=[SubdomainResolver("example.com")])
    host = ("Host", "acme.example.com")

    async def post(*headers: tuple[str, str], app: TenancyMiddleware = app, method: str = "POST") -> int:
        return (await request(app, "/", login("ada", host, *headers), method=method)).status

    attacks = (
        [("Sec-Fetch-Site", "cross-site"), ("Origin", "https://evil.example")],
        [("Sec-Fetch-Site", "same-site"), ("Origin", "https://globex.example.com")],
        [("Origin", "https://globex.example.com")],
        [("Origin", "null")],
        [("Origin", "https://acme.example.com:8443")],
        [("Origin", "https://[.]")],
        [("Sec-Fetch-Site", "same-origin"), ("Sec-Fetch-Site", "cross-site")],
    )
    for attack in attacks:
        assert await post(*attack) == 403
        assert await post(*attack, method="GET") == 200
    for fair in (
        [],
        [("Sec-Fetch-Site", "same-origin"), ("Origin", "https://acme.example.com")],
        [("Sec-Fetch-Site", "none")],
        [("Origin", "https://acme.example.com")],
        [("Sec-Fetch-Site", "cross-site"), ("Origin", "https://app.example.net")],
    ):
        assert await post(*fair) == 200
    unprotected = build(
        tenancy,
        authenticators=[LoginAs(lambda who: Credential("session", who, sent_by_browser=False))],
        resolvers=[SubdomainResolver("example.com")],
    )
    assert await post(*attacks[0], app=unprotected) == 200


async def test_a_token_that_an_own_authenticator_reads_from_a_cookie_is_checked_too(tenancy: Tenancy) -> None:
    """It need not say so; one in a header is not concerned, and what it says counts."""
    says: dict[str, Any] = {}

    class Tokens:
        async def authenticate(self, connection: HTTPConnection) -> Credential | None:
            return Credential("token", "ada", **says)

    app = build(tenancy, authenticators=[Tokens()])
    foreign = [("Host", "app.example.com"), ("Origin", "https://evil.example"), ("Sec-Fetch-Site", "cross-site")]
    cookie, header = ("Cookie", "session=a.b.c"), ("Authorization", "Bearer a.b.c")
    for sent, status in (([cookie], 403), ([header], 200), ([cookie, header], 200)):
        assert (await request(app, headers=[*foreign, *sent], method="POST")).status == status

    class Texts(TextAuthenticator):
        def read(self, scope: Scope, headers: Headers) -> Presented | None:
            return Presented("a.b.c", sent_by_browser=True)

        def peek(self, presented: Presented) -> Credential | None:
            return Credential("token", "ada")

        async def verify(self, presented: Presented) -> Credential:
            raise NotImplementedError

    answer = await request(build(tenancy, authenticators=[Texts()]), headers=[*foreign, cookie], method="POST")
    assert answer.json()["type"].endswith(":cross-origin")
    says["sent_by_browser"] = False
    assert (await request(app, headers=[*foreign, cookie], method="POST")).status == 200
    says["sent_by_browser"] = True
    assert (await request(app, headers=[*foreign, header], method="POST")).status == 403


async def test_the_first_authenticator_with_a_credential_decides(tenancy: Tenancy) -> None:
    """In their order; a key that is not valid is refused, whatever else there is."""
    key = await tenancy.keys.issue("globex")
    both = login("ada", ("X-API-Key", key.text))
    first = build(tenancy, authenticators=[ApiKeyAuthenticator(), LoginAs()])
    assert (await request(first, headers=both)).json()["tenant"] == "globex"
    last = build(tenancy, authenticators=[LoginAs(), ApiKeyAuthenticator()])
    assert (await request(last, headers=both)).json()["tenant"] == "acme"
    assert (await request(last, headers=[("X-API-Key", key.text)])).json()["tenant"] == "globex"
    wrong = login("ada", ("X-API-Key", key.text[:-1] + ("a" if key.text[-1] != "a" else "b")))
    assert (await request(first, headers=wrong)).status == 401
    # what is not a key is another's, or nobody's
    assert (await request(first, headers=login("ada", ("Authorization", "Bearer a.b.c")))).json()["tenant"] == "acme"
    nobodys = await request(first, headers=[("Authorization", "Bearer a.b.c")])
    assert (nobodys.status, nobodys.json()["type"]) == (401, "urn:tenancy:problem:invalid-credential")
    missing = await request(first)
    assert (missing.status, missing.json()["type"]) == (401, "urn:tenancy:problem:missing-credential")


@pytest.mark.parametrize("made", [{"kind": "key"}, {"kind": "anonymous"}, {"kind": "session", "bound": ...}])
async def test_a_login_of_the_application_cannot_make_other_credentials(tenancy: Tenancy, made: dict[str, Any]) -> None:
    """No key, no visitor, and none with a tenant that nobody has looked up: a mistake of the application."""
    bound = {"bound": await tenancy.tenants.get("globex")} if "bound" in made else {}
    app = build(tenancy, authenticators=[LoginAs(lambda who: Credential(**{**made, **bound, "subject": who}))])
    with pytest.raises(ConfigurationError, match="kind token or session, without a tenant"):
        await request(app, headers=login("ada"))


async def test_what_a_token_has_open_ends_when_its_key_is_withdrawn(tenancy: Tenancy) -> None:
    """With the next fetch of the issuer's keys, which another one's token may cause; and its own key's tokens go on."""
    opened: list[Admission] = []

    async def keep(scope: Scope, receive: Receive, send: Send) -> None:
        opened.append(scope["tenancy"].tenant.admission)
        await JSONResponse({})(scope, receive, send)

    with Issuer() as issuer:
        tokens = JwtAuthenticator(issuer=issuer.url, audience=issuer.audience)
        app = TenancyMiddleware(keep, tenancy=tenancy, authenticators=[tokens])

        async def ask(**claims: Any) -> int:
            headers = [("Authorization", f"Bearer {issuer.token(**claims)}")]
            return (await request(app, headers=headers)).status

        assert await ask(sub="ada") == 200
        issuer.rotate(keep=False)
        cast("IssuerKeys", tokens._keys)._tried_at -= 60
        assert await ask(sub="ada", jti="new") == 200
        await until(lambda: opened[0].ended)
        assert (opened[0].ended and opened[0].ended.reason, opened[1].ended) == ("revoked", None)


async def test_starlettes_own_sessions(tenancy: Tenancy) -> None:
    """A complete login on SessionMiddleware: it stands outside, and its signature makes the cookie."""

    class Sessions:
        async def authenticate(self, connection: HTTPConnection) -> Credential | None:
            user = connection.session.get("user")
            if user is None:
                return None
            return Credential("session", user, issued_at=datetime.fromtimestamp(connection.session["at"], UTC))

    async def log_in(incoming: Request) -> JSONResponse:
        incoming.session.update(user="ada", at=datetime.now(UTC).timestamp())
        return JSONResponse({})

    app = Starlette(
        routes=[Route("/login", log_in, methods=["POST"]), Route("/", whoami)],
        middleware=[
            Middleware(SessionMiddleware, secret_key="s" * 32),
            Middleware(TenancyMiddleware, tenancy=tenancy, authenticators=[Sessions()], exempt=["/login"]),
        ],
    )
    assert (await request(app)).status == 401
    answer = await request(app, "/login", method="POST")
    cookie = dict(answer.headers)[b"set-cookie"].decode().partition(";")[0]
    assert (await request(app, headers=[("Cookie", cookie)])).json()["tenant"] == "acme"
    assert (await request(app, headers=[("Cookie", cookie[:-3] + "abc")])).status == 401


async def test_an_authenticator_outside_of_what_it_reads_is_told(tenancy: Tenancy) -> None:
    """With the order, which ``add_middleware`` turns around; another failure of its own passes as it is."""

    class Sessions:
        async def authenticate(self, connection: HTTPConnection) -> Credential | None:
            user: str | None = connection.session.get("user")
            return None if user is None else Credential("session", user)

    class Broken:
        async def authenticate(self, connection: HTTPConnection) -> Credential | None:
            raise AssertionError("its own")

    inside = Starlette(routes=[Route("/", whoami)])
    inside.add_middleware(SessionMiddleware, secret_key="s" * 32)
    inside.add_middleware(TenancyMiddleware, tenancy=tenancy, authenticators=[Sessions()])
    with pytest.raises(ConfigurationError, match="Sessions needs SessionMiddleware: put it outside TenancyMiddleware"):
        await request(inside)
    with pytest.raises(AssertionError, match="its own"):
        await request(build(tenancy, authenticators=[Broken()]))


async def test_what_an_authenticator_returns_is_a_credential(tenancy: Tenancy) -> None:
    """Anything else is an error that names it, and reaches nothing."""
    answers: list[Any] = ["ada", {"subject": "ada"}, Credential("key", "ada"), Credential("anonymous", "")]
    answers.append(Credential("session", "ada", roles=frozenset({"owner"})))  # which would give nothing
    app = build(tenancy, authenticators=[LoginAs(lambda who: answers[int(who)])])
    for number in range(len(answers)):
        with pytest.raises(ConfigurationError, match="LoginAs must return a credential"):
            await request(app, headers=login(str(number)))


@pytest.mark.parametrize("keys", [False, True])
async def test_a_token_that_nobody_knows_is_not_missing(tenancy: Tenancy, keys: bool) -> None:
    """The log says that no authenticator takes it: most often the issuer is not the one that is configured."""
    refused: list[CredentialRejected] = []
    tenancy.events.subscribe(CredentialRejected, refused.append)
    authenticators = [*([ApiKeyAuthenticator()] if keys else []), tokens_of("https://a.example")]
    app = build(tenancy, authenticators=authenticators)
    foreign = jwt.encode({"iss": "https://b.example", "aud": "api", "exp": time.time() + 60}, "s" * 32, "HS256")
    for text_ in (foreign, "opaque"):
        for _ in range(30):  # no guess: its source is not slowed down
            answer = await request(app, headers=[("Authorization", f"Bearer {text_}")])
            assert (answer.status, answer.json()["type"]) == (401, "urn:tenancy:problem:invalid-credential")
    assert {(one.kind, one.reason) for one in refused} == {("token", "unrecognised")}
    for headers in ([], [("Authorization", "Basic YTpi")]):
        assert (await request(app, headers=headers)).json()["type"] == "urn:tenancy:problem:missing-credential"


async def test_a_claim_with_the_providers_own_id_is_logged(tenancy: Tenancy, caplog: pytest.LogCaptureFixture) -> None:
    """Once, with the remedy: the answer alone, that the credential allows no tenant, would not tell the cause."""
    app = build(tenancy, authenticators=[LoginAs(lambda who: Credential("token", who, tenants=("org_9ybsU1",)))])
    for _ in range(2):
        answer = await request(app, headers=login("ada"))
        assert (answer.status, answer.json()["type"]) == (403, "urn:tenancy:problem:no-tenant")
    [warning] = [record.getMessage() for record in caplog.records if record.name == "tenancy_orm.asgi"]
    assert "'org_9ybsU1'" in warning and "tenants_claim" in warning
    member = build(tenancy, authenticators=[LoginAs()])
    caplog.clear()
    assert (await request(member, headers=login("nobody"))).status == 403
    assert not caplog.records


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"authenticators": [object()]}, "is not an authenticator"),
        ({"authenticators": [LoginAs]}, "an instance"),
        ({"authenticators": [ApiKeyAuthenticator(), ApiKeyAuthenticator()]}, "one ApiKeyAuthenticator"),
        ({"authenticators": [tokens_of("https://a.example"), tokens_of("https://b.example")]}, "subject_prefix"),
        ({"public": ["/p/*"]}, "need a resolver"),
        ({"public": ["/*"], "resolvers": [PathPrefixResolver()]}, "public path"),
        ({"without_tenant": ["me"]}, "without_tenant path"),
        ({"trusted_origins": ["app.example.com"]}, "trusted origin"),
        ({"trusted_origins": "https://app.example.com"}, "sequence of origins"),
    ],
)
async def test_what_cannot_work_is_refused_when_the_middleware_is_built(
    tenancy_config: TenancyConfig, options: dict[str, Any], message: str
) -> None:
    """With the argument that is wrong."""
    build(
        Tenancy(tenancy_config), authenticators=[tokens_of("https://a.example", "a:"), tokens_of("https://b.example")]
    )
    with pytest.raises(ConfigurationError, match=message):
        build(Tenancy(tenancy_config), **options)
