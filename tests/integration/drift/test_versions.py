"""The same schema on servers of different versions."""

from __future__ import annotations

from tenancy_orm.drift import Catalogue, catalogue
from tenancy_orm.drift.compare import compare
from tenancy_orm.postgres.quoting import quote_identifier
from tests.integration.drift.test_kinds import BASE
from tests.support.postgres import Postgres
from tests.support.provisioning import VERSIONS, running_server


async def test_fingerprints_are_equal_across_versions(postgres: Postgres) -> None:
    """Apart from views, which PostgreSQL 16 and later print in another way."""
    found: dict[int, Catalogue] = {}
    for version in VERSIONS:
        with running_server(version, postgres.worker) as server:
            async with server.connect() as connection:
                await connection.execute("CREATE ROLE owner; CREATE ROLE tenant")
                await connection.execute("CREATE DATABASE drift OWNER owner")
            async with server.connect("drift") as connection:
                await connection.execute("ALTER SCHEMA public OWNER TO owner; SET ROLE owner")
                await connection.execute(BASE.format(tenant=quote_identifier("tenant")))
                found[version] = await catalogue.read(connection, owner="owner", role="tenant")
    assert len(found) > 1
    newest = found[max(found)]
    assert {one.fingerprint for version, one in found.items() if version >= 16} == {newest.fingerprint}
    for one in found.values():
        assert {difference.name for difference in compare(newest, one)} <= {"public.totals", "public.cached"}
