"""What depends on PostgreSQL's version, on each installed one: passwords, cloning, and the administrator."""

from __future__ import annotations

import base64
import logging
import re
import subprocess
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import psycopg
import pytest

from tenancy_orm.errors import ConfigurationError, DatabaseExistsError, TenantSuspendedError
from tenancy_orm.provisioning.logins.temporary_logins import TemporaryLogin
from tenancy_orm.provisioning.server_objects import databases, roles
from tenancy_orm.provisioning.server_objects.scram import scram_verifier
from tenancy_orm.provisioning.watchdog import WatchReport
from tenancy_orm.secrets.keyring import new_password
from tenancy_orm.tenant import Status
from tests.support.postgres import ENDED, Postgres
from tests.support.provisioning import (
    Workshop,
    names_of,
    open_workshop,
    placement,
    plain_workshop,
    superuser_workshop,
)


@pytest.fixture
async def role(versioned: Postgres) -> tuple[str, str]:
    """A role made as tenants' roles are, and its password."""
    name, password = versioned.new_name("role"), new_password()
    async with versioned.connect() as connection:
        await roles.create(connection, name, verifier=scram_verifier(password), connection_limit=3)
        await connection.execute(f'GRANT CONNECT ON DATABASE postgres TO "{name}"')
    return name, password


async def test_asyncpg_logs_in_against_a_verifier_of_one_iteration(versioned: Postgres, role: tuple[str, str]) -> None:
    """The right password is accepted, another is refused."""
    name, password = role
    connection = await asyncpg.connect(versioned.url(user=name, password=password))
    assert await connection.fetchval("SELECT current_user") == name
    await connection.close()
    with pytest.raises(asyncpg.InvalidPasswordError):
        await asyncpg.connect(versioned.url(user=name, password=new_password()))


def psql(server: Postgres, *, user: str, password: str) -> subprocess.CompletedProcess[str]:
    """Ask psql who it is."""
    assert server.bin_dir is not None
    url = server.url(user=user, password=password)
    command = [str(server.bin_dir / "psql"), "--no-psqlrc", "-Atc", "SELECT current_user", url]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)


def test_psql_logs_in_against_a_verifier_of_one_iteration(versioned: Postgres, role: tuple[str, str]) -> None:
    """psql, which uses libpq, logs in as well."""
    name, password = role
    right = psql(versioned, user=name, password=password)
    assert (right.stdout.strip(), right.stderr) == (name, "")
    wrong = psql(versioned, user=name, password=new_password())
    assert wrong.returncode == 2
    assert "password authentication failed" in wrong.stderr


async def test_a_verifier_is_the_one_libpq_computes(versioned: Postgres) -> None:
    """With the same salt and iterations the result is that of libpq's own function."""
    password = new_password()
    with psycopg.connect(versioned.admin_url) as connection:
        theirs = connection.pgconn.encrypt_password(password.encode(), b"anyone", b"scram-sha-256").decode()
    match = re.match(r"SCRAM-SHA-256\$(\d+):([^$]+)\$", theirs)
    assert match is not None
    assert scram_verifier(password, salt=base64.b64decode(match[2]), iterations=int(match[1])) == theirs


async def test_the_stored_verifier_is_ours(versioned: Postgres, role: tuple[str, str]) -> None:
    """PostgreSQL stores the verifier unchanged, so it did not treat it as a plain password."""
    async with versioned.connect() as connection:
        stored = await connection.fetchval("SELECT rolpassword FROM pg_authid WHERE rolname = $1", role[0])
    assert stored.startswith("SCRAM-SHA-256$1:")


@pytest.fixture(params=[superuser_workshop, plain_workshop], ids=["superuser", "plain"])
async def workshop(request: pytest.FixtureRequest, versioned: Postgres) -> AsyncIterator[Workshop]:
    """A provisioner with either kind of administrator."""
    async with request.param(versioned) as opened:
        yield opened


