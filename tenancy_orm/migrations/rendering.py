"""The SQL of an upgrade or downgrade, as ``alembic upgrade --sql`` prints it, apart by revision. Needs no database."""

from __future__ import annotations

import copy
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

from alembic.runtime.environment import EnvironmentContext
from alembic.runtime.migration import RevisionStep
from alembic.script import Script
from sqlalchemy.engine import URL

from ..errors import MigrationError
from ..tenant import Tenant
from . import local
from .execution import printing_sql
from .failures import describe
from .logs import quiet
from .plan import Heads, MigrationStep, Plan
from .statements import statements

_URL = URL.create("postgresql+asyncpg")  # the fleet's own dialect
_PRINTING = {"literal_binds": True, "dialect_opts": {"paramstyle": "named"}}


@dataclass(frozen=True, slots=True)
class RenderedRevision:
    """One revision, as SQL.

    ``revision`` is the one that is upgraded to, or that is downgraded; None for a stamp. ``path`` is its file, and
    ``summary`` what Alembic prints about it: "upgrade 0001 -> 0002". ``output`` are the texts in the order in which
    Alembic prints them: comments, BEGIN and COMMIT, the change of the version table, and what the revision executes.
    ``lines`` are the lines of the file that printed each of them, None for Alembic's own. ``error`` is why the revision
    could not be rendered to its end, None if it was.
    """

    revision: str | None
    path: str | None
    summary: str
    output: tuple[str, ...]
    lines: tuple[int | None, ...]
    error: str | None = None

    @property
    def text(self) -> str:
        """The output as one text, as ``alembic upgrade --sql`` prints it."""
        return "".join(self.output)

    @property
    def statements(self) -> tuple[str, ...]:
        """The statements, each without comments around it and without a semicolon."""
        return tuple(text[one.start : one.end] for text in self.output for one in statements(text))


def render(
    plan: Plan, heads: Heads, *, tenant: Tenant | None = None, keep_going: bool = False
) -> list[RenderedRevision]:
    """Return the SQL that ``plan`` needs on a database at ``heads``, in order; empty if it is at the target already.

    ``upgrade`` or ``downgrade`` of each revision is called, so call this in a thread if there are many.

    Args:
        plan: The command with its target.
        heads: The revisions that the database is at; empty for base.
        tenant: ``op.get_context().opts["tenant"]`` of the revisions.
        keep_going: Store a revision's error in ``RenderedRevision.error``, and render the others.

    Raises:
        MigrationError: there is no path to the target, or a revision cannot be rendered: it reads the database.
    """
    steps = plan.path_from(heads).steps
    if not steps:
        return []
    local.install()
    pieces = _Pieces([_script(step) for step in steps])
    errors: dict[int, str] = {}

    def tracking() -> Iterator[MigrationStep]:
        for number, step in enumerate(steps):
            pieces.begin(number)
            yield _guarded(step, number, errors) if keep_going else step

    context = plan.environment.context(
        as_sql=True, **{**plan.options, "fn": lambda heads, context: tracking(), "starting_rev": None}
    )
    options = {**_PRINTING, **plan.environment.options, "output_buffer": pieces, "tenant": tenant}
    with local.isolated(), context, quiet():
        try:
            context.configure(url=_URL, **options)
            _preset(context, heads)
            with context.begin_transaction(), printing_sql(context, plan.environment):
                context.run_migrations()
        except MigrationError:
            raise
        except Exception as exc:
            raise MigrationError(f"{steps[pieces.number].short_log}: {_reason(exc)}") from exc
    return [_rendered(step, pieces.of(number), errors.get(number)) for number, step in enumerate(steps)]


_Piece = tuple[str, int | None]


def sql_text(revisions: Sequence[RenderedRevision]) -> str:
    """Return the SQL of all ``revisions``, as ``alembic upgrade --sql`` prints it."""
    return "".join(revision.text for revision in revisions)


class _Pieces(io.TextIOBase):
    """Alembic's output, apart by step. What comes before the first step (BEGIN) belongs to that one."""

    def __init__(self, scripts: Sequence[Script | None]) -> None:
        self.number = 0
        self._paths = [None if script is None else script.path for script in scripts]
        self._pieces: list[list[_Piece]] = [[] for _ in scripts]

    def begin(self, number: int) -> None:
        self.number = number

    def of(self, number: int) -> list[_Piece]:
        return self._pieces[number]

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        path = self._paths[self.number]
        self._pieces[self.number].append((text, None if path is None else _running_line(path)))
        return len(text)


def _running_line(path: str) -> int | None:
    """The line of the file ``path`` that runs; None if none of it does."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_filename != path:
        frame = frame.f_back
    return None if frame is None else frame.f_lineno


def _guarded(step: MigrationStep, number: int, errors: dict[int, str]) -> MigrationStep:
    """The step, with the error of its revision stored instead of raised."""
    function: Callable[..., None] = step.migration_fn

    def call(**arguments: Any) -> None:
        try:
            function(**arguments)
        except Exception as exc:  # noqa: BLE001 - a revision may raise anything
            errors[number] = _reason(exc)

    guarded: Any = copy.copy(step)
    guarded.migration_fn = call
    return guarded  # type: ignore[no-any-return]


def _preset(context: EnvironmentContext, heads: Heads) -> None:
    """Give Alembic the heads: its own option cannot say that there are several branches."""
    migration_context: Any = context.get_context()
    migration_context.get_current_heads = lambda: tuple(sorted(heads))


def _rendered(step: MigrationStep, pieces: Sequence[_Piece], error: str | None) -> RenderedRevision:
    script = _script(step)
    return RenderedRevision(
        revision=None if script is None else script.revision,
        path=None if script is None else script.path,
        summary=step.short_log,
        output=tuple(text for text, _ in pieces),
        lines=tuple(line for _, line in pieces),
        error=error,
    )


def _script(step: MigrationStep) -> Script | None:
    return step.revision if isinstance(step, RevisionStep) else None


def _reason(exc: Exception) -> str:
    return (
        f"it cannot be printed as SQL: {describe(exc)}; a revision that reads the database must do without that where "
        "op.get_context().as_sql is true"
    )


__all__ = ["RenderedRevision", "render", "sql_text"]
