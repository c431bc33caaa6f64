"""``tenancy export``: a tenant's data as an archive that needs no PostgreSQL."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..exports import ExportFormat, ExportProgress, ExportReport
from ..tenancy import Tenancy
from .output import console, errors, note, print_json, printable, size_text
from .runtime import Json, TenantArgument, fail, operator, run_stoppable

_FORMATS: tuple[ExportFormat, ...] = ("jsonl", "csv")


def export(
    tenant: TenantArgument,
    to: Annotated[Path, typer.Option("--to", help="A .zip file, or a directory; nothing is overwritten.")],
    row_format: Annotated[str, typer.Option("--format", help="What the rows are: jsonl or csv.")] = "jsonl",
    exclude: Annotated[
        list[str] | None,
        typer.Option(help="Leave this table out, or with table:column this column; repeatable."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted export to that place.")] = False,
    as_json: Json = False,
) -> None:
    """Write a tenant's data as an archive that its owner can use without PostgreSQL."""
    wanted = next((one for one in _FORMATS if one == row_format), None)
    if wanted is None:
        fail(f"{row_format!r} is not a format: give {' or '.join(_FORMATS)}")

    async def command(tenancy: Tenancy) -> ExportReport:
        with _bar(shown=not as_json) as bar:
            task = bar.add_task("export", total=None)

            def show(progress: ExportProgress) -> None:
                text = printable(f"{progress.part} ({size_text(progress.bytes)})")
                bar.update(task, description=text, completed=progress.done, total=progress.total)

            return await tenancy.exports.write(
                tenant,
                to,
                row_format=wanted,
                exclude=exclude or (),
                resume=resume,
                progress=show,
                actor=operator(),
            )

    report = run_stoppable(command, stopped="stopped: continue with --resume")
    if as_json:
        print_json(report)
        return
    for one in report.left_out:
        note(f"left out: {one.name}: {one.reason}")
    if len(report.snapshots) > 1:
        times = len(report.snapshots)
        note(f"its tables were read at {times} different times, since it was resumed: see its manifest.json")
    console.print(
        f"[bold]{report.slug}[/]: {report.rows:,} rows of {report.tables:,} tables in {printable(str(report.path))} "
        f"({report.files:,} files, {size_text(report.bytes)} unpacked)",
        highlight=False,
    )


def _bar(*, shown: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=errors, disable=not (shown and errors.is_terminal))


__all__ = ["export"]
