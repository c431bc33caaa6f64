"""What the walk has found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

Kind = Literal["data", "change", "answered"]

OTHER: Final = "another tenant's key"
NOBODY: Final = "no key"
REVOKED: Final = "a revoked key of the owner's"

NOTHING: Final = "nothing"
AT_ONCE: Final = "nothing, at the same time as the owner"

_WHAT: Final[Mapping[str, str]] = {
    "data": "shows the owner's data",
    "change": "changes the owner's data",
    "answered": "answers, without the owner's data",
}


@dataclass(frozen=True)
class Finding:
    """A route that answered a caller who is not the owner with something that is no refusal.

    Args:
        method: The route's method; ``WEBSOCKET`` for a websocket.
        path: Its path, as the application writes it.
        target: Path and query of the request.
        status: What it answered; 101 for a websocket that was accepted.
        caller: Who called: ``another tenant's key``, ``no key``, ``a revoked key of the owner's``.
        named: By what the request named the owner or its objects.
        kind: ``data`` where the answer shows the owner's data, ``change`` where the owner's rows are not what they
            were, ``answered`` where it does neither.
        shown: What is shown or changed: ``notes.body``.
    """

    method: str
    path: str
    target: str
    status: int
    caller: str
    named: str
    kind: Kind
    shown: tuple[str, ...] = ()

    @property
    def remedy(self) -> str:
        """What to change in the application."""
        if self.kind == "answered":
            return "if everybody may ask this, list the path in tenancy_matrix_public; else refuse it"
        if self.caller == REVOKED:
            return "a key that is revoked must end at TenancyMiddleware: take the path out of exempt="
        if self.caller == NOBODY:
            return (
                "take the path out of the exempt= and public= of TenancyMiddleware; or, if everybody may see this, "
                "list it in tenancy_matrix_public"
            )
        if self.named == AT_ONCE:
            return "two requests share a variable: keep what belongs to a request in the request, not in a global"
        if self.named == NOTHING and self.method == "WEBSOCKET":
            return "keep open websockets by tenant, and send to those of current_tenant() alone"
        if self.named == NOTHING:
            return (
                "the answer comes from what all tenants share, a cache or a global: put the id of current_tenant() "
                "into its key"
            )
        if self.named.startswith("path id"):
            return (
                "look the object up by tenancy.session() without an argument: it is in the caller's database or "
                "nowhere; if it comes from a cache or a global, put the id of current_tenant() into the key"
            )
        return (
            "do not take the tenant from the request: tenancy.session() without an argument is the credential's tenant"
        )


@dataclass
class Report:
    """The result of a walk; ``str`` of it is what ``pytest --tenancy-matrix`` prints.

    Attributes:
        routes: How many routes of the application's own were tried, each method and each websocket counted.
        calls: How many requests it took.
        findings: What answered somebody else.
        unreached: Routes that did not even answer the owner, and how they answered it: nothing is proven of them.
        public: Routes that are expected to answer everybody.
        unplanted: Tables that took no row, and why.
    """

    routes: int = 0
    calls: int = 0
    findings: list[Finding] = field(default_factory=list)
    unreached: dict[str, str] = field(default_factory=dict)
    public: list[str] = field(default_factory=list)
    unplanted: dict[str, str] = field(default_factory=dict)

    @property
    def leaks(self) -> list[Finding]:
        """What shows or changes the owner's data."""
        return [one for one in self.findings if one.kind != "answered"]

    @property
    def answered(self) -> list[Finding]:
        """What answered without the owner's data."""
        return [one for one in self.findings if one.kind == "answered"]

    def __str__(self) -> str:
        """Return all lines."""
        return "\n".join(self.lines())

    def lines(self) -> Iterator[str]:
        """Yield the report line by line: leaks first, each with its remedy."""
        leaking = {(one.method, one.path) for one in self.leaks}
        yield (
            f"{self.routes} routes, {self.calls} requests: "
            + (
                "no route leaks"
                if not leaking
                else "1 route leaks"
                if len(leaking) == 1
                else f"{len(leaking)} routes leak"
            )
        )
        for kind in ("data", "change", "answered"):
            yield from self._section(kind)
        if self.unreached:
            yield ""
            yield "not proven: these did not answer the owner either; give an example of what they take"
            for route, why in self.unreached.items():
                yield f"  {route}: {why}"
        if self.unplanted:
            yield ""
            yield "no row could be put into these tables"
            for table, why in self.unplanted.items():
                yield f"  {table}: {why}"
        if self.public:
            yield ""
            yield f"public, and so not tried: {', '.join(self.public)}"

    def _section(self, kind: str) -> Iterator[str]:
        merged: dict[tuple[str, str, int, str, str], list[Finding]] = {}
        for one in self.findings:
            if one.kind == kind:
                merged.setdefault((one.method, one.path, one.status, one.caller, one.remedy), []).append(one)
        for (method, path, status, caller, remedy), found in merged.items():
            named = list(dict.fromkeys(one.named for one in found))
            shown = list(dict.fromkeys(label for one in found for label in one.shown))
            yield ""
            yield f"{method} {path} {_WHAT[kind]}: {status}"
            yield f"  called with {caller}; named {'; '.join(named)}"
            yield f"  as in {found[0].method} {found[0].target}"
            if shown:
                more = f" and {len(shown) - 4} more" if len(shown) > 4 else ""
                yield f"  {'changed' if kind == 'change' else 'shown'}: {', '.join(shown[:4])}{more}"
            yield f"  remedy: {remedy}"
