"""Databases that become tenants where they are."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
import sqlalchemy as sa

from tenancy_orm.adoption.in_place import InPlace
from tenancy_orm.errors import AdoptionError, OperationStateError, ProvisioningError, TenantNotFoundError
from tenancy_orm.provisioning.creation import pipeline
from tenancy_orm.routing.marker import marker_text
from tests.integration.adoption.test_databases import OLD
from tests.support.fleet import Fleet
from tests.support.older_rows import turn_back
from tests.support.postgres import Postgres
from tests.support.provisioning import VERSIONS, running_server
from tests.support.sources import ForeignDatabase, foreign_database

RIGHTS = """
SELECT concat_ws(' ', kind, name, owner, a.grantee::regrole, a.privilege_type, a.is_grantable) FROM (
  SELECT 'table' AS kind, relname::text AS name, relowner::regrole AS owner,
         coalesce(relacl, acldefault(CASE relkind WHEN 'S' THEN 's' ELSE 'r' END::"char", relowner)) AS acl
    FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'v', 'S')
  UNION ALL SELECT 'function', oid::regprocedure::text, proowner::regrole,
                   coalesce(proacl, acldefault('f', proowner)) FROM pg_proc WHERE pronamespace = 'public'::regnamespace
  UNION ALL SELECT 'lock', oid::regprocedure::text, 0::regrole, coalesce(proacl, acldefault('f', proowner))
              FROM pg_proc WHERE proname = 'pg_advisory_lock'
  UNION ALL SELECT 'schema', nspname::text, nspowner::regrole, nspacl FROM pg_namespace WHERE nspname !~ '^pg_'
  UNION ALL SELECT 'default', defaclobjtype::text, defaclrole::regrole, defaclacl FROM pg_default_acl
  UNION ALL SELECT 'large object', oid::text, lomowner::regrole, coalesce(lomacl, acldefault('L', lomowner))
              FROM pg_largeobject_metadata
  UNION ALL SELECT 'database', datname::text, datdba::regrole, coalesce(datacl, acldefault('d', datdba))
              FROM pg_database WHERE datname = current_database()
) o, aclexplode(acl) a
UNION ALL SELECT concat('comment ', shobj_description(oid, 'pg_database'), ' ', datconnlimit) FROM pg_database
           WHERE datname = current_database()
