"""Restoring one tenant by hand: the commands of docs/operations.md, with the server's own pg_dump and pg_restore."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import secrets
import shlex
import sys
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from sqlalchemy.engine import make_url

from tests.support.postgres import Postgres
from tests.support.shell import ROOT, environment, python_path
from tests.support.warm import run_module

PAGE = ROOT / "docs" / "operations.md"
BLOCKS = dict(re.findall(r"```sh\n# (dump|restore)\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL))

REVISION = """
from alembic import op

revision = "0001"
down_revision = None


def upgrade():
    op.execute("CREATE TABLE notes (id serial PRIMARY KEY, body text)")
    op.execute("CREATE MATERIALIZED VIEW totals AS SELECT count(*) AS notes FROM notes")
    op.execute(
        "CREATE FUNCTION refresh_totals() RETURNS void LANGUAGE sql SECURITY DEFINER "
        "SET search_path = pg_catalog, pg_temp AS 'REFRESH MATERIALIZED VIEW public.totals'"
    )
"""
SECOND = """
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade():
    op.execute("CREATE TABLE ledger (amount int)")
"""
HOOK = """
def grants(target):
    yield (
        "DO $$ BEGIN IF to_regclass('ledger') IS NOT NULL THEN "
        f"REVOKE UPDATE, DELETE ON ledger FROM {target.role}; END IF; END $$"
    )
