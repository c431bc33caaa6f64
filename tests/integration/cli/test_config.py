"""``tenancy config``: what is configured, without a server."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tenancy_orm.cli.app import app

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
    assert found["default_tier"] == ("pro", "in tenancy.toml")
    assert found["pool.max_connections"] == ("50", "in tenancy.toml")
    assert found["pool.max_engines"] == ("1000", "default")
    assert found["encryption_keys"] == (None, "default")


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
