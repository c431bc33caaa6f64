"""Run the tests on each combination of Python, SQLAlchemy and PostgreSQL in ``COMBINATIONS``: ``make test-matrix``.

Each pair of Python and SQLAlchemy has a virtual environment of its own (``.venv-3.13-sa2.0``), which is kept, and
brought up to date when pyproject.toml changes. This file needs the standard library alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

ROOT = Path(__file__).parents[1]

# As `make test` does; see the Makefile.
PYTEST = ("-m", "pytest", "-n", "3", "--dist", "worksteal", "--ignore=tests/benchmarks")

# Versions that the tests' own Python package has; Debian's packages have others.
EMBEDDED = frozenset({16, 18})
DEBIAN = Path("/usr")

# Tests that need pgvector. Where it is missing they are left out, and the table says so.
OF_PGVECTOR = (
    "tests/acceptance/test_agent_platform.py",
    "tests/security/test_tenancy_matrix.py::test_the_agent_platform_leaks_nothing",
    "tests/integration/provisioning/test_templates.py::test_an_extension_comes_with_the_template",
    "tests/integration/migrations/test_autogenerate.py",
    "tests/integration/cli/test_cli.py::test_an_extension_that_is_configured_later_reaches_tenants_by_command",
)


@dataclass(frozen=True)
class Combination:
    """What one run is on.

    Args:
        python: A minor version, ``3.12``.
        sqlalchemy: A minor version, of which the latest is installed, ``2.0``; or one release, ``2.0.53``.
        postgres: PostgreSQL's major version.
    """

    python: str
    sqlalchemy: str
    postgres: int

    @property
    def name(self) -> str:
        """What ``ONLY`` selects, ``3.12-sa2.1-pg16``."""
        return f"{self.python}-sa{self.sqlalchemy}-pg{self.postgres}"

    @property
    def environment(self) -> Path:
        """The directory of its virtual environment."""
        return ROOT / f".venv-{self.python}-sa{self.sqlalchemy}"

    @property
    def requirement(self) -> str:
        """For pip."""
        version = self.sqlalchemy
        return f"sqlalchemy=={version}" if version.count(".") == 2 else f"sqlalchemy~={version}.0"


# Each Python, each SQLAlchemy with the oldest that pyproject.toml allows, each PostgreSQL: twice, beside others.
COMBINATIONS = (
    Combination("3.11", "2.1", 18),
    Combination("3.11", "2.0.53", 16),
    Combination("3.12", "2.1", 16),
    Combination("3.13", "2.1", 18),
    Combination("3.13", "2.0", 15),
)


@dataclass
class Outcome:
    """How a combination ended, as the table at the end says it."""

    combination: Combination
    state: str = "not run"
    reason: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)

    def row(self) -> tuple[str, ...]:
        """Its cells."""
        known = [self.versions.get(part, "") for part in ("python", "sqlalchemy", "postgres")]
        return (self.combination.name, *known, f"{self.state}: {self.reason}" if self.reason else self.state)


class Missing(Exception):  # noqa: N818 - no error of the program's
    """Something that a combination needs is not on this machine; the text says how to get it."""


# --- what a combination needs ---------------------------------------------------------------------------------------


def selected(patterns: Sequence[str]) -> list[Combination]:
    """The combinations with a name that one of the patterns matches; all where there is no pattern.

    Raises:
        SystemExit: a pattern matches none.
    """
    for pattern in patterns:
        if not any(fnmatchcase(one.name, pattern) for one in COMBINATIONS):
            names = ", ".join(one.name for one in COMBINATIONS)
            raise SystemExit(f"ONLY={pattern!r} matches no combination; there are {names}")
    return [one for one in COMBINATIONS if not patterns or any(fnmatchcase(one.name, it) for it in patterns)]


def version_of(python: str) -> str | None:
    """The version of an interpreter; None where it does not start, as pyenv's stand-in of a version not chosen."""
    try:
        run = subprocess.run(
            [python, "-c", "import platform; print(platform.python_version())"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip()


def find_python(version: str, named: Sequence[str]) -> str:
    """An interpreter of ``version``: one of ``named`` (PYTHONS), or from PATH, or of uv, which installs it.

    Raises:
        Missing: there is none.
    """
    candidates = [*named, f"python{version}"]
    for candidate in candidates:
        found = shutil.which(candidate)
        if found is not None and (version_of(found) or "").startswith(f"{version}."):
            return found
    if shutil.which("uv") is not None:
        subprocess.run(["uv", "python", "install", "--quiet", version], check=False)
        found = subprocess.run(
            ["uv", "python", "find", version], capture_output=True, text=True, check=False
        ).stdout.strip()
        if found and (version_of(found) or "").startswith(f"{version}."):
            return found
    raise Missing(
        f"there is no Python {version}: install python{version}, name one (make test-matrix PYTHONS='/path/to/python'),"
        " or install uv, which brings it"
    )


def check_postgres(version: int) -> None:
    """Look for PostgreSQL's programs.

    Raises:
        Missing: there are none.
    """
    if version not in EMBEDDED and not (DEBIAN / f"lib/postgresql/{version}/bin/postgres").is_file():
        raise Missing(f"there is no PostgreSQL {version}: apt-get install postgresql-{version}")


def has_pgvector(version: int) -> bool:
    """Whether PostgreSQL has the extension: not every Debian has a package of it."""
    return version in EMBEDDED or (DEBIAN / f"share/postgresql/{version}/extension/vector.control").is_file()


def prepare(combination: Combination, python: str) -> Path:
    """Make the virtual environment, or bring it up to date, and return its interpreter.

    Raises:
        Missing: it cannot be made.
    """
    directory = combination.environment
    inside = directory / "bin" / "python"
    version = version_of(python)
    wanted = json.dumps(
        {
            "python": version,
            "sqlalchemy": combination.requirement,
            "project": hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest(),
        }
    )
    stamp = directory / "matrix.json"
    if stamp.is_file() and stamp.read_text("utf-8") == wanted and version_of(str(inside)) == version:
        return inside
    print(f"installing {directory.name}", flush=True)
    try:
        if version_of(str(inside)) != version:
            subprocess.run([python, "-m", "venv", "--clear", directory], check=True)
        pip = [str(inside), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        subprocess.run([*pip, "--editable", ".[dev]", combination.requirement], cwd=ROOT, check=True)
    except subprocess.CalledProcessError as error:
        raise Missing(f"{directory.name} cannot be installed: see above") from error
    stamp.write_text(wanted, "utf-8")
    return inside


# --- running --------------------------------------------------------------------------------------------------------


def arguments_of(further: Sequence[str]) -> list[str]:
    """Pytest's arguments: all tests, or those that ``further`` names."""
    named = any((ROOT / argument.partition("::")[0]).exists() for argument in further if not argument.startswith("-"))
    return [*PYTEST, *([] if named else ["tests"]), *further]


def environment_of(combination: Combination) -> dict[str, str]:
    """The variables of a run: a server of the combination's version, whichever the caller's is."""
    variables = {name: value for name, value in os.environ.items() if name not in ("TENANCY_TEST_DSN", "VIRTUAL_ENV")}
    # kept bytecode: the tests start hundreds of programs
    variables.pop("PYTHONDONTWRITEBYTECODE", None)
    return {**variables, "TENANCY_TEST_POSTGRES": str(combination.postgres)}


def run_tests(outcome: Outcome, python: Path, further: Sequence[str]) -> None:
    """Run pytest, show what it prints, and keep how it ended."""
    combination = outcome.combination
    left_out = () if has_pgvector(combination.postgres) else OF_PGVECTOR
    versions = dict(outcome.versions)
    versions["sqlalchemy"] = subprocess.run(
        [python, "-c", "from importlib.metadata import version; print(version('sqlalchemy'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    summary = ""
    with subprocess.Popen(
        [python, *arguments_of(further), *(f"--deselect={test}" for test in left_out)],
        cwd=ROOT,
        env=environment_of(combination),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if found := re.match(r"PostgreSQL (\S+) \(", line):
                versions["postgres"] = found[1]
            if found := re.fullmatch(r"=* ?(.* in [0-9.]+s(?: \(.*\))?) ?=*\n", line):
                summary = found[1]
    outcome.versions = versions
    outcome.state = "passed" if process.returncode == 0 else "FAILED"
    outcome.reason = summary or f"pytest ended with status {process.returncode}"
    if left_out:
        outcome.reason += f"; without tests of pgvector: apt-get install postgresql-{combination.postgres}-pgvector"


def table(rows: Iterable[tuple[str, ...]]) -> str:
    """The rows below each other, in columns."""
    rows = [("combination", "Python", "SQLAlchemy", "PostgreSQL", "result"), *rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def run_all(
    outcomes: Sequence[Outcome],
    pythons: Sequence[str],
    further: Sequence[str],
    run: Callable[[Outcome, Path, Sequence[str]], None] = run_tests,
) -> None:
    """Look for everything first, since a run takes its time; then run each combination that has what it needs."""
    found: list[tuple[Outcome, str]] = []
    for outcome in outcomes:
        try:
            check_postgres(outcome.combination.postgres)
            python = find_python(outcome.combination.python, pythons)
        except Missing as missing:
            outcome.reason = str(missing)
            print(f"NOT RUN {outcome.combination.name}: {missing}", flush=True)
        else:
            outcome.versions = {"python": version_of(python) or ""}
            found.append((outcome, python))
    for outcome, python in found:
        try:
            inside = prepare(outcome.combination, python)
        except Missing as missing:
            outcome.state, outcome.reason = "FAILED", str(missing)
            continue
        print(f"\n=== {outcome.combination.name}", flush=True)
        run(outcome, inside, further)


def status_of(outcomes: Sequence[Outcome], *, named: bool) -> int:
    """The exit status: 0 where all that ran have passed, and something ran.

    What is missing is a failure where the caller has named it.
    """
    states = [outcome.state for outcome in outcomes]
    if "FAILED" in states or "passed" not in states:
        return 1
    return 1 if named and "not run" in states else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the matrix, and return the exit status."""
    parser = argparse.ArgumentParser(prog="make test-matrix", description=main.__doc__)
    parser.add_argument("--only", default="", help="patterns of combinations, separated by blanks: '3.12-* *-pg15'")
    parser.add_argument(
        "--pythons", default="", help="interpreters, separated by blanks; others are looked for on PATH"
    )
    parser.add_argument("pytest", nargs="*", help="for pytest")
    options = parser.parse_args(arguments)
    outcomes = [Outcome(one) for one in selected(options.only.split())]
    try:
        run_all(outcomes, options.pythons.split(), options.pytest)
    except KeyboardInterrupt:
        status = 130
    else:
        status = status_of(outcomes, named=bool(options.only))
    print(f"\n{table(outcome.row() for outcome in outcomes)}", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
