"""Who loses access when a server is prepared: found first, asked about, and never taken without a word."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import os
import pty
import secrets
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.errors import ConfigurationError, ControlUnavailableError
from tenancy_orm.postgres.quoting import quote_literal
from tenancy_orm.provisioning.preparation.plan import PreparationPlan
from tests.support.models import Base
from tests.support.postgres import Postgres
from tests.support.shell import ROOT, environment, python_path
from tests.support.warm import Finished, run_module

PASSWORD = "its-password"
_numbers = itertools.count(1)

# all that decides who may do what on the server, and what there is
CATALOGUE = (
    "SELECT 'database ' || datname || ' ' || xmin::text || coalesce(datacl::text, '') FROM pg_database "
    "UNION ALL SELECT 'role ' || rolname || ' ' || xmin::text FROM pg_authid "
    "UNION ALL SELECT 'member ' || roleid || ' ' || member FROM pg_auth_members ORDER BY 1"
)


class Place:
    """A server that others use too, and a project's directory."""

    def __init__(self, server: Postgres, directory: Path) -> None:
        self.server = server
        self.directory = directory
        self.control = f"control_{next(_numbers)}"
        self.variables = environment(
            TENANCY_CONTROL_URL=server.url(self.control),
            TENANCY_SERVERS=f"default={server.admin_url}",
            TENANCY_ENCRYPTION_KEYS="1:" + base64.b64encode(secrets.token_bytes(32)).decode(),
            TENANCY_NAME_PREFIX="shared",
            PYTHONPATH=python_path(ROOT),
            NO_COLOR="1",
        )

    async def init(self, *arguments: str, **changes: str | None) -> Finished:
        """Run ``tenancy init`` without a terminal."""
        variables = {name: text for name, text in {**self.variables, **changes}.items() if text is not None}
        return await run_module("tenancy_orm.cli", "init", *arguments, cwd=self.directory, env=variables)

    def config(self, **changes: Any) -> TenancyConfig:
        """An application's configuration."""
        return TenancyConfig(
            control_url=self.server.url(self.control),
            servers={"default": self.server.admin_url},
            metadata=Base.metadata,
            encryption_keys={"1": self.variables["TENANCY_ENCRYPTION_KEYS"].removeprefix("1:")},
            name_prefix="shared",
        ).replace(**changes)

    async def catalogue(self) -> list[str]:
        """What there is on the server, and the files of the project."""
        async with self.server.connect() as connection:
            rows = [row[0] for row in await connection.fetch(CATALOGUE)]
        files = (str(path) for path in sorted(self.directory.rglob("*")) if "__pycache__" not in path.parts)
        return [*rows, *files]

    async def connects(self, role: str, database: str = "postgres") -> bool:
        """Whether a role can connect to a database."""
        url = self.server.url(database, user=role, password=PASSWORD)
        try:
            connection = await asyncpg.connect(url, timeout=30)
        except asyncpg.InsufficientPrivilegeError:
            return False
        await connection.close()
        return True


@pytest.fixture
async def place(own_server: Postgres, tmp_path: Path) -> AsyncIterator[Place]:
    """A server as it is after installation, with a role for monitoring."""
    async with own_server.connect() as connection:
        await connection.execute(
            f"""
            GRANT CONNECT, TEMPORARY ON DATABASE postgres, template1 TO PUBLIC;
            CREATE ROLE monitoring LOGIN PASSWORD {quote_literal(PASSWORD)};
            CREATE ROLE granted LOGIN; CREATE ROLE a_group; GRANT a_group TO granted;
            GRANT CONNECT ON DATABASE postgres, template1 TO a_group;
            """
        )
    made = Place(own_server, tmp_path)
    yield made
    async with own_server.connect() as connection:
        await connection.execute(f'DROP DATABASE IF EXISTS "{made.control}" WITH (FORCE)')
        for role in ("monitoring", "granted", "a_group"):
            await connection.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")
    await own_server.drop_all("shared")


async def test_init_names_who_loses_access_and_changes_nothing_until_told_to(place: Place) -> None:
    """Who could connect through PUBLIC alone, who is connected, and the remedies; ``--keep-access`` applies them."""
    before = await place.catalogue()
    keyless = await place.init("--yes", TENANCY_ENCRYPTION_KEYS=None)
    assert (keyless.status, "encryption_keys is empty" in keyless.err) == (1, True)
    url = place.server.url("postgres", user="monitoring", password=PASSWORD)
    session = await asyncpg.connect(url, server_settings={"application_name": "pgmonitor"})
    try:
        refused = await place.init()
        assert refused.status == 1
        assert "database postgres on server default: PUBLIC loses its rights" in refused.out
        assert "monitoring (1 connected now as pgmonitor) loses its access" in refused.out
        assert 'GRANT CONNECT ON DATABASE "postgres" TO "monitoring";' in refused.out
        assert "granted" not in refused.out.replace("is granted", "")
        assert f"{place.control} does not exist, and is made" in refused.out
        assert "nothing was changed: monitoring would lose access" in refused.err
        for arguments in (("--dry-run",), ("--dry-run", "--json"), ("--json",), ("--keep-access", "monitorin")):
            assert (await place.init(*arguments)).status == (0 if "--dry-run" in arguments else 1)
        assert await place.catalogue() == before
        planned = json.loads((await place.init("--dry-run", "--json")).out)["preparation"]
        assert planned["creates_control_database"] is True
        [database] = [found for found in planned["databases"] if found["database"] == "postgres"]
        assert database["roles"] == [
            {
                "role": "monitoring",
                "keeps_access": False,
                "remedy": 'GRANT CONNECT ON DATABASE "postgres" TO "monitoring"',
                "connected": [{"application_name": "pgmonitor", "count": 1}],
            }
        ]
        assert (await place.init("--keep-access", "connected")).status == 0
    finally:
        await session.close()
    assert await place.connects("monitoring")


