"""The walk itself: what the owner can do, then the same by everybody else."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any, Final

from ..asgi.resolvers import TenantResolver
from ._matrix_client import Answer, Call, Client
from ._matrix_learning import Learner, Side, host_of, noun_of, risk, with_body
from ._matrix_naming import names_of, namings
from ._matrix_report import AT_ONCE, NOBODY, NOTHING, OTHER, REVOKED, Finding, Kind, Report
from ._matrix_routes import WEBSOCKET, Route
from ._matrix_values import NAMES_OF_TENANTS, Owned, made_up

_LONGEST_PAUSE: Final = 5.0
_PAUSES: Final = 4


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
        own = [route for route in routes if not route.is_provided]
        self.report = Report(routes=len(own), public=[str(route) for route in routes if public(route)])
        self._routes = [route for route in routes if not public(route)]
        self._learner = Learner(self._as_self, self._routes, resolvers, (owner, other), examples)
        self._digest: Mapping[str, str] | None = None

    async def run(self) -> Report:
        """Walk, and return the report."""
        # the other first: what it is shown of itself cannot be the owner's, who has nothing yet
        for side in (self._other, self._owner):
            await side.rows.plant()
            await self._learner.learn(side)
        self._owner.owned.assign(self._other.owned)
        self._other.owned.assign(self._owner.owned)
        for route in sorted(self._routes, key=risk):
            await self._attack(route)
        for route in self._routes:
            if route.method == "DELETE":
                await self._learner.reach(self._owner, route)
            if route not in self._owner.made and not self._is_known_to_leak(route):
                self.report.unreached[str(route)] = self._owner.failed.get(route, "no id for its path is known")
        self.report.unplanted = dict(self._owner.rows.refused)
        self.report.calls = self._client.count
        return self.report

    async def _as_self(self, side: Side, call: Call) -> Answer:
        """Call as the tenant itself. It must not be shown what is the other's either."""
        call = replace(call, headers={**call.headers, **side.headers})
        answer = await self._call(call)
        if answer.status == 401 and side.headers:
            # one of the routes may have logged it out
            side.headers = await side.log_in()
            answer = await self._call(replace(call, headers={**call.headers, **side.headers}))
        self._digest = None
        foreign = self._owner if side is self._other else self._other
        self._judge(call, answer, foreign.owned, _template_of(call, self._routes), OTHER, NOTHING)
        return answer

    # --- what everybody else can do -----------------------------------------------------------------------------------

    async def _attack(self, route: Route) -> None:
        if route.method == "HEAD" and self._is_known_to_leak(replace(route, method="GET")):
            return
        owner = self._owner
        own = owner.made.get(route)
        sets = [owner.parameters[route]] if route in owner.parameters else list(self._learner.values(owner, route))[:2]
        for values in sets:
            call = self._as_anybody(route, values)
            base = [*self._path_labels(route, values), *self._labels_in(call)]
            if own is not None and not route.changes and route.method != WEBSOCKET:
                await self._as_self(owner, own)  # what is cached now is the owner's
            # each caller until it gets something: what else it could name says no more
            waiting = [OTHER, NOBODY]
            variants = [(naming, call, list[str]()) for naming in namings(self._resolvers, owner.tenant)]
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
        # the caller's own credential goes there
        kept = {name: value for name, value in kept.items() if name.lower() not in map(str.lower, owner.headers)}
        if route.host:
            kept["Host"] = host_of(route.host, owner.tenant.slug)
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
        if caller == OTHER and answer.status == 429:
            self.report.unreached[str(route)] = "429 for the other tenant: too many requests are not a refusal"
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
                    for message in self._learner.messages(route, owner.owned):
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
        """Call; where the tenant calls too often, wait and call again: too many requests are not a refusal."""
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
        if kind == "answered" and route.is_provided:
            return  # documentation that everybody may read
        found = Finding(route.method, route.path, call.target, answer.status, caller, named, kind, shown)
        self.report.findings.append(found)

    # --- ways to name the owner ---------------------------------------------------------------------------------------

    def _with_owners_ids(self, route: Route, call: Call) -> list[tuple[Call, list[str]]]:
        """Calls that name objects of the owner's in the query, where the document has parameters for ids."""
        known = self._owner.owned.known
        found = []
        for name, schema in route.query.items():
            kind = "uuid" if schema.get("format") == "uuid" else "str"
            if name in NAMES_OF_TENANTS:
                value: Any = self._owner.tenant.id if name.lower().endswith("id") else self._owner.tenant.slug
            elif ids := known.candidates(name, noun_of(route), kind=kind):
                value = ids[0]
            else:
                continue
            if name in NAMES_OF_TENANTS or re.search(r"(^|_)(id|slug|key)$|Id$", name):
                found.append((replace(call, query={**call.query, name: str(value)}), [f"query {name}"]))
        return found

    def _with_own_texts(self, route: Route, call: Call) -> Call:
        """The call with the owner's ids and the other's texts: what the other has written is no leak."""
        if route not in self._owner.bodies and not call.content:
            body = next(self._learner.bodies(self._owner, route), None)
            call = with_body(call, route, body) if body is not None else call
        mark = self._owner.owned.mark
        content = re.sub(
            rf"{mark}[0-9a-f]*", lambda _: self._other.owned.text(), call.content.decode("utf-8", "replace")
        )
        return replace(call, content=content.encode())

    def _messages_naming(self, route: Route) -> Iterator[tuple[str, ...]]:
        owner = self._owner
        ids = {f"{noun}_id": str(value) for noun, value in owner.owned.known.ids().items()}
        for said in names_of(owner.tenant.slug, str(owner.tenant.id)):
            yield (json.dumps({**ids, **said, "text": self._other.owned.text()}),)
        yield (owner.tenant.slug,)
        yield (str(owner.tenant.id),)


def _template_of(call: Call, routes: Sequence[Route]) -> Route:
    for route in routes:
        pattern = re.sub(r"\\{[^{}]*\\}", ".+", re.escape(route.path))
        if route.method == call.method and re.fullmatch(f"(.*/)?{pattern}".replace("(.*/)?/", "(/.*)?/"), call.path):
            return route
    return Route(call.method, call.path)
