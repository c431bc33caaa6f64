"""Which paths need no key."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from starlette.responses import Response
from starlette.routing import Match, Mount, Route

from tenancy_orm.asgi import ExemptPaths
from tenancy_orm.errors import ConfigurationError
from tests.support.asgi import http_scope

EXEMPT = ExemptPaths(["/healthz", "/static/*", "/"])


@pytest.mark.parametrize("path", ["/healthz", "/static/app.js", "/static/a/b.css", "/static/", "/"])
def test_a_path_on_the_list_is_exempt(path: str) -> None:
    """Exactly, or below a pattern."""
    assert EXEMPT.covers(http_scope(path))


@pytest.mark.parametrize(
    "path",
    [
        "",
        "//",
        "/healthz/",
        "/healthz//",
        "//healthz",
        "/Healthz",
        "/healthz/x",
        "/healthz?x",
        "/healthz;x",
        "/healthz\0",
        "/healthz%00",
        "/static",
        "/static/../orders",
        "/static/..",
        "/static/./x",
        "/static//x",
        "/static/x/../../orders",
        "/static/..\\orders",
        "/static/%2e%2e/orders",
        "/static/%2f",
        "/static/x\n",
        "/statics/x",
        "/STATIC/x",
        "http://example.com/healthz",
        "healthz",
        "*",
    ],
)
def test_no_other_spelling_is_exempt(path: str) -> None:
    """Whatever else might read it as a path on the list."""
    assert not EXEMPT.covers(http_scope(path))


def test_the_path_below_root_path_counts() -> None:
    """As the application's routes are matched."""
    assert EXEMPT.covers(http_scope("/api/healthz", root_path="/api"))
    assert not EXEMPT.covers(http_scope("/api/orders", root_path="/api"))
    assert not EXEMPT.covers(http_scope("/apihealthz", root_path="/api"))


@pytest.mark.parametrize(
    "patterns", [["/*"], ["healthz"], ["/a*"], ["/a/*/b"], ["/a//b"], ["/a/../b"], ["/a?b"], ["*"], [""], "/healthz"]
)
def test_a_pattern_that_is_none_is_refused(patterns: Iterable[str]) -> None:
    """And one that would exempt everything."""
    with pytest.raises(ConfigurationError):
        ExemptPaths(patterns)


def endpoint(request: object) -> Response:
    """Never called: routes are only matched."""
    return Response()


FILES = Response()


ROUTES: list[Route | Mount] = [
    Route("/healthz", endpoint, name="exempt"),
    Mount("/static", FILES, name="exempt"),
    Route("/", endpoint, name="exempt"),
    Route("/orders", endpoint, name="orders"),
    Route("/orders/{id}", endpoint, name="orders"),
    Route("/{anything:path}", endpoint, name="anything"),
]
PIECES = ["/", "//", "healthz", "static", "orders", "..", ".", "%2f", "\\", "\0", "api", "x", "*", "?", "é"]
HOSTILE = st.lists(st.sampled_from(PIECES), max_size=7).map("".join)


@given(path=HOSTILE, root=st.one_of(st.just(""), st.just("/api"), HOSTILE))
@example("/api/healthz", "/api")
@example("/static/../orders", "")
def test_what_is_exempt_is_routed_to_an_exempt_route(path: str, root: str) -> None:
    """No spelling gets by without a key and reaches a route that needs one."""
    scope = http_scope(path, root_path=root)
    if EXEMPT.covers(scope):
        matched = next(route for route in ROUTES if route.matches(scope)[0] is not Match.NONE)
        assert matched.name == "exempt"
