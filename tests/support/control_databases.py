"""Control databases with their tables, cloned from one that the migrations have made: a fifth of a migration's cost."""

from __future__ import annotations

from uuid import UUID

import asyncpg

from tenancy_orm.control.database import ControlDatabase
from tenancy_orm.control.names import Names
from tests.support.postgres import Postgres

# The names of an installation's templates, as its next control database knows them; by the installation's id.
_known_templates: dict[UUID, list[str]] = {}
_READ_TEMPLATES = "SELECT coalesce(json_agg(t), '[]')::text FROM tenancy.templates AS t WHERE name = ANY($1)"
_WRITE_TEMPLATES = "INSERT INTO tenancy.templates SELECT * FROM json_populate_recordset(NULL::tenancy.templates, $1)"

_TABLES_OF_TENANTS = """
SELECT array_agg(quote_ident(c.relname)) FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
WHERE a.attname = 'tenant_id' AND c.relnamespace = 'tenancy'::regnamespace AND c.relkind = 'r' AND NOT c.relispartition
"""

# The template of a server, an owner and a lasting installation, by the server's URL, the owner's name and the
# installation's id. Each worker has its own: a clone needs a template without connections.
_templates: dict[tuple[str, str | None, UUID | None], str] = {}


async def create_control_database(
    postgres: Postgres,
    name: str,
    *,
    names: Names | None = None,
    lasts: bool = False,
    owner: tuple[str, str] | None = None,
) -> str:
    """Create a control database at the newest revision, which nothing has opened yet, and return its URL.

    Args:
        postgres: Its server.
        name: Its name.
        names: Of an installation, which gets its viewer role; a new one without that role where None.
        lasts: Whether further tests use that installation, so that a template of its own pays.
        owner: Name and password of the role that owns the database and its tables, and is in the URL; the superuser
            where None.
    """
    user, password = owner or (None, None)
    template = await _find_template(postgres, user, password)
    if lasts and names is not None:
        key = postgres.admin_url, user, names.installation
        if key not in _templates:
            made = postgres.new_name("template")
            await create_control_database(postgres, made, names=names, owner=owner)
            _templates[key] = made
        await postgres.create_database(name, template=_templates[key], owner=user)
        return postgres.url(name, user=user, password=password)
    await postgres.create_database(name, template=template, owner=user)
    await _name_installation(postgres, name, None if names is None else names.installation)
    if names is not None:
        await _upgrade(postgres.url(name, user=user, password=password), "head", names.prefix)
    return postgres.url(name, user=user, password=password)


async def drop_tenants(postgres: Postgres, control_url: str, prefix: str, names: Names) -> None:
    """Drop what a test has created, and keep for the next one what makes creations quick: roles, and templates.

    Args:
        postgres: The server.
        control_url: The control database, the superuser's URL.
        prefix: What all names begin with, those of other installations of the test too.
        names: Of the installation that the next test goes on with.
    """
    kept = sorted(await postgres.drop_all(prefix, but=names))
    if kept == _known_templates.get(names.installation, []):
        return
    known = []
    rows = "[]"
    try:
        async with postgres.connect(postgres.database_of(control_url)) as connection:
            rows = await connection.fetchval(_READ_TEMPLATES, kept)
            known = kept
    except asyncpg.PostgresError:  # the test has dropped it, or its tables
        pass
    _known_templates[names.installation] = known
    for (url, _user, installation), template in _templates.items():
        if (url, installation) == (postgres.admin_url, names.installation):
            async with postgres.connect(template) as connection:
                await connection.execute("DELETE FROM tenancy.templates")
                await connection.execute(_WRITE_TEMPLATES, rows)


async def forget_tenants(postgres: Postgres, control_url: str) -> None:
    """Delete every tenant from a control database, and what it knows of it but for the audit log."""
    async with postgres.connect(postgres.database_of(control_url)) as connection:
        names = await connection.fetchval(_TABLES_OF_TENANTS)
        deletions = "".join(f"DELETE FROM tenancy.{name};" for name in (*names, "tenants"))
        # no trigger refuses it, and no foreign key prescribes an order
        await connection.execute(f"SET session_replication_role = replica; {deletions}")


async def _find_template(postgres: Postgres, user: str | None, password: str | None) -> str:
    key = postgres.admin_url, user, None
    if key not in _templates:
        _templates[key] = await _create_template(postgres, user, password)
    return _templates[key]


async def _name_installation(postgres: Postgres, database: str, installation: UUID | None) -> None:
    async with postgres.connect(database) as connection:
        await connection.execute(
            "UPDATE tenancy.installation SET id = coalesce($1, gen_random_uuid()), created_at = now()", installation
        )


async def _create_template(postgres: Postgres, user: str | None, password: str | None) -> str:
    name = postgres.new_name("template")
    await postgres.create_database(name, owner=user)
    # not "head", at which it makes the role that reads for a tenant: its name holds the installation's id
    await _upgrade(postgres.url(name, user=user, password=password), "heads")
    return name


async def _upgrade(url: str, revision: str, prefix: str = "tenancy") -> None:
    control = ControlDatabase(url, name_prefix=prefix)
    try:
        await control.upgrade(revision)
    finally:
        await control.close()
