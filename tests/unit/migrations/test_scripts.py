"""A migration directory is found, and env.py's options are read without running a command."""

from __future__ import annotations

import sys
from pathlib import Path

import alembic.context
import pytest

from tenancy_orm.errors import ConfigurationError
from tenancy_orm.migrations.scripts import alembic_config, load, script_directory
from tests.support.projects import Project


@pytest.fixture
def project(tmp_path: Path) -> Project:
    project = Project.create(tmp_path / "app")
    project.add("1")
    return project


def test_the_ini_file_beside_the_directory_is_used(project: Project) -> None:
    config = alembic_config(project.migrations)
    assert config.config_file_name == str(project.ini)
    assert load(config).script.get_heads() == ["1"]


def test_an_ini_file_of_another_directory_is_not(project: Project) -> None:
    other = Project.create(project.root / "other")
    project.ini.rename(other.root / "alembic.ini")
    other.migrations.rename(other.root / "moved")
    config = alembic_config(project.migrations)
    assert config.config_file_name is None
    assert load(config).script.get_heads() == ["1"]


def test_the_working_directorys_ini_file_is_used(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    top = project.root.parent
    project.ini.write_text(project.ini.read_text().replace("%(here)s/migrations", "%(here)s/app/migrations"))
    project.ini.rename(top / "alembic.ini")
    monkeypatch.chdir(top)
    assert alembic_config("app/migrations").config_file_name == str(top / "alembic.ini")


@pytest.mark.parametrize("location", ["migrations", "app:migrations"])
def test_relative_paths_of_an_ini_file_are_beside_it(
    project: Project, monkeypatch: pytest.MonkeyPatch, location: str
) -> None:
    """For Alembic they are in the working directory, which is that one where users run it."""
    top = project.root.parent if location.startswith("app:") else project.root
    text = project.ini.read_text().replace("%(here)s/migrations", location)
    project.ini.unlink()
    text = text.replace("prepend_sys_path = %(here)s", "prepend_sys_path = .").replace("path_separator = os", "")
    (top / "alembic.ini").write_text(
        text.replace("# version_locations = %(here)s/bar:%(here)s/bat", "version_locations = more")
    )
    (top / "more").mkdir()
    (project.migrations / "versions" / "1.py").rename(top / "more" / "1.py")
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in (".", str(top))])
    for cwd in (project.migrations, Path("/")):
        monkeypatch.chdir(cwd)
        assert load(alembic_config(project.migrations)).script.get_heads() == ["1"]
        assert str(top) in sys.path and "." not in sys.path


def test_settings_in_pyproject_toml_are_used(project: Project) -> None:
    project.ini.unlink()
    (project.root / "pyproject.toml").write_text(
        '[tool.alembic]\nscript_location = "%(here)s/migrations"\nversion_locations = ["%(here)s/elsewhere"]\n'
    )
    (project.root / "elsewhere").mkdir()
    (project.migrations / "versions" / "1.py").rename(project.root / "elsewhere" / "1.py")
    assert load(alembic_config(project.migrations)).script.get_heads() == ["1"]


def test_a_percent_sign_in_the_path_is_a_percent_sign(tmp_path: Path) -> None:
    project = Project.create(tmp_path / "100%s")
    project.add("1")
    project.ini.unlink()
    assert load(alembic_config(project.migrations)).script.get_heads() == ["1"]


def test_a_directory_without_env_py_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"has no env\.py; create a migration directory with: tenancy init"):
        alembic_config(tmp_path)


def test_env_py_gives_its_options(project: Project) -> None:
    project.configure('target_metadata=target_metadata, compare_type=False, version_table="v"')
    loaded = load(alembic_config(project.migrations))
    assert loaded.options == {"target_metadata": None, "compare_type": False, "version_table": "v"}
    assert loaded.quoted_version_table == '"v"'


def test_the_version_table_is_quoted_with_its_schema(project: Project) -> None:
    project.configure("""version_table='a"b', version_table_schema="s" """)
    assert load(alembic_config(project.migrations)).quoted_version_table == '"s"."a""b"'


def test_env_py_sees_its_environment_while_it_is_read(project: Project) -> None:
    seen = "assert context.get_x_argument() == ['a=b'] and not context.is_offline_mode() and context.config\n"
    env = project.migrations / "env.py"
    env.write_text(env.read_text() + seen)
    load(alembic_config(project.migrations, x=["a=b"]))
    assert not hasattr(alembic.context, "config")


def test_an_env_py_that_is_not_ours_does_nothing_and_is_refused(project: Project) -> None:
    (project.migrations / "env.py").write_text(
        "from alembic import context\n"
        "assert context._proxy.context_opts['fn']((), None) == []\n"
        "assert context._proxy.context_opts['dont_mutate']\n"
    )
    with pytest.raises(ConfigurationError, match=r"env\.py cannot be used: it calls neither"):
        load(alembic_config(project.migrations))


def test_an_env_py_that_chooses_a_database_is_refused(project: Project) -> None:
    project.configure('connection="mine"')
    with pytest.raises(ConfigurationError, match="leave out 'connection'"):
        load(alembic_config(project.migrations))


def test_sys_path_does_not_grow(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    config = alembic_config(project.migrations)
    script_directory(config)
    once = list(sys.path)
    assert once[0] == str(project.root)
    script_directory(config)
    assert sys.path == once