UNION ALL SELECT 'row ' || n::text FROM notes n
UNION ALL SELECT 'event trigger ' || evtname FROM pg_event_trigger
ORDER BY 1
"""


@pytest.fixture
async def source(postgres: Postgres) -> AsyncIterator[ForeignDatabase]:
    """A database in which a reporting role has rights, with a large object, and a comment of its own."""
    async with foreign_database(postgres, OLD) as made:
        reporter = f"{made.name}_reporter"
        await postgres.administer(f'CREATE ROLE "{reporter}"')
        await made.execute(
            f'GRANT SELECT ON notes TO "{reporter}" WITH GRANT OPTION; GRANT UPDATE (body) ON notes TO "{reporter}"; '
            f'GRANT SELECT ON authors TO PUBLIC; GRANT CONNECT ON DATABASE "{made.name}" TO "{reporter}"; '
            f'ALTER DEFAULT PRIVILEGES GRANT SELECT ON TABLES TO "{reporter}"; '
            "REVOKE EXECUTE ON FUNCTION shout() FROM PUBLIC; SELECT lo_from_bytea(4711, 'large'); "
            f"COMMENT ON DATABASE \"{made.name}\" IS 'it''s ours'; "
        )
        await postgres.administer(f'ALTER DATABASE "{made.name}" CONNECTION LIMIT 17')
        yield made
        if await postgres.administer("SELECT FROM pg_database WHERE datname = %s", (made.name,)):
            await postgres.drop_database(made.name)
        await postgres.administer(f'DROP ROLE "{reporter}"')


async def test_a_database_becomes_a_tenant_where_it_is(fleet: Fleet, postgres: Postgres) -> None:
    """With its rows, its owner's and others' rights gone, and the missing revisions run."""
    adopt = fleet.tenancy.adoption.adopt
    async with foreign_database(postgres, OLD) as source:
        await source.execute("GRANT SELECT ON notes TO PUBLIC")
        looked = await fleet.tenancy.adoption.check("acme", source.url, in_place=True)
        assert looked.foreign_rights == ("PUBLIC has SELECT on TABLE public.notes",)
        with pytest.raises(AdoptionError, match=r"PUBLIC has SELECT on TABLE public\.notes.*--revoke"):
            await adopt("acme", source.url, in_place=True)
        async with postgres.connect(source.name) as connection:
            with pytest.raises(AdoptionError, match=r"sessions of .* are open in it"):
                await adopt("acme", source.url, in_place=True, revoke=True)
            await connection.execute("SELECT 1")
        report = await adopt("acme", source.url, in_place=True, revoke=True)
        assert report.tenant is not None and report.tenant.schema_revision == "0002" and report.notes == ()
        assert report.api_key is not None
        with pytest.raises(asyncpg.InvalidCatalogNameError):
            await asyncpg.connect(source.url)
        place = report.tenant.placement
        assert place is not None
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await asyncpg.connect(postgres.url(place.database, user=source.name, password=source.password))
    async with fleet.tenancy.transaction("acme") as session:
        row = sa.text("INSERT INTO notes (id, author_id, body) VALUES (99, 1, '!loud') RETURNING body, pinned")
        assert (await session.execute(row)).one() == ("!LOUD", False)
    assert (await fleet.migrations.drift()).ok
    assert (await fleet.provisioner.reconcile(check=True)).clean
    again = await adopt("acme", source.url, in_place=True)
    assert again.tenant is not None and again.tenant.id == report.tenant.id

    # a control database that is restored from when it was being taken over brings nothing back
    own = marker_text(fleet.tenancy.internals.control.installation, report.tenant.id)
    await turn_back(fleet.services.control, "acme", "taken", operations=True)
    with pytest.raises(OperationStateError, match=r"has become tenant 'acme' since.*run: tenancy reconcile"):
        await adopt("acme", source.url, in_place=True)
    mark = f'COMMENT ON DATABASE "{place.database}" IS '
    await postgres.administer(f"{mark}'{own}:replaced:default/another'")
    with pytest.raises(OperationStateError, match=r"default/another has replaced.*run: tenancy rebuild"):
        await adopt("acme", source.url, in_place=True)
    await postgres.administer(f"{mark}'{own}'")
    assert (await fleet.provisioner.reconcile(check=True)).finished == ("acme",)
    assert (await fleet.provisioner.reconcile()).finished == ("acme",)
    again = await adopt("acme", source.url, in_place=True)
    assert again.tenant is not None and again.tenant.id == report.tenant.id
    assert await fleet.fetch("acme", "SELECT body FROM notes WHERE id = 99") == [("!LOUD",)]
    assert await fleet.tenancy.operations.list(kinds=("adopt",), states=("running",)) == ()


async def test_what_fails_brings_it_back_to_how_it_was(
    fleet: Fleet, postgres: Postgres, source: ForeignDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Owners, rights, default rights, comment, limit and rows, whether or not it can be tried once more."""

    async def refuse(*_: Any, **__: Any) -> Any:
        raise ProvisioningError("it does not log in")

    names, before = fleet.tenancy.internals.provisioner.names, list[Any]()
    for owner in (names.owner, source.name):  # that of tenants' databases owns it before already, or somebody else
        await postgres.administer(f'ALTER DATABASE "{source.name}" OWNER TO "{owner}"')
        before = await source.fetch(RIGHTS)
        with monkeypatch.context() as patch:
            patch.setattr(pipeline, "prove", refuse)
            with pytest.raises(ProvisioningError, match="does not log in"):
                await fleet.tenancy.adoption.adopt("acme", source.url, in_place=True, revoke=True)
        assert await source.fetch(RIGHTS) == before
    with pytest.raises(TenantNotFoundError):
        await fleet.tenancy.tenants.get("acme")
    assert (await fleet.provisioner.reconcile(check=True)).clean
    await source.execute("INSERT INTO authors (name) VALUES ('its owner still works')")

    # code that comes between the look and the moment from which nobody can change it any more
    original = InPlace.take

    async def attacked(self: InPlace, *given: Any, **options: Any) -> Any:
        await source.execute(
            "CREATE FUNCTION late() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS 'BEGIN RETURN NULL; END'"
        )
        return await original(self, *given, **options)

    with monkeypatch.context() as patch:
        patch.setattr(InPlace, "take", attacked)
        with pytest.raises(AdoptionError, match=r"function public\.late\(\)"):
            await fleet.tenancy.adoption.adopt("acme", source.url, in_place=True, revoke=True)
    await source.execute("DROP FUNCTION late()")
    assert await source.fetch(RIGHTS) == before
    report = await fleet.tenancy.adoption.adopt("acme", source.url, in_place=True, revoke=True)
    assert report.tenant is not None
    assert await fleet.fetch("acme", "SELECT convert_from(lo_get(4711), 'UTF8')") == [("large",)]
    await fleet.tenancy.tenants.delete("acme")
    await fleet.tenancy.tenants.purge("acme")


async def test_what_is_nobodys_own_is_refused(fleet: Fleet, postgres: Postgres) -> None:
    """Shared databases, the control database, a tenant's, and a database of another server."""
    adopt = fleet.tenancy.adoption.adopt
    await fleet.create("globex")
    for url, reason in (
        (postgres.url("postgres"), "is shared by server"),
        (postgres.url("template1"), "is shared by server"),
        (fleet.tenancy.config.control_url, "control database"),
        (postgres.url(fleet.database("globex")), "the database of tenant 'globex' already"),
    ):
        with pytest.raises(AdoptionError, match=reason):
            await adopt("acme", url, in_place=True, at="0001")
    with running_server(VERSIONS[-1], postgres.worker) as other:
        async with foreign_database(other, OLD) as elsewhere:
            with pytest.raises(AdoptionError, match="on none of the installation's servers"):
                await adopt("acme", elsewhere.url, in_place=True)
