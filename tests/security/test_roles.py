"""What a tenant's own role, with its own valid password, can do on its server: use its data, and nothing else.

Every forbidden statement is first run by the superuser in the same database, so that it is refused for want of rights
and not because it is wrong.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from tenancy_orm.tenant import Tenant
from tests.support.postgres import Postgres
from tests.support.provisioning import VERSIONS, open_workshop, placement, running_server

REFUSED = "42501"


@dataclass(frozen=True)
class Neighbours:
    """Two tenants of one server."""

    server: Postgres
    owner: str
    role: str
    password: str = field(repr=False)
    other: str
    other_password: str = field(repr=False)

    @asynccontextmanager
    async def tenant(self, database: str | None = None) -> AsyncIterator[Any]:
        """The first tenant's connection."""
        url = self.server.url(database or self.role, user=self.role, password=self.password)
        connection = await asyncpg.connect(url, timeout=10)
        try:
            yield connection
        finally:
            await connection.close()

    @asynccontextmanager
    async def owning(self) -> AsyncIterator[Any]:
        """A connection to the first tenant's database as a migration has it."""
        async with self.server.connect(self.role) as connection:
            await connection.execute(f'SET ROLE "{self.owner}"')
            yield connection

    def fill(self, statement: str) -> str:
        """Put the names into a statement. Database and role of a tenant are called alike."""
        for name in ("owner", "role", "other"):
            statement = statement.replace(f"<{name}>", f'"{getattr(self, name)}"')
        return statement


@pytest.fixture(scope="module", params=VERSIONS, ids=lambda version: f"pg{version}")
def neighbours(request: pytest.FixtureRequest, postgres: Postgres) -> Iterator[Neighbours]:
    """Two tenants on a server of each version."""
    with running_server(request.param, f"{postgres.worker}-roles") as server:
        yield asyncio.run(make_neighbours(server))


async def make_neighbours(server: Postgres) -> Neighbours:
    control_url = await server.create_database(server.new_name())
    workshop = await open_workshop(control_url=control_url, admin_url=server.admin_url, name_prefix="roles")
    try:
        acme, globex = await workshop.create("acme"), await workshop.create("globex")

        def login(tenant: Tenant) -> tuple[str, str]:
            return placement(tenant).role, workshop.provisioner.password(tenant)

        return Neighbours(server, workshop.names.owner, *login(acme), *login(globex))
    finally:
        await workshop.close()


FILES_AND_PROGRAMS = [
    "COPY (SELECT 1) TO PROGRAM 'cat > /dev/null'",
    "COPY notes (body) FROM PROGRAM 'echo x'",
    "COPY (SELECT 1) TO '/dev/null'",
    "COPY notes (body) FROM '/etc/hostname'",
    "SELECT pg_read_file('PG_VERSION')",
    "SELECT pg_read_binary_file('PG_VERSION')",
    "SELECT pg_ls_dir('.')",
    "SELECT pg_stat_file('PG_VERSION')",
    "SELECT lo_import('/etc/hostname')",
    "SELECT pg_ls_waldir()",
    "SELECT pg_current_logfile()",
]

DEFINITIONS = [
    "CREATE TABLE x ()",
    "CREATE TABLE x AS SELECT * FROM notes",
    "CREATE TEMP TABLE x ()",
    "SELECT * INTO TEMP x FROM notes",
    "CREATE TEMP VIEW x AS SELECT 1",
    "CREATE TEMP SEQUENCE x",
    "CREATE SCHEMA x",
    "CREATE VIEW x AS SELECT * FROM notes",
    "CREATE SEQUENCE x",
    "CREATE TYPE x AS ENUM ('a')",
    "CREATE DOMAIN x AS text",
    "CREATE FUNCTION x() RETURNS int LANGUAGE sql AS 'SELECT 1'",
    "CREATE FUNCTION x() RETURNS int SECURITY DEFINER LANGUAGE plpgsql AS 'BEGIN RETURN 1; END'",
    "CREATE INDEX ON notes (body)",
    "CREATE RULE x AS ON INSERT TO notes DO INSTEAD NOTHING",
    "CREATE TRIGGER x BEFORE UPDATE ON notes FOR EACH ROW EXECUTE FUNCTION suppress_redundant_updates_trigger()",
    "CREATE POLICY x ON notes USING (true)",
    "ALTER TABLE notes ADD COLUMN x int",
    "ALTER TABLE notes DISABLE TRIGGER ALL",
    "ALTER TABLE notes OWNER TO <role>",
    "ALTER SCHEMA public RENAME TO x",
    "COMMENT ON TABLE notes IS 'x'",
    "DROP TABLE notes CASCADE",
    "TRUNCATE notes",
    "REINDEX TABLE notes",
    "DROP EXTENSION plpgsql CASCADE",
    "CREATE PUBLICATION x FOR ALL TABLES",
    "CREATE FOREIGN DATA WRAPPER x",
    "CREATE CAST (text AS bytea) WITHOUT FUNCTION",
    "ALTER DEFAULT PRIVILEGES FOR ROLE <owner> GRANT ALL ON TABLES TO <role>",
]

