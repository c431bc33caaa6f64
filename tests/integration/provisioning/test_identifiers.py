"""Identifiers and constants with any content are quoted correctly in every statement."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tenancy_orm.postgres.quoting import MAX_IDENTIFIER_BYTES
from tenancy_orm.provisioning.server_objects import databases, removal, roles
from tenancy_orm.provisioning.server_objects.scram import scram_verifier
from tenancy_orm.secrets.keyring import new_password
from tests.support.postgres import Postgres
from tests.support.provisioning import ScriptSchema, Workshop, set_marker

HOSTILE = [
    'x"; DROP ROLE postgres; --',
    "x'; DROP ROLE postgres; --",
    "\\'; DROP ROLE postgres; --",
    "$$; DROP ROLE postgres; $$",
    "%s %(x)s {x} :x $1",
    "Ünïcödé ☃ \u202e\n\t",
    "SELECT",
    "ä" * 31,
]


@pytest.fixture
async def admin(postgres: Postgres) -> AsyncIterator[Any]:
    """A superuser's connection."""
    async with postgres.connect() as connection:
        yield connection


async def all_superusers(postgres: Postgres) -> list[tuple[Any, ...]]:
    """All but those that tests make, which other processes of the test run do on the same server."""
    of_tests = f"^([a-z]+_{postgres.run}_|w[0-9]+x)"
    return await postgres.administer("SELECT rolname FROM pg_roles WHERE rolname !~ %s AND rolsuper", (of_tests,))


@pytest.mark.parametrize("hostile", HOSTILE)
async def test_a_hostile_name_is_only_a_name(postgres: Postgres, admin: Any, workshop: Workshop, hostile: str) -> None:
    """Creating, changing and dropping objects of this name changes nothing else on the server."""
    name = f"{postgres.new_name()[-10:]} {hostile}".encode()[:MAX_IDENTIFIER_BYTES].decode(errors="ignore")
    superusers = await all_superusers(postgres)
    password = new_password()
    await roles.create_owner(admin, f"{name[:30]} owner")
    await roles.create(admin, name, verifier=scram_verifier(password), connection_limit=2)
    await databases.create(admin, name, template="template0", owner=f"{name[:30]} owner", open_to_connections=False)
    try:
        await databases.open_to_role(admin, name, role=name)
        await set_marker(admin, name, hostile)
        state = await databases.state(admin, name)
        assert state is not None and (state.name, state.comment) == (name, hostile)
        connection = await asyncpg.connect(postgres.url(), database=name, user=name, password=password)
        assert await connection.fetchrow("SELECT current_database(), current_user") == (name, name)
        await connection.close()
        await roles.set_connection_limit(admin, name, 1)
        await databases.complete_template(admin, name, comment=hostile)
    finally:
        deadline = asyncio.get_running_loop().time() + 10
        await removal.remove(admin, workshop.blockers(), workshop.names, database=name, role=name, deadline=deadline)
        await roles.drop(admin, f"{name[:30]} owner")
    assert await databases.state(admin, name) is None
    assert await all_superusers(postgres) == superusers


async def test_hostile_table_names_are_granted_and_nothing_else(workshop: Workshop) -> None:
    """Names of the application's tables are quoted by PostgreSQL itself."""
    quoted = ['"' + name.replace('"', '""') + '"' for name in HOSTILE]
    script = "".join(f"CREATE SCHEMA {q}; CREATE TABLE {q}.{q} ({q} serial);" for q in quoted)
    provisioner = workshop.provisioner_of(ScriptSchema(script))
    tenant = await provisioner.create(workshop.draft("acme"), key=None)
    async with workshop.connect(tenant) as connection:
        for q in quoted:
            await connection.execute(f"INSERT INTO {q}.{q} DEFAULT VALUES")
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await connection.execute(f"DROP TABLE {q}.{q}")


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=200))
def test_any_marker_is_read_back_as_it_was(postgres: Postgres, marker: str) -> None:
    """A marker with any content is read back unchanged."""

    async def there_and_back() -> str | None:
        async with postgres.connect() as connection, connection.transaction():
            name = await connection.fetchval("SELECT current_database()")
            await set_marker(connection, name, marker)
            state = await databases.state(connection, name)
            assert state is not None
            await connection.execute("ROLLBACK; BEGIN")
            return state.comment

    # PostgreSQL keeps no empty comment
    assert asyncio.run(there_and_back()) == (marker or None)
