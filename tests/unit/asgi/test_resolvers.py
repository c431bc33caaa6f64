"""What a request says about its tenant."""

from __future__ import annotations

from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette._utils import get_route_path

from tenancy_orm.asgi import (
    ApiKeyHeader,
    BearerToken,
    HeaderResolver,
    PathPrefixResolver,
    SubdomainResolver,
    WebSocketKeyProtocol,
)
from tenancy_orm.asgi.resolvers import parse_host, route_path
from tenancy_orm.errors import ConfigurationError, InvalidCredentialError, MalformedRequestError
from tenancy_orm.tenant import Status, Tenant
from tests.support.asgi import http_scope, websocket_scope

SCOPE = http_scope()
TENANT = Tenant(
    id=UUID("01890a5d-ac96-774b-bcce-b302099a8057"),
    slug="acme",
    status=Status.ACTIVE,
    tier="free",
    aliases=frozenset({"acme-old", "shop.acme.example"}),
)


# --- keys -----------------------------------------------------------------------------------------------------------


def test_a_key_is_the_whole_header() -> None:
    """Also an empty one, which is then malformed rather than missing."""
    resolver = ApiKeyHeader()
    assert resolver.key(SCOPE, {b"x-api-key": b"abc"}) == "abc"
    assert resolver.key(SCOPE, {b"x-api-key": b""}) == ""
    assert resolver.key(SCOPE, {}) is None


@pytest.mark.parametrize(
    ("value", "key"),
    [
        (b"Bearer abc", "abc"),
        (b"bearer abc", "abc"),
        (b"BEARER  abc ", "abc"),
        (b"Bearer", ""),
        (b"Bearer ", ""),
        (b"Basic YTpi", None),
        (b"Bearerabc", None),
        (b"", None),
    ],
)
def test_a_bearer_token_is_found_whatever_the_case_of_its_scheme(value: bytes, key: str | None) -> None:
    """Other schemes are the application's business."""
    assert BearerToken().key(SCOPE, {b"authorization": value}) == key


def test_a_websocket_offers_its_key_as_a_subprotocol() -> None:
    """The application sees the other offers only."""
    scope = websocket_scope()
    scope["subprotocols"] = ["chat", "tenancy.key.abc"]
    resolver = WebSocketKeyProtocol()
    assert resolver.key(scope, {}) == "abc"
    resolver.adapt_scope(scope)
    assert scope["subprotocols"] == ["chat"]
    assert resolver.key(scope, {}) is None


def test_two_keys_among_the_subprotocols_are_refused() -> None:
    """Even equal ones."""
    scope = websocket_scope()
    scope["subprotocols"] = ["tenancy.key.abc", "tenancy.key.abc"]
    with pytest.raises(InvalidCredentialError) as caught:
        WebSocketKeyProtocol().key(scope, {})
    assert caught.value.reason == "ambiguous"


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", ["acme", "01890a5d-ac96-774b-bcce-b302099a8057", "acme-old", "shop.acme.example"])
def test_a_tenant_is_named_by_slug_id_or_alias(named: str) -> None:
    """Aliases are the former slugs and verified domains of its own."""
    assert HeaderResolver().matches(named, TENANT)


@pytest.mark.parametrize("named", ["Acme", "acme ", "globex", "", "01890a5d-ac96-774b-bcce-b302099a8058"])
def test_any_other_name_is_another_tenant(named: str) -> None:
    """There is no normalising: what does not equal does not match."""
    assert not HeaderResolver().matches(named, TENANT)


@pytest.mark.parametrize(
    ("host", "named"),
    [
        (b"acme.example.com", "acme"),
        (b"ACME.Example.com:8443", "acme"),
        (b"acme.example.com.", "acme"),
        (b"a.b.example.com", "a.b"),
        (b"example.com", None),
        (b"example.com:80", None),
        (b"www.example.com", None),
        (b"acme.example.com.evil.test", None),
        (b"acmeexample.com", None),
        (b"localhost", None),
        (b"127.0.0.1:8000", None),
        (b"[::1]:8000", None),
    ],
)
def test_a_subdomain_names_a_tenant(host: bytes, named: str | None) -> None:
    """Reserved ones, the domain itself and foreign hosts do not."""
    assert SubdomainResolver("example.com").claimed_tenant(SCOPE, {b"host": host}) == named


def test_without_a_host_no_tenant_is_named() -> None:
    """HTTP/1.0 has none."""
    assert SubdomainResolver("example.com").claimed_tenant(SCOPE, {}) is None