async def test_a_temporary_login_can_do_what_the_tenants_role_can_and_ends(workshop: Workshop) -> None:
    """On its own database alone, until it expires, is dropped, or the tenant is suspended or purged."""
    tenant, other = await workshop.create("acme"), await workshop.create("globex")
    assert tenant.placement is not None and other.placement is not None
    logins, role = workshop.provisioner.logins, tenant.placement.role

    async def connect(login: TemporaryLogin, **changes: Any) -> Any:
        return await asyncpg.connect(login.url, timeout=10, **changes)

    def left() -> Any:
        return workshop.provisioner.reconcile(check=True, thorough=False)

    async with logins.open(tenant, purpose="test") as login:
        assert login.password not in repr(login) and "//" not in repr(login)
        connection = await connect(login)
        assert await connection.fetchrow("SELECT current_user::text, session_user::text") == (role, login.role)
        assert await connection.fetchval("SHOW application_name") == "test"
        settings = "SELECT setting FROM pg_settings WHERE name = 'temp_file_limit'"
        async with workshop.connect(tenant) as own:
            assert await connection.fetchval(settings) == await own.fetchval(settings)
        await connection.execute("INSERT INTO notes (body) VALUES ('x')")
        assert await connection.fetchval("SELECT lomowner::regrole::text FROM pg_largeobject_metadata") is None
        large = await connection.fetchval("SELECT lo_create(0)")
        owner = "SELECT lomowner::regrole::text FROM pg_largeobject_metadata WHERE oid = $1"
        assert (await connection.fetchval(owner, large)).strip('"') == role
        for refused in (
            "CREATE TABLE t (id int)",
            "DROP TABLE notes",
            "CREATE ROLE x",
            f"ALTER ROLE \"{login.role}\" VALID UNTIL 'infinity'",
            f'GRANT "{role}" TO "{other.placement.role}"',
            f'SET ROLE "{other.placement.role}"',
            f'SET ROLE "{workshop.names.owner}"',
            "CREATE TRIGGER t BEFORE INSERT ON notes EXECUTE FUNCTION suppress_redundant_updates_trigger()",
            "CREATE RULE r AS ON SELECT TO pg_authid DO INSTEAD SELECT 1",
        ):
            with pytest.raises((asyncpg.InsufficientPrivilegeError, asyncpg.UndefinedObjectError)):
                await connection.execute(refused)
        # it is no other tenant's, and no difference
        report = await left()
        assert report.clean, report
        assert await workshop.provisioner.end_excessive_sessions() == WatchReport()
        await connection.execute("SET ROLE NONE")
        # what it creates as itself goes to the tenant's role when it is dropped
        large = await connection.fetchval("SELECT lo_create(0)")
        assert (await connection.fetchval(owner, large)).strip('"') == login.role
        for database in (other.placement.database, "postgres", "template1"):
            with pytest.raises(asyncpg.PostgresError) as refused_login:
                await connect(login, database=database)
            assert refused_login.value.sqlstate == "42501"
    with pytest.raises(ENDED):
        await connection.fetch("SELECT 1")
    with pytest.raises(asyncpg.InvalidPasswordError):
        await connect(login)
    async with workshop.connect(tenant) as own:
        assert (await own.fetchval(owner, large)).strip('"') == role
    assert await workshop.present() == names_of(tenant) | names_of(other)
    await logins.drop(tenant, login.role)

    # a process that was killed: expired, with a session that is still open
    dead = await logins.issue(tenant, seconds=60)
    connection = await connect(dead)
    assert (await left()).clean
    async with workshop.admin() as admin:
        await admin.execute(f"ALTER ROLE \"{dead.role}\" VALID UNTIL '2020-01-01'")
    with pytest.raises(asyncpg.InvalidPasswordError):
        await connect(dead)
    assert (await left()).orphans == (dead.role,)
    assert (await workshop.provisioner.reconcile(thorough=False)).orphans == (dead.role,)
    with pytest.raises(ENDED):
        await connection.fetch("SELECT 1")

    # a suspended tenant's end, and do not come back with it
    ended = await logins.issue(tenant)
    connection = await connect(ended)
    await workshop.set_login(tenant, False)
    with pytest.raises(ENDED):
        await connection.fetch("SELECT 1")
    with pytest.raises(TenantSuspendedError):
        await logins.issue(tenant)
    await workshop.set_login(tenant, True)
    with pytest.raises(asyncpg.PostgresError):
        await connect(ended)
    assert (await workshop.provisioner.reconcile(thorough=False)).orphans == (ended.role,)

    # a purge drops them
    last = await logins.issue(tenant)
    connection = await connect(last)
    await workshop.registry.transition(tenant.id, Status.DELETED, action="tenant.delete")
    await workshop.provisioner.purge(tenant)
    with pytest.raises(ENDED):
        await connection.fetch("SELECT 1")
    assert await workshop.present() == names_of(other)
    for seconds in (0.0, 10_000_000.0, float("nan")):
        with pytest.raises(ConfigurationError):
            await logins.issue(other, seconds=seconds)
    with pytest.raises(ConfigurationError):
        await logins.drop(other, other.placement.role)


