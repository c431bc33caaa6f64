"""Preparing a server: once, by any number of processes, and without blocking anybody's login."""

from __future__ import annotations

import asyncio
import secrets

import pytest

from tenancy_orm.errors import ProvisioningError, ServerUnavailableError, UnknownServerError
from tenancy_orm.provisioning.server_objects import databases, roles
from tests.support.postgres import Postgres
from tests.support.provisioning import Workshop, open_workshop


async def test_the_owner_cannot_log_in(workshop: Workshop) -> None:
    """It owns everything, so nobody may become it but the administrator."""
    await workshop.provisioner.prepare_server("default")
    async with workshop.admin() as connection:
        role = await connection.fetchrow("SELECT * FROM pg_roles WHERE rolname = $1", workshop.names.owner)
    assert not any(role[f"rol{right}"] for right in ("canlogin", "super", "createdb", "createrole", "replication"))
    assert not role["rolbypassrls"]


async def test_shared_databases_are_closed_to_public(workshop: Workshop) -> None:
    """PUBLIC has no rights on the control database, ``postgres`` and ``template1``."""
    await workshop.provisioner.prepare_server("default")
    async with workshop.admin() as connection:
        for name in (workshop.control.database, "postgres", "template1"):
            assert not await databases.is_open_to_public(connection, name)


async def test_preparing_again_writes_nothing(workshop: Workshop) -> None:
    """A prepared server is only read: the catalogue's rows stay the same."""
    query = (
        "SELECT xmin::text FROM pg_database WHERE datname IN ('postgres', 'template1', $1) "
        "UNION ALL SELECT xmin::text FROM pg_authid WHERE rolname = $2"
    )
    await workshop.provisioner.prepare_server("default")
    async with workshop.admin() as connection:
        rows = [await connection.fetch(query, workshop.control.database, workshop.names.owner)]
        await workshop.provisioner_of().prepare_server("default")
        rows.append(await connection.fetch(query, workshop.control.database, workshop.names.owner))
    assert len(rows[0]) == 4
    assert rows[0] == rows[1]


async def test_many_processes_can_prepare_at_once(workshop: Workshop) -> None:
    """Several processes prepare a server at once; none fails, and there is one owner role."""
    await asyncio.gather(*(workshop.provisioner_of().prepare_server("default") for _ in range(8)))
    async with workshop.admin() as connection:
        assert await roles.exists(connection, workshop.names.owner)


async def test_many_installations_can_prepare_one_server_at_once(own_server: Postgres, name_prefix: str) -> None:
    """They share ``postgres`` and ``template1``, in which PostgreSQL lets the slower of two writers fail (XX000)."""
    names = [own_server.new_name() for _ in range(4)]
    opened = [
        await open_workshop(
            control_url=await own_server.create_database(name),
            # another maintenance database, so that no advisory lock is shared
            admin_url=own_server.url(name),
            name_prefix=name_prefix,
        )
        for name in names
    ]
    try:
        for _ in range(5):
            async with own_server.connect() as connection:
                await connection.execute("GRANT CONNECT ON DATABASE postgres TO PUBLIC")
            await asyncio.gather(*(workshop.provisioner.prepare_server("default") for workshop in opened))
            async with own_server.connect() as connection:
                assert not await databases.is_open_to_public(connection, "postgres")
    finally:
        for workshop in opened:
            await workshop.close()


async def test_the_registry_of_another_server_is_left_alone(workshop: Workshop, own_server: Postgres) -> None:
    """On another server, a database with the control database's name is somebody else's."""
    await own_server.create_database(workshop.control.database)
    elsewhere = await open_workshop(
        control_url=workshop.config.control_url,
        admin_url=own_server.admin_url,
        name_prefix=workshop.config.name_prefix,
    )
    try:
        await elsewhere.provisioner.prepare_server("default")
        async with elsewhere.admin() as connection:
            assert await databases.is_open_to_public(connection, workshop.control.database)
    finally:
        await elsewhere.close()


async def test_an_administrator_without_rights_is_told_what_it_needs(postgres: Postgres, control_url: str) -> None:
    """The error names the missing privileges, and not only PostgreSQL's refusal."""
    name, password = postgres.new_name("nobody"), secrets.token_urlsafe(32)
    async with postgres.connect() as connection:
        await connection.execute(f"CREATE ROLE \"{name}\" LOGIN PASSWORD '{password}'")
    database = control_url.rsplit("/", 1)[1]
    opened = await open_workshop(
        control_url=control_url, admin_url=postgres.url(database, user=name, password=password), name_prefix="nobody"
    )
    try:
        with pytest.raises(ProvisioningError, match="needs CREATEDB and CREATEROLE") as caught:
            await opened.provisioner.prepare_server("default")
        assert caught.value.step == "prepare"
        assert password not in str(caught.value)
    finally:
        await opened.close()
        async with postgres.connect() as connection:
            await connection.execute(f'DROP ROLE "{name}"')


async def test_a_server_must_be_known_and_answer(workshop: Workshop) -> None:
    """An unknown server and one that does not answer raise the errors of routing."""
    with pytest.raises(UnknownServerError):
        await workshop.provisioner.prepare_server("elsewhere")
    opened = await open_workshop(
        control_url=workshop.config.control_url,
        admin_url="postgresql://nobody@127.0.0.1:1/postgres",
        name_prefix=workshop.config.name_prefix,
    )
    try:
        with pytest.raises(ServerUnavailableError):
            await opened.provisioner.prepare_server("default")
    finally:
        await opened.close()
