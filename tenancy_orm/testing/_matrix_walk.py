"""The walk itself: what the owner can do, then the same by everybody else."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Final
from urllib.parse import urlencode

from ..asgi.resolvers import HeaderResolver, PathPrefixResolver, SubdomainResolver, TenantResolver
from ..tenant import Tenant
from ._matrix_client import Answer, Call, Client
from ._matrix_report import AT_ONCE, NOBODY, NOTHING, OTHER, REVOKED, Finding, Kind, Report
from ._matrix_routes import JSON, WEBSOCKET, Route
from ._matrix_rows import Rows
from ._matrix_values import NAMES_OF_TENANTS, Owned, body_of, made_up, singular

_MOST_VALUES: Final = 4
_MOST_REVISIONS: Final = 4
_LONGEST_PAUSE: Final = 5.0
_PAUSES: Final = 4
# what proxies and applications read a tenant from, besides what the middleware is told
_HEADERS: Final = ("X-Tenant", "X-Tenant-ID", "X-Tenant-Slug", "X-Org", "X-Org-ID", "X-Organization", "X-Account")
_HOST_HEADERS: Final = ("X-Forwarded-Host", "X-Original-Host", "Forwarded")
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


@dataclass(frozen=True)
class Naming:
    """A way to name the owner, besides what the path has of it."""

    label: str
    apply: Callable[[Call], Call | None]
    by_everyone: bool = True


class Walk:
    """Calls each route as the owner, then as everybody else.

    Args:
        client: Calls the application.
        routes: Its routes.
        resolvers: Where its middleware reads tenants.
        owner, other: The two tenants.
        revoked: Returns headers with a key of the owner's that is revoked; None where the application takes no keys.
        examples: Bodies and messages that routes take, by ``POST /notes``.
        public: Whether a path is expected to answer everybody.
    """

    def __init__(
        self,
        client: Client,
        routes: Sequence[Route],
        resolvers: Sequence[TenantResolver],
        *,
        owner: Side,
        other: Side,
        revoked: Callable[[], Awaitable[Mapping[str, str]]] | None,
        examples: Mapping[str, Any],
        public: Callable[[Route], bool],
    ) -> None:
        self._client = client
        self._resolvers = resolvers
        self._owner = owner
        self._other = other
        self._revoked = revoked
        self._revoked_headers: Mapping[str, str] | None = None
        self._examples = examples
        self.report = Report(routes=len(routes), public=[str(route) for route in routes if public(route)])
        self._routes = [route for route in routes if not public(route)]
        self._last: Answer | None = None
        self._digest: Mapping[str, str] | None = None

    async def run(self) -> Report:
        """Walk, and return the report."""
        # the other first: what it is shown of itself cannot be the owner's, who has nothing yet
        for side in (self._other, self._owner):
            await side.rows.plant()
            await self._learn(side)
        self._owner.owned.settle(self._other.owned)
        self._other.owned.settle(self._owner.owned)
        for route in sorted(self._routes, key=_risk):
            await self._attack(route)
        for route in self._routes:
            if route.method == "DELETE":
                await self._reach(self._owner, route)
            if route not in self._owner.made and not self._is_known_to_leak(route):
                self.report.unreached[str(route)] = self._owner.failed.get(route, "no id for its path is known")
        self.report.unplanted = dict(self._owner.rows.refused)
        self.report.calls = self._client.count
        return self.report

    # --- what a tenant can do itself ----------------------------------------------------------------------------------

    async def _learn(self, side: Side) -> None:
        """Call every route as the tenant's own, until nothing more is reached; what is deleted is left for the end."""
        routes = [route for route in self._routes if route.method not in ("DELETE", "HEAD")]
        routes.sort(key=lambda route: (bool(route.parameters), _risk(route)))
        for number in range(3):
            before = len(side.made)
            for route in routes:
                if route not in side.made or (number == 1 and not route.changes):
                    await self._reach(side, route)
            if number and len(side.made) == before:
                break
        for route in self._routes:
            if route.method == "HEAD":
                await self._reach(side, route)

    async def _reach(self, side: Side, route: Route) -> None:
        for values in self._values(side, route):
            base = Call(route.method, route.fill(values), headers=side.headers)
            if route.host:
                base = replace(base, headers={**base.headers, "Host": _host(route.host, side.tenant.slug)})
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
            answer = await self._as_self(side, call)
            if answer.is_success:
                side.made.setdefault(route, call)
                side.parameters.setdefault(route, values)
                side.bodies.setdefault(route, body)
                self._read(side, route, call, answer)
                return True
            side.failed[route] = _describe(answer)
        return False

    def _values(self, side: Side, route: Route) -> Iterator[Mapping[str, Any]]:
        """Values for the parameters of the path: the tenant's own objects."""
        if not route.parameters:
            yield {}
            return
        other = self._other if side is self._owner else self._owner
        options = []
        for name, kind in route.parameters.items():
            noun = route.noun(name)
            found: list[Any] = [side.tenant.slug, str(side.tenant.id)] if _is_tenant(name, noun) else []
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
            yield replace(base, messages=self._messages(route, side.owned, side.owned)), None
            return
        more = [base]
        if route.query or route.headers:
            query = self._described(side, route.query)
            headers = {name: value for name, value in self._described(side, route.headers).items() if value.isascii()}
            more.append(replace(base, query=query, headers={**headers, **base.headers}))
        for call in more:
            if not route.changes:
                yield call, None
                continue
            for body in self._bodies(side, route):
                yield _with_body(call, route, body), body
                if not isinstance(body, dict):
                    continue
                for _ in range(_MOST_REVISIONS):
                    revised = self._revise(side, route, body)
                    if revised is None or revised == body:
                        break
                    body = revised
                    yield _with_body(call, route, body), body

    def _described(self, side: Side, schemas: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
        """Values for the parameters that the OpenAPI document names in query or headers."""
        made = {}
        for name, schema in schemas.items():
            plain = name.lower().removeprefix("x-").replace("-", "_")
            value = body_of({"type": "string", **schema}, side.owned, side.owned, all_fields=False, noun=plain)
            if not isinstance(value, (dict, list)):
                made[name] = str(value)
        return made

    def _bodies(self, side: Side, route: Route) -> Iterator[Any]:
        if str(route) in self._examples:
            example = self._examples[str(route)]
            yield example(side.owned) if callable(example) else example
            return
        noun = _noun(route)
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
                ids = side.owned.known.candidates(name, _noun(route))
                revised[name] = str(ids[0]) if ids and re.search(r"(^|_)id$", name) else side.owned.text(name)
        return revised

    def _read(self, side: Side, route: Route, call: Call, answer: Answer) -> None:
        noun = _noun(route)
        side.owned.learn(answer.json(), noun, label=str(route))
        if (location := answer.headers.get("location")) and route.method == "POST":
            side.owned.known.add(noun, "id", location.rstrip("/").rpartition("/")[2])

    async def _as_self(self, side: Side, call: Call) -> Answer:
        """Call as the tenant itself. It must not be shown what is the other's either."""
        call = replace(call, headers={**call.headers, **side.headers})
        answer = await self._call(call)
        if answer.status == 401 and side.headers:
            # one of the routes may have logged it out
            side.headers = await side.log_in()
            answer = await self._call(replace(call, headers={**call.headers, **side.headers}))
        self._last = answer
        self._digest = None
        foreign = self._owner if side is self._other else self._other
        self._judge(call, answer, foreign.owned, _template(call, self._routes), OTHER, NOTHING)
        return answer

    def _addressed(self, side: Side, call: Call) -> Call | None:
        naming = next(self._namings(side.tenant, only_addresses=True), None)
        return None if naming is None else naming.apply(call)

    # --- what everybody else can do -----------------------------------------------------------------------------------

    async def _attack(self, route: Route) -> None:
        if route.method == "HEAD" and self._is_known_to_leak(replace(route, method="GET")):
            return
        owner = self._owner
        own = owner.made.get(route)
        sets = [owner.parameters[route]] if route in owner.parameters else list(self._values(owner, route))[:2]
        for values in sets:
            call = self._as_anybody(route, values)
            base = [*self._path_labels(route, values), *self._labels_in(call)]
            if own is not None and not route.changes and route.method != WEBSOCKET:
                await self._as_self(owner, own)  # what is cached now is the owner's
            # each caller until it gets something: what else it could name says no more
            waiting = [OTHER, NOBODY]
            variants = [(naming, call, list[str]()) for naming in self._namings(owner.tenant)]
            variants[1:1] = [(variants[0][0], one, ids) for one, ids in self._with_owners_ids(route, call)]
            for naming, one, ids in variants:
                if (named := naming.apply(one)) is None:
                    continue
                label = "; ".join([*base, *ids, *([naming.label] if naming.label != NOTHING else [])]) or NOTHING
                for caller in list(waiting):
                    if caller == NOBODY and (ids or not naming.by_everyone):
                        continue
                    headers = self._other.headers if caller == OTHER else {}
                    if await self._try(route, named, headers, caller, label, values):
                        waiting.remove(caller)
            if self._revoked is not None and NOBODY in waiting:
                label = "; ".join([*base, "the key itself"])
                await self._try(route, call, await self._revoked_key(), REVOKED, label, values)
        theirs = self._other.made.get(route)
        if own is not None and theirs is not None and not route.changes and route.method != WEBSOCKET:
            await self._at_once(route, own, theirs)

    def _as_anybody(self, route: Route, values: Mapping[str, Any]) -> Call:
        """The call by which the owner has reached a route, without its credential and its address."""
        owner = self._owner
        call = replace(owner.made.get(route) or Call(route.method, ""), path=route.fill(values))
        kept = {name: value for name, value in call.headers.items() if name in route.headers}
        if route.host:
            kept["Host"] = _host(route.host, owner.tenant.slug)
        return replace(call, headers=kept)

    def _path_labels(self, route: Route, values: Mapping[str, Any]) -> list[str]:
        tenant = self._owner.tenant
        return [
            f"path {'tenant' if str(value) in (tenant.slug, str(tenant.id)) else 'id'} {{{name}}}"
            for name, value in values.items()
        ]

    def _labels_in(self, call: Call) -> list[str]:
        """What of the owner's a call names in query, headers and body."""
        tenant, owned = self._owner.tenant, {str(value) for value in self._owner.owned.known.ids().values()}
        owned |= {tenant.slug, str(tenant.id)}
        try:
            body = json.loads(call.content) if call.content else {}
        except ValueError:
            body = {}
        places = {"query": call.query, "header": call.headers, "body": body if isinstance(body, dict) else {}}
        return [f"{place} {name}" for place, found in places.items() for name in found if str(found[name]) in owned]

    async def _try(
        self,
        route: Route,
        call: Call,
        headers: Mapping[str, str],
        caller: str,
        named: str,
        values: Mapping[str, Any],
    ) -> bool:
        """Call as somebody else. Returns whether it got anything of the owner's, or anything at all without a key."""
        found = len(self.report.findings)
        call = replace(call, headers={**headers, **call.headers})
        if route.method == WEBSOCKET:
            await self._overhear(route, call, caller, named)
            return len(self.report.findings) > found
        if route.changes:
            call = self._with_own_texts(route, call)
        before = self._digest = self._digest or await self._owner.rows.digest()
        answer = await self._call(call, patient=caller != REVOKED)
        if caller == OTHER and answer.status == 401 and not await self._is_logged_in():
            self._other.headers = await self._other.log_in()
            call = replace(call, headers={**call.headers, **self._other.headers})
            answer = await self._call(call)
        if caller == REVOKED and answer.status == 429:
            self._revoked_headers = None  # too many have tried with this one
            call = replace(call, headers={**call.headers, **await self._revoked_key()})
            answer = await self._call(call)
        shown = self._judge(call, answer, self._owner.owned, route, caller, named)
        if answer.is_refusal:
            return shown
        if route.changes:
            self._owner.owned.spend(call.text)
        after = self._digest = await self._owner.rows.digest()
        if changed := tuple(name for name in after.keys() | before.keys() if after.get(name) != before.get(name)):
            self._add(route, call, answer, caller, named, "change", changed)
            await self._owner.rows.restore()
            self._digest = None
        elif not shown and not (caller == OTHER and await self._is_ignored(route, call, answer, values, named)):
            self._add(route, call, answer, caller, named, "answered")
        return len(self.report.findings) > found

    async def _is_logged_in(self) -> bool:
        """Whether the other's credential is valid still: one that it has ended itself would prove nothing."""
        for route, call in self._other.made.items():
            if route.method == "GET":
                answer = await self._call(replace(call, headers={**call.headers, **self._other.headers}))
                return answer.status != 401
        return False

    async def _is_ignored(
        self, route: Route, call: Call, answer: Answer, values: Mapping[str, Any], named: str
    ) -> bool:
        """Return whether it was no finding, or is recorded as one: compare with an id that nobody has."""
        if not values:
            return not named.startswith(("host", "path"))
        theirs = self._other.owned.known
        if any(value in theirs.candidates(name, route.noun(name)) for name, value in values.items()):
            return True
        nobody = {name: made_up(value) for name, value in values.items()}
        path = call.path.replace(route.fill(values), route.fill(nobody))
        control = await self._call(replace(call, path=path))
        if not control.is_success:
            shown = (f"that it has {', '.join(map(str, values.values()))}: for one that nobody has, {control.status}",)
            self._add(route, call, answer, OTHER, named, "data", shown)
            return True
        return False

    async def _overhear(self, route: Route, call: Call, caller: str, named: str) -> None:
        """Open a websocket, say what names the owner, and listen while the owner uses its own."""
        owner = self._owner
        own = owner.made.get(route)
        for messages in self._messages_naming(route):
            call = replace(call, messages=messages)
            async with AsyncExitStack() as stack:
                # before the owner's, so that it is there when the owner says something
                socket = await stack.enter_async_context(self._client.websocket(call))
                if socket.status == 101 and own is not None:
                    self._digest = None
                    owners = await stack.enter_async_context(self._client.websocket(own))
                    for message in self._messages(route, owner.owned, owner.owned):
                        await owners.send(message)
                    await owners.answer()
                for message in messages:
                    await socket.send(message)
                answer = await socket.answer()
            shown = self._judge(call, answer, owner.owned, route, caller, named)
            if answer.status != 101 or shown:
                return
            if caller != OTHER:
                self._add(route, call, answer, caller, named, "answered")
                return
            if NOTHING not in named:
                return

    async def _at_once(self, route: Route, own: Call, theirs: Call) -> None:
        """Call as both at the same time: a global that is set at the start of a request is the other's at its end."""
        for calls in ((own, theirs), (theirs, own)):
            answers = await asyncio.gather(*(self._call(call) for call in calls))
            for call, answer in zip(calls, answers, strict=True):
                foreign = self._other if call is own else self._owner
                if not self._is_known_to_leak(route):
                    self._judge(call, answer, foreign.owned, route, OTHER, AT_ONCE)

    def _is_known_to_leak(self, route: Route) -> bool:
        return any((one.method, one.path) == (route.method, route.path) for one in self.report.leaks)

    # --- calls --------------------------------------------------------------------------------------------------------

    async def _call(self, call: Call, *, patient: bool = True) -> Answer:
        """Call; where the tenant calls too often, wait and call again: too many requests are no refusal."""
        answer = await self._client.request(call)
        for _ in range(_PAUSES):
            pause = answer.headers.get("retry-after", "")
            if not patient or answer.status != 429 or not pause.isdecimal() or int(pause) > _LONGEST_PAUSE:
                break
            await asyncio.sleep(int(pause))
            answer = await self._client.request(call)
        return answer

    async def _revoked_key(self) -> Mapping[str, str]:
        if self._revoked_headers is None and self._revoked is not None:
            self._revoked_headers = await self._revoked()
        return self._revoked_headers or {}

    def _judge(self, call: Call, answer: Answer, owned: Owned, route: Route, caller: str, named: str) -> bool:
        shown = owned.shown_in(answer.text, sent=call.text)
        if shown:
            self._add(route, call, answer, caller, named, "data", shown)
        return bool(shown)

    def _add(
        self,
        route: Route,
        call: Call,
        answer: Answer,
        caller: str,
        named: str,
        kind: Kind,
        shown: tuple[str, ...] = (),
    ) -> None:
        found = Finding(route.method, route.path, call.target, answer.status, caller, named, kind, shown)
        self.report.findings.append(found)

    # --- ways to name the owner ---------------------------------------------------------------------------------------

    def _namings(self, tenant: Tenant, *, only_addresses: bool = False) -> Iterator[Naming]:
        slug, tenant_id = tenant.slug, str(tenant.id)
        if not only_addresses:
            yield Naming(NOTHING, lambda call: call)
        configured = set()
        for resolver in self._resolvers:
            if isinstance(resolver, PathPrefixResolver):
                prefix = resolver.template.replace("{tenant}", slug)
                yield Naming(f"path {resolver.template}", _prefixed(prefix))
            elif isinstance(resolver, SubdomainResolver):
                host = f"{slug}.{resolver.domain}"
                yield Naming("host", _headed({"Host": host}))
                if not only_addresses:
                    headers = dict.fromkeys(_HOST_HEADERS, host) | {"Forwarded": f"host={host}"}
                    yield Naming("header X-Forwarded-Host and the like", _headed(headers), by_everyone=False)
            elif isinstance(resolver, HeaderResolver) and not only_addresses:
                for name in resolver.headers:
                    title = name.decode().title()
                    configured.add(title.lower())
                    yield Naming(f"header {title}", _headed({title: slug}))
        if only_addresses:
            return
        names = [name for name in _HEADERS if name.lower() not in configured]
        for value in (slug, tenant_id):
            yield Naming(f"headers {names[0]} and the like", _headed(dict.fromkeys(names, value)))
        for said in _names(slug, tenant_id):
            yield Naming("query (tenant, tenant_id, org and the like)", _asked(said))
            yield Naming("body (tenant, tenant_id, org and the like)", _embodied(said), by_everyone=False)

    def _with_owners_ids(self, route: Route, call: Call) -> list[tuple[Call, list[str]]]:
        """Calls that name objects of the owner's in the query, where the document has parameters for ids."""
        known = self._owner.owned.known
        found = []
        for name, schema in route.query.items():
            if name in NAMES_OF_TENANTS:
                value: Any = self._owner.tenant.id if name.lower().endswith("id") else self._owner.tenant.slug
            elif ids := known.candidates(name, _noun(route), kind="uuid" if schema.get("format") == "uuid" else "str"):
                value = ids[0]
            else:
                continue
            if name in NAMES_OF_TENANTS or re.search(r"(^|_)(id|slug|key)$|Id$", name):
                found.append((replace(call, query={**call.query, name: str(value)}), [f"query {name}"]))
        return found

    def _with_own_texts(self, route: Route, call: Call) -> Call:
        """The call with the owner's ids and the other's texts: what the other has written is no leak."""
        if route not in self._owner.bodies and not call.content:
            body = next(self._bodies(self._owner, route), None)
            call = _with_body(call, route, body) if body is not None else call
        mark = self._owner.owned.mark
        content = re.sub(
            rf"{mark}[0-9a-f]*", lambda _: self._other.owned.text(), call.content.decode("utf-8", "replace")
        )
        return replace(call, content=content.encode())

    def _messages(self, route: Route, ids: Owned, texts: Owned) -> tuple[str, ...]:
        if str(route) in self._examples:
            example = self._examples[str(route)]
            made = example(texts) if callable(example) else example
            return tuple(one if isinstance(one, str) else json.dumps(one) for one in made)
        return (json.dumps({"text": texts.text(), "message": texts.text()}),)

    def _messages_naming(self, route: Route) -> Iterator[tuple[str, ...]]:
        owner = self._owner
        ids = {f"{noun}_id": str(value) for noun, value in owner.owned.known.ids().items()}
        for said in _names(owner.tenant.slug, str(owner.tenant.id)):
            yield (json.dumps({**ids, **said, "text": self._other.owned.text()}),)
        yield (owner.tenant.slug,)
        yield (str(owner.tenant.id),)


def _risk(route: Route) -> int:
    order = {"GET": 0, "HEAD": 1, WEBSOCKET: 2, "POST": 3, "PATCH": 4, "PUT": 5, "DELETE": 6}
    return order.get(route.method, 4)


def _is_tenant(name: str, noun: str | None) -> bool:
    if name in NAMES_OF_TENANTS:
        return True
    return name in ("id", "slug", "name", "key") and noun is not None and singular(noun) in NAMES_OF_TENANTS


def _noun(route: Route) -> str:
    """What a route's objects are: the last part of its path that is no parameter."""
    parts = [part for part in route.path.split("/") if part and "{" not in part]
    return parts[-1] if parts else "object"


def _template(call: Call, routes: Sequence[Route]) -> Route:
    for route in routes:
        pattern = re.sub(r"\\{[^{}]*\\}", ".+", re.escape(route.path))
        if route.method == call.method and re.fullmatch(f"(.*/)?{pattern}".replace("(.*/)?/", "(/.*)?/"), call.path):
            return route
    return Route(call.method, call.path)


def _host(pattern: str, slug: str) -> str:
    return re.sub(r"{[^{}]*}", slug, pattern)


def _names(slug: str, tenant_id: str) -> tuple[Mapping[str, str], ...]:
    by_kind = {name: tenant_id if name.lower().endswith("id") else slug for name in NAMES_OF_TENANTS}
    return (by_kind, dict.fromkeys(NAMES_OF_TENANTS, tenant_id))


def _prefixed(prefix: str) -> Callable[[Call], Call | None]:
    return lambda call: None if call.path.startswith(prefix) else replace(call, path=prefix + call.path)


def _headed(headers: Mapping[str, str]) -> Callable[[Call], Call | None]:
    return lambda call: replace(call, headers={**call.headers, **headers})


def _asked(query: Mapping[str, str]) -> Callable[[Call], Call | None]:
    return lambda call: replace(call, query={**query, **call.query})


def _embodied(fields: Mapping[str, str]) -> Callable[[Call], Call | None]:
    def apply(call: Call) -> Call | None:
        try:
            body = json.loads(call.content) if call.content else {}
        except ValueError:
            return None
        if call.method in ("GET", "HEAD", WEBSOCKET) or not isinstance(body, dict):
            return None
        # only those that are there already, where there are any: a model may take no others
        own = {name: fields[name] for name in body if name in fields}
        return replace(call, content=json.dumps({**body, **(own or fields)}).encode(), media=JSON)

    return apply


def _with_body(call: Call, route: Route, body: Any) -> Call:
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
