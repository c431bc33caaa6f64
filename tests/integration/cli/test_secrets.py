"""``tenancy secrets`` and the options of ``tenancy keys``, run as a user runs them."""

from __future__ import annotations

import base64
import json
import secrets
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.cli import secrets as secrets_commands
from tenancy_orm.secrets.sealed import ResealReport
from tests.support.postgres import Postgres
from tests.support.shell import ROOT, environment
from tests.support.warm import run_module


@pytest.fixture
def variables(tenancy_config: TenancyConfig, postgres: Postgres, control_url: str, name_prefix: str) -> dict[str, str]:
    """What leads the command line to the database of ``tenancy``."""
    keys = tenancy_config.encryption_keys or {}
    return environment(
        TENANCY_CONTROL_URL=control_url,
        TENANCY_SERVERS=f"default={postgres.admin_url}",
        TENANCY_ENCRYPTION_KEYS=",".join(f"{key_id}:{value!s}" for key_id, value in keys.items()),
        TENANCY_METADATA="tests.support.models:Base.metadata",
        TENANCY_NAME_PREFIX=name_prefix,
        PYTHONPATH=str(ROOT),
    )


async def cli(variables: dict[str, str], directory: Path, *arguments: str, status: int = 0) -> Any:
    """Run ``tenancy`` and return what it printed, from JSON."""
    done = await run_module("tenancy_orm.cli", *arguments, "--json", cwd=directory, env=variables)
    assert done.status == status, done.err
    return json.loads(done.out) if done.out else done.err


async def test_passwords_and_keys_are_rotated(tenancy: Tenancy, variables: dict[str, str], tmp_path: Path) -> None:
    """All of them, or those of one tenant; under a new key afterwards."""
    for slug in ("acme", "globex"):
        await tenancy.tenants.create(slug)
    assert await cli(variables, tmp_path, "secrets", "rotate-passwords") == {"rotated": 2, "failed": {}}
    assert (await cli(variables, tmp_path, "secrets", "rotate-passwords", "-t", "acme"))["rotated"] == 1
    added = base64.b64encode(secrets.token_bytes(32)).decode()
    both = {**variables, "TENANCY_ENCRYPTION_KEYS": f"{variables['TENANCY_ENCRYPTION_KEYS']},2:{added}"}
    expected = {"resealed": 2, "failed": {}, "key_id": "2", "keys_in_use": ["2"]}
    assert await cli(both, tmp_path, "secrets", "rotate-key") == expected
    assert await cli(both, tmp_path, "secrets", "reseal") == {**expected, "resealed": 0}
    assert await cli(both, tmp_path, "secrets", "keys") == {"keys_in_use": ["2"]}
    alone = {**variables, "TENANCY_ENCRYPTION_KEYS": f"2:{added}"}
    assert (await cli(alone, tmp_path, "secrets", "rotate-passwords", "-t", "acme"))["rotated"] == 1
    assert "no data keys" in await cli(both, tmp_path, "secrets", "forget-keys", status=1)
    actors = {entry.actor.kind for entry in await tenancy.audit.events(action="tenant.rotate_password")}
    assert actors == {"operator"}


async def test_a_failure_is_listed_and_is_the_exit_status(
    tenancy: Tenancy, variables: dict[str, str], tmp_path: Path
) -> None:
    """A key that seals something must not be missing."""
    await tenancy.tenants.create("acme")
    other = base64.b64encode(secrets.token_bytes(32)).decode()
    lacking = {**variables, "TENANCY_ENCRYPTION_KEYS": f"2:{other}"}
    report = await cli(lacking, tmp_path, "secrets", "rotate-key", status=1)
    assert report["resealed"] == 0
    assert list(report["failed"]) == ["acme"]
    assert report["keys_in_use"] == ["1"]


async def test_keys_that_were_recorded_by_mistake_are_replaced(
    tenancy: Tenancy, variables: dict[str, str], tmp_path: Path
) -> None:
    """A pepper and an encryption key are accepted; not a key that opens none of the passwords under its id."""
    await tenancy.tenants.create("acme")
    peppers = [f"a:{base64.b64encode(secrets.token_bytes(32)).decode()}" for _ in range(2)]
    mistaken, right = ({**variables, "TENANCY_KEYS_PEPPERS": pepper} for pepper in peppers)
    await cli(mistaken, tmp_path, "list")
    assert "key pepper 'a' is not the one" in await cli(right, tmp_path, "list", status=1)
    accepted = await cli(right, tmp_path, "secrets", "accept-keys", "--yes")
    assert accepted == {"encryption_keys": ["1"], "peppers": ["a"]}
    assert [tenant["slug"] for tenant in (await cli(right, tmp_path, "list"))["items"]] == ["acme"]
    assert [entry.detail for entry in await tenancy.audit.events(action="secrets.accept_keys")] == [accepted]
    wrong = {**right, "TENANCY_ENCRYPTION_KEYS": peppers[0].replace("a:", "1:")}
    for command in (("list",), ("secrets", "accept-keys", "--yes")):
        assert "encryption key '1' is not the key" in await cli(wrong, tmp_path, *command, status=1)


def test_an_old_key_that_is_still_in_use_is_the_exit_status(monkeypatch: pytest.MonkeyPatch) -> None:
    """Although nothing failed: a tenant created in between needs the key, so it must not be removed."""

    def run(command: Any) -> ResealReport:
        return ResealReport("2", 3, {}, frozenset({"1", "2"}))

    monkeypatch.setattr(secrets_commands, "run", run)
    for command in (["rotate-key"], ["reseal"], ["rotate-key", "--json"]):
        result = CliRunner().invoke(secrets_commands.app, command)
        assert result.exit_code == 1
        assert "1" in result.output
    assert "still in use: 1" in CliRunner().invoke(secrets_commands.app, ["rotate-key"]).output


async def test_a_key_is_issued_with_networks_and_a_prefix(
    tenancy: Tenancy, variables: dict[str, str], tmp_path: Path
) -> None:
    """And listed with them."""
    await tenancy.tenants.create("acme")
    changed = {**variables, "TENANCY_KEYS_PREFIXES": "ten_test"}
    options = ("--network", "192.0.2.0/24", "--network", "2001:db8::/32", "--prefix", "ten_test", "--scope", "a")
    issued = await cli(changed, tmp_path, "keys", "issue", "acme", *options)
    assert issued["api_key"].startswith("ten_test_")
    listed = await cli(changed, tmp_path, "keys", "list", "acme")
    assert listed[1]["networks"] == ["192.0.2.0/24", "2001:db8::/32"]
    assert listed[1]["scopes"] == ["a"]