ROLES = [
    "SET ROLE <owner>",
    "SET ROLE <other>",
    "SET ROLE postgres",
    "SET ROLE pg_monitor",
    "SET SESSION AUTHORIZATION <other>",
    "CREATE ROLE x",
    "ALTER ROLE <role> SUPERUSER",
    "ALTER ROLE <role> CREATEROLE",
    "ALTER ROLE <role> CREATEDB",
    "ALTER ROLE <role> BYPASSRLS",
    "ALTER ROLE <role> REPLICATION",
    "ALTER ROLE <role> CONNECTION LIMIT -1",
    "ALTER ROLE <other> RENAME TO x",
    "ALTER ROLE <other> PASSWORD 'x'",
    "ALTER ROLE <other> SET work_mem = '1MB'",
    "ALTER ROLE ALL SET work_mem = '1MB'",
    "GRANT <owner> TO <role>",
    "GRANT <other> TO <role>",
    "GRANT pg_read_all_data TO <role>",
    "GRANT pg_execute_server_program TO <role>",
    "GRANT pg_signal_backend TO <role>",
    "SELECT rolpassword FROM pg_authid",
]

DATABASES = [
    "ALTER DATABASE <role> SET work_mem = '1MB'",
    "ALTER DATABASE <role> CONNECTION LIMIT 1",
    "ALTER DATABASE <role> OWNER TO <role>",
    "ALTER DATABASE <other> RENAME TO x",
    "ALTER DATABASE <other> WITH ALLOW_CONNECTIONS false",
    "COMMENT ON DATABASE <role> IS 'x'",
    "COMMENT ON DATABASE <other> IS 'x'",
    "GRANT CONNECT ON DATABASE <other> TO <role>",
    "REVOKE CONNECT ON DATABASE <other> FROM <other>",
]

VERSIONS_TABLE = [
    "UPDATE alembic_version SET version_num = 'x'",
    "DELETE FROM alembic_version",
    "INSERT INTO alembic_version VALUES ('x')",
]

SERVER = [
    "SELECT pg_reload_conf()",
    "SELECT pg_switch_wal()",
    "SELECT pg_create_restore_point('x')",
    "SELECT pg_stat_reset()",
    "SELECT pg_create_physical_replication_slot('x')",
    "SET session_replication_role = replica",
    "SET log_statement = 'none'",
    "LOAD 'plpgsql'",
    "SELECT * FROM pg_hba_file_rules",
    "SELECT * FROM pg_file_settings",
    "SELECT * FROM pg_statistic",
    "SELECT * FROM pg_largeobject",
    "SELECT * FROM pg_subscription",
    "SELECT * FROM pg_user_mapping",
    "SELECT * FROM pg_config",
]

FORBIDDEN = [*FILES_AND_PROGRAMS, *DEFINITIONS, *ROLES, *DATABASES, *VERSIONS_TABLE, *SERVER]

# What cannot be tried by the superuser and rolled back.
FORBIDDEN_ALONE = [
    "CREATE DATABASE x",
    "DROP DATABASE <other>",
    "CREATE TABLESPACE x LOCATION '/tmp'",
    "ALTER SYSTEM SET work_mem = '1MB'",
    "CHECKPOINT",
    "DROP ROLE <other>",
    "CREATE EVENT TRIGGER x ON ddl_command_start EXECUTE FUNCTION x()",
    "SELECT lo_export(1, '/dev/null')",
]


@pytest.mark.parametrize("statement", FORBIDDEN)
async def test_a_tenants_role_may_not(neighbours: Neighbours, statement: str) -> None:
    """The superuser may, in the tenant's own database; the tenant's role is refused for want of rights."""
    statement = neighbours.fill(statement)
    await works_for_the_superuser(neighbours, statement)
    async with neighbours.tenant() as connection:
        with pytest.raises(asyncpg.PostgresError) as caught:
            await connection.execute(statement)
    assert caught.value.sqlstate == REFUSED, caught.value


