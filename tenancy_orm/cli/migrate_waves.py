"""Options of ``tenancy migrate`` that say in which order tenants are migrated, and what would be done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import typer

from ..errors import counted
from ..runs.migrator import DEFAULT_CONCURRENCY
from ..runs.preview import Preview, RevisionPreview, StartPreview, WavePreview
from ..runs.wave_texts import PlanFile, parse_waves, read_plan
from ..runs.waves import Waves
from .output import console, note, print_json, print_table, printable
from .runtime import EXIT_FAILED, exit_on_error, fail, run

WaveOption = Annotated[
    list[str] | None,
    typer.Option(
        "--wave",
        metavar="WAVE",
        help="Tenants to migrate before the others, such as 'canary: tenant=acme,globex wait=10m', 5%, tier=free; "
        "repeatable, in order.",
    ),
]
PlanOption = Annotated[
    str | None, typer.Option("--plan", metavar="FILE", help="The waves, and what is checked between them, as TOML.")
]
SeedOption = Annotated[
    str | None, typer.Option("--wave-seed", metavar="TEXT", help="Let percentages choose other tenants than usual.")
]
MaxFailures = Annotated[
    int | None, typer.Option("--max-failures", min=1, help="Start no further tenant once so many have failed.")
]
PlannedConcurrency = Annotated[
    int | None,
    typer.Option("--concurrency", min=1, max=64, help="Tenants migrated at once; 8, unless the plan says otherwise."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and do nothing.")]
Sql = Annotated[bool, typer.Option("--sql", help="Print the SQL that would be executed, and do nothing.")]


@dataclass(frozen=True, slots=True)
class GivenWaves:
    """What was given on the command line."""

    waves: Waves | None
    max_failures: int | None
    concurrency: int

    @classmethod
    def of(
        cls,
        wave: Sequence[str] | None,
        plan: str | None,
        seed: str | None,
        max_failures: int | None,
        concurrency: int | None,
    ) -> GivenWaves:
        """Read the options; what cannot be meant exits with an error. They win over the file of ``--plan``."""
        if wave and plan:
            fail("give the waves by --wave or by --plan, not by both", kind="ConfigurationError")

        def read() -> PlanFile:
            if plan:
                return read_plan(plan)
            return PlanFile(parse_waves(wave, seed=seed or "") if wave else None)

        found = exit_on_error(read)
        waves = found.waves
        if waves is not None and seed is not None:
            waves = Waves(waves.waves, seed)
        return cls(
            waves,
            found.max_failures if max_failures is None else max_failures,
            concurrency or found.concurrency or DEFAULT_CONCURRENCY,
        )


def refuse_both(first: bool, second: bool, names: str) -> None:
    """Exit with an error where both of two options were given that ask for different things."""
    if first and second:
        fail(f"give only one of {names}", kind="ConfigurationError")


def say_ignored(context: typer.Context, mode: str, *taken: str) -> None:
    """Say which options of a command were given and have no effect in ``mode``; ``taken`` are those that have one."""
    ignored = [
        parameter.opts[0]
        for parameter in context.command.params
        if parameter.name not in (*taken, "revision", "number", "tenant", "as_json")
        and (source := context.get_parameter_source(parameter.name)) is not None
        and source.name == "COMMANDLINE"
    ]
    if ignored:
        note(f"{mode} ignores {', '.join(ignored)}")


def look_ahead(
    context: typer.Context,
    command: str,
    revision: str,
    tenants: Sequence[str] | None,
    given: GivenWaves,
    *,
    sql: bool,
    as_json: bool,
) -> None:
    """Print what a run would do."""
    say_ignored(context, *(("--sql", "sql") if sql else ("--dry-run", "dry_run", "wave", "plan", "wave_seed")))
    _show_preview(
        run(lambda tenancy: tenancy.migrations.preview(command, revision, tenants=tenants, waves=given.waves, sql=sql)),
        sql=sql,
        as_json=as_json,
    )


def _show_preview(preview: Preview, *, sql: bool, as_json: bool) -> None:
    """Print what a run would do; exits with status 1 if there is no way to the target for some tenants."""
    if as_json:
        print_json(preview)
    elif sql:
        _print_sql(preview)
    else:
        _print_plan(preview)
    if not preview.ok:
        raise typer.Exit(EXIT_FAILED)


def _print_plan(preview: Preview) -> None:
    console.print(f"{preview.command} {preview.target}: {counted(preview.total)}, nothing is changed", highlight=False)
    print_waves(preview.waves)
    print_table(
        "revisions",
        ("from", "tenants", "to", "runs"),
        [(start.revision or "base", len(start.tenants), _target(start), _runs(start)) for start in preview.starts],
    )


def print_waves(waves: Sequence[WavePreview]) -> None:
    """Print the waves with their tenants."""
    rows = [
        (
            number,
            wave.name,
            len(wave.tenants),
            ", ".join(f"{name} {count}" for name, count in wave.servers.items()),
            ", ".join(wave.tenants[:5]) + (", ..." if len(wave.tenants) > 5 else ""),
            wave.gate,
        )
        for number, wave in enumerate(waves, 1)
    ]
    print_table("waves", ("wave", "name", "tenants", "servers", "who", "then"), rows)


def _target(start: StartPreview) -> str | None:
    return None if start.error else start.target or "base"


def _runs(start: StartPreview) -> str:
    if start.error:
        return f"cannot: {start.error}"
    return "; ".join(map(_step, start.revisions)) or "nothing to do"


def _step(step: RevisionPreview) -> str:
    if step.up is None:
        return step.doc or "stamp"
    more = ["preflight"] * step.has_checks + [f"data migration {name}" for name in step.data_migrations]
    return " ".join(
        [
            "up" if step.up else "down",
            str(step.revision),
            *([step.doc] if step.doc else []),
            *([f"({', '.join(more)})"] if more else []),
        ]
    )


def _print_sql(preview: Preview) -> None:
    """Print a script for each revision that tenants start from: they are at different ones after a failed run."""
    for start in preview.starts:
        names = ", ".join(start.tenants[:5]) + (", ..." if len(start.tenants) > 5 else "")
        print(printable(f"-- {counted(len(start.tenants))} at {start.revision or 'base'}: {names}"))
        if start.error:
            print(printable(f"-- cannot: {start.error}"))
        # as it is: it may be piped into psql
        print(start.sql or "-- nothing to do\n")


__all__ = [
    "DryRun",
    "GivenWaves",
    "MaxFailures",
    "PlanOption",
    "PlannedConcurrency",
    "SeedOption",
    "Sql",
    "WaveOption",
    "look_ahead",
    "print_waves",
    "refuse_both",
    "say_ignored",
]