@pytest.mark.parametrize("strategy", ["wal_log", "file_copy"])
async def test_the_whole_life_of_a_tenant(workshop: Workshop, strategy: databases.Strategy) -> None:
    """Creating, using, blocking, unblocking and purging work on every version, with either kind of administrator."""
    tenant = await workshop.provisioner.create(workshop.draft("acme"), key=None, strategy=strategy)
    assert await workshop.present() == names_of(tenant)
    async with workshop.connect(tenant) as connection:
        await connection.execute("INSERT INTO notes (body) VALUES ('hello')")
        await workshop.set_login(tenant, False)
        with pytest.raises(ENDED):
            await connection.fetch("SELECT 1")
    with pytest.raises(asyncpg.InvalidAuthorizationSpecificationError):
        async with workshop.connect(tenant):
            pass
    await workshop.set_login(tenant, True)
    async with workshop.connect(tenant) as connection:
        assert await connection.fetchval("SELECT body FROM notes") == "hello"
        await workshop.registry.transition(tenant.id, Status.DELETED, action="tenant.delete")
        await workshop.provisioner.purge(tenant)  # with a connection still open
    assert await workshop.present() == set()


async def test_a_failed_creation_is_undone(workshop: Workshop) -> None:
    """Either kind of administrator can undo a creation."""
    await workshop.create("first")
    before = await workshop.present()
    failing = workshop.draft("acme")
    async with workshop.admin() as connection:
        await connection.execute(f'CREATE DATABASE "{failing.database}"')
    with pytest.raises(DatabaseExistsError):
        await workshop.provisioner.create(failing, key=None)
    assert await workshop.present() == {*before, f"database {failing.database}"}
    report = await workshop.provisioner.reconcile()
    assert (report.orphans, report.errors) == ((failing.database,), ())
    assert await workshop.consistent()


async def test_what_a_plain_administrator_may_not_close_is_named(
    versioned: Postgres, caplog: pytest.LogCaptureFixture
) -> None:
    """It does not own ``postgres`` and ``template1``: the warning has the statement that a superuser must run."""
    names = ("postgres", "template1")
    async with versioned.connect() as connection:
        for name in names:
            await connection.execute(f'GRANT CONNECT ON DATABASE "{name}" TO PUBLIC')
    async with plain_workshop(versioned) as workshop:
        with caplog.at_level(logging.WARNING):
            await workshop.provisioner.prepare_server("default")
        for name in names:
            assert f'REVOKE ALL ON DATABASE "{name}" FROM PUBLIC' in caplog.text
        async with workshop.admin() as connection:
            own = await connection.fetchval("SELECT current_database()")
            assert not await databases.is_open_to_public(connection, own)
    async with versioned.connect() as connection:
        await connection.execute("REVOKE ALL ON DATABASE postgres, template1 FROM PUBLIC")


async def test_the_registrys_own_user_still_reaches_it(versioned: Postgres) -> None:
    """Closing the control database to PUBLIC does not lock out the role of ``control_url``, which does not own it."""
    user, password, name = versioned.new_name("user"), new_password(), versioned.new_name()
    await versioned.create_database(name)
    async with versioned.connect(name) as connection:
        await connection.execute(f"CREATE ROLE \"{user}\" LOGIN PASSWORD '{password}'")
        await connection.execute(f'GRANT CREATE ON DATABASE "{name}" TO "{user}"')
    opened = await open_workshop(
        control_url=versioned.url(name, user=user, password=password),
        admin_url=versioned.admin_url,
        name_prefix="user",
    )
    try:
        await opened.provisioner.prepare_server("default")
        async with opened.admin() as connection:
            assert not await databases.is_open_to_public(connection, name)
        own = await asyncpg.connect(versioned.url(name, user=user, password=password))
        await own.close()
        placed = placement(await opened.create("acme"))
        assert placed.server == "default"
    finally:
        await opened.close()