async def works_for_the_superuser(neighbours: Neighbours, statement: str) -> None:
    """Run a statement in the tenant's database, with every right, and roll it back."""
    async with neighbours.server.connect(neighbours.role) as connection:
        transaction = connection.transaction()
        await transaction.start()
        try:
            await connection.execute(statement)
        finally:
            await transaction.rollback()


@pytest.mark.parametrize("statement", FORBIDDEN_ALONE)
async def test_a_tenants_role_may_not_outside_a_transaction(neighbours: Neighbours, statement: str) -> None:
    """Refused for want of rights as well."""
    async with neighbours.tenant() as connection:
        with pytest.raises(asyncpg.PostgresError) as caught:
            await connection.execute(neighbours.fill(statement))
    assert caught.value.sqlstate == REFUSED, caught.value


async def test_a_tenants_role_may_not_install_an_extension(neighbours: Neighbours) -> None:
    """Not even a trusted one, which whoever has CREATE on the database may install."""
    async with neighbours.tenant() as connection:
        available = await connection.fetch(
            "SELECT name, trusted FROM pg_available_extension_versions WHERE NOT installed AND requires IS NULL"
        )
        assert available
        name = min(available, key=lambda row: not row["trusted"])["name"]
        await works_for_the_superuser(neighbours, f'CREATE EXTENSION "{name}"')
        for row in available:
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await connection.execute(f'CREATE EXTENSION "{row["name"]}"')


async def test_dblink_leads_nowhere_else(neighbours: Neighbours) -> None:
    """Where an operator has installed it, it logs in as the tenant's role, with its password, to its own database."""
    async with neighbours.server.connect(neighbours.role) as connection:
        query = "SELECT count(*) FROM pg_available_extensions WHERE name = 'dblink'"
        if installed := bool(await connection.fetchval(query)):
            await connection.execute("CREATE EXTENSION dblink")
    port = neighbours.server.url().rsplit(":", 1)[1].split("/")[0]

    def call(database: str, login: str = f"user={neighbours.role} password={neighbours.password}") -> str:
        target = f"host=127.0.0.1 port={port} dbname={database} {login}"
        return f"SELECT * FROM dblink('{target}', 'SELECT current_database()::text') AS t (name text)"

    async with neighbours.tenant() as connection:
        if not installed:
            with pytest.raises(asyncpg.UndefinedFunctionError):
                await connection.fetchval(call(neighbours.role))
            return
        assert await connection.fetchval(call(neighbours.role)) == neighbours.role
        for database in (neighbours.other, "postgres", "template1"):
            with pytest.raises(asyncpg.PostgresConnectionError):
                await connection.fetchval(call(database))
        with pytest.raises(asyncpg.PostgresError, match="password"):
            await connection.fetchval(call(neighbours.role, login="user=postgres"))
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.fetchval("SELECT dblink_connect_u('dbname=postgres')")


async def test_a_grant_gives_nothing_away(neighbours: Neighbours) -> None:
    """The role has rights, but not the right to pass them on: PostgreSQL warns, and nothing changes."""
    query = (
        "SELECT relacl::text FROM pg_class WHERE relname = 'notes' "
        "UNION ALL SELECT datacl::text FROM pg_database ORDER BY 1"
    )
    async with neighbours.server.connect(neighbours.role) as superuser:
        before = await superuser.fetch(query)
        async with neighbours.tenant() as connection:
            for statement in ("GRANT SELECT ON notes TO <other>", "GRANT CONNECT ON DATABASE <role> TO <other>"):
                await connection.execute(neighbours.fill(statement))
        assert await superuser.fetch(query) == before


async def test_another_backend_cannot_be_ended(neighbours: Neighbours) -> None:
    """The superuser's, and the other tenant's."""
    url = neighbours.server.url(neighbours.other, user=neighbours.other, password=neighbours.other_password)
    other = await asyncpg.connect(url, timeout=10)
    try:
        async with neighbours.server.connect() as superuser, neighbours.tenant() as connection:
            for victim in (other, superuser):
                for function in ("pg_terminate_backend", "pg_cancel_backend"):
                    with pytest.raises(asyncpg.InsufficientPrivilegeError):
                        await connection.fetchval(f"SELECT {function}($1)", victim.get_server_pid())
        assert await other.fetchval("SELECT 1") == 1
    finally:
        await other.close()


async def test_others_statements_are_not_shown(neighbours: Neighbours) -> None:
    """pg_stat_activity shows that there are others, by opaque names, and not what they do."""
    async with neighbours.server.connect(neighbours.other) as superuser, neighbours.tenant() as connection:
        await superuser.execute("SELECT 'secret'")
        shown = await connection.fetchval(
            "SELECT query FROM pg_stat_activity WHERE pid = $1", superuser.get_server_pid()
        )
    assert shown == "<insufficient privilege>"


