"""``tenancy worker`` and ``tenancy jobs``."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from pathlib import Path

import asyncpg

from tests.integration.cli.test_cli import Cli, cli
from tests.support.shell import ROOT, environment, python_path
from tests.support.waiting import until

__all__ = ["cli"]

APPLICATION = """
from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.jobs import JobResult

tenancy = Tenancy(TenancyConfig.from_env())

@tenancy.job(every=3600)
async def count_tenants():
    return JobResult({"count": await tenancy.tenants.count()})

@tenancy.job(every=3600, name="broken")
async def fail():
    raise RuntimeError("nobody is there")
"""


async def test_a_worker_does_what_is_due_and_the_jobs_say_so(cli: Cli, tmp_path: Path) -> None:
    """Housekeeping and the application's own jobs; a failure is listed, and makes ``--once`` and ``--check`` fail."""
    await cli("init")
    await cli("create", "acme")
    assert (await cli("jobs", "list", "--check")).status == 1  # nobody works
    done = await cli("worker", "--once", "--json")
    assert done.status == 0, done.err
    lines = [json.loads(line) for line in done.err.splitlines()]
    assert any(line["message"].startswith("housekeeping: done in ") for line in lines), lines
    (job,) = (await cli("jobs", "list", "--check", "--json")).json["items"]
    assert (job["name"], job["state"], job["failures"]) == ("housekeeping", "waiting", 0)
    again = await cli("worker", "--once")
    assert "worker ends: 0 done, 0 failed, 0 lost" in again.err  # it is not due

    (tmp_path / "shop.py").write_text(APPLICATION)
    shop = ("--app", "shop:tenancy")
    unknown = await cli(*shop, "worker", "--once", "--jobs", "count")
    assert (unknown.status, "there are broken, count_tenants, housekeeping" in unknown.err) == (1, True)
    assert (await cli(*shop, "worker", "--once", "--jobs", "count_tenants")).status == 0
    failed = await cli(*shop, "worker", "--once", "--jobs", "broken,housekeeping")
    assert (failed.status, "nobody is there" in failed.err) == (1, True)
    found = {x["name"]: x for x in (await cli("jobs", "list", "--json")).json["items"]}
    assert found["count_tenants"]["result"] == {"count": 1}
    assert (found["broken"]["state"], found["broken"]["failures"]) == ("failed", 1)
    assert found["broken"]["error"] == "RuntimeError: nobody is there"
    checked = await cli("jobs", "list", "--check")
    assert (checked.status, "broken: failed 1 times in a row" in checked.err) == (1, True)

    assert (await cli("jobs", "hasten", "housekeeping")).status == 0
    assert (await cli("worker", "--once")).err.count("housekeeping: done in") == 1
    assert (await cli("jobs", "forget", "broken")).status == 0
    assert (await cli("jobs", "forget", "broken")).status == 1
    assert (await cli("jobs", "list", "--check")).status == 0


async def test_a_worker_is_a_service(cli: Cli, tmp_path: Path, empty_url: str) -> None:
    """It shows that it is alive, goes on after the control database was away, and ends by SIGTERM with status 0."""
    await cli("init")
    alive, log = tmp_path / "alive", tmp_path / "log"
    variables = json.loads((await cli(program=("-c", "import json, os; print(json.dumps(dict(os.environ)))"))).out)
    env = environment(**{k: v for k, v in variables.items() if k.startswith("TENANCY_")}, PYTHONPATH=python_path(ROOT))
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tenancy_orm.cli", "worker", "--alive-file", str(alive)),
            cwd=tmp_path,
            env=env,
            stderr=output,
        )
    try:
        await until(lambda: "housekeeping: done" in log.read_text())
        assert alive.exists()
        admin = await asyncpg.connect(empty_url)
        try:
            # away: every connection is ended, and none gets in
            name = await admin.fetchval("SELECT current_database()")
            other = await asyncpg.connect(empty_url.rpartition("/")[0] + "/postgres")
            try:
                await other.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false')
                ended = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1"
                await other.execute(ended.replace("$1", f"'{name}'"))
                await until(lambda: "does not answer, nothing is claimed" in log.read_text())
                await other.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true')
            finally:
                await other.close()
        finally:
            admin.terminate()
        await until(lambda: "the control database answers again" in log.read_text())
        assert process.returncode is None
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(60):
            assert await process.wait() == 0, log.read_text()
        assert "worker ends: 1 done, 0 failed, 0 lost" in log.read_text()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
