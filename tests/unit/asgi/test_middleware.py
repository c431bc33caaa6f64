"""The middleware's protocol, on a directory in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from tenancy_orm.asgi import (
    ApiKeyHeader,
    HeaderResolver,
    PathPrefixResolver,
    Resolver,
    SubdomainResolver,
    TenancyMiddleware,
    WebSocketKeyProtocol,
    refusals,
)
from tenancy_orm.context import current_tenant, current_tenant_or_none, set_current
from tenancy_orm.errors import (
    ConfigurationError,
    ControlUnavailableError,
    CrossTenantError,
    InvalidCredentialError,
    NotOpenError,
    ServerUnavailableError,
    TenantNotFoundError,
)
from tenancy_orm.events import CredentialRejected, QuotaRefused
from tenancy_orm.tenant import Status, Tenant
from tests.support.asgi import MemoryTenancy, http_scope, messages, request, websocket_scope
from tests.support.waiting import until

KEY = ("X-API-Key", "key-acme")
BEARER = ("Authorization", "Bearer key-acme")


class Recorder:
    """An application that answers 200 and remembers how it was called."""

    def __init__(self) -> None:
        self.scopes: list[Scope] = []
        self.bound: list[Tenant | None] = []
        self.error: Exception | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer."""
        self.scopes.append(scope)
        self.bound.append(current_tenant_or_none())
        if self.error is not None:
            raise self.error
        if scope["type"] == "websocket":
            await send({"type": "websocket.accept"})
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture
def app() -> Recorder:
    return Recorder()


@pytest.fixture
def tenants() -> MemoryTenancy:
    made = MemoryTenancy()
    made.add("acme")
    made.add("globex")
    return made


def build(app: Any, tenants: MemoryTenancy, **options: Any) -> TenancyMiddleware:
    return TenancyMiddleware(app, tenancy=tenants.as_tenancy(), **options)


# --- who it is ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("headers", [[KEY], [BEARER], [KEY, BEARER], [KEY, ("Authorization", "Basic YTpi")]])
@pytest.mark.parametrize("known", [True, False])
async def test_a_key_binds_its_tenant(
    app: Recorder, tenants: MemoryTenancy, headers: Sequence[tuple[str, str]], known: bool
) -> None:
    """However it is sent, and whether it was known or is looked up."""
    tenants.directory.known = known
    assert (await request(build(app, tenants), headers=headers)).status == 200
    assert [tenant and tenant.slug for tenant in app.bound] == ["acme"]
    assert app.scopes[0]["tenancy"].id == "acmexxxxxxxxxxxx"
    assert tenants.directory.asked == ([] if known else [("key-acme", "192.0.2.7")])
    assert current_tenant_or_none() is None


@pytest.mark.parametrize("path", ["/", "/healthz/", "/orders"])
async def test_without_a_key_nothing_is_reached(app: Recorder, tenants: MemoryTenancy, path: str) -> None:
    """It is answered 401, with how to authenticate."""
    answer = await request(build(app, tenants), path)
    assert answer.status == 401
    assert answer.header("www-authenticate") == "Bearer"
    assert answer.json()["type"] == "urn:tenancy:problem:missing-credential"
    assert app.scopes == []


@pytest.mark.parametrize(
    "headers",
    [
        [KEY, ("Authorization", "Bearer key-globex")],
        [KEY, ("X-API-Key", "key-globex")],
        [KEY, KEY],
        [BEARER, BEARER],
        [BEARER, ("Authorization", "Basic YTpi")],
        [KEY, ("X-API-Key", "")],
    ],
)
async def test_two_keys_are_refused(app: Recorder, tenants: MemoryTenancy, headers: Sequence[tuple[str, str]]) -> None:
    """Rather than one of them chosen: a proxy in front may have chosen the other."""
    answer = await request(build(app, tenants), headers=headers)
    assert answer.status == 401
    assert answer.json()["type"] == "urn:tenancy:problem:ambiguous-credential"
    assert app.scopes == []


@pytest.mark.parametrize("other", [("Authorization", "Bearer ey.J0.eXAi"), ("Authorization", "Bearer")])
@pytest.mark.parametrize("first", [True, False])
async def test_another_systems_token_beside_a_key_is_ignored(
    app: Recorder, tenants: MemoryTenancy, other: tuple[str, str], first: bool
) -> None:
    """A proxy's JWT, for example: it cannot be one of our keys, so that nothing has to be chosen."""
    answer = await request(build(app, tenants), headers=[other, KEY] if first else [KEY, other])
    assert answer.status == 200
    assert len(app.scopes) == 1