# --- what it may ----------------------------------------------------------------------------------------------------


async def test_data_can_be_used(neighbours: Neighbours) -> None:
    """Reading and writing rows, sequences, views, and COPY through the client."""
    async with neighbours.tenant() as connection:
        note = await connection.fetchval("INSERT INTO notes (body) VALUES ('a') RETURNING id")
        await connection.execute("UPDATE notes SET body = 'b' WHERE id = $1", note)
        await connection.copy_records_to_table("notes", columns=["body"], records=[("c",), ("d",)])
        await connection.execute("SELECT setval('notes_id_seq', 100)")
        assert await connection.fetchval("SELECT count(*) FROM bodies") == 3
        await connection.execute("""INSERT INTO "odd ""schema"."odd ""table" (body) VALUES ('e')""")
        assert await connection.fetchval("SELECT version_num FROM alembic_version") == "0001"
        await connection.execute("DELETE FROM notes")


async def test_what_a_later_migration_adds_can_be_used(neighbours: Neighbours) -> None:
    """Tables, views, sequences and schemas that the owner makes after the tenant was created; but not changed."""
    async with neighbours.owning() as migration:
        await migration.execute("CREATE TABLE later (id bigserial, body text)")
        await migration.execute("CREATE SCHEMA later CREATE TABLE deeper (id int GENERATED BY DEFAULT AS IDENTITY)")
        await migration.execute("CREATE SEQUENCE later.numbers")
    async with neighbours.tenant() as connection:
        await connection.execute("INSERT INTO later (body) VALUES ('x'); INSERT INTO later.deeper DEFAULT VALUES")
        await connection.execute("UPDATE later SET body = 'y'; DELETE FROM later")
        assert await connection.fetchval("SELECT nextval('later.numbers')") == 1
        for statement in ("DROP TABLE later", "ALTER TABLE later.deeper ADD x int", "CREATE TABLE later.x ()"):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await connection.execute(statement)


async def test_the_roles_attributes(neighbours: Neighbours) -> None:
    """None but LOGIN, in no other role, with a limit on its connections."""
    async with neighbours.server.connect() as connection:
        role = await connection.fetchrow("SELECT * FROM pg_roles WHERE rolname = $1", neighbours.role)
        member = await connection.fetchval(
            "SELECT count(*) FROM pg_auth_members WHERE member = $1::regrole OR roleid = $1::regrole", neighbours.role
        )
    flags = ("super", "inherit", "createrole", "createdb", "canlogin", "replication", "bypassrls")
    assert {flag for flag in flags if role[f"rol{flag}"]} == {"canlogin"}
    assert role["rolconnlimit"] == 5
    assert member == 0


async def test_the_connection_limit_holds(neighbours: Neighbours) -> None:
    """PostgreSQL refuses the connection after the last one that the tier allows."""
    url = neighbours.server.url(neighbours.role, user=neighbours.role, password=neighbours.password)
    opened = [await asyncpg.connect(url, timeout=10) for _ in range(5)]
    try:
        with pytest.raises(asyncpg.TooManyConnectionsError):
            await asyncpg.connect(url, timeout=10)
    finally:
        for connection in opened:
            await connection.close()


SEEN = [
    "SELECT * FROM pg_stat_activity",
    "SELECT * FROM pg_stat_get_activity(NULL)",
    "SELECT * FROM pg_stat_database",
    "SELECT * FROM pg_locks",
    "SELECT * FROM pg_lock_status()",
    "SELECT * FROM pg_db_role_setting",
]


async def test_what_a_tenant_sees_of_others_can_be_taken_away(neighbours: Neighbours) -> None:
    """By the statements that the page on security has. Its data can be used as before."""
    page = (Path(__file__).parents[2] / "docs" / "security.md").read_text("utf-8")
    statements = page.partition("```sql\n")[2].partition("```")[0]
    async with neighbours.tenant() as connection, neighbours.server.connect(neighbours.role) as superuser:
        other = await connection.fetch("SELECT usename, query FROM pg_stat_activity WHERE usename <> current_user")
        assert {row["query"] for row in other} == {"<insufficient privilege>"}
        for query in SEEN:
            await connection.fetch(query)
        await superuser.execute(statements)
        try:
            for query in SEEN:
                with pytest.raises(asyncpg.InsufficientPrivilegeError):
                    await connection.fetch(query)
            async with neighbours.tenant() as another:
                assert await another.fetchval("SELECT count(*) FROM notes") >= 0
        finally:
            await superuser.execute(statements.replace("REVOKE", "GRANT").replace("FROM", "TO"))
