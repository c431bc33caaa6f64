"""``make check`` fails on what it is there to find: each fault is planted in a copy of this repository.

The copy's own Makefile runs there, so that what is proven here is what a developer and every change run.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DIRECTORIES = ("tenancy_orm", "alembic_templates", "docs", "examples", ".github")
FILES = ("Makefile", "mkdocs.yml", "pyproject.toml", "*.md", "LICENSE")
SECONDS = 120.0

CHECKS = ("formatting", "lint", "types", "docs")

LINK = "[no page](no-such-page.md)"
ANCHOR = "[no heading](quickstart.md#no-such-heading)"
NAME = '\n\ndef planted() -> None:\n    """Do nothing."""\n\n\n__all__ += ["planted"]\n'


def copied(directory: Path) -> Path:
    """A copy of what the checks read."""
    for name in DIRECTORIES:
        shutil.copytree(ROOT / name, directory / name, ignore=shutil.ignore_patterns("__pycache__"))
    for pattern in FILES:
        for file in ROOT.glob(pattern):
            shutil.copy2(file, directory)
    return directory


def make(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``make`` with this interpreter's environment, and install nothing into it.

    ``-o`` takes the environment for up to date. Should it not, ``PIP=false`` fails, where a copy would be installed.
    """
    return subprocess.run(
        ["make", "-C", str(directory), f"VENV={sys.prefix}", "-o", f"{sys.prefix}/.dev", "PIP=false", *arguments],
        check=False,
        # no flags of a `make test` that runs this
        env={name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
    )


def append(file: Path, text: str) -> None:
    """Write ``text`` at the end of a file, which is made if it is missing."""
    with file.open("a", encoding="utf-8") as stream:
        stream.write(text)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of this repository without a fault."""
    return copied(tmp_path)


def test_check_runs_each_of_the_checks() -> None:
    """What the tests below run alone, one after the other: ``make check`` runs the same commands."""
    commands = [make(ROOT, "--dry-run", check).stdout for check in CHECKS]
    programs = [re.findall(rf"{re.escape(sys.prefix)}/bin/(\w+)", command) for command in commands]
    assert programs == [["ruff"], ["ruff"], ["mypy"], ["mkdocs"]]

    def run(output: str) -> list[str]:
        return [line for line in output.splitlines() if f"{sys.prefix}/bin/" in line]

    assert run(make(ROOT, "--dry-run", "check").stdout) == [line for command in commands for line in run(command)]


def test_pre_commit_runs_the_same_checks() -> None:
    """Each hook is a target of the Makefile, and none is left out."""
    hooks = (ROOT / ".pre-commit-config.yaml").read_text("utf-8")
    assert re.findall(r"^ +entry: (.*)$", hooks, re.MULTILINE) == [f"make {check}" for check in CHECKS]


@pytest.mark.parametrize("check", ["formatting", "lint"])
def test_a_copy_without_a_fault_passes(copy: Path, check: str) -> None:
    """Else the tests below would pass for another reason; that of the documentation counts what there is to find."""
    done = make(copy, check)
    assert done.returncode == 0, done.stdout
    assert "WARNING -" not in done.stdout


def test_code_that_is_not_formatted_fails(copy: Path) -> None:
    """``make formatting`` names the file."""
    append(copy / "tenancy_orm" / "errors.py", "\n\nX = (1,\n  2)\n")
    done = make(copy, "formatting")
    assert done.returncode != 0
    assert "tenancy_orm/errors.py" in done.stdout


@pytest.mark.parametrize(
    ("code", "rule"),
    [
        ("def planted() -> None: ...", "D103"),
        ("class Planted: ...", "D101"),
        ('class Planted:\n    """A class."""\n\n    def method(self) -> None: ...', "D102"),
        ('class Planted:\n    """A class."""\n\n    @property\n    def value(self) -> int: ...', "D102"),
    ],
    ids=["function", "class", "method", "property"],
)
def test_a_missing_docstring_fails(copy: Path, code: str, rule: str) -> None:
    """``make lint`` names the place, whatever it is that has none."""
    append(copy / "tenancy_orm" / "errors.py", f"\n\n{code}\n")
    done = make(copy, "lint")
    assert done.returncode != 0
    assert f"{rule} Missing docstring" in done.stdout


def test_a_module_without_a_docstring_fails(copy: Path) -> None:
    """``make lint`` names the file."""
    append(copy / "tenancy_orm" / "planted.py", "PLANTED = 1\n")
    done = make(copy, "lint")
    assert done.returncode != 0
    assert "D100 Missing docstring" in done.stdout


def test_faults_of_the_documentation_fail(copy: Path) -> None:
    """A broken link, a page in no navigation and a public name in no reference: a warning each, and one is enough."""
    append(copy / "docs" / "tenants.md", f"\n{LINK}\n\n{ANCHOR}\n")
    append(copy / "docs" / "planted.md", "# In no navigation\n")
    append(copy / "CONTRIBUTING.md", f"\n{LINK}\n\n{ANCHOR.replace('quickstart', 'docs/quickstart')}\n")
    append(copy / "tenancy_orm" / "__init__.py", NAME)

    done = make(copy, "docs")
    assert done.returncode != 0
    warnings = re.findall(r"^WARNING +- +(.*(?:\n  .*)*)", done.stdout, re.MULTILINE)
    expected = [
        r'not included in the "nav" configuration:\n  - planted\.md$',
        r"'tenants\.md' contains a link 'no-such-page\.md'",
        r"'tenants\.md' contains a link 'quickstart\.md#no-such-heading'",
        r"tenancy_orm\.planted is public, but no page",
        r"CONTRIBUTING\.md contains a link 'no-such-page\.md'",
        r"CONTRIBUTING\.md contains a link 'docs/quickstart\.md#no-such-heading'",
    ]
    # exactly these: with none of them, the build ends well
    assert len(warnings) == len(expected), done.stdout
    for warning in expected:
        assert any(re.search(warning, found) for found in warnings), f"{warning} in\n{done.stdout}"
    assert f"Aborted with {len(expected)} warnings in strict mode!" in done.stdout
