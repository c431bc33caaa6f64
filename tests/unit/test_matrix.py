"""``make test-matrix``: what it runs, what it says is missing, and when it fails."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests import matrix
from tests.matrix import COMBINATIONS, Combination, Missing, Outcome

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
HERE = "{}.{}".format(*sys.version_info)


def test_it_has_each_version_that_is_supported() -> None:
    """Each Python of the classifiers; SQLAlchemy from the oldest release to the newest; what the pages say."""
    pythons = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    assert {one.python for one in COMBINATIONS} == set(pythons)
    (requirement,) = (one for one in PROJECT["dependencies"] if one.startswith("sqlalchemy"))
    oldest, limit = re.fullmatch(r"sqlalchemy\[asyncio\]>=(2\.0\.\d+),<(2\.\d+)", requirement).groups()  # type: ignore[union-attr]
    assert {one.sqlalchemy for one in COMBINATIONS} == {oldest, "2.0", "2.1"} and limit == "2.2"
    assert {one.postgres for one in COMBINATIONS} == {15, 16, 18}
    assert [one.name for one in COMBINATIONS[:1]] == ["3.11-sa2.1-pg18"]

    assert f"Python {pythons[0]} to {pythons[-1]}" in (ROOT / "docs" / "index.md").read_text("utf-8")
    for page in ("index.md", "architecture.md"):
        assert oldest in (ROOT / "docs" / page).read_text("utf-8"), page


def test_a_release_or_the_latest_is_installed() -> None:
    """A minor version leaves the release to pip."""
    assert Combination("3.11", "2.0.53", 16).requirement == "sqlalchemy==2.0.53"
    assert Combination("3.13", "2.0", 15).requirement == "sqlalchemy~=2.0.0"
    assert Combination("3.13", "2.0", 15).environment.name == ".venv-3.13-sa2.0"


def test_only_selects_by_name() -> None:
    """By one pattern or several; one that matches nothing is a mistake."""
    assert matrix.selected([]) == list(COMBINATIONS)
    assert {one.python for one in matrix.selected(["3.12-*"])} == {"3.12"}
    assert {one.name for one in matrix.selected(["3.12-*", "*-pg15"])} == {"3.12-sa2.1-pg16", "3.13-sa2.0-pg15"}
    with pytest.raises(SystemExit, match=r"'3\.9-\*' matches no combination; there are 3\.11-sa2\.1-pg18, "):
        matrix.selected(["3.12-*", "3.9-*"])


def test_interpreters_are_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is named or on PATH is taken if it starts and is of the version, as pyenv's stand-ins need not be."""

    def program(name: str, text: str) -> Path:
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n", "utf-8")
        (tmp_path / name).chmod(0o700)
        return tmp_path / name

    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Missing, match=rf"no Python {re.escape(HERE)}: .* PYTHONS="):
        matrix.find_python(HERE, [])
    standing_in = program(f"python{HERE}", f"echo 'python{HERE}: command not found' >&2; exit 127")
    other = program("other", "echo 3.9.1")
    with pytest.raises(Missing):
        matrix.find_python(HERE, [str(other), "not-there"])
    assert matrix.find_python(HERE, [str(other), sys.executable]) == sys.executable
    standing_in.unlink()
    real = program(f"python{HERE}", f'exec {sys.executable} "$@"')
    assert matrix.find_python(HERE, [str(other)]) == str(real)
    real.unlink()
    uv = program("uv", f'[ "$2" = install ] && : > {tmp_path}/done; [ -e {tmp_path}/done ] && echo {sys.executable}')
    assert matrix.find_python(HERE, []) == sys.executable
    uv.unlink()


def test_what_is_missing_is_said_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is in the table too; alone it is no failure, unless the caller has named it or nothing is left."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(matrix, "DEBIAN", tmp_path)
    monkeypatch.setattr(matrix, "prepare", lambda combination, python: Path(python))
    here, no_python, no_postgres = (
        Combination(HERE, "2.1", 18),
        Combination("2.9", "2.1", 18),
        Combination(HERE, "2", 9),
    )
    said_before: list[str] = []

    def run(outcome: Outcome, python: Path, further: Sequence[str]) -> None:
        said_before.append(capsys.readouterr().out)
        assert (outcome.combination, python, list(further)) == (here, Path(sys.executable), ["-x"])
        outcome.state = "passed"

    outcomes = [Outcome(one) for one in (here, no_python, no_postgres)]
    matrix.run_all(outcomes, [sys.executable], ["-x"], run)
    assert said_before[0].splitlines()[:2] == [
        f"NOT RUN 2.9-sa2.1-pg18: {outcomes[1].reason}",
        f"NOT RUN {HERE}-sa2-pg9: there is no PostgreSQL 9: apt-get install postgresql-9",
    ]
    assert [outcome.state for outcome in outcomes] == ["passed", "not run", "not run"]
    assert matrix.status_of(outcomes, named=False) == 0
    assert matrix.status_of(outcomes, named=True) == 1
    assert matrix.status_of(outcomes[1:], named=False) == 1
    assert matrix.status_of([*outcomes, Outcome(here, "FAILED")], named=False) == 1

    lines = matrix.table(outcome.row() for outcome in outcomes).splitlines()
    assert lines[0].split() == ["combination", "Python", "SQLAlchemy", "PostgreSQL", "result"]
    assert lines[1].split() == [here.name, platform.python_version(), "passed"]
    assert lines[2].endswith(f"not run: {outcomes[1].reason}")


