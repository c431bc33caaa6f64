"""``lint``: looks for what is dangerous in revisions, in the SQL that they become. Needs no database.

squawk reads the SQL; the rules that need more than SQL are here. Each finding names the line of the revision that
printed the statement. A comment there, ``# squawk-ignore RULE``, leaves the finding out, as does squawk's own
``-- squawk-ignore RULE`` in SQL.
"""

from __future__ import annotations

import linecache
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from alembic.runtime.migration import RevisionStep
from alembic.script import Script
from alembic.util.exc import CommandError

from ..config import MigrationConfig
from ..errors import MigrationError
from ..migrations.plan import Heads, Plan
from ..migrations.rendering import RenderedRevision, render
from ..migrations.scripts import Environment
from ..migrations.statements import statements
from . import squawk

Level = Literal["error", "warning"]

RULES = {
    "no-downgrade": "the revision cannot be taken back",
    "change-before-autocommit-block": "an autocommit_block() commits a part of the revision",
    "not-rendered": "the revision cannot be printed as SQL, so it was not checked",
}
"""The rules beside squawk's."""

_IGNORE = re.compile(r"#\s*squawk-ignore(?P<rules>[\w\s,-]*)")
_NO_WAY_BACK = (
    "Write one. Without it tenancy migrate undo refuses a run of this revision, unless --stamp-irreversible leaves its "
    "changes in the databases."
)
_STATEMENT = 200  # characters of a statement that are shown


@dataclass(frozen=True, slots=True, kw_only=True)
class LintFinding:
    """One finding.

    ``path`` is the revision's file and ``line`` the line in it, None where it is not known; ``statement`` is the
    beginning of the SQL that it is about, None if it is about the revision.
    """

    revision: str
    path: str
    line: int | None
    level: Level
    rule: str
    message: str
    help: str | None = None
    statement: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LintReport:
    """The findings, and the revisions that were checked, in their order."""

    revisions: tuple[str, ...]
    findings: tuple[LintFinding, ...]

    @property
    def ok(self) -> bool:
        """Whether there are none."""
        return not self.findings


def revisions_between(environment: Environment, starts: Iterable[Heads], target: str = "heads") -> tuple[str, ...]:
    """Return the revisions that databases at any of ``starts`` lack to be at ``target``, in order.

    Raises:
        MigrationError: a revision does not exist, or there is no path.
    """
    plan = Plan.of(environment, "upgrade", target)
    found: dict[str, None] = {}
    for heads in starts:
        for step in plan.path_from(heads).steps:
            if isinstance(step, RevisionStep):
                found[step.revision.revision] = None
    return tuple(found)


def heads_of(environment: Environment, name: str) -> Heads:
    """Return the heads of a database at the revision ``name``, or at ``base``.

    Raises:
        MigrationError: it does not exist.
    """
    return frozenset() if name == "base" else frozenset({_script(environment, name).revision})


def lint(
    environment: Environment,
    revisions: Iterable[str],
    *,
    settings: MigrationConfig | None = None,
    exclude: Sequence[str] = (),
    config: Path | None = None,
    pg_version: str | None = None,
) -> LintReport:
    """Check revisions.

    Their ``upgrade`` and ``downgrade`` are called without a database, as by ``alembic upgrade --sql``.

    Args:
        environment: The scripts.
        revisions: The revisions, as Alembic names them.
        settings: The time limits of runs, which squawk would otherwise miss in the SQL.
        exclude: Rules, squawk's or those of ``RULES``, that are not checked.
        config: squawk's configuration; where None, a ``.squawk.toml`` in the directory of the revisions or above it.
        pg_version: The version of PostgreSQL that squawk goes by; that of its configuration where None.

    Raises:
        MigrationError: a revision does not exist.
        MissingExtraError: squawk is not installed.
        ConfigurationError: squawk refuses its configuration.
    """
    scripts = [_script(environment, name) for name in revisions]
    scripts = list({script.revision: script for script in scripts}.values())
    # so that each is a transaction of its own, whatever env.py says
    alone = replace(environment, options={**environment.options, "transaction_per_migration": True})
    texts = {
        script.revision: _Text(_render(alone, script, "upgrade"), settings or MigrationConfig()) for script in scripts
    }
    found = squawk.check(
        {revision: text.sql for revision, text in texts.items()},
        config=config or squawk.find_config(Path(environment.script.dir).absolute()),
        exclude=[rule for rule in exclude if rule not in RULES],
        pg_version=pg_version,
    )
    findings: list[LintFinding] = []
    for script in scripts:
        text = texts[script.revision]
        mine = [text.locate(script, one) for one in found if one.name == script.revision]
        mine += _own(alone, script, text)
        findings += sorted(mine, key=lambda one: (one.line or 0, one.rule))
    return LintReport(
        revisions=tuple(script.revision for script in scripts),
        findings=tuple(one for one in findings if one.rule not in exclude and not _is_ignored(one)),
    )


def _script(environment: Environment, name: str) -> Script:
    try:
        script = environment.script.get_revision(name)
    except CommandError as exc:
        raise MigrationError(str(exc)) from exc
    if script is None:
        raise MigrationError(f"there is no revision {name!r}")
    return script


