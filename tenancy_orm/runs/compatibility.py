"""``Compatibility``: the revisions that the running code can work with, as the application declares them."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from alembic.script import ScriptDirectory
from alembic.util.exc import CommandError

from ..config import TenancyConfig
from ..config.revisions import Declared
from ..config.values import named
from ..errors import ConfigurationError
from ..migrations.configuration import alembic_config
from ..migrations.plan import Heads, format_revision
from ..migrations.scripts import script_directory
from ..registry.revisions import BASE
from ..tenant import Tenant

logger = logging.getLogger("tenancy_orm.migrations")

_NONE = frozenset({"", "base"})
_FROM_HEAD = re.compile(r"^heads?(-\d+)$")


class Compatibility:
    """Tells which revisions the running code can work with.

    A range has both of its ends, and goes by the graph of the revisions: everything that has its lower end and that its
    upper end has. Without an upper end it has later revisions as well, and those that this code does not know: newer
    code has made them.

    Args:
        declared: The setting ``compatible_revisions``.
        script: The revisions of the running code.
        is_own: Whether it is the running code's own declaration, and not that of another release.

    Raises:
        ConfigurationError: an end of a range is no revision here, or the head of this code itself is not in its own
            declaration.
    """

    def __init__(self, declared: Declared, script: ScriptDirectory, *, is_own: bool = True) -> None:
        self._known: dict[str | None, bool] = {}
        self.head = format_revision(script.revision_map._real_heads)
        if not callable(declared):
            self.text = ", ".join(declared)
            graph = _Graph(script)
            tests = [graph.test_of(item) for item in declared]
            singles = frozenset().union(*(graph.single(item) for item in declared))
            self._test: Callable[[str | None], bool] = lambda revision: _is_among(_heads(revision), tests, singles)
        else:
            self.text = named(declared)
            self._test = declared
        if is_own and not self.allows(self.head):
            raise ConfigurationError(
                f"compatible_revisions ({self.text}) does not have {self.head or 'base'}, the head of this code's own "
                "migrations: it would not serve the tenants that it creates; add it"
            )

    def __repr__(self) -> str:
        """Return what was declared."""
        return f"<Compatibility {self.text}>"

    def allows(self, revision: str | None) -> bool:
        """Return whether the code can work with a revision, in the form of ``Tenant.schema_revision``."""
        known = self._known.get(revision)
        if known is None:
            known = self._known[revision] = self._ask(revision)
        return known

    def refusal(self, tenant: Tenant) -> str | None:
        """Return why a tenant is not served; None where it is."""
        if not self.allows(tenant.schema_revision):
            return f"its schema is at {tenant.schema_revision or BASE}, and this code works with {self.text}"
        target = tenant.migrating_to
        if target is not None and not self.allows(None if target == BASE else target):
            return f"its schema is being migrated to {target}, and this code works with {self.text}"
        return None

    def _ask(self, revision: str | None) -> bool:
        try:
            return bool(self._test(revision))
        except Exception:
            # the application's function: what it cannot judge is not served
            logger.exception("%s failed for revision %s", self.text, revision)
            return False


@dataclass(frozen=True, slots=True)
class _Range:
    """What has all of ``lower`` (None: anything), and nothing that ``upper`` lacks; ``known`` is what this code has."""

    lower: Heads | None
    upper: Heads | None
    known: Heads
    ancestors: Callable[[Iterable[str]], Heads] = field(repr=False)

    def __call__(self, heads: Heads) -> bool:
        unknown = heads - self.known
        if self.upper is not None and (unknown or not heads <= self.upper):
            return False
        if unknown or self.lower is None:
            # newer code has made it, on top of what this code knows
            return True
        return self.lower <= self.ancestors(heads)


class _Graph:
    """Reads symbols by a directory's revisions."""

    def __init__(self, script: ScriptDirectory) -> None:
        self._script = script
        self._map: Any = script.revision_map
        self._heads = frozenset(self._map._real_heads)
        self._known = self.ancestors(self._heads)

    def ancestors(self, revisions: Iterable[str]) -> Heads:
        """Return revisions with all that they are made on."""
        nodes = [self._map.get_revision(revision) for revision in revisions]
        return frozenset(node.revision for node in self._map._get_ancestor_nodes(nodes))

    def single(self, item: str) -> Heads:
        """Return the revision that an item names, also one that only other code has; nothing for a range."""
        if ":" in item or item in ("head", "heads", "base"):
            return frozenset()
        return self._resolved(item) or frozenset({item})

    def test_of(self, item: str) -> Callable[[Heads], bool]:
        """Return what tells whether a database at these heads is within an item."""
        lower, colon, upper = item.partition(":")
        if not colon:
            if item == "base":
                return lambda heads: not heads
            if item in ("head", "heads"):
                wanted = self._end(item, item)
                return lambda heads: heads == wanted
            return lambda heads: False  # ``single`` has it
        low = None if lower in _NONE else self._end(lower, item)
        high = None if not upper else self.ancestors(self._end(upper, item))
        if low is not None and high is not None and not low <= high:
            raise ConfigurationError(f"compatible_revisions: {item!r} has nothing: {upper} is not made on {lower}")
        return _Range(low, high, self._known, self.ancestors)

    def _end(self, symbol: str, item: str) -> Heads:
        found = self._resolved(symbol)
        if found is None:
            what = "are not" if symbol == "heads" else "is not a revision"
            raise ConfigurationError(
                f"compatible_revisions: {symbol!r} of {item!r} {what} in {self._script.dir}; an end of a range must be "
                "there: leave the upper end out where it is one of newer code, as in '0012:'"
            )
        return found

    def _resolved(self, symbol: str) -> Heads | None:
        try:
            # Alembic counts from the heads where there is a number alone
            found = self._script.get_revisions(_FROM_HEAD.sub(r"\1", symbol))
        except CommandError as exc:
            if symbol == "head":
                raise ConfigurationError(f"compatible_revisions: {exc}") from exc
            return None
        return frozenset(revision.revision for revision in found)


def _heads(revision: str | None) -> Heads:
    return frozenset(revision.split(",")) if revision else frozenset()


def _is_among(heads: Heads, tests: Iterable[Callable[[Heads], bool]], singles: Heads) -> bool:
    return (bool(heads) and heads <= singles) or any(test(heads) for test in tests)


async def load_compatibility(config: TenancyConfig, *, is_own: bool = True) -> Compatibility | None:
    """Return what an application declares; None where it declares nothing. ``is_own`` is as for ``Compatibility``.

    Raises:
        ConfigurationError: as ``Compatibility``; or the revisions cannot be loaded.
    """
    declared, directory = config.compatible_revisions, config.migrations
    if declared is None or directory is None:
        return None

    def load() -> Compatibility:
        try:
            return Compatibility(declared, script_directory(alembic_config(directory, config.migration)), is_own=is_own)
        except CommandError as exc:
            raise ConfigurationError(f"the migrations cannot be loaded: {exc}") from exc

    # in a thread: it reads every revision
    return await asyncio.to_thread(load)


__all__ = ["Compatibility", "load_compatibility"]