def test_custom_domains_name_their_owner() -> None:
    """Every host outside the domain must then be one."""
    resolver = SubdomainResolver("example.com", custom_domains=True)
    assert resolver.claimed_tenant(SCOPE, {b"host": b"Shop.Acme.example:443"}) == "shop.acme.example"
    assert resolver.claimed_tenant(SCOPE, {b"host": b"127.0.0.1"}) == "127.0.0.1"
    assert resolver.claimed_tenant(SCOPE, {b"host": b"example.com"}) is None


@pytest.mark.parametrize(
    "host",
    [
        b"",
        b" ",
        b".",
        b".example.com",
        b"acme..example.com",
        b"acme.example.com/x",
        b"acme.example.com@evil",
        b"acme.example.com:port",
        b"acme.example.com:123456",
        b"acme\0.example.com",
        b"acm\xe9.example.com",
        b"a.example.com, b.example.com",
        b"a" * 300,
    ],
)
def test_a_malformed_host_is_refused(host: bytes) -> None:
    """Rather than read in one way here and in another by the application."""
    with pytest.raises(MalformedRequestError):
        parse_host(host)


def test_a_header_names_a_tenant() -> None:
    """By slug or id."""
    resolver = HeaderResolver()
    assert resolver.headers == (b"x-tenant",)
    assert resolver.claimed_tenant(SCOPE, {b"x-tenant": b"acme"}) == "acme"
    assert resolver.claimed_tenant(SCOPE, {}) is None


@pytest.mark.parametrize("value", [b"", b" acme", b"acme,globex", b"acme/..", b"\xff", b"a" * 200, b"acme\n"])
def test_a_malformed_tenant_header_is_refused(value: bytes) -> None:
    """It cannot be any tenant's name."""
    with pytest.raises(MalformedRequestError):
        HeaderResolver().claimed_tenant(SCOPE, {b"x-tenant": value})


@pytest.mark.parametrize(
    ("path", "root", "named", "entered", "rest"),
    [
        ("/t/acme/orders", "", "acme", "/t/acme", "/orders"),
        ("/t/acme", "", "acme", "/t/acme", ""),
        ("/t/acme/", "", "acme", "/t/acme", "/"),
        ("/api/t/acme/orders", "/api", "acme", "/api/t/acme", "/orders"),
        ("/orders", "", None, "", "/orders"),
        ("/tt/acme", "", None, "", "/tt/acme"),
        ("/t/acme/t/globex", "", "acme", "/t/acme", "/t/globex"),
    ],
)
def test_a_path_names_a_tenant_and_enters_it(path: str, root: str, named: str | None, entered: str, rest: str) -> None:
    """The application's routes match what follows, as below a Mount."""
    scope = http_scope(path, root_path=root)
    resolver = PathPrefixResolver("/t/{tenant}")
    assert resolver.claimed_tenant(scope, {}) == named
    resolver.adapt_scope(scope)
    assert scope["path"] == path
    assert scope["root_path"] == entered
    assert get_route_path(scope) == rest


@pytest.mark.parametrize("path", ["/t/", "/t//orders", "/t/../orders", "/t/a b/orders", "/t/é"])
def test_a_malformed_tenant_in_the_path_is_refused(path: str) -> None:
    """It cannot be any tenant's name."""
    with pytest.raises(MalformedRequestError):
        PathPrefixResolver().claimed_tenant(http_scope(path), {})


@pytest.mark.parametrize(
    "make",
    [
        lambda: SubdomainResolver("example.com:80"),
        lambda: SubdomainResolver(""),
        lambda: SubdomainResolver("*.example.com"),
        lambda: PathPrefixResolver("/t"),
        lambda: PathPrefixResolver("/t/{tenant}/x"),
        lambda: PathPrefixResolver("t/{tenant}"),
        lambda: HeaderResolver("X Tenant"),
        lambda: ApiKeyHeader(""),
        lambda: WebSocketKeyProtocol("a,b"),
    ],
)
def test_a_mistaken_resolver_is_refused_when_it_is_made(make: object) -> None:
    """Not with the first request."""
    assert callable(make)
    with pytest.raises(ConfigurationError):
        make()


PATHS = st.text("/ab.%é", max_size=8)


@given(path=PATHS, root=PATHS)
def test_the_route_path_is_starlettes(path: str, root: str) -> None:
    """What is decided on is what is routed."""
    scope = http_scope(path, root_path=root)
    assert route_path(scope) == get_route_path(scope)