def _render(environment: Environment, script: Script, command: Literal["upgrade", "downgrade"]) -> RenderedRevision:
    """The SQL of one revision alone, whatever comes before it."""
    is_upgrade = command == "upgrade"
    below: Heads = frozenset(script._versioned_down_revisions)
    step = RevisionStep(environment.script.revision_map, script, is_upgrade)

    def only(heads: Any, context: Any) -> list[RevisionStep]:
        return [step]

    plan = Plan.of(environment, command, script.revision, function=only)
    (rendered,) = render(plan, below if is_upgrade else frozenset({script.revision}), keep_going=True)
    return rendered


class _Text:
    """The text that squawk gets for one revision, and where each of its lines comes from.

    Alembic's own statements on the version table are left out. The time limits are set at the beginning, as a run sets
    them when it connects.
    """

    def __init__(self, rendered: RenderedRevision, settings: MigrationConfig) -> None:
        self.rendered = rendered
        self.blocks = 0  # autocommit blocks
        self.changes_before: int | None = None  # the line of a change before the first one
        self.has_statements = False
        # by line of the text: the revision's line, what it printed, and where in that the line begins
        self._origins: list[tuple[int | None, str, int]] = []
        self._lines: list[str] = []
        if settings.lock_timeout:
            self._add("SET lock_timeout = '5s';", None)
        self._add("SET statement_timeout = '1h';", None)
        last_change: int | None = None
        outputs = list(zip(rendered.output, rendered.lines, strict=True))
        for number, (text, line) in enumerate(outputs):
            found = statements(text)
            controls = bool(found) and all(one.controls_transaction for one in found)
            if line is None and not controls:
                continue
            self._add(text, line)
            if controls and line is not None and found[0].words[:1] == ["COMMIT"] and number < len(outputs) - 1:
                self.blocks += 1
                if last_change is not None and self.changes_before is None:
                    self.changes_before = last_change
            elif found and not controls:
                self.has_statements = True
                if any(one.changes for one in found):
                    last_change = line

    @property
    def sql(self) -> str:
        """The text."""
        return "\n".join(self._lines)

    def _add(self, text: str, line: int | None) -> None:
        lines = text.rstrip("\n").split("\n")
        self._lines += lines
        start = 0
        for part in lines:
            self._origins.append((line, text, start))
            start += len(part) + 1

    def locate(self, script: Script, found: squawk.SquawkFinding) -> LintFinding:
        """Return a finding of squawk with the line of the revision that it is about."""
        line, text, start = self._origins[min(found.line, len(self._origins) - 1)]
        return LintFinding(
            revision=script.revision,
            path=script.path,
            line=line,
            level="error" if found.level.lower() == "error" else "warning",
            rule=found.rule,
            message=found.message,
            help=found.help,
            statement=_around(text, start + found.column) or None,
        )


def _around(text: str, position: int) -> str:
    """The statement that is at ``position`` of ``text``, in one line."""
    one = next((one for one in statements(text) if position < one.end), None)
    if one is None:
        return ""
    sql = " ".join(text[one.start : one.end].split())
    return sql if len(sql) <= _STATEMENT else f"{sql[:_STATEMENT]}..."


# --- rules of our own -------------------------------------------------------------------------------------------------


def _own(environment: Environment, script: Script, text: _Text) -> list[LintFinding]:
    found = []

    def add(rule: str, message: str, line: int | None = None, remedy: str | None = None) -> None:
        found.append(
            LintFinding(
                revision=script.revision,
                path=script.path,
                line=line,
                level="warning",
                rule=rule,
                message=message,
                help=remedy,
            )
        )

    if text.rendered.error is not None:
        add("not-rendered", f"{RULES['not-rendered']}: {text.rendered.error}", _line_of(script, "upgrade"))
    if text.changes_before is not None:
        add(
            "change-before-autocommit-block",
            "The autocommit_block() commits this change without recording the revision. If the block fails, the "
            "repetition makes the same change again, and fails.",
            text.changes_before,
            "Put the block into a revision of its own.",
        )
    if reason := _missing_downgrade(environment, script, text):
        add("no-downgrade", reason, _line_of(script, "downgrade"), _NO_WAY_BACK)
    return found


def _missing_downgrade(environment: Environment, script: Script, text: _Text) -> str | None:
    if not hasattr(script.module, "downgrade"):
        return "The revision has no downgrade()."
    back = _render(environment, script, "downgrade")
    if back.error is not None:
        # one that reads the database may do anything
        return "Its downgrade() raises NotImplementedError." if "NotImplementedError" in back.error else None
    if text.has_statements and not _Text(back, MigrationConfig()).has_statements:
        return "Its downgrade() executes nothing."
    return None


def _line_of(script: Script, function: str) -> int | None:
    code = getattr(getattr(script.module, function, None), "__code__", None)
    return None if code is None else int(code.co_firstlineno)


def _is_ignored(finding: LintFinding) -> bool:
    """Whether a comment in the revision ignores it: on its line, or alone on the line above."""
    if finding.line is None:
        return False
    above = linecache.getline(finding.path, finding.line - 1).strip()
    for text in (linecache.getline(finding.path, finding.line), above if above.startswith("#") else ""):
        if match := _IGNORE.search(text):
            rules = set(re.split(r"[\s,]+", match["rules"].strip()))
            if rules == {""} or finding.rule in rules:
                return True
    return False


__all__ = ["RULES", "LintFinding", "LintReport", "heads_of", "lint", "revisions_between"]
