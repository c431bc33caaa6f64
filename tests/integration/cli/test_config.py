"""``tenancy config``: what is configured, without a server."""

from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tenancy_orm import TenancyConfig
from tenancy_orm.cli import config as cli
from tenancy_orm.cli import dev
from tenancy_orm.cli.app import app
from tenancy_orm.config.validation import settings_of

URL = "postgresql://admin:hunter2@db.example/control"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a settings file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TENANCY_CONTROL_URL", URL)
    (tmp_path / "tenancy.toml").write_text("default_tier = 'pro'\n[pool]\nmax_connections = 50\n")
    return tmp_path


def test_settings_are_shown_with_their_places(project: Path) -> None:
    """And no secret is."""
    outcome = CliRunner().invoke(app, ["config", "show", "--json"])
    assert outcome.exit_code == 0 and "hunter2" not in outcome.output
    found = {row["setting"]: (row["value"], row["from"]) for row in json.loads(outcome.output)}
    assert found["control_url"] == ("(set)", "TENANCY_CONTROL_URL")
    assert found["default_tier"] == ("pro", "tenancy.toml")
    assert found["pool.max_connections"] == ("50", "tenancy.toml")
    assert found["pool.max_engines"] == ("1000", "default")
    assert found["encryption_keys"] == (None, "default")


def test_the_files_that_were_read_are_named(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a sub-directory too; where there is none, the directory that was searched is named."""
    below = project / "src"
    below.mkdir()
    (project / ".env").write_text("TENANCY_NAME_PREFIX=shop\n")
    monkeypatch.chdir(below)
    outcome = CliRunner().invoke(app, ["config", "show"])
    assert outcome.output.startswith(f"settings files: {project}/tenancy.toml, {project}/.env\n")
    rows = json.loads(CliRunner().invoke(app, ["config", "show", "--json"]).output)
    assert {"setting": "name_prefix", "value": "shop", "from": "TENANCY_NAME_PREFIX in ../.env"} in rows
    (project / "tenancy.toml").unlink()
    (project / ".env").unlink()
    outcome = CliRunner().invoke(app, ["config", "show"])
    assert outcome.output.startswith(f"settings files: none; there is no settings file in {below} nor above it\n")


def test_settings_are_a_table_for_people(project: Path) -> None:
    """One line each."""
    outcome = CliRunner().invoke(app, ["config", "show"])
    assert outcome.exit_code == 0 and "hunter2" not in outcome.output
    assert any("pool.max_connections" in line and "tenancy.toml" in line for line in outcome.output.splitlines())


def test_a_mistake_is_one_line(project: Path) -> None:
    """It names the file and the key."""
    (project / "tenancy.toml").write_text("[pool]\nmax_conections = 50\n")
    outcome = CliRunner().invoke(app, ["config", "show"])
    assert outcome.exit_code == 1
    assert outcome.stderr.startswith("error: pool.max_conections (in tenancy.toml): there is no such setting")


def test_the_schema_knows_every_key_of_a_settings_file(project: Path) -> None:
    """As an editor would look it up."""
    schema = json.loads(CliRunner().invoke(app, ["config", "schema"]).output)
    for key, value in tomllib.loads((project / "tenancy.toml").read_text()).items():
        found = schema["properties"][key]
        if isinstance(value, dict):
            found = schema["$defs"][found["$ref"].rpartition("/")[2]]["properties"]
            assert value.keys() <= found.keys()


def test_what_may_hold_credentials_is_hidden() -> None:
    """Whatever a repr of the configuration leaves out is either hidden, or no secret."""
    left_out = {
        ".".join(path) for path, model in settings_of(TenancyConfig).items() if not model.model_fields[path[-1]].repr
    }
    assert left_out - cli._SECRETS == {
        "metadata",
        "placement",
        "tiers",
        "secrets.provider",
        "secrets.key_wrapper",
        "metering.usage_sender",
    }


def test_the_application_s_own_configuration_is_shown(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the one that the other commands use; it is found in the working directory."""
    (project / "shop.py").write_text(
        "from tenancy_orm import TenancyConfig\nfrom tenancy_orm.config import PoolConfig\n"
        "config = TenancyConfig(control_url='postgresql://h/other', pool=PoolConfig(max_engines=7))\n"
    )
    monkeypatch.setenv("TENANCY_APP", "shop:config")
    monkeypatch.setattr(sys, "path", list(sys.path))
    found = json.loads(CliRunner().invoke(app, ["config", "show", "--json"]).output)
    assert {"setting": "pool.max_engines", "value": "7", "from": "shop:config"} in found
    assert {"setting": "pool.max_connections", "value": None, "from": "default"} in found


def test_markup_in_a_value_is_text(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every table."""
    monkeypatch.setenv("TENANCY_SESSIONS_SETTINGS", "app.x=[/x][bold]")
    outcome = CliRunner().invoke(app, ["config", "show"])
    assert outcome.exit_code == 0 and "[/x][bold]" in outcome.output


@pytest.mark.parametrize(
    ("url", "directory"), [("embedded:data", "data"), ("embedded", ".tenancy"), ("postgresql://h/d", ".tenancy")]
)
def test_dev_runs_the_projects_server(project: Path, monkeypatch: pytest.MonkeyPatch, url: str, directory: str) -> None:
    """From a sub-directory too: another one would be empty."""
    monkeypatch.delenv("TENANCY_CONTROL_URL")
    (project / "tenancy.toml").write_text(f'control_url = "{url}"\n')
    (project / "src").mkdir()
    monkeypatch.chdir(project / "src")
    assert dev._data_directory() == project / directory