def test_an_environment_is_made_again_when_the_project_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is kept otherwise; what cannot be installed is a failure, and tried again in the next run."""
    monkeypatch.setattr(matrix, "ROOT", tmp_path)
    (tmp_path / "pyproject.toml").write_text("", "utf-8")
    commands: list[list[Any]] = []
    fails = False

    def run(command: list[Any], **options: object) -> subprocess.CompletedProcess[str]:
        if "-c" in command:
            there = command[0] == sys.executable or Path(str(command[0])).exists()
            return subprocess.CompletedProcess(command, 0, platform.python_version() if there else "")
        commands.append(command)
        if fails:
            raise subprocess.CalledProcessError(1, ["pip"])
        inside = Path(tmp_path, f".venv-{HERE}-sa2.0", "bin", "python")
        inside.parent.mkdir(parents=True, exist_ok=True)
        inside.touch()
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    one = Combination(HERE, "2.0", 15)
    inside = matrix.prepare(one, sys.executable)
    assert [command[2] for command in commands] == ["venv", "pip"]
    assert commands[1][-3:] == ["--editable", ".[dev]", "sqlalchemy~=2.0.0"]
    assert (inside, len(commands)) == (matrix.prepare(one, sys.executable), 2)
    (tmp_path / "pyproject.toml").write_text("# more\n", "utf-8")
    fails = True
    with pytest.raises(Missing, match="cannot be installed"):
        matrix.prepare(one, sys.executable)
    fails = False
    matrix.prepare(one, sys.executable)
    assert [command[2] for command in commands] == ["venv", "pip", "pip", "pip"]


def test_arguments_may_name_tests() -> None:
    """Options alone are added to the whole suite."""
    assert matrix.arguments_of(["-k", "embedded"])[-3:] == ["tests", "-k", "embedded"]
    assert matrix.arguments_of(["tests/unit/test_matrix.py::test_x", "-x"])[len(matrix.PYTEST) :] == [
        "tests/unit/test_matrix.py::test_x",
        "-x",
    ]


def test_a_run_has_the_server_of_its_combination(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is named for `make test` is of one version alone."""
    monkeypatch.setenv("TENANCY_TEST_DSN", "postgresql://elsewhere")
    monkeypatch.setenv("TENANCY_TEST_POSTGRES", "18")
    environment = matrix.environment_of(Combination("3.11", "2.1", 16))
    assert environment["TENANCY_TEST_POSTGRES"] == "16" and "TENANCY_TEST_DSN" not in environment
    assert environment["PATH"] == os.environ["PATH"]


@pytest.mark.parametrize(
    ("printed", "status", "state", "reason"),
    [
        ("=== 3 passed, 1 warning in 61.50s (0:01:01) ===", 0, "passed", "3 passed, 1 warning in 61.50s (0:01:01)"),
        ("1 failed, 2 passed in 1.20s", 1, "FAILED", "1 failed, 2 passed in 1.20s"),
        ("ERROR: usage: pytest", 4, "FAILED", "pytest ended with status 4"),
        ("no tests ran in 0.01s", 5, "FAILED", "no tests ran in 0.01s"),
    ],
)
def test_a_run_ends_as_pytest_does(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    printed: str,
    status: int,
    state: str,
    reason: str,
) -> None:
    """Its output is shown; the line that it ends with is in the table, and the version of its server."""
    lines = f"PostgreSQL 18.4 (embedded, /tmp/x)\n{printed}\n"
    monkeypatch.setattr(matrix, "PYTEST", ("-c", f"import sys; print({lines!r}); sys.exit({status})"))
    outcome = Outcome(COMBINATIONS[0])
    matrix.run_tests(outcome, Path(sys.executable), [])
    assert (outcome.state, outcome.reason) == (state, reason)
    assert outcome.versions["postgres"] == "18.4" and outcome.versions["sqlalchemy"].startswith("2.")
    assert printed in capsys.readouterr().out


def test_without_pgvector_its_tests_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On Debian's PostgreSQL, where that has no such package; the table names it."""
    monkeypatch.setattr(matrix, "DEBIAN", tmp_path)
    monkeypatch.setattr(matrix, "PYTEST", ("-c", "import sys; print(sys.argv[1:], 'in 1.0s')"))
    assert all((ROOT / test.partition("::")[0]).is_file() for test in matrix.OF_PGVECTOR)
    outcome = Outcome(Combination("3.13", "2.0", 15))
    matrix.run_tests(outcome, Path(sys.executable), [])
    assert all(f"--deselect={test}" in outcome.reason for test in matrix.OF_PGVECTOR)
    assert outcome.reason.endswith("; without tests of pgvector: apt-get install postgresql-15-pgvector")

    control = tmp_path / "share/postgresql/15/extension/vector.control"
    control.parent.mkdir(parents=True)
    control.touch()
    matrix.run_tests(outcome, Path(sys.executable), [])
    assert outcome.reason == "['tests'] in 1.0s"


def test_make_passes_its_variables_on() -> None:
    """As they are written."""
    command = subprocess.run(
        ["make", "--dry-run", "test-matrix", "PYTHON=p", "ONLY=3.12-* *-pg15", "ARGS=-k 'a or b'", "PYTHONS=/x/python"],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert command == 'p tests/matrix.py --only "3.12-* *-pg15" --pythons "/x/python" -- -k \'a or b\'\n'
