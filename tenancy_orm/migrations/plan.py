"""The steps that a command needs on a database, computed once for all databases at the same revision."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from alembic.runtime.migration import HeadMaintainer, MigrationContext, RevisionStep, StampStep
from alembic.util.exc import CommandError

from ..errors import MigrationError
from .scripts import Environment

Heads = frozenset[str]
MigrationStep = RevisionStep | StampStep
StepFunction = Callable[[Any, Any], Iterable[MigrationStep]]

_RELATIVE = re.compile(r"[+-]\d+$")


def format_revision(heads: Iterable[str]) -> str | None:
    """Return a database's heads as one text: sorted, joined by commas; None if there are none."""
    return ",".join(sorted(heads)) or None


class _Simulated(HeadMaintainer):
    """Alembic's own tracking of heads, without a database."""

    def __init__(self, heads: Heads) -> None:
        self.heads = set(heads)

    def _insert_version(self, version: str) -> None:
        self.heads.add(version)

    def _delete_version(self, version: str) -> None:
        self.heads.remove(version)

    def _update_version(self, from_: str, to_: str) -> None:
        self.heads.remove(from_)
        self.heads.add(to_)


@dataclass(frozen=True, slots=True)
class MigrationPath:
    """The steps from one revision to the target. ``states[i]`` are the heads after ``i`` steps."""

    steps: tuple[MigrationStep, ...]
    states: tuple[Heads, ...]

    @property
    def end(self) -> Heads:
        """The heads after all steps."""
        return self.states[-1]

    def remaining(self, heads: Heads) -> tuple[MigrationStep, ...] | None:
        """The remaining steps for a database at ``heads``; None if it is not on this path."""
        for done in range(len(self.states) - 1, -1, -1):
            if self.states[done] == heads:
                return self.steps[done:]
        return None


@dataclass(slots=True, eq=False)
class Plan:
    """A command (``upgrade``, ``downgrade`` or ``stamp``) with its target, for any number of databases.

    Alembic calls ``function`` to turn heads into steps. ``options`` are those of the ``EnvironmentContext``
    (``destination_rev``, ``tag``, ``purge``).
    """

    command: str
    revision: str | Sequence[str]
    environment: Environment
    function: StepFunction
    options: Mapping[str, Any]
    _paths: dict[Heads, MigrationPath] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        environment: Environment,
        command: str,
        revision: str | Sequence[str],
        *,
        purge: bool = False,
        function: StepFunction | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Plan:
        """Plan ``command`` to ``revision``; ``function`` and ``options`` are those of Alembic's own command, if any.

        Raises:
            MigrationError: the revision does not exist, or is ambiguous.
        """
        options = {"destination_rev": revision, "purge": purge} if options is None else options
        plan = cls(command, revision, environment, function or _function(environment, command, revision), options)
        plan._check()
        return plan

    @property
    def target(self) -> str:
        """The target as it was given, for messages and reports."""
        return self.revision if isinstance(self.revision, str) else ",".join(self.revision)

    @property
    def is_relative(self) -> bool:
        """Whether the target depends on where a database is (``+1``, ``-1``, ``abc+2``)."""
        symbols = [self.revision] if isinstance(self.revision, str) else self.revision
        return any(_RELATIVE.search(symbol) for symbol in symbols)

    @property
    def is_counted(self) -> bool:
        """Whether the way is counted from where a database was first: one that was moved off it is left alone."""
        return self.is_relative

    @property
    def purges(self) -> bool:
        """Whether the version table is emptied first (``stamp --purge``)."""
        return bool(self.options.get("purge"))

    @property
    def reaches_head(self) -> bool:
        """Whether this upgrades to all heads, as a new template needs."""
        if self.command != "upgrade" or self.is_relative:
            return False
        scripts = self.environment.script
        wanted = {script.revision for script in scripts.get_revisions(self.revision)}
        return wanted == set(scripts.get_heads())

    def path_from(self, heads: Heads) -> MigrationPath:
        """Return the path from ``heads`` to the target.

        Raises:
            MigrationError: there is none.
        """
        if self.purges:
            heads = frozenset()
        found = self._paths.get(heads)
        if found is None:
            found = self._paths[heads] = self._find_path(heads)
        return found

    def _find_path(self, heads: Heads) -> MigrationPath:
        try:
            # the functions of Alembic's own commands do not use the context
            steps = tuple(self.function(tuple(sorted(heads)), None))
            simulated = _Simulated(heads)
            states = [heads]
            for step in steps:
                simulated.update_to_step(step)
                states.append(frozenset(simulated.heads))
        except CommandError as exc:
            hint = ""
            if self._is_unknown(heads):
                hint = (
                    "; the database is newer than this code, or of another branch: use the code that has this revision"
                )
            raise MigrationError(f"cannot {self.command} from {format_revision(heads) or 'base'}: {exc}{hint}") from exc
        return MigrationPath(steps, tuple(states))

    def _is_unknown(self, heads: Heads) -> bool:
        """Whether a database has a revision that this code does not have."""
        try:
            self.environment.script.get_revisions(tuple(heads))
        except CommandError:
            return True
        return False

    def _check(self) -> None:
        """Refuse a target that does not exist, before any tenant is touched."""
        if self.is_relative:
            return
        try:
            self.environment.script.get_revisions(self.revision)
        except CommandError as exc:
            raise MigrationError(str(exc)) from exc


def _function(environment: Environment, command: str, revision: str | Sequence[str]) -> StepFunction:
    script: Any = environment.script

    def upgrade(heads: Any, context: MigrationContext | None) -> Iterable[MigrationStep]:
        return script._upgrade_revs(revision, heads)  # type: ignore[no-any-return]

    def downgrade(heads: Any, context: MigrationContext | None) -> Iterable[MigrationStep]:
        return script._downgrade_revs(revision, heads)  # type: ignore[no-any-return]

    def stamp(heads: Any, context: MigrationContext | None) -> Iterable[MigrationStep]:
        return script._stamp_revs((revision,) if isinstance(revision, str) else tuple(revision), heads)  # type: ignore[no-any-return]

    return {"upgrade": upgrade, "downgrade": downgrade, "stamp": stamp}[command]