async def test_an_unknown_key_is_refused(app: Recorder, tenants: MemoryTenancy) -> None:
    """The refusal is the directory's to count and report."""
    answer = await request(build(app, tenants), headers=[("X-API-Key", "key-nobody")])
    assert answer.status == 401
    assert answer.json()["type"] == "urn:tenancy:problem:invalid-credential"
    assert tenants.directory.asked == [("key-nobody", "192.0.2.7")]
    assert app.scopes == []


async def test_refusals_that_the_directory_never_sees_are_reported(app: Recorder, tenants: MemoryTenancy) -> None:
    """With their reason and source."""
    seen: list[CredentialRejected] = []
    tenants.events.subscribe(CredentialRejected, seen.append)
    served = build(app, tenants)
    await request(served)
    await request(served, headers=[KEY, KEY], client=None)
    assert seen == [
        CredentialRejected(reason="missing", source="192.0.2.7"),
        CredentialRejected(reason="ambiguous", source=None),
    ]


async def test_keys_are_looked_for_where_one_says(app: Recorder, tenants: MemoryTenancy) -> None:
    """And nowhere else."""
    served = build(app, tenants, resolvers=[ApiKeyHeader("X-Token")])
    assert (await request(served, headers=[("x-token", "key-acme"), BEARER, ("X-API-Key", "key-globex")])).status == 200
    assert (await request(served, headers=[KEY])).status == 401
    assert [tenant and tenant.slug for tenant in app.bound] == ["acme"]


async def test_a_directory_that_cannot_tell_is_answered_503(app: Recorder, tenants: MemoryTenancy) -> None:
    """Nobody is let in on trust."""
    tenants.directory.known = False
    tenants.directory.error = ControlUnavailableError("no answer from control.internal")
    answer = await request(build(app, tenants), headers=[KEY])
    assert (answer.status, answer.header("retry-after")) == (503, "5")
    assert b"control.internal" not in answer.body
    assert app.scopes == []


@pytest.mark.parametrize("error", [NotOpenError("closed"), RuntimeError("a bug")])
async def test_a_failure_of_the_directory_lets_nobody_in(
    app: Recorder, tenants: MemoryTenancy, error: Exception
) -> None:
    """It is the server's fault, and raised for it to report."""
    tenants.directory.known = False
    tenants.directory.error = error
    with pytest.raises(type(error)):
        await request(build(app, tenants), headers=[KEY])
    assert app.scopes == []


@pytest.mark.parametrize(
    ("status", "answered"),
    [
        (Status.ACTIVE, 200),
        (Status.TRIAL, 200),
        (Status.SUSPENDED, 403),
        (Status.PROVISIONING, 503),
        (Status.MAINTENANCE, 503),
        (Status.DELETED, 401),
        (Status.PURGED, 401),
    ],
)
async def test_the_tenants_status_decides(app: Recorder, tenants: MemoryTenancy, status: Status, answered: int) -> None:
    """A deleted tenant's key is answered as one that never was."""
    tenants.add("initech", status=status)
    answer = await request(build(app, tenants), headers=[("X-API-Key", "key-initech")])
    assert answer.status == answered
    assert len(app.scopes) == (answered == 200)
    if answered == 401:
        unknown = await request(build(app, tenants), headers=[("X-API-Key", "key-nobody")])
        assert (answer.headers, answer.body) == (unknown.headers, unknown.body)
    if answered == 503:
        assert int(answer.header("retry-after") or 0) >= 1


# --- which tenant is named ------------------------------------------------------------------------------------------

RESOLVERS: list[Resolver] = [SubdomainResolver("example.com"), PathPrefixResolver(), HeaderResolver()]


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        ("/orders", [("Host", "acme.example.com")]),
        ("/orders", [("Host", "www.example.com")]),
        ("/orders", [("X-Tenant", "acme")]),
        ("/orders", [("X-Tenant", "00000000-0000-0000-0000-000000000001")]),
        ("/t/acme/orders", [("Host", "acme.example.com"), ("X-Tenant", "acme")]),
    ],
)
async def test_naming_the_keys_own_tenant_is_fine(
    app: Recorder, tenants: MemoryTenancy, path: str, headers: list[tuple[str, str]]
) -> None:
    """By slug or id, in as many places as there are."""
    answer = await request(build(app, tenants, resolvers=RESOLVERS), path, [KEY, *headers])
    assert answer.status == 200
    assert tenants.directory.reports == []


