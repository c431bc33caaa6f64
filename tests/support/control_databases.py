"""Control databases with their tables, cloned from one that the migrations have made: a fifth of a migration's cost."""

from __future__ import annotations

from uuid import UUID

from tenancy_orm.control.database import ControlDatabase
from tests.support.postgres import Postgres

# The template of a server and an owner, by the server's URL and the owner's name. Each worker has its own: a clone
# needs a template without connections.
_templates: dict[tuple[str, str | None], str] = {}


async def create_control_database(
    postgres: Postgres, name: str, *, installation: UUID | None = None, owner: tuple[str, str] | None = None
) -> str:
    """Create a control database at the newest revision, which nothing has opened yet, and return its URL.

    Args:
        postgres: Its server.
        name: Its name.
        installation: The id of an installation whose owner role and templates are there already; a new one where None.
        owner: Name and password of the role that owns the database and its tables, and is in the URL; the superuser
            where None.
    """
    user, password = owner or (None, None)
    template = _templates.get((postgres.admin_url, user))
    if template is None:
        template = _templates[postgres.admin_url, user] = await _create_template(postgres, user, password)
    await postgres.create_database(name, template=template, owner=user)
    async with postgres.connect(name) as connection:
        await connection.execute(
            "UPDATE tenancy.installation SET id = coalesce($1, gen_random_uuid()), created_at = now()", installation
        )
    return postgres.url(name, user=user, password=password)


async def _create_template(postgres: Postgres, user: str | None, password: str | None) -> str:
    name = postgres.new_name("template")
    await postgres.create_database(name, owner=user)
    control = ControlDatabase(postgres.url(name, user=user, password=password))
    try:
        # not "head", at which it makes the role that reads for a tenant: its name holds the installation's id
        await control.upgrade("heads")
    finally:
        await control.close()
    return name
