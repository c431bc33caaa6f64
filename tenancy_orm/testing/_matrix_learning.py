"""What a tenant can do itself: it calls every route until it is answered, and learns from what it is answered."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final
from urllib.parse import urlencode

from ..asgi.resolvers import TenantResolver
from ..tenant import Tenant
from ._matrix_client import Answer, Call
from ._matrix_naming import namings
from ._matrix_routes import JSON, WEBSOCKET, Route
from ._matrix_rows import Rows
from ._matrix_values import NAMES_OF_TENANTS, Owned, body_of, singular

_MOST_VALUES: Final = 4
_MOST_REVISIONS: Final = 4
_UNWANTED: Final = re.compile(r"extra|forbid|unknown|unexpected|not permitted|not allowed", re.IGNORECASE)


@dataclass
class Side:
    """One of the two tenants: what it owns, and how it calls."""

    tenant: Tenant
    owned: Owned
    rows: Rows
    log_in: Callable[[], Awaitable[Mapping[str, str]]]
    """Returns the headers of a new credential."""
    headers: Mapping[str, str] = field(default_factory=dict)
    made: dict[Route, Call] = field(default_factory=dict)
    """The call by which it has reached each route."""
    parameters: dict[Route, Mapping[str, Any]] = field(default_factory=dict)
    bodies: dict[Route, Any] = field(default_factory=dict)
    failed: dict[Route, str] = field(default_factory=dict)


class Learner:
    """Calls routes as the tenants' own.

    Args:
        ask: Calls as one of them.
        routes: The routes.
        resolvers: Where the application's middleware reads tenants.
        sides: The two tenants.
        examples: Bodies and messages that routes take, by ``POST /notes``.
    """

    def __init__(
        self,
        ask: Callable[[Side, Call], Awaitable[Answer]],
        routes: Sequence[Route],
        resolvers: Sequence[TenantResolver],
        sides: Sequence[Side],
        examples: Mapping[str, Any],
    ) -> None:
        self._ask = ask
        self._routes = routes
        self._resolvers = resolvers
        self._sides = sides
        self._examples = examples
        self._last: Answer | None = None

    async def learn(self, side: Side) -> None:
        """Call every route as the tenant's own, until nothing more is reached; what is deleted is left for the end."""
        routes = [route for route in self._routes if route.method not in ("DELETE", "HEAD")]
        routes.sort(key=lambda route: (bool(route.parameters), risk(route)))
        for number in range(3):
            before = len(side.made)
            for route in routes:
                if route not in side.made or (number == 1 and not route.changes):
                    await self.reach(side, route)
            if number and len(side.made) == before:
                break
        for route in self._routes:
            if route.method == "HEAD":
                await self.reach(side, route)

    async def reach(self, side: Side, route: Route) -> None:
        """Call one route as the tenant's own, in different ways until it answers."""
        for values in self.values(side, route):
            base = Call(route.method, route.fill(values), headers=side.headers)
            if route.host:
                base = replace(base, headers={**base.headers, "Host": host_of(route.host, side.tenant.slug)})
            # at the tenant's own address too: a person of several tenants must name one
            for start in (base, self._addressed(side, base)):
                if start is None:
                    break
                if await self._reach_by(side, route, start, values):
                    return
                if self._last is not None and self._last.status not in (401, 403, 404, 409):
                    break

    async def _reach_by(self, side: Side, route: Route, start: Call, values: Mapping[str, Any]) -> bool:
        async for call, body in self._calls(side, route, start):
            answer = self._last = await self._ask(side, call)
            if answer.is_success:
                side.made.setdefault(route, call)
                side.parameters.setdefault(route, values)
                side.bodies.setdefault(route, body)
                self._read(side, route, call, answer)
                return True
            side.failed[route] = _describe(answer)
        return False

    def values(self, side: Side, route: Route) -> Iterator[Mapping[str, Any]]:
        """Yield values for the parameters of the path: the tenant's own objects."""
        if not route.parameters:
            yield {}
            return
        other = next(one for one in self._sides if one is not side)
        options = []
        for name, kind in route.parameters.items():
            noun = route.noun(name)
            found: list[Any] = [side.tenant.slug, str(side.tenant.id)] if is_tenant(name, noun) else []
            if found and (name.lower().endswith("id") or kind == "uuid"):
                found.reverse()
            found += side.owned.known.candidates(name, noun, kind=kind, but=other.owned.known)
            if not found or name == "slug":
                guesses: dict[str, list[Any]] = {"int": [1], "path": ["index.html"]}
                found += guesses.get(kind, [side.tenant.slug, str(side.tenant.id), "1"])
            options.append(found[:_MOST_VALUES])
        for chosen in itertools.islice(itertools.product(*options), 2 * _MOST_VALUES):
            yield dict(zip(route.parameters, chosen, strict=True))

    async def _calls(self, side: Side, route: Route, base: Call) -> AsyncIterator[tuple[Call, Any]]:
        """The calls that may reach a route, each corrected by what the one before was answered."""
        if route.method == WEBSOCKET:
            yield replace(base, messages=self.messages(route, side.owned)), None
            return
        more = [base]
        if route.query or route.headers:
            query = self._described(side, route.query)
            credentials = {name.lower() for name in side.headers}
            described = {name: one for name, one in route.headers.items() if name.lower() not in credentials}
            headers = {name: value for name, value in self._described(side, described).items() if value.isascii()}
            more.append(replace(base, query=query, headers={**headers, **base.headers}))
        for call in more:
            if not route.changes:
                yield call, None
                continue
            for body in self.bodies(side, route):
                yield with_body(call, route, body), body
                if not isinstance(body, dict):
                    continue
                for _ in range(_MOST_REVISIONS):
                    revised = self._revise(side, route, body)
                    if revised is None or revised == body:
                        break
                    body = revised
                    yield with_body(call, route, body), body

    def _described(self, side: Side, schemas: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
        """Values for the parameters that the OpenAPI document names in query or headers."""
        made = {}
        for name, schema in schemas.items():
            plain = name.lower().removeprefix("x-").replace("-", "_")
            value = body_of({"type": "string", **schema}, side.owned, side.owned, all_fields=False, noun=plain)
            if not isinstance(value, (dict, list)):
                made[name] = str(value)
        return made

    def bodies(self, side: Side, route: Route) -> Iterator[Any]:
        """Yield bodies that a route may take, the likeliest first."""
        if str(route) in self._examples:
            example = self._examples[str(route)]
            yield example(side.owned) if callable(example) else example
            return
        noun = noun_of(route)
        if route.body is not None:
            for all_fields in (True, False):
                yield body_of(route.body, side.owned, side.owned, all_fields=all_fields, noun=noun)
        else:
            if (row := side.rows.document(noun)) is not None:
                yield row
            yield {}

    def _revise(self, side: Side, route: Route, body: dict[str, Any]) -> dict[str, Any] | None:
        """Return the body without the fields that were not wanted, and with those that were missed."""
        if self._last is None or not self._last.is_refusal:
            return None
        revised = dict(body)
        for name, message in _complaints(self._last.json()):
            if name in revised:
                del revised[name]
            elif not _UNWANTED.search(message):
                ids = side.owned.known.candidates(name, noun_of(route))
                revised[name] = str(ids[0]) if ids and re.search(r"(^|_)id$", name) else side.owned.text(name)
        return revised

    def _read(self, side: Side, route: Route, call: Call, answer: Answer) -> None:
        noun = noun_of(route)
        side.owned.learn(answer.json(), noun, label=str(route))
        if (location := answer.headers.get("location")) and route.method == "POST":
            side.owned.known.add(noun, "id", location.rstrip("/").rpartition("/")[2])

    def _addressed(self, side: Side, call: Call) -> Call | None:
        naming = next(namings(self._resolvers, side.tenant, only_addresses=True), None)
        return None if naming is None else naming.apply(call)

    def messages(self, route: Route, texts: Owned) -> tuple[str, ...]:
        """Return what a websocket may take."""
        if str(route) in self._examples:
            example = self._examples[str(route)]
            made = example(texts) if callable(example) else example
            return tuple(one if isinstance(one, str) else json.dumps(one) for one in made)
        return (json.dumps({"text": texts.text(), "message": texts.text()}),)


def risk(route: Route) -> int:
    """Return where a route stands in the order: what changes least first."""
    order = {"GET": 0, "HEAD": 1, WEBSOCKET: 2, "POST": 3, "PATCH": 4, "PUT": 5, "DELETE": 6}
    return order.get(route.method, 4)


def is_tenant(name: str, noun: str | None) -> bool:
    """Return whether a parameter in a path names a tenant."""
    if name in NAMES_OF_TENANTS:
        return True
    return name in ("id", "slug", "name", "key") and noun is not None and singular(noun) in NAMES_OF_TENANTS


def noun_of(route: Route) -> str:
    """Return what a route's objects are: the last part of its path that is no parameter."""
    parts = [part for part in route.path.split("/") if part and "{" not in part]
    return parts[-1] if parts else "object"


def host_of(pattern: str, slug: str) -> str:
    """Return a host that a pattern of hosts admits."""
    return re.sub(r"{[^{}]*}", slug, pattern)


def with_body(call: Call, route: Route, body: Any) -> Call:
    """Return the call with a body, in the form that the route takes."""
    if body is None:
        return call
    if route.media == "application/x-www-form-urlencoded":
        return replace(call, content=urlencode(body).encode(), media=route.media)
    if route.media == "multipart/form-data":
        edge = "matrix"
        parts = [
            f'--{edge}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
            for name, value in body.items()
        ]
        content = "".join((*parts, f"--{edge}--\r\n")).encode()
        return replace(call, content=content, media=f"{route.media}; boundary={edge}")
    return replace(call, content=json.dumps(body, default=str).encode(), media=JSON)


def _complaints(document: Any) -> Iterator[tuple[str, str]]:
    """The fields that a refusal names, with what it says of each: as pydantic, FastAPI, Litestar and RFC 9457 do."""
    if isinstance(document, list):
        for one in document:
            yield from _complaints(one)
    elif isinstance(document, Mapping):
        place = document.get("loc") or document.get("pointer") or document.get("field") or document.get("key")
        parts = place if isinstance(place, list) else re.split(r"[/.]", str(place or ""))
        names = [part for part in parts if isinstance(part, str) and part and part != "body"]
        if names:
            yield names[0], json.dumps(document)
        else:
            for value in document.values():
                yield from _complaints(value)


def _describe(answer: Answer) -> str:
    if answer.error is not None:
        return f"{answer.status}, {type(answer.error).__name__}: {answer.error}"[:200]
    detail = answer.json()
    said = detail.get("detail") or detail.get("title") if isinstance(detail, Mapping) else ""
    return f"{answer.status} {json.dumps(said) if isinstance(said, (list, dict)) else said or ''}".strip()[:200]
