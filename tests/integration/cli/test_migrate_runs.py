"""``tenancy migrate runs``, ``show``, ``retry``, ``resume``, ``join`` and ``cancel``, as a user runs them."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from pathlib import Path

import pytest

from tests.integration.cli.test_cli import COMMAND, Cli, cli
from tests.support.projects import NOTES, Project
from tests.support.waiting import until

__all__ = ["cli"]


async def test_runs_from_the_shell(cli: Cli, tmp_path: Path) -> None:
    """The number is printed first; what failed is shown, and tried again by that number."""
    await cli("init")
    project = Project(tmp_path)
    project.add("0001", NOTES)
    for slug in ("acme", "globex"):
        await cli("create", slug)
    project.add("0002", 'op.add_column("notes", sa.Column("rating", sa.Integer))', down="0001")
    wrote = await cli("sql", "INSERT INTO notes (body) VALUES ('x')", "globex", "--write", "--yes")
    assert wrote.status == 0, wrote.err
    project.add("0003", 'op.create_check_constraint("never", "notes", "body IS NULL")', down="0002")

    upgraded = await cli("migrate", "upgrade", TENANCY_MIGRATION_CODE_VERSION="v1.2")
    assert upgraded.status == 1
    assert upgraded.err.startswith("run 1\n")
    following = "run 1 has failed: 1 of 2 tenants failed; continue with: tenancy migrate retry 1 (its failed tenants)"
    assert following in upgraded.err
    assert upgraded.out.splitlines()[0].endswith("s (run 1)")

    (listed,) = (await cli("migrate", "runs", "--json")).json
    assert (listed["run"], listed["state"], listed["code_version"]) == (1, "failed", "v1.2")
    assert listed["by"].startswith("cli:")
    heading, row = (await cli("migrate", "runs")).out.splitlines()
    assert heading.split()[:4] == ["RUN", "COMMAND", "TARGET", "STATE"]
    assert row.split()[:6] == ["1", "upgrade", "head", "failed", "2", "1"]

    shown = await cli("migrate", "show", "1")
    assert "1 of 2 tenants failed" in shown.out
    tenants = [line for line in shown.out.splitlines() if line.startswith(("acme", "globex"))]
    assert [line.split()[:2] for line in tenants] == [["globex", "failed"], ["acme", "done"]]
    assert "23514" in tenants[0]
    (failed,) = (await cli("migrate", "show", "1", "--failed", "--json")).json["tenants"]
    assert (failed["slug"], failed["sqlstate"], failed["attempts"]) == ("globex", "23514", 1)

    for command in ("resume", "join"):
        assert (await cli("migrate", command, "1")).status == 1, "it is reported again"
    refused = await cli("migrate", "cancel", "1")
    assert "run 1 is failed, and cannot be cancelled" in refused.err
    assert (await cli("sql", "DELETE FROM notes", "globex", "--write", "--yes")).status == 0
    retried = await cli("migrate", "retry", "1")
    assert retried.status == 0, retried.err
    assert retried.out.startswith("upgrade head: 2 tenants, 2 migrated, 0 unchanged, 0 failed, ")
    for command in ("resume", "retry"):
        again = await cli("migrate", command, "1")
        assert (again.status, f"run 1 is done; nothing to {command}" in again.err) == (0, True)
    missing = await cli("migrate", "show", "7")
    assert (missing.status, "there is no run 7" in missing.err) == (1, True)
    actions = {one["action"] for one in (await cli("audit", "list", "--json")).json}
    assert {"migration.start", "migration.resume", "migration.retry", "migration.end"} <= actions


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_an_interrupted_command_says_how_to_go_on(cli: Cli, tmp_path: Path, number: signal.Signals) -> None:
    """Nothing is left claimed: the run is resumed at once."""
    await cli("init")
    project = Project(tmp_path)
    project.add("0001", NOTES)
    await cli("create", "acme")
    waiting = "if op.get_context().opts['tenant'] is not None:\n    op.execute('SELECT pg_sleep(600)')"
    project.add("0002", waiting, down="0001")
    variables = tmp_path / "environment.json"
    (tmp_path / "dump.py").write_text(f"import json, os\njson.dump(dict(os.environ), open({str(variables)!r}, 'w'))\n")
    await cli(program=("dump.py",))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, *COMMAND, "migrate", "upgrade"),
        cwd=tmp_path,
        env=json.loads(variables.read_text()),
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    try:
        async with asyncio.timeout(120):

            async def is_running() -> bool:
                found = (await cli("migrate", "runs", "--json")).json
                return bool(found) and found[0]["tenants"]["running"] == 1

            await until(is_running, seconds=100)
            process.send_signal(number)
            said = (await process.stderr.read()).decode()
            assert await process.wait() == 128 + number
    finally:
        if process.returncode is None:
            process.kill()
    assert said.endswith("run 1 is interrupted; continue with: tenancy migrate resume 1\n")
    (listed,) = (await cli("migrate", "runs", "--json")).json
    assert (listed["state"], listed["tenants"]["waiting"]) == ("interrupted", 1)
    (tmp_path / "migrations" / "versions" / "0002.py").write_text(
        (tmp_path / "migrations" / "versions" / "0002.py").read_text().replace("600", "0")
    )
    refused = await cli("migrate", "resume", "1")
    assert "run 1 was started with other revisions or options" in refused.err
