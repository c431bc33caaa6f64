"""``tenancy init`` and ``alembic init`` create a migration directory from the package's template."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory

from tenancy_orm.errors import ConfigurationError
from tenancy_orm.migrations.layout import init_directory, template_directory


def test_a_directory_is_made_with_its_ini_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert init_directory(tmp_path / "app" / "migrations", app="myapp.main:tenancy")
    made = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert made == [
        "app",
        "app/alembic.ini",
        "app/migrations",
        "app/migrations/README",
        "app/migrations/env.py",
        "app/migrations/script.py.mako",
        "app/migrations/versions",
    ]
    config = Config(tmp_path / "app" / "alembic.ini")
    assert config.get_main_option("tenancy_app") == "myapp.main:tenancy"
    assert config.get_main_option("script_location") == str(tmp_path / "app" / "migrations")
    assert capsys.readouterr().out == ""


def test_the_project_can_be_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    init_directory("migrations")
    assert str(tmp_path) not in Path("alembic.ini").read_text()
    (tmp_path / "here").rename(tmp_path / "there")
    ScriptDirectory.from_config(Config(tmp_path / "there" / "alembic.ini"))


def test_a_directory_that_is_there_is_left_alone(tmp_path: Path) -> None:
    init_directory(tmp_path / "migrations")
    (tmp_path / "migrations" / "env.py").write_text("# mine")
    (tmp_path / "alembic.ini").write_text("; mine")
    assert not init_directory(tmp_path / "migrations", app="a:b")
    assert (tmp_path / "migrations" / "env.py").read_text() == "# mine"
    assert (tmp_path / "alembic.ini").read_text() == "; mine"


def test_a_directory_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "migrations").mkdir()
    (tmp_path / "migrations" / "data").touch()
    with pytest.raises(ConfigurationError, match="already exists and is not empty"):
        init_directory(tmp_path / "migrations")


def test_an_ini_file_of_another_directory_is_refused(tmp_path: Path) -> None:
    init_directory(tmp_path / "first")
    with pytest.raises(ConfigurationError, match="belongs to another directory"):
        init_directory(tmp_path / "second")
    assert not (tmp_path / "second").exists()
    assert init_directory(tmp_path / "second", config_file=tmp_path / "second.ini")


def test_plain_alembic_takes_the_template_by_its_path(tmp_path: Path) -> None:
    command.init(Config(tmp_path / "alembic.ini"), str(tmp_path / "migrations"), template=str(template_directory()))
    assert (tmp_path / "migrations" / "env.py").read_text() == (template_directory() / "env.py").read_text()


def test_the_first_line_of_the_readme_says_what_the_template_is_for() -> None:
    assert "tenant" in (template_directory() / "README").read_text().splitlines()[0]


def test_a_revision_of_the_template_is_python(tmp_path: Path) -> None:
    init_directory(tmp_path / "migrations")
    config = Config(tmp_path / "alembic.ini")
    command.revision(config, "first", rev_id="1")
    command.revision(config, "second", rev_id="2", depends_on="1")
    written = (tmp_path / "migrations" / "versions" / "2_second.py").read_text()
    ast.parse(written)
    assert "\n\n\n\n" not in written
    assert 'down_revision: str | Sequence[str] | None = "1"' in written.replace("'", '"')