@pytest.mark.parametrize(
    ("path", "headers", "report"),
    [
        ("/orders", [("Host", "globex.example.com")], ("acme", "globex", "subdomain")),
        ("/orders", [("Host", "nobody.example.com:8000")], ("acme", "nobody", "subdomain")),
        ("/orders", [("X-Tenant", "globex")], ("acme", "globex", "header")),
        ("/t/globex/orders", [], ("acme", "globex", "path")),
        ("/t/globex/orders", [("Host", "acme.example.com"), ("X-Tenant", "acme")], ("acme", "globex", "path")),
        (
            "/orders",
            [("X-Tenant", "00000000-0000-0000-0000-000000000002")],
            ("acme", "00000000-0000-0000-0000-000000000002", "header"),
        ),
    ],
)
async def test_naming_another_tenant_is_refused_and_reported(
    app: Recorder,
    tenants: MemoryTenancy,
    path: str,
    headers: list[tuple[str, str]],
    report: tuple[str, str, str],
) -> None:
    """Whether or not there is such a tenant: the answer does not tell."""
    answer = await request(build(app, tenants, resolvers=RESOLVERS), path, [KEY, *headers])
    assert answer.status == 403
    assert answer.json()["type"] == "urn:tenancy:problem:cross-tenant"
    assert report[1].encode() not in answer.body
    assert tenants.directory.reports == [report]
    assert app.scopes == []


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        ("/", [("Host", "acme.example.com"), ("Host", "acme.example.com")]),
        ("/", [("X-Tenant", "acme"), ("X-Tenant", "acme")]),
        ("/", [("Host", "acme.example.com/..")]),
        ("/", [("X-Tenant", "")]),
        ("/t//orders", []),
    ],
)
async def test_a_malformed_name_is_refused(
    app: Recorder, tenants: MemoryTenancy, path: str, headers: list[tuple[str, str]]
) -> None:
    """Rather than read in one way here and in another by the application."""
    answer = await request(build(app, tenants, resolvers=RESOLVERS), path, [KEY, *headers])
    assert answer.status == 400
    assert app.scopes == []


async def test_names_count_only_where_a_resolver_reads_them(app: Recorder, tenants: MemoryTenancy) -> None:
    """An application without sub-domains may be reached under any host."""
    headers = [KEY, ("Host", "globex.example.com"), ("Host", "%%"), ("X-Tenant", "globex")]
    assert (await request(build(app, tenants), headers=headers)).status == 200


async def test_a_suspended_tenant_learns_nothing_from_names(app: Recorder, tenants: MemoryTenancy) -> None:
    """Its status is looked at first."""
    tenants.add("initech", status=Status.SUSPENDED)
    headers = [("X-API-Key", "key-initech"), ("X-Tenant", "globex")]
    answer = await request(build(app, tenants, resolvers=RESOLVERS), headers=headers)
    assert answer.json()["type"] == "urn:tenancy:problem:tenant-suspended"


async def test_a_resolver_of_another_kind_is_refused(app: Recorder, tenants: MemoryTenancy) -> None:
    """It would silently check nothing."""
    with pytest.raises(ConfigurationError):
        build(app, tenants, resolvers=[Resolver()])


# --- exempt paths and other protocols -------------------------------------------------------------------------------


@pytest.mark.parametrize("headers", [[], [KEY], [KEY, KEY], [("X-API-Key", "key-nobody")]])
async def test_an_exempt_path_has_no_tenant(
    app: Recorder, tenants: MemoryTenancy, headers: list[tuple[str, str]]
) -> None:
    """Whatever key comes with it, which is not even looked at, and whatever a middleware before this one left."""
    left = tenants.directory.keys["key-globex"]
    assert (await request(build(app, tenants), "/healthz", headers, tenancy=left)).status == 200
    assert app.bound == [None]
    assert app.scopes[0]["tenancy"] is None
    assert tenants.directory.asked == []


async def test_no_binding_from_before_is_seen_on_an_exempt_path(app: Recorder, tenants: MemoryTenancy) -> None:
    """Whatever the server's context carries, and it is as it was afterwards."""
    leaked = tenants.add("leaked")
    set_current(leaked)
    assert (await request(build(app, tenants), "/healthz")).status == 200
    assert (await request(build(app, tenants))).status == 401
    assert (await request(build(app, tenants), headers=[KEY])).status == 200
    assert [tenant and tenant.slug for tenant in app.bound] == [None, "acme"]
    assert current_tenant() is leaked
    set_current(None)