async def test_init_asks_at_a_terminal(place: Place) -> None:
    """Nothing is changed by a no, and everything is done by a yes."""
    before = await place.catalogue()
    for answer, status in (("n", 1), ("y", 0)):
        assert await place.catalogue() == before
        controller, terminal = pty.openpty()
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "tenancy_orm.cli", "init"),
                cwd=place.directory,
                env=place.variables,
                stdin=terminal,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
            )
            os.write(controller, f"{answer}\n".encode())
            out, _ = await process.communicate()
        finally:
            os.close(controller)
            os.close(terminal)
        assert process.returncode == status, out
        assert b"monitoring loses its access" in out and b"Continue?" in out
    assert not await place.connects("monitoring")


async def test_yes_takes_and_keep_access_grants(place: Place) -> None:
    """``--keep-access`` alone is enough where it covers everybody; a repeat asks nothing, and writes nothing."""
    assert (await place.init("--keep-access", "all")).status == 0
    assert await place.connects("monitoring")
    assert await place.connects("monitoring", "template1")
    assert not await place.connects("monitoring", place.control)
    before = await place.catalogue()
    again = await place.init()
    assert (again.status, "loses" in again.out) == (0, False), again.err
    assert await place.catalogue() == before
    async with place.server.connect() as connection:
        await connection.execute("GRANT CONNECT ON DATABASE postgres TO PUBLIC")
        await connection.execute("REVOKE ALL ON DATABASE postgres FROM monitoring")
    assert (await place.init("--yes")).status == 0
    assert not await place.connects("monitoring")


async def test_leaving_public_opens_shared_databases_but_no_tenants(place: Place) -> None:
    """What a tenant's role can then do is what PUBLIC may, and another tenant's database stays closed to it."""
    assert (await place.init("--leave-public")).status == 0
    assert "revoke_public = false" in (place.directory / "tenancy.toml").read_text()
    again = await place.init("--leave-public")
    assert again.status == 0, again.err
    assert await place.connects("monitoring")
    async with Tenancy(place.config(provisioning={"revoke_public": False})) as tenancy:
        tenants = [(await tenancy.tenants.create(slug)).tenant for slug in ("acme", "globex")]
        role, other = (tenant.placement.role for tenant in tenants if tenant.placement)
        password = tenancy.internals.provisioner.password(tenants[0])
    session = await asyncpg.connect(place.server.url("postgres", user=role, password=password))
    await session.execute("CREATE TEMPORARY TABLE anything (); SELECT pg_advisory_lock(1)")
    await session.close()
    for name in (other, place.control):  # init made the latter, closed
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await asyncpg.connect(place.server.url(name, user=role, password=password))
    (place.directory / "tenancy.toml").write_text("")
    refused = await place.init("--leave-public")
    assert (refused.status, "put revoke_public = false" in refused.err) == (1, True)


async def test_an_application_that_never_ran_init_takes_nothing_from_anybody(place: Place) -> None:
    """Opening with ``initialise``, and the first creation on a server, refuse and change nothing."""
    with pytest.raises(ControlUnavailableError, match="tenancy init creates it"):
        await Tenancy(place.config()).open()
    await place.server.create_database(place.control)
    before = await place.catalogue()
    with pytest.raises(ConfigurationError, match=r"'default'.*postgres \(by monitoring\).*tenancy init"):
        await Tenancy(place.config()).open(initialise=True)
    assert await place.catalogue() == before
    leaving = Tenancy(place.config(provisioning={"revoke_public": False}))
    async with await leaving.open(initialise=True):
        before = await place.catalogue()
    async with Tenancy(place.config()) as tenancy:
        with pytest.raises(ConfigurationError, match=r"GRANT CONNECT ON DATABASE .postgres. TO .monitoring."):
            await tenancy.tenants.create("acme")
        assert await place.catalogue() == before
        async with place.server.connect() as connection:
            await connection.execute("GRANT CONNECT ON DATABASE postgres, template1 TO monitoring")
        await tenancy.tenants.create("acme")
    assert await place.connects("monitoring")


