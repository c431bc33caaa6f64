"""The way of a database to a set of heads that it had before."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

from alembic.runtime.migration import RevisionStep
from alembic.script import Script, ScriptDirectory
from alembic.util.exc import CommandError

from ..errors import MigrationError
from ..migrations.plan import Heads, MigrationPath, MigrationStep, Plan, format_revision
from ..migrations.scripts import Environment
from .downgrades import missing_downgrade


def heads_of(revision: str | None) -> Heads:
    """Return the heads of a text by ``format_revision``; of ``base`` none."""
    return frozenset(filter(None, ("" if revision in (None, "base") else revision).split(",")))


class Return(Plan):
    """A plan that goes back to a set of heads, however many: the revisions outside their history are undone.

    It also upgrades, where an earlier run had downgraded. ``return_to`` makes one.
    """

    @property
    def is_counted(self) -> bool:
        """The way was planned, and agreed to, from where each database was: later runs are not taken back with it."""
        return True

    def _find_path(self, heads: Heads) -> MigrationPath:
        wanted = frozenset(() if self.revision == "base" else self.revision)
        try:
            # the base class's attributes have slots, and it is made again by its decorator
            path = Plan._find_path(self, heads)
        except (AssertionError, KeyError, AttributeError) as exc:
            raise MigrationError(f"cannot return from {format_revision(heads) or 'base'}: {exc}") from exc
        if path.end != wanted:
            raise MigrationError(
                f"cannot return from {format_revision(heads) or 'base'} to {format_revision(wanted) or 'base'}: that "
                f"would end at {format_revision(path.end) or 'base'}"
            )
        return path


def return_to(
    environment: Environment, revision: str | None, *, stamp: bool = False, stamp_irreversible: bool = False
) -> Plan:
    """Plan the way to ``revision``, which is a text by ``format_revision``.

    Args:
        environment: The scripts.
        revision: The heads to return to; None or ``base`` for none.
        stamp: Run no revision.
        stamp_irreversible: Run none that has no downgrade; only the version table forgets it.

    Raises:
        MigrationError: this code does not know one of the revisions.
    """
    wanted = heads_of(revision)
    script: Any = environment.script

    def steps(found: Any, context: Any) -> Iterable[MigrationStep]:
        if stamp:
            return cast(list[MigrationStep], script._stamp_revs(tuple(sorted(wanted)) or "base", found))
        return steps_between(script, frozenset(found), wanted, stamp_irreversible=stamp_irreversible)

    return Return.of(environment, "stamp" if stamp else "undo", tuple(sorted(wanted)) or "base", function=steps)


def steps_between(
    script: ScriptDirectory, heads: Heads, wanted: Heads, *, stamp_irreversible: bool = False
) -> list[MigrationStep]:
    """Return the steps that lead from ``heads`` to ``wanted``: downgrades first, in the order of Alembic's own.

    Raises:
        CommandError: a revision is unknown, or has no function for its step.
    """
    revision_map: Any = script.revision_map
    now, then = (_history(script, some) for some in (heads, wanted))
    steps: list[MigrationStep] = []
    for revisions, tops, is_upgrade in ((now - then, heads, False), (then - now, wanted, True)):
        scripts = [script.get_revision(one) for one in sorted(revisions)]
        order = revision_map._topological_sort(scripts, [script.get_revision(one) for one in sorted(tops)])
        names = reversed(order) if is_upgrade else order
        steps += [_step(revision_map, script.get_revision(name), is_upgrade, stamp_irreversible) for name in names]
    return steps


def _step(revision_map: Any, found: Script, is_upgrade: bool, stamp_irreversible: bool) -> RevisionStep:
    if not is_upgrade and (reason := missing_downgrade(found)):
        if not stamp_irreversible:
            raise CommandError(f"revision {found.revision}: {reason}")
        return _Forgotten(revision_map, found)
    return RevisionStep(revision_map, found, is_upgrade)


class _Forgotten(RevisionStep):
    """A downgrade that runs nothing, and reverses no data."""

    runs_nothing = True

    def __init__(self, revision_map: Any, revision: Script) -> None:
        self.revision_map = revision_map
        self.revision = revision
        self.is_upgrade = False
        self.migration_fn = _nothing


def _nothing(**arguments: Any) -> None:
    """Run instead of a downgrade that is missing."""


def _history(script: ScriptDirectory, heads: Heads) -> set[str]:
    """Return the revisions that a database at ``heads`` has run."""
    tops = script.get_revisions(tuple(sorted(heads)))
    revision_map: Any = script.revision_map
    return {one.revision for one in tops} | {one.revision for one in revision_map._get_ancestor_nodes(tops)}


def taken_back(script: ScriptDirectory, heads: Heads, wanted: Heads) -> dict[str, str]:
    """Return the revisions between ``heads`` and ``wanted`` that cannot be taken back, each with the reason.

    Raises:
        CommandError: a revision is unknown.
    """
    found = {}
    for name in sorted(_history(script, heads) - _history(script, wanted)):
        if reason := missing_downgrade(script.get_revision(name)):
            found[name] = reason
    return found


__all__ = ["Return", "heads_of", "return_to", "steps_between", "taken_back"]
