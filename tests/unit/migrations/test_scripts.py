"""A migration directory is found, and env.py's options are read without running a command."""

from __future__ import annotations

import sys
from pathlib import Path

import alembic.context
import pytest
from alembic.config import Config

from tenancy_orm.config import MigrationConfig
from tenancy_orm.errors import ConfigurationError
from tenancy_orm.migrations.configuration import alembic_config
from tenancy_orm.migrations.scripts import load, script_directory
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


# --- which file and section -------------------------------------------------------------------------------------------


def copy_ini(project: Project, name: str, *, options: str = "", section: str = "alembic") -> Path:
    """Write an ini file for the project's directory."""
    path = project.root / name
    path.write_text(f"[{section}]\nscript_location = %(here)s/migrations\npath_separator = os\n{options}\n")
    return path


def test_the_settings_name_a_file_and_a_section(project: Project) -> None:
    other = copy_ini(project, "other.ini", section="tenants", options="colour = red")
    config = alembic_config(project.migrations, MigrationConfig(alembic_config=other, alembic_section="tenants"))
    assert config.get_main_option("colour") == "red"
    config = alembic_config(project.migrations, MigrationConfig(alembic_config=Config(other, ini_section="tenants")))
    assert config.get_main_option("colour") == "red"


def test_a_pyproject_toml_can_be_named(project: Project) -> None:
    file = project.root / "pyproject.toml"
    file.write_text('[tool.alembic]\nscript_location = "%(here)s/migrations"\ncolour = "red"\n')
    project.ini.unlink()
    config = alembic_config(project.migrations, MigrationConfig(alembic_config=file))
    assert config.get_alembic_option("colour") == "red"


def test_a_named_file_that_is_missing_or_for_another_directory_is_refused(project: Project) -> None:
    with pytest.raises(ConfigurationError, match=r"migration\.alembic_config: there is no file '.*absent\.ini'"):
        alembic_config(project.migrations, MigrationConfig(alembic_config=project.root / "absent.ini"))
    with pytest.raises(ConfigurationError, match=r"alembic\.ini \[other\] names no script_location, but migrations is"):
        alembic_config(project.migrations, MigrationConfig(alembic_config=project.ini, alembic_section="other"))
    elsewhere = Project.create(project.root / "elsewhere")
    with pytest.raises(
        ConfigurationError, match=r"is for '.*elsewhere/migrations', but migrations is '.*app/migrations'"
    ):
        alembic_config(project.migrations, MigrationConfig(alembic_config=elsewhere.ini))
    broken = copy_ini(project, "broken.ini")
    broken.write_text("[alembic]\nscript_location = %(nothing)s\n")
    with pytest.raises(ConfigurationError, match=r"broken\.ini \[alembic\] cannot be read"):
        alembic_config(project.migrations, MigrationConfig(alembic_config=broken))


def test_the_variable_of_alembics_command_line_is_honoured(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    other = copy_ini(project, "other.ini")
    monkeypatch.setenv("ALEMBIC_CONFIG", str(other))
    assert alembic_config(project.migrations).config_file_name == str(other)
    elsewhere = Project.create(project.root / "elsewhere")
    assert alembic_config(elsewhere.migrations).config_file_name == str(elsewhere.ini), "it is for another directory"


def test_the_only_other_section_or_file_for_the_directory_is_used(project: Project) -> None:
    project.ini.write_text("[alembic]\nscript_location = somewhere:else\n")
    (project.root / "pytest.ini").write_text("[pytest]\naddopts = %(x\n")
    (project.root / "odd.ini").write_text("no section")
    copy_ini(project, "first.ini", section="tenants", options="version_locations = %(here)s/a")
    config = alembic_config(project.migrations)
    assert (config.config_ini_section, Path(str(config.config_file_name)).name) == ("tenants", "first.ini")
    copy_ini(project, "second.ini", options="version_locations = %(here)s/a")
    assert alembic_config(project.migrations).config_file_name, "both lead to the same"
    copy_ini(project, "third.ini")
    with pytest.raises(
        ConfigurationError, match=r"several configurations.*\.ini \[.*third\.ini \[alembic\]; choose one"
    ):
        alembic_config(project.migrations)
    assert alembic_config(project.migrations, MigrationConfig(alembic_section="tenants")).config_file_name


def test_a_config_of_the_applications_own_is_not_changed(project: Project) -> None:
    """Nor is that of the running ``alembic`` command, when a template is built by it."""
    own = Config(project.ini, attributes={"colour": "red"})
    config = alembic_config(project.migrations, MigrationConfig(alembic_config=own, x_arguments=("a=1",)))
    config.set_main_option("colour", "blue")
    config.attributes["colour"] = "blue"
    assert own.get_main_option("colour") is None
    assert own.attributes == {"colour": "red"}
    assert own.cmd_opts is None
    assert config.get_main_option("script_location") == own.get_main_option("script_location")


def test_x_arguments_are_those_of_the_settings_and_the_run(project: Project) -> None:
    config = alembic_config(project.migrations, MigrationConfig(x_arguments=("a=1", "b=2")), x=["c=3"])
    assert load(config).context().get_x_argument() == ["a=1", "b=2", "c=3"]
