"""What a template is built from besides the migration directory, in the ways in which applications are laid out."""

from __future__ import annotations

import compileall
import importlib
import json
import os
import pkgutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

import tenancy_orm
from tenancy_orm.migrations.inputs import Inputs
from tenancy_orm.migrations.recording import recorded


class App:
    """A repository with the migrations of one application; its modules are imported before the build."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.migrations = root / "service" / "migrations"
        self.site = root / "venv" / "site-packages"
        self.write("service/migrations/env.py", "")

    def write(self, name: str, text: str) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        # the time has the system's resolution
        os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns + len(text)))
        return path

    def inputs(self, build: Callable[[], object] = lambda: None) -> Callable[[], str | None]:
        """Record a build, and return a function that says which input has changed since, as another process would."""
        with recorded() as recording:
            build()
        digests = {name: digest.split()[0] for name, digest in Inputs(self.migrations).digests(recording).items()}
        return lambda: Inputs(self.migrations).changed(digests)


@pytest.fixture
def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[App]:
    before = set(sys.modules)
    made = App(tmp_path)
    monkeypatch.syspath_prepend(tmp_path / "service")
    monkeypatch.syspath_prepend(made.site)
    yield made
    for name in set(sys.modules) - before:
        del sys.modules[name]


def load(name: str) -> ModuleType:
    importlib.invalidate_caches()
    return importlib.import_module(name)


def test_a_file_that_is_read_counts(app: App) -> None:
    """Also beside the project, in a repository of several applications, and one that the package's loader reads."""
    app.write("service/shop/__init__.py", "")
    app.write("service/shop/one.sql", "SELECT 1")
    script = app.write("shared/sql/views.sql", "SELECT 1")
    changed = app.inputs(script.read_text)
    assert changed() is None
    by_loader = app.inputs(lambda: pkgutil.get_data("shop", "one.sql"))
    app.write("service/shop/one.sql", "SELECT 2")
    assert by_loader() == "shop/one.sql"
    app.write("shared/sql/views.sql", "SELECT 2")
    assert changed() == "../shared/sql/views.sql"


def test_a_directory_that_is_listed_counts_though_it_is_a_package(app: App) -> None:
    """Python's import lists it too, and that alone does not count."""
    app.write("service/migrations/env.py", "import shop.tables")
    for name in ("shop/__init__", "shop/tables", "other/__init__", "other/tables"):
        app.write(f"service/{name}.py", "")
    load("shop.tables")
    changed = app.inputs(lambda: [list((app.root / "service/shop").glob("*.sql")), load("other.tables")])
    app.write("service/other/new.sql", "SELECT 1")
    assert changed() is None
    app.write("service/shop/new.sql", "SELECT 1")
    assert changed() == "shop"


def test_files_of_the_machine_and_of_this_package_do_not_count(app: App) -> None:
    """Whether it is installed or, as here, a checkout that ``sys.path`` has."""
    with recorded() as recording:
        for name in ("/etc/hosts", "/proc/self/stat", tenancy_orm.__file__, json.__file__):
            Path(name).read_bytes()
    assert Inputs(app.migrations).digests(recording) == {}


@pytest.mark.parametrize("text", ["importlib.import_module(f'{__name__}.{name}')", "__import__('shop.tables')"])
def test_modules_that_are_imported_by_made_up_names_count(app: App, text: str) -> None:
    """Of a package that imports whatever modules are in it, and that the application has imported already."""
    app.write("service/migrations/env.py", "import shop")
    app.write("service/shop/__init__.py", f"import importlib\nfor name in ['tables']:\n    {text}\n")
    app.write("service/shop/tables.py", "NAME = 'a'")
    load("shop")
    changed = app.inputs()
    assert changed() is None
    app.write("service/shop/more.py", "")
    assert changed() == "shop"
    (app.root / "service/shop/more.py").unlink()
    app.write("service/shop/tables.py", "NAME = 'other'")
    assert changed() == "shop/tables.py"


def test_a_compiled_module_without_its_source_counts(app: App) -> None:
    """And what it imports, although its imports cannot be read."""
    app.write("service/migrations/env.py", "import shop.helpers")
    app.write("service/shop/__init__.py", "")
    app.write("service/shop/helpers.py", "from shop import words")
    app.write("service/shop/words.py", "WORD = 'a'")

    def compile_all() -> None:
        compileall.compile_dir(app.root / "service/shop", legacy=True, quiet=1, force=True)
        for path in (app.root / "service/shop").glob("*.py"):
            path.unlink()

    compile_all()
    load("shop.helpers")
    changed = app.inputs()
    assert changed() is None
    app.write("service/shop/words.py", "WORD = 'other'")
    compile_all()
    assert changed() == "shop/words.pyc"


def test_what_a_module_read_when_it_was_imported_counts(app: App) -> None:
    """No build reads it again: the application has imported the module when it started."""
    app.write("service/migrations/env.py", "import shop.functions")
    app.write("service/shop/__init__.py", "")
    lines = ("from pathlib import Path", "here = Path(__file__).parent", "ONE = (here / 'one.sql').read_text()")
    more = "MORE = [path.read_text() for path in (here / 'more').iterdir()]"
    app.write("service/shop/functions.py", "\n".join((*lines, more)))
    for name in ("one", "more/two"):
        app.write(f"service/shop/{name}.sql", "SELECT 1")
    load("shop.functions")
    changed = app.inputs()
    assert changed() is None
    for name in ("one", "more/two"):
        app.write(f"service/shop/{name}.sql", "SELECT 2")
        assert changed() == f"shop/{name}.sql"
        app.write(f"service/shop/{name}.sql", "SELECT 1")
    app.write("service/shop/more/three.sql", "SELECT 3")
    assert changed() == "shop/more"


def test_an_installed_package_that_is_imported_counts(app: App) -> None:
    """The application's own, where an image installs it and copies the migrations; and one of shared types."""

    def install(name: str, version: str, digest: str, script: str = "") -> None:
        for old in app.site.glob(f"{name}-*"):
            (old / "RECORD").unlink()
            old.rmdir()
        record = f"{name}/__init__.py,sha256={digest},1\n../../bin/{name},sha256={script},1\n{name}/x.pyc,,\n"
        app.write(f"venv/site-packages/{name}-{version}.dist-info/RECORD", record)

    app.write("service/migrations/env.py", "import shop_types\nimport sqlalchemy")
    for name in ("shop_types", "not_imported"):
        app.write(f"venv/site-packages/{name}/__init__.py", "")
        install(name, "1", "aaa")
    load("shop_types")
    changed = app.inputs()
    assert changed() is None
    install("not_imported", "2", "bbb")
    install("shop_types", "1", "aaa", script="of another machine")
    assert changed() is None
    install("shop_types", "1.1", "bbb")
    assert changed() == "package://shop_types"
