"""``tenancy migrate rehearse``, ``upgrade --rehearse`` and ``lint``."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from pathlib import Path

from sqlalchemy import make_url

from tests.integration.cli.test_cli import COMMAND, Cli, cli
from tests.support.postgres import Postgres
from tests.support.projects import NOTES, Project
from tests.support.waiting import until

__all__ = ["cli"]


async def test_a_rehearsal_prints_what_an_upgrade_would_do(cli: Cli, tmp_path: Path) -> None:
    """Tables for people, JSON for programs; exit status 1 where a clone differs; no tenant is changed."""
    await cli("init")
    project = Project(tmp_path)
    project.add("0001", NOTES, 'op.drop_table("notes")')
    await cli("create", "acme")
    nothing = await cli("migrate", "rehearse")
    assert (nothing.status, "every tenant is at head already" in nothing.err) == (1, True)
    path = project.add(
        "0002",
        'op.execute("ALTER TABLE notes ALTER COLUMN id TYPE bigint")',
        'op.execute("ALTER TABLE notes ALTER COLUMN id TYPE int")\nop.execute("SELECT 1 -- " + "x" * 600)',
        down="0001",
        preflight='yield "SELECT FROM notes WHERE id < 0"',
    )
    good = await cli("migrate", "rehearse")
    assert good.status == 0, good.out + good.err
    lines = [line.split() for line in good.out.splitlines()]
    assert lines[1][0] == "acme" and lines[1][-1] == "good"
    (statement,) = [line for line in good.out.splitlines() if "TYPE bigint" in line]
    assert "AccessExclusive public.notes" in statement and "reads and writes wait" in statement
    assert "table public.notes" in statement
    assert [line.split()[-1] for line in good.out.splitlines() if "preflight" in line] == ["(preflight)"]
    assert "SAVEPOINT" not in good.out and "set_config" not in good.out
    assert max(map(len, good.out.splitlines())) < 500
    assert "estimate: 1 tenant " in good.out
    assert good.out.splitlines()[-1].endswith("no tenant was changed")
    assert good.err.splitlines()[1:] == [f"acme: {text}" for text in ("copy", "upgrade", "downgrade", "upgrade again")]

    project.add("0002", path.read_text().partition("def upgrade():\n    ")[2].partition("\n")[0], "pass", down="0001")
    found = await cli("migrate", "upgrade", "--rehearse", "1", "--json")
    assert found.status == 1
    (clone,) = found.json["clones"]
    assert [one["after"] for one in clone["differences"]] == ["downgrade"]
    assert clone["idle_downgrades"] == ["0002"]
    shown = await cli("migrate", "rehearse", "--tenant", "acme", "--schema-only")
    assert shown.status == 1
    assert "the downgrade of 0002 executes nothing" in shown.out
    assert (await cli("migrate", "rehearse", "--no-downgrade", "--json")).json["clones"][0]["error"] is None
    status = (await cli("migrate", "status", "--json")).json
    assert [one["revision"] for one in status] == ["0001"]
    assert (await cli("reconcile", "--check", "--json")).json["orphans"] == []


async def test_what_a_killed_rehearsal_leaves_is_removed(cli: Cli, tmp_path: Path, postgres: Postgres) -> None:
    """SIGTERM drops the clone at once, as Ctrl-C does; after a SIGKILL reconcile does."""
    await cli("init")
    project = Project(tmp_path)
    project.add("0001", NOTES, 'op.drop_table("notes")')
    await cli("create", "acme")
    # the clone has the tenant, a new database has none
    sleep = 'if op.get_context().opts["tenant"] is not None:\n    op.execute("SELECT pg_sleep(600)")'
    project.add("0002", sleep, down="0001")
    variables = tmp_path / "environment.json"
    (tmp_path / "dump.py").write_text(
        f"import json, os\nwith open({str(variables)!r}, 'w') as file:\n    json.dump(dict(os.environ), file)\n"
    )
    await cli(program=("dump.py",))

    async def sleeps() -> bool:
        query = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep(600)%%' AND usename LIKE %s"
        return await postgres.administer(query, (f"{json.loads(variables.read_text())['TENANCY_NAME_PREFIX']}%",)) == [
            (1,)
        ]

    for number in (signal.SIGTERM, signal.SIGKILL):
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *(*COMMAND, "migrate", "rehearse"),
            cwd=tmp_path,
            env=json.loads(variables.read_text()),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            await until(sleeps)
            process.send_signal(number)
            async with asyncio.timeout(60):
                assert await process.wait() != 0
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if number is signal.SIGKILL:

            async def removed() -> bool:
                return len((await cli("reconcile", "--json")).json["orphans"]) > 0

            await until(removed)
        assert (await cli("reconcile", "--check", "--json")).json["orphans"] == []
    names = await postgres.administer("SELECT datname FROM pg_database WHERE datname LIKE '%%\\_x\\_%%'")
    prefix = json.loads(variables.read_text())["TENANCY_NAME_PREFIX"]
    assert [name for (name,) in names if name.startswith(prefix)] == []


async def test_lint_names_lines_and_has_an_exit_status(cli: Cli, tmp_path: Path) -> None:
    await cli("init")
    project = Project(tmp_path)
    project.add("0001", NOTES, 'op.drop_table("notes")')
    await cli("create", "acme")
    path = project.add(
        "0002",
        'op.execute("ALTER TABLE notes ADD COLUMN n bigint NOT NULL")',
        'op.execute("ALTER TABLE notes DROP COLUMN n")',
        down="0001",
    )
    line = path.read_text().splitlines().index('    op.execute("ALTER TABLE notes ADD COLUMN n bigint NOT NULL")') + 1
    # by default those that some tenant lacks
    for arguments in ((), ("0002",), ("--from", "0001"), ("--from", "0001", "--to", "0002")):
        found = await cli("migrate", "lint", *arguments)
        assert found.status == 1, found.err
        assert found.out.splitlines()[0].startswith(f"migrations/versions/0002.py:{line}: warning: ")
        assert found.out.splitlines()[0].endswith("[adding-required-field]")
        assert "1 finding in 1 revision" in found.err
    assert (await cli("migrate", "lint", "--json")).json["findings"][0]["rule"] == "adding-required-field"
    assert (await cli("migrate", "lint", "--exclude", "adding-required-field")).status == 0
    # these need no database
    away = {"TENANCY_CONTROL_URL": "postgresql://nobody@127.0.0.1:1/none"}
    assert "adding-required-field" in (await cli("migrate", "lint", "--from", "base", **away)).out
    assert (await cli("migrate", "lint", **away)).status == 2
    for wrong in (("0002", "--from", "base"), ("nowhere",), ("--since", "nowhere")):
        assert (await cli("migrate", "lint", *wrong)).status == 2


async def test_lint_leaves_out_tenants_that_an_upgrade_leaves_out(
    cli: Cli, tmp_path: Path, empty_url: str, postgres: Postgres
) -> None:
    """One that is being created has no revision yet, and one that newer code has migrated an unknown one."""
    await cli("init")
    project = Project(tmp_path)
    project.add("0001", 'op.execute("CREATE TABLE old (n integer NOT NULL)")')
    await cli("create", "acme")
    await cli("create", "globex")
    project.add("0002", 'op.execute("DROP TABLE old")', 'op.execute("CREATE TABLE old ()")', down="0001")
    async with postgres.connect(make_url(empty_url).database or "") as connection:
        await connection.execute(
            "UPDATE tenancy.tenants SET schema_revision = '9999' WHERE slug = 'globex';"
            "INSERT INTO tenancy.tenants (id, slug, status, tier, server, database_name, role_name, sealed_password) "
            "SELECT gen_random_uuid(), 'new', 'provisioning', tier, server, 'new', 'new', sealed_password "
            "FROM tenancy.tenants WHERE slug = 'acme'"
        )
    found = await cli("migrate", "lint", "--json")
    assert (found.json["revisions"], {one["revision"] for one in found.json["findings"]}) == (["0002"], {"0002"})
    assert "left out: tenants at 9999" in found.err