"""


class Shop:
    """A directory with settings, the commands in it, and the superuser's connections."""

    def __init__(self, postgres: Postgres, directory: Path, control_url: str, prefix: str) -> None:
        self.postgres = postgres
        self.directory = directory
        url = make_url(postgres.admin_url)
        programs = os.environ["PATH"] if postgres.bin_dir is None else f"{postgres.bin_dir}:{environment()['PATH']}"
        self.env = environment(
            TENANCY_CONTROL_URL=control_url,
            TENANCY_SERVERS=f"default={postgres.admin_url}",
            TENANCY_ENCRYPTION_KEYS="1:" + base64.b64encode(secrets.token_bytes(32)).decode(),
            TENANCY_NAME_PREFIX=prefix,
            TENANCY_PROVISIONING_GRANTS="shop_grants:grants",
            PYTHONPATH=python_path(directory, ROOT),
            PGHOST=url.host or "",
            PGPORT=str(url.port or 5432),
            PGUSER=url.username or "",
            PGPASSWORD=str(url.password or ""),
            PATH=f"{Path(sys.executable).parent}:{programs}",
        )

    async def tenancy(self, *arguments: str, status: int = 0) -> Any:
        """Run ``tenancy ... --json``."""
        done = await run_module("tenancy_orm.cli", *arguments, "--json", cwd=self.directory, env=self.env)
        assert done.status == status, done.out + done.err
        return json.loads(done.out)

    async def shell(self, script: str) -> str:
        """Run a script that fails where a command of it does."""
        process = await asyncio.create_subprocess_exec(
            "bash", "-euo", "pipefail", "-c", script, cwd=self.directory, env=self.env,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        async with asyncio.timeout(600):
            out, _ = await process.communicate()
        assert process.returncode == 0, out.decode()
        return out.decode()

    async def follow(self, script: str) -> None:
        """Run a script line by line, and ``tenancy`` without the time in which each process imports the package."""
        for line in script.splitlines():
            program, *arguments = shlex.split(line)
            if program != "tenancy":
                await self.shell(line)
                continue
            done = await run_module("tenancy_orm.cli", *arguments, cwd=self.directory, env=self.env)
            assert done.status == 0, done.out + done.err

    async def as_role(self, role: str, database: str, sql: str) -> Any:
        """Log in as a tenant's role, with a password that the superuser gives it, and run SQL."""
        connection = await asyncpg.connect(self.postgres.url(database, user=role, password="by hand"))
        try:
            return await connection.fetchval(sql)
        finally:
            await connection.close()


@pytest.fixture
async def shop(postgres: Postgres, tmp_path: Path, empty_url: str, name_prefix: str) -> Shop:
    """Tenants acme and globex, at revision 0001."""
    made = Shop(postgres, tmp_path, empty_url, name_prefix)
    (tmp_path / "shop_grants.py").write_text(HOOK)
    await made.tenancy("init")
    (tmp_path / "migrations" / "versions" / "0001.py").write_text(REVISION)
    for slug in ("acme", "globex"):
        await made.tenancy("create", slug)
    return made


async def test_a_tenant_is_restored_by_the_commands_of_the_page(shop: Shop) -> None:
    """Rows, large objects and functions are back, and nothing differs; even where the page was not read."""
    acme, globex = [(await shop.tenancy("show", slug))["database"] for slug in ("acme", "globex")]
    async with shop.postgres.connect(acme) as superuser:
        await superuser.execute(f"ALTER ROLE \"{globex}\" PASSWORD 'by hand'; ALTER ROLE \"{acme}\" PASSWORD 'by hand'")
        await superuser.execute(
            f"SET ROLE \"{acme}\"; INSERT INTO notes (body) VALUES ('kept'); SELECT lo_from_bytea(4711, 'large')"
        )
    await shop.shell(BLOCKS["dump"])
    async with shop.postgres.connect(acme) as superuser:
        await superuser.execute("DELETE FROM notes; SELECT lo_unlink(4711)")
    # the new release, which the dump is older than
    (shop.directory / "migrations" / "versions" / "0002.py").write_text(SECOND)
    await shop.tenancy("migrate", "upgrade")

    first, _, restore = BLOCKS["restore"].partition("\n")
    assert first in BLOCKS["dump"]
    shop.env["DATABASE"] = acme
    await shop.follow(restore)
    await works(shop, acme)
    await shop.postgres.drop_database(f"{acme}_old")

    # a restore by somebody who has not read the page, up to the moment at which somebody checks
    careless, _, rest = restore.partition("tenancy reconcile --adopt-marker")
    await shop.follow("\n".join(line for line in careless.splitlines() if "REVOKE" not in line))
    assert await shop.as_role(globex, acme, "SELECT current_database()") == acme
    report = await shop.tenancy("reconcile", "--check", status=1)
    found = {(one["tenant"], one["kind"]) for one in report["differences"]}
    assert found == {("acme", kind) for kind in ("database.public", "database.owner", "marker.missing")}
    text = await shop.shell("tenancy reconcile --check || echo status $?")
    assert "status 1" in text and "marker.missing" in text and "--adopt-marker" in text
    report = await shop.tenancy("reconcile", status=1)
    assert {one["kind"]: one["mended"] for one in report["differences"]} == {
        "database.public": True,
        "database.owner": False,
        "marker.missing": False,
    }
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await shop.as_role(globex, acme, "SELECT 1")
    await shop.follow(f"tenancy reconcile --adopt-marker{rest}")
    await works(shop, acme)
    assert not any((await shop.tenancy("reconcile", "--check")).values())


async def works(shop: Shop, acme: str) -> None:
    """See that acme has what was dumped, the rights of a tenant, and the later revision with what the hook says."""
    assert (await shop.tenancy("show", "acme"))["schema_revision"] == "0002"
    assert await shop.as_role(acme, acme, "SELECT body FROM notes") == "kept"
    assert await shop.as_role(acme, acme, "SELECT lo_get(4711)") == b"large"
    await shop.as_role(acme, acme, "SELECT refresh_totals()")
    await shop.as_role(acme, acme, "INSERT INTO ledger VALUES (1)")
    for refused in ("DELETE FROM ledger", "CREATE TABLE mine (id int)", "UPDATE alembic_version SET version_num = '1'"):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await shop.as_role(acme, acme, refused)
    async with shop.postgres.connect(acme) as superuser:
        owners = await superuser.fetch(
            "SELECT DISTINCT pg_get_userbyid(relowner) FROM pg_class WHERE relnamespace = 'public'::regnamespace"
        )
        assert [owner[0].rpartition("_")[2] for owner in owners] == ["owner"]


async def test_an_administrator_who_is_no_superuser_restores_a_tenant(
    postgres: Postgres, tmp_path: Path, name_prefix: str
) -> None:
    """The commands run as the role of the administrative URL, as on a managed server."""
    role = f"{name_prefix}_plain"
    async with postgres.connect() as superuser:
        await superuser.execute(f"CREATE ROLE {role} LOGIN CREATEDB CREATEROLE PASSWORD 'plain'")
        await superuser.execute(f'GRANT CONNECT ON DATABASE postgres TO "{role}"')
    url = postgres.url("postgres", user=role, password="plain")
    shop = Shop(postgres, tmp_path, postgres.url(role, user=role, password="plain"), name_prefix)
    shop.env.update(TENANCY_SERVERS=f"default={url}", PGUSER=role, PGPASSWORD="plain")
    (tmp_path / "shop_grants.py").write_text(HOOK)
    await shop.tenancy("init")
    (tmp_path / "migrations" / "versions" / "0001.py").write_text(REVISION)
    await shop.tenancy("create", "acme")
    acme = shop.env["DATABASE"] = (await shop.tenancy("show", "acme"))["database"]
    async with postgres.connect(acme) as superuser:
        await superuser.execute(f"SET ROLE \"{acme}\"; INSERT INTO notes (body) VALUES ('kept')")
    await shop.shell(BLOCKS["dump"])
    await shop.follow(BLOCKS["restore"].partition("\n")[2])
    async with postgres.connect(acme) as superuser:
        assert await superuser.fetchval("SELECT body FROM notes") == "kept"
