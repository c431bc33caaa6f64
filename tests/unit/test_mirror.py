"""The tests of ``unit`` and ``integration`` stand in the rooms of the package that they test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
PACKAGE = TESTS.parent / "tenancy_orm"
KINDS = ("unit", "integration")

# Of no room, and why.
OF_THE_REPOSITORY = {
    "test_architecture_page.py": "docs/architecture.md, which describes all rooms",
    "test_distribution.py": "what a user gets who installs the package, but not the repository",
    "test_layers.py": "which room may import which",
    "test_matrix.py": "tests/matrix.py, which `make test-matrix` runs",
    "test_mirror.py": "this one",
    "test_public_names.py": "the names that the package as a whole offers",
    "test_reference.py": "the reference that docs/hooks.py builds from all rooms",
    "test_security_page.py": "docs/security.md, which names tests of every kind",
}


def misplaced(package: Path, tests: Path) -> Iterator[str]:
    """What of ``tests`` does not mirror ``package``."""
    folders = {path.parent.name for path in package.glob("*/__init__.py")}
    modules = {path.stem for path in package.glob("*.py")} - {"__init__"}
    tested = set()
    for kind in KINDS:
        for path in sorted((tests / kind).rglob("*.py")):
            first, *rest = path.relative_to(tests / kind).parts
            if rest:
                if first not in folders | modules:
                    yield f"{kind}/{'/'.join((first, *rest))}: there is no room {first}"
                elif path.name.startswith("test_"):
                    tested.add(first)
            elif first.startswith("test_") and first not in OF_THE_REPOSITORY:
                module = path.stem.removeprefix("test_")
                if module not in modules:
                    yield f"{kind}/{first}: there is no {module}.py in the package"
    for folder in sorted(folders - tested):
        yield f"{folder}: no test stands in {' or '.join(f'{kind}/{folder}' for kind in KINDS)}"


def test_the_tests_mirror_the_rooms() -> None:
    """Each folder is a room, each room that is a folder has tests, and a file beside the folders is of one module."""
    assert list(misplaced(PACKAGE, TESTS)) == []


def test_what_is_of_the_repository_is_there() -> None:
    """The list has no file that was moved since."""
    assert [name for name in OF_THE_REPOSITORY if not (TESTS / "unit" / name).is_file()] == []


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda tests: None, []),
        (lambda tests: put(tests / "unit/keys/deep/test_more.py"), []),
        (lambda tests: put(tests / "integration/queries/test_rows.py"), []),
        (lambda tests: put(tests / "integration/conftest.py"), []),
        (lambda tests: put(tests / "unit/__pycache__/test_gone.cpython-311.pyc"), []),
        (
            lambda tests: put(tests / "integration/doors/test_doors.py"),
            ["integration/doors/test_doors.py: there is no room doors"],
        ),
        (
            lambda tests: put(tests / "integration/doors/conftest.py"),
            ["integration/doors/conftest.py: there is no room doors"],
        ),
        # a room that is a folder is one here as well
        (lambda tests: put(tests / "unit/test_keys.py"), ["unit/test_keys.py: there is no keys.py in the package"]),
        (lambda tests: put(tests / "unit/test_odd.py"), ["unit/test_odd.py: there is no odd.py in the package"]),
        (
            lambda tests: (tests / "unit/keys/test_format.py").rename(tests / "unit/keys/conftest.py"),
            ["keys: no test stands in unit/keys or integration/keys"],
        ),
    ],
)
def test_what_does_not_mirror_them_is_found(tmp_path: Path, change: Callable[[Path], object], found: list[str]) -> None:
    """In a package with the rooms ``keys`` and ``queries``."""
    package, tests = tmp_path / "package", tmp_path / "tests"
    for path in (package / "__init__.py", package / "queries.py", package / "keys/__init__.py"):
        put(path)
    for path in (tests / "unit/keys/test_format.py", tests / "integration/test_queries.py"):
        put(path)
    put(tests / "unit/test_layers.py")
    change(tests)
    assert list(misplaced(package, tests)) == found


def put(path: Path) -> None:
    """Make an empty file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
