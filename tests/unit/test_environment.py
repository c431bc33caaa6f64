"""env.py's call: where the application's configuration is found, and where the call is refused."""

from __future__ import annotations

import os
from pathlib import Path

import alembic.context
import pytest
from alembic.config import Config

from tenancy_orm import environment
from tenancy_orm.config import TenancyConfig
from tenancy_orm.errors import ConfigurationError

CONFIG = TenancyConfig(control_url="postgresql://h/d")


class Application:
    config = CONFIG


def test_the_configuration_is_what_attributes_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENANCY_APP", "nothing:here")
    assert environment.find_config(Config(attributes={"tenancy": CONFIG})) is CONFIG
    assert environment.find_config(Config(attributes={"tenancy": Application()})) is CONFIG


def test_the_configuration_is_what_the_variable_names_before_the_ini_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "named_app.py").write_text(
        "from tenancy_orm import TenancyConfig\n"
        "first = TenancyConfig(control_url='postgresql://first/d')\n"
        "second = TenancyConfig(control_url='postgresql://second/d')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    config = Config()
    config.set_main_option("tenancy_app", "named_app:first")
    assert environment.find_config(config).control_url == "postgresql://first/d"
    monkeypatch.setenv("TENANCY_APP", "named_app:second")
    assert environment.find_config(config).control_url == "postgresql://second/d"


def test_the_configuration_is_in_the_environment_otherwise(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in [name for name in os.environ if name.startswith("TENANCY_")]:
        monkeypatch.delenv(variable)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TENANCY_CONTROL_URL", "postgresql://env/d")
    assert environment.find_config(Config()).control_url == "postgresql://env/d"


def test_the_configuration_is_in_files_otherwise(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in [name for name in os.environ if name.startswith("TENANCY_")]:
        monkeypatch.delenv(variable)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tenancy.toml").write_text('control_url = "postgresql://file/d"\n')
    assert environment.find_config(Config()).control_url == "postgresql://file/d"


def test_the_configuration_is_what_pyproject_toml_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TENANCY_APP", raising=False)
    (tmp_path / "pyproject.toml").write_text('[tool.alembic]\ntenancy_app = "project_app:config"\n')
    (tmp_path / "project_app.py").write_text(
        "from tenancy_orm import TenancyConfig\nconfig = TenancyConfig(control_url='postgresql://project/d')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    found = environment.find_config(Config(toml_file=tmp_path / "pyproject.toml"))
    assert found.control_url == "postgresql://project/d"


def test_what_is_no_configuration_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="is a int, not a Tenancy"):
        environment.find_config(Config(attributes={"tenancy": 7}))


def test_env_py_outside_of_alembic_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"in an env\.py that Alembic runs"):
        environment.run(alembic.context)