async def test_a_lifespan_passes_untouched(tenants: MemoryTenancy) -> None:
    """The very same scope and callables, and no tenant bound or unbound."""
    calls: list[tuple[Any, ...]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        calls.append((scope, receive, send))

    async def receive() -> Message:
        return {"type": "lifespan.startup"}

    async def send(message: Message) -> None: ...

    scope = {"type": "lifespan"}
    await build(app, tenants)(scope, receive, send)
    assert calls == [(scope, receive, send)]
    assert scope == {"type": "lifespan"}


async def test_a_websocket_is_bound_to_its_keys_tenant(app: Recorder, tenants: MemoryTenancy) -> None:
    """As a request is."""
    sent = await messages(build(app, tenants), websocket_scope(headers=[KEY]))
    assert sent == [{"type": "websocket.accept"}]
    assert [tenant and tenant.slug for tenant in app.bound] == ["acme"]


@pytest.mark.parametrize("headers", [[], [("X-API-Key", "key-nobody")], [KEY, ("X-Tenant", "globex")]])
async def test_a_websocket_is_refused_before_it_is_accepted(
    app: Recorder, tenants: MemoryTenancy, headers: list[tuple[str, str]]
) -> None:
    """The application is not called."""
    sent = await messages(build(app, tenants, resolvers=RESOLVERS), websocket_scope(headers=headers))
    assert [message["type"] for message in sent] == ["websocket.close"]
    assert app.scopes == []


async def test_a_browser_offers_its_key_as_a_subprotocol(app: Recorder, tenants: MemoryTenancy) -> None:
    """Where one opted in; the application sees the other offers."""
    scope = websocket_scope()
    scope["subprotocols"] = ["chat", "tenancy.key.key-acme"]
    served = build(app, tenants, resolvers=[ApiKeyHeader(), WebSocketKeyProtocol()])
    assert await messages(served, scope) == [{"type": "websocket.accept"}]
    assert app.scopes[0]["subprotocols"] == ["chat"]
    scope["subprotocols"] = ["chat", "tenancy.key.key-acme"]
    assert [message["type"] for message in await messages(build(app, tenants), scope)] == ["websocket.close"]


# --- the server's side ----------------------------------------------------------------------------------------------


async def test_the_server_never_runs_with_a_tenant_bound(tenants: MemoryTenancy) -> None:
    """What it starts in receive and send, the next request of the connection for one, inherits none."""
    seen: list[Tenant | None] = []

    async def receive() -> Message:
        seen.append(current_tenant_or_none())
        return {"type": "http.request", "body": b"x", "more_body": False}

    async def send(message: Message) -> None:
        await asyncio.sleep(0)
        seen.append(current_tenant_or_none())

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert (await receive())["body"] == b"x"
        assert current_tenant().slug == "acme"
        await send({"type": "http.response.start", "status": 200, "headers": []})
        assert current_tenant().slug == "acme"
        await send({"type": "http.response.body", "body": b""})
        assert current_tenant().slug == "acme"

    await build(app, tenants)(http_scope(headers=[KEY]), receive, send)
    assert seen == [None, None, None]


async def test_a_failing_send_leaves_the_tenant_bound(tenants: MemoryTenancy) -> None:
    """For what the application does about it."""

    async def receive() -> Message:
        raise OSError("gone")

    async def send(message: Message) -> None:
        raise OSError("gone")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for broken in (receive(), send({"type": "http.response.start", "status": 200, "headers": []})):
            with pytest.raises(OSError, match="gone"):
                await broken
            assert current_tenant().slug == "acme"

    await build(app, tenants)(http_scope(headers=[KEY]), receive, send)
    assert current_tenant_or_none() is None


# --- errors of the application --------------------------------------------------------------------------------------


async def test_an_error_of_the_application_is_answered(app: Recorder, tenants: MemoryTenancy) -> None:
    """Where it has an answer, and as long as nothing was answered yet."""
    app.error = TenantNotFoundError("globex")
    answer = await request(build(app, tenants), headers=[KEY])
    assert answer.status == 404
    assert b"globex" not in answer.body


@pytest.mark.parametrize("error", [NotOpenError("closed"), RuntimeError("a bug"), KeyError("a bug")])
async def test_other_errors_of_the_application_pass(app: Recorder, tenants: MemoryTenancy, error: Exception) -> None:
    """The very same object."""
    app.error = error
    with pytest.raises(type(error)) as caught:
        await request(build(app, tenants), headers=[KEY])
    assert caught.value is error
    assert current_tenant_or_none() is None


async def test_answers_in_an_outage_are_not_a_line_each(
    app: Recorder, tenants: MemoryTenancy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One at once, and one with their number later, for each tenant; a quiet second ends it. All are counted."""
    monkeypatch.setattr(refusals, "SECONDS", 0.05)
    tenants.add("globex")
    served = build(app, tenants)
    app.error = ServerUnavailableError(server="eu", tenant="acme", reason="refused")
    for header in (KEY, ("X-API-Key", "key-globex")):
        for _ in range(50):
            assert (await request(served, headers=[header])).status == 503
    await until(lambda: not served._refusals._windows)
    first = [one for one in caplog.messages if one.startswith("answered 503: ")]
    more = [one for one in caplog.messages if one.startswith("answered 503 to ")]
    counted = sum(int(one.split()[3]) for one in more)
    assert len(first) + counted == 100 and 2 <= len(first) + len(more) < 50


async def test_answering_the_applications_errors_can_be_switched_off(app: Recorder, tenants: MemoryTenancy) -> None:
    """The middleware's own refusals are answered all the same."""
    app.error = TenantNotFoundError("globex")
    served = build(app, tenants, map_errors=False)
    with pytest.raises(TenantNotFoundError):
        await request(served, headers=[KEY])
    assert (await request(served)).status == 401


async def test_nothing_is_answered_twice(tenants: MemoryTenancy) -> None:
    """An error after the response has begun passes to the server, which cuts the connection."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise InvalidCredentialError

    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    with pytest.raises(InvalidCredentialError):
        await build(app, tenants)(http_scope(headers=[KEY]), receive, send)
    assert len(sent) == 1


async def test_an_application_that_was_led_to_another_tenant_is_reported(app: Recorder, tenants: MemoryTenancy) -> None:
    """By an id in a body, say: it is an attempt like one by sub-domain."""
    app.error = CrossTenantError("naming a tenant", bound="acme", requested="globex")
    answer = await request(build(app, tenants), headers=[KEY])
    assert answer.status == 403
    assert tenants.directory.reports == [("acme", "globex", "application")]


# --- rates ----------------------------------------------------------------------------------------------------------


async def test_a_tenant_that_asks_too_fast_is_slowed_down(app: Recorder, tenants: MemoryTenancy) -> None:
    """With 429 and when to come back; the others are not affected."""
    tenants.add("hasty", tier="slow")
    seen: list[QuotaRefused] = []
    tenants.events.subscribe(QuotaRefused, seen.append)
    served = build(app, tenants)
    answers = [await request(served, headers=[("X-API-Key", "key-hasty")]) for _ in range(3)]
    assert [(event.slug, event.resource, event.limit) for event in seen] == [("hasty", "requests_per_second", 2)]
    assert [answer.status for answer in answers] == [200, 200, 429]
    assert [answer.header("ratelimit-policy") for answer in answers] == ['"tenant";q=2'] * 3
    assert [answer.header("ratelimit") for answer in answers] == [
        '"tenant";r=1;t=1',
        '"tenant";r=0;t=1',
        '"tenant";r=0;t=1',
    ]
    assert answers[2].header("retry-after") == "1"
    assert answers[2].json()["type"] == "urn:tenancy:problem:rate-limited"
    assert answers[0].header("retry-after") is None
    unlimited = await request(served, headers=[KEY])
    assert unlimited.status == 200 and unlimited.header("ratelimit") is None
    assert len(app.scopes) == 3


async def test_refused_requests_count_as_well(app: Recorder, tenants: MemoryTenancy) -> None:
    """Whoever tries other tenants' names is slowed down like anybody."""
    tenants.add("hasty", tier="slow")
    served = build(app, tenants, resolvers=RESOLVERS)
    headers = [("X-API-Key", "key-hasty"), ("X-Tenant", "globex")]
    assert [(await request(served, headers=headers)).status for _ in range(3)] == [403, 403, 429]


async def test_a_websocket_counts_as_one_request(app: Recorder, tenants: MemoryTenancy) -> None:
    """It is refused before it is accepted."""
    tenants.add("hasty", tier="slow")
    served = build(app, tenants)
    sent = [await messages(served, websocket_scope(headers=[("X-API-Key", "key-hasty")])) for _ in range(3)]
    assert [message["type"] for answer in sent for message in answer] == [
        "websocket.accept",
        "websocket.accept",
        "websocket.close",
    ]
