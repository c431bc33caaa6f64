"""Control databases with their tables, cloned from one that the migrations have made: a fifth of a migration's cost."""

from __future__ import annotations

from tenancy_orm.control.database import ControlDatabase
from tests.support.postgres import Postgres

# Each server's template by the server's URL. Each worker has its own: a clone needs a template without connections.
_templates: dict[str, str] = {}


async def create_control_database(postgres: Postgres, name: str) -> str:
    """Create a control database at the newest revision and return its URL.

    It is an installation of its own, which nothing has opened yet: the role that reads for a tenant is not there.
    """
    template = _templates.get(postgres.admin_url)
    if template is None:
        template = _templates[postgres.admin_url] = await _create_template(postgres)
    url = await postgres.create_database(name, template=template)
    async with postgres.connect(name) as connection:
        await connection.execute("UPDATE tenancy.installation SET id = gen_random_uuid(), created_at = now()")
    return url


async def _create_template(postgres: Postgres) -> str:
    name = postgres.new_name("template")
    control = ControlDatabase(await postgres.create_database(name))
    try:
        # not "head", at which it makes the role that reads for a tenant: its name holds the installation's id
        await control.upgrade("heads")
    finally:
        await control.close()
    return name