async def test_an_applications_own_database_is_no_control_database(place: Place) -> None:
    """It is refused; shared all the same, the application's role is named; a schema of our name is never used."""
    await place.server.create_database(place.control)
    async with place.server.connect(place.control) as connection:
        await connection.execute("CREATE TABLE invoices ()")
    before = await place.catalogue()
    refused = await place.init("--yes")
    assert refused.status == 1
    assert "tables of another application (public.invoices)" in refused.err
    assert "/tenancy_control" in refused.err and "--shared-control-database" in refused.err
    shared = await place.init("--shared-control-database")
    assert (shared.status, f"database {place.control} on server default" in shared.out) == (1, True)
    assert f'GRANT CONNECT ON DATABASE "{place.control}" TO "monitoring";' in shared.out
    async with place.server.connect(place.control) as connection:
        await connection.execute("CREATE SCHEMA tenancy; CREATE TABLE tenancy.flats ()")
    with pytest.raises(ConfigurationError, match="schema 'tenancy'"):
        await Tenancy(place.config(provisioning={"revoke_public": False})).open(initialise=True)
    foreign = await place.init("--shared-control-database", "--yes")
    assert (foreign.status, "schema 'tenancy'" in foreign.err) == (1, True)
    async with place.server.connect(place.control) as connection:
        await connection.execute("DROP SCHEMA tenancy CASCADE")
    assert await place.catalogue() == before
    assert (await place.init("--shared-control-database", "--keep-access", "all")).status == 0
    assert await place.connects("monitoring", place.control)
    assert (await place.init()).status == 0


async def test_a_control_database_that_a_killed_init_has_left_closed_has_a_remedy(place: Place) -> None:
    """Nobody can connect to it: it is created closed, and opened once PUBLIC has no rights."""
    async with place.server.connect() as connection:
        await connection.execute(f'CREATE DATABASE "{place.control}" ALLOW_CONNECTIONS false')
    refused = await place.init("--yes")
    assert (refused.status, f'DROP DATABASE "{place.control}"' in refused.err) == (1, True), refused.err


async def test_what_an_administrator_may_not_revoke_is_in_the_plan(place: Place) -> None:
    """On a managed server it is no superuser: the statements for one are shown, and nobody loses anything."""
    async with place.server.connect() as connection:
        await connection.execute(f"CREATE ROLE shared_admin LOGIN CREATEDB CREATEROLE PASSWORD '{PASSWORD}'")
        await connection.execute("CREATE DATABASE shared_admin OWNER shared_admin")
    url = place.server.url("shared_admin", user="shared_admin", password=PASSWORD)
    control = place.server.url(place.control, user="shared_admin", password=PASSWORD)
    plan = await PreparationPlan.read(place.config(control_url=control, servers={"default": url}))
    assert plan.creates_control and not plan.losing
    assert {closing.database: closing.may_revoke for closing in plan.closings} == {
        "postgres": False,
        "template1": False,
        "shared_admin": True,
    }
    done = await place.init(TENANCY_CONTROL_URL=control, TENANCY_SERVERS=f"default={url}")
    assert (done.status, 'REVOKE ALL ON DATABASE "postgres" FROM PUBLIC;' in done.out) == (0, True), done.err
    async with place.server.connect() as connection:
        owner = await connection.fetchval(
            "SELECT pg_get_userbyid(datdba) FROM pg_database WHERE datname = $1", place.control
        )
    assert owner == "shared_admin"


async def test_what_a_superuser_is_asked_to_run_keeps_the_administrators_access(place: Place) -> None:
    """The URL names ``postgres``: the SQL does not lock the administrator out, and those that it does are named."""
    async with place.server.connect() as connection:
        await connection.execute(f"CREATE ROLE plain_admin LOGIN CREATEDB CREATEROLE PASSWORD '{PASSWORD}'")
    url = place.server.url("postgres", user="plain_admin", password=PASSWORD)
    control = place.server.url(place.control, user="plain_admin", password=PASSWORD)
    settings = {"TENANCY_CONTROL_URL": control, "TENANCY_SERVERS": f"default={url}"}
    shown = (await place.init("--dry-run", **settings)).out.splitlines()
    at = next(i for i, line in enumerate(shown) if line.startswith("database postgres on server default: every role"))
    assert 'which takes access from monitoring; to keep it: GRANT CONNECT ON DATABASE "postgres"' in shown[at + 2]
    done = await place.init(**settings)
    assert (done.status, done.err.count("every role can connect to database postgres")) == (0, 1), done.err
    async with place.server.connect() as connection:
        await connection.execute(shown[at + 1])
        await connection.execute('GRANT CONNECT ON DATABASE "postgres" TO "monitoring"')
    again = await place.init(**settings)
    assert (again.status, "every role can connect to database postgres" in again.err) == (0, False), again.err
    assert await place.connects("monitoring", "postgres")
