"""``tenancy backup base``, ``wal``, ``window`` and ``restore --to``; and a recovery that is killed."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.integration.cli.test_cli import Cli, cli
from tests.support.projects import NOTES, Project
from tests.support.recovery import backup_directory, left_in, now, recovery_settings
from tests.support.replication import TestServer, primary_server
from tests.support.shell import ROOT, environment, python_path
from tests.support.waiting import until

__all__ = ["cli"]

SECONDS = 60.0


@pytest.fixture(scope="module")
def primary() -> Iterator[TestServer]:
    """The server of this module's tenants."""
    with primary_server() as server:
        yield server


@pytest.fixture
def directory() -> Iterator[Path]:
    """For base backups, WAL and recovered servers."""
    with backup_directory() as made:
        yield made


@pytest.fixture
def variables(primary: TestServer, directory: Path, empty_url: str, name_prefix: str) -> dict[str, str]:
    """The settings of every process of a test."""
    settings = recovery_settings(primary, directory)
    found = {f"TENANCY_RECOVERY_{name.upper()}": str(value) for name, value in settings["recovery"].items()}
    return {
        **found,
        "TENANCY_CONTROL_URL": empty_url,
        "TENANCY_ENCRYPTION_KEYS": "1:" + base64.b64encode(bytes(32)).decode(),
        "TENANCY_NAME_PREFIX": name_prefix,
        "TENANCY_SERVERS": f"default={primary.url()}",
        "TENANCY_PROVISIONING_CLIENT_PROGRAMS": settings["provisioning"]["client_programs"],
    }


@asynccontextmanager
async def running(*arguments: str, cwd: Path, env: dict[str, str]) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process of Python for the body; it is killed at the end where it still runs."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(sys.executable, *arguments, cwd=cwd, env=env, stdout=pipe)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def line(process: asyncio.subprocess.Process) -> str:
    """The next line that a process prints."""
    assert process.stdout is not None
    async with asyncio.timeout(SECONDS):
        return (await process.stdout.readline()).decode().strip()


async def test_the_commands_take_receive_list_and_show(
    cli: Cli, tmp_path: Path, primary: TestServer, directory: Path, variables: dict[str, str]
) -> None:
    """The receiver is a service that SIGTERM ends; a killed recovery leaves neither files nor a server."""
    await cli("init", **variables)
    Project(tmp_path).add("0001", NOTES, 'op.drop_table("notes")')
    await cli("create", "acme", **variables)
    assert "no base backup" in (await cli("backup", "window", **variables)).out
    unset = await cli("backup", "base", **{**variables, "TENANCY_RECOVERY_PROVIDER": "barman"})
    assert (unset.status, "recovery.provider names no directory" in unset.err) == (1, True)

    env = environment(PYTHONPATH=python_path(ROOT), **variables)
    async with running("-m", "tenancy_orm.cli", "backup", "wal", "--json", cwd=tmp_path, env=env) as receiver:
        assert json.loads(await line(receiver))["kind"] == "receiving"
        again = await cli("backup", "wal", **variables)
        assert (again.status, "another process works on" in again.err) == (1, True)
        taken = await cli("backup", "base", **variables)
        assert taken.status == 0, taken.err
        assert re.fullmatch(r"base backup \d{8}T\d{6}Z of server default: [\d,]+ bytes, verified", taken.out.strip())
        (listed,) = (await cli("backup", "base", "--list", "--json", **variables)).json
        assert (listed["server"], listed["version"]) == ("default", primary.version)
        assert listed["id"] in (await cli("backup", "base", "--verify", "newest", **variables)).out
        database = (await cli("show", "acme", "--json", **variables)).json["database"]
        primary.query("INSERT INTO notes (body) VALUES ('kept')", database=database)
        target = now(primary)
        window = (await cli("backup", "window", "--json", **variables)).json
        assert (window["oldest"], window["gaps"]) == (listed["ended_at"], [])

        arguments = ("-m", "tests.support.recovery_process", "acme", target.isoformat())
        async with running(*arguments, cwd=tmp_path, env=env) as recovering:
            assert await line(recovering) == "recovered"
            assert [found for found in left_in(directory) if "config_file" in found]
            recovering.send_signal(signal.SIGKILL)
            await until(lambda: left_in(directory) == [], seconds=SECONDS)

        primary.query("DELETE FROM notes", database=database)
        restored = await cli("backup", "restore", "acme", "--to", target.isoformat(" "), "--yes", "--json", **variables)
        assert (restored.status, left_in(directory)) == (0, []), restored.err
        counted = await cli("sql", "SELECT count(*) AS notes FROM notes", "acme", "--json", **variables)
        assert '"notes": 1' in counted.out
        naive = await cli("backup", "restore", "acme", "--to", "2026-11-28 14:03", "--yes", "--json", **variables)
        assert (naive.status, json.loads(naive.err)["error"]) == (1, "RecoveryTargetError")

        # damaged on the disk: a base backup that would be found out too late otherwise
        (file,) = (directory / "kept").glob("default/base/*/data/global/pg_control")
        content = bytearray(file.read_bytes())
        content[100] ^= 1
        file.write_bytes(content)
        damaged = await cli("backup", "base", "--verify", listed["id"], **variables)
        assert (damaged.status, "is damaged" in damaged.err) == (1, True)
        refused = await cli("backup", "restore", "acme", "--to", target.isoformat(), "--yes", **variables)
        assert (refused.status, "is damaged" in refused.err, left_in(directory)) == (1, True, [])
        missing = await cli("backup", "base", "--verify", "other", **variables)
        assert (missing.status, "there is no base backup other" in missing.err) == (1, True)

        receiver.send_signal(signal.SIGTERM)
        async with asyncio.timeout(SECONDS):
            assert await receiver.wait() == 0
    assert (await cli("backup", "wal", "--drop-slot", **variables)).status == 0
    assert primary.query("SELECT count(*) FROM pg_replication_slots") == 0
