"""``tenancy migrate rehearse``, and ``upgrade --rehearse``: an upgrade on clones of some tenants."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated

import typer

from ..rehearsal import CloneReport, Estimate, PhaseReport, RehearsalReport, StatementReport
from ..tenancy import Tenancy
from .output import Column, console, note, print_json, print_table, printable, size_text
from .runtime import EXIT_FAILED, Json, operator, run_stoppable

_STATEMENT = 200  # characters of a statement that are shown; JSON has more


def rehearse(
    revision: Annotated[str, typer.Argument(help="An Alembic revision.")] = "head",
    clones: Annotated[int, typer.Option("--clones", "-n", min=1, help="How many tenants are cloned.")] = 3,
    tenant: Annotated[list[str] | None, typer.Option("--tenant", "-t", help="Clone this tenant; repeatable.")] = None,
    schema_only: Annotated[
        bool, typer.Option("--schema-only", help="Clone the schema and its statistics, and no rows.")
    ] = False,
    downgrade: Annotated[
        bool, typer.Option("--downgrade/--no-downgrade", help="Downgrade each clone, and upgrade it again.")
    ] = True,
    concurrency: Annotated[
        int, typer.Option(min=1, max=64, help="Tenants that the real run migrates at once, for the estimate.")
    ] = 8,
    as_json: Json = False,
) -> None:
    """Try an upgrade on clones of some tenants; no tenant is changed. Exit status 1 if a clone fails or differs."""
    show(revision, clones, tenant, schema_only, downgrade, concurrency, as_json)


def show(
    revision: str,
    clones: int,
    tenants: Sequence[str] | None,
    schema_only: bool,
    downgrade: bool,
    concurrency: int,
    as_json: bool,
) -> None:
    """Rehearse, and print the report; exit with a failure if a clone failed or differs."""

    async def command(tenancy: Tenancy) -> RehearsalReport:
        return await tenancy.migrations.rehearse(
            revision,
            clones=clones,
            tenants=tenants,
            content="schema" if schema_only else "data",
            downgrade=downgrade,
            concurrency=concurrency,
            progress=None if as_json else note,
            actor=operator(),
        )

    report = run_stoppable(command, stopped="stopped: the clone was dropped")
    if as_json:
        print_json(report)
    else:
        _print(report)
    if not report.ok:
        raise typer.Exit(EXIT_FAILED)


def _print(report: RehearsalReport) -> None:
    columns = ("tenant", "server", "size", "from", "copy", "upgrade", "downgrade", "again", "result")
    print_table("clones", columns, map(_clone, report.clones))
    slowest = max(
        (clone for clone in report.clones if clone.upgrade is not None),
        key=lambda clone: clone.upgrade.seconds if clone.upgrade is not None else 0.0,
        default=None,
    )
    if slowest is not None:
        print_table(
            f"statements on the clone of {slowest.slug}, the slowest",
            (Column("phase", drop=1), "revision", "seconds", "locks", "rewrites", "statement"),
            (row for phase in slowest.phases[:2] for row in _statements(phase)),
        )
    differences = [(clone.slug, one.after, one.text) for clone in report.clones for one in clone.differences]
    if differences:
        print_table("differences", ("tenant", "after", "difference"), differences)
    for text in _remarks(report):
        console.print(printable(text), markup=False)
    console.print(printable(report.summary()), markup=False)


def _clone(clone: CloneReport) -> tuple[str | None, ...]:
    seconds = {phase.name: f"{phase.seconds:.2f} s" for phase in clone.phases if phase.error is None}
    count = len(clone.differences)
    return (
        clone.slug,
        clone.server,
        size_text(clone.size),
        clone.revision or "base",
        None if clone.copy_seconds is None else f"{clone.copy_seconds:.2f} s",
        seconds.get("upgrade"),
        seconds.get("downgrade"),
        seconds.get("upgrade again"),
        clone.error or (f"{count} difference{'s' * (count != 1)}" if count else "good"),
    )


def _statements(phase: PhaseReport) -> Iterator[tuple[str, ...]]:
    def row(revision: str, seconds: float, locks: str, rewrites: str, text: str) -> tuple[str, ...]:
        return phase.name, revision, f"{seconds:.3f}", locks, rewrites, text

    for one in phase.revisions:
        if one.preflight_seconds is not None:
            yield row(one.revision, one.preflight_seconds, "", "", "(preflight)")
        own = [row(one.revision, found.seconds, *_effects(found), _shown(found.sql)) for found in one.statements]
        data = [] if one.data_seconds is None else [row(one.revision, one.data_seconds, "", "", "(data migrations)")]
        # a downgrade has them before the statements of its revision
        yield from data + own if phase.name == "downgrade" else own + data


def _shown(sql: str) -> str:
    return sql if len(sql) <= _STATEMENT else f"{sql[:_STATEMENT]}..."


def _effects(statement: StatementReport) -> tuple[str, str]:
    locks = "; ".join(f"{one.mode} {one.relation} {one.seconds:.3f} s, {one.blocks} wait" for one in statement.locks)
    rewrites = "; ".join(f"{one.kind} {one.relation} ({size_text(one.size)})" for one in statement.rewrites)
    return locks, rewrites


def _remarks(report: RehearsalReport) -> Iterator[str]:
    for clone in report.clones:
        if clone.idle_downgrades:
            yield f"{clone.slug}: the downgrade of {', '.join(clone.idle_downgrades)} executes nothing"
        if clone.lost_values:
            yield f"{clone.slug}: upgrade and downgrade lose values of {', '.join(clone.lost_values)}"
        if clone.left_out:
            yield f"{clone.slug}: not cloned: {', '.join(clone.left_out)}"
    if report.estimate is not None:
        yield _estimate(report.estimate)
    yield from report.notes


def _estimate(found: Estimate) -> str:
    count = found.tenants
    return (
        f"estimate: {count} tenant{'s' * (count != 1)} ({size_text(found.total_bytes)}), {found.concurrency} at once: "
        f"{_range(found.low, found.high)}; the longest {_range(found.longest_low, found.longest_high)} "
        f"(by {found.method})"
    )


def _range(low: float, high: float) -> str:
    first, second = _time(low), _time(high)
    return first if first == second else f"{first} to {second}"


def _time(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7_200 else f"{seconds / 3_600:.1f} h"


__all__ = ["rehearse", "show"]
