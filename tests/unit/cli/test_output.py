"""Tables of the command line: what is shortened, what is left out, and what a cell may hold."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta, timezone
from uuid import UUID

import pytest
import typer

from tenancy_orm.cli.app import _show_housekeeping
from tenancy_orm.cli.output import Column, cell, fit, note, print_json, print_report, print_table, size_text
from tenancy_orm.cli.runtime import fail
from tenancy_orm.housekeeping import HousekeepingReport
from tenancy_orm.provisioning import Difference, ReconcileReport

COLUMNS = [Column("slug"), Column("reason"), Column("created", drop=1), Column("id", keep=True)]
FIXED = [False, False, True, True]


@pytest.mark.parametrize(
    ("available", "shown", "widths"),
    [
        (200, [0, 1, 2, 3], [20, 60, 19, 36]),
        (110, [0, 1, 2, 3], [20, 29, 19, 36]),
        (90, [0, 1, 3], [20, 30, 36]),
        (70, [0, 1, 3], [20, 10, 36]),
        (62, [0, 1, 3], [12, 10, 36]),
        (40, [0, 1, 3], [10, 10, 36]),
    ],
)
def test_a_table_fits_the_width(available: int, shown: list[int], widths: list[int]) -> None:
    """Texts are shortened, then columns left out, then the name of the row shortened; an id never."""
    found, given = fit(COLUMNS, [20, 60, 19, 36], FIXED, available)
    assert (found, [given[i] for i in found]) == (shown, widths)


def test_several_texts_are_shortened_alike() -> None:
    """The widest first, until they are equally wide."""
    columns = [Column("a"), Column("b"), Column("c")]
    assert fit(columns, [10, 50, 30], [False] * 3, 54) == ([0, 1, 2], [10, 20, 20])
    assert fit(columns, [10, 50, 30], [False] * 3, 80) == ([0, 1, 2], [10, 36, 30])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        ("", "-"),
        ([], "-"),
        ({}, "-"),
        (0, "0"),
        (["notes:read", "notes:write"], "notes:read,notes:write"),
        ("two\nlines  and\tmore", "two lines and more"),
        ("\x1b[2Jred\x07", r"\x1b[2Jred\x07"),
        ("[bold]plain[/]", "[bold]plain[/]"),
        ({"a": [1, "é"]}, '{"a":[1,"é"]}'),
        (datetime(2030, 1, 2, 3, 4, 5, 6, tzinfo=timezone(timedelta(hours=1))), "2030-01-02T02:04:05Z"),
    ],
)
def test_a_cell_is_one_line_of_text(value: object, text: str) -> None:
    """Whatever a tenant wrote: no line breaks, no sign that controls the terminal, no markup."""
    assert cell(value) == text


def test_no_json_and_no_error_controls_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """What JSON need not escape (0x9b begins a sequence, as ESC [ does), and a server on a tenant's SQL."""
    hostile = "é \x9b31m \x1b[2J \x7f \u202e"
    print_json({"a": hostile})
    note(hostile)
    with pytest.raises(typer.Exit):
        fail(f"[bold]two\nlines[/] {hostile}")
    out, err = capsys.readouterr()
    assert json.loads(out) == {"a": hostile}
    assert all(sign.isprintable() or sign == "\n" for sign in out + err)
    assert "é" in out and r"\x1b[2J" in err and "[bold]two\nlines[/]" in err


def test_without_a_terminal_rows_are_aligned_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """A line of headings, then a line a row; nothing is shortened, and wide signs count twice."""
    long = "x" * 500
    print_table(
        "title", ("name", Column("note", drop=1), "id"), [("日本", long, UUID(int=1)), ("a", None, UUID(int=2))]
    )
    assert capsys.readouterr().out.splitlines() == [
        f"NAME  NOTE{' ' * 496}  ID",
        f"日本  {long}  {UUID(int=1)}",
        f"a     -{' ' * 499}  {UUID(int=2)}",
    ]


def test_a_report_is_a_line_for_each_chore_and_error(capsys: pytest.CaptureFixture[str]) -> None:
    """For a log; what is empty is a dash."""
    checked = datetime(2030, 1, 1, tzinfo=UTC)
    chores = {"reconcile": {"finished": ("a", "b"), "failed": (), "seconds": 0}, "prune": None, "at": checked}
    print_report("x", HousekeepingReport(("acme", "globex"), (), chores, ("one", "two")), as_json=False)
    assert capsys.readouterr().out.splitlines() == [
        "suspended  acme, globex",
        "purged     -",
        "reconcile  finished a, b, seconds 0",
        "prune      -",
        "at         2030-01-01T00:00:00Z",
        "error      one",
        "error      two",
    ]


def test_in_a_log_a_note_comes_after_its_table() -> None:
    """A file or a pipe that gets both streams has them in the order of the program, though only one is buffered."""
    code = (
        "from tenancy_orm.cli.output import note, print_fields, print_table\n"
        "print_table('t', ['a'], [[1]]); note('1 row'); print_fields('t', {'b': 2})"
    )
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    log = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=buffered, check=True
    )
    assert log.stdout.decode().splitlines() == ["A", "1", "1 row", "b  2"]


def test_housekeeping_prints_differences_as_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """Each with what mends it, as reconcile does; not as one line of all their fields."""
    found = Difference("acme", "eu", "db", "database.owner", "it is owned by x", dangerous=True, remedy="ALTER y")
    reconciled = ReconcileReport(differences=(found,))
    _show_housekeeping(HousekeepingReport((), (), {"reconcile": reconciled}, ()), as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[:2]] == [["suspended", "-"], ["purged", "-"]]
    assert [line.split() for line in lines[2:4]] == [["reconcile", "-"], ["errors", "-"]]
    assert lines[5].split()[:4] == ["acme", "database.owner", "yes", "no"]
    assert lines[6:] == ["a superuser has to run, in database db:", "ALTER y;"]


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1_500, "1.5 kB"), (12_340_000, "12.3 MB"), (5e15, "5000.0 TB")],
)
def test_a_number_of_bytes_is_shown_with_one_place(count: float, text: str) -> None:
    """Every command writes a size alike."""
    assert size_text(count) == text
