"""An event trigger that keeps tenants' roles from queueing for locks on the catalogue that all databases share.

CREATE RULE and CREATE TRIGGER wait for their lock on a table before PostgreSQL checks whether the role may run them. If
a second connection has read ``pg_roles`` in an open transaction, ``CREATE RULE ... ON pg_authid`` waits for ever, and
every login to the server waits behind it. The event trigger refuses the command before that.

Only a superuser can create an event trigger. It is part of the template, so every new tenant has it.
"""

from __future__ import annotations

from ...postgres.connections import Connection
from ...postgres.quoting import quote_identifier, quote_literal
from ..server_objects import roles

NAME = "tenancy_guard"


async def install(connection: Connection, owner: str) -> None:
    """Refuse these commands to roles that are not members of ``owner``. Does nothing if this is not a superuser.

    It replaces what is there.

    Args:
        connection: An administrative one, to a template that is being built, or to a tenant's database.
        owner: The owner of tenants' databases.
    """
    if not await roles.is_superuser(connection):
        return
    name = quote_identifier(NAME)
    await connection.execute(
        f"CREATE SCHEMA IF NOT EXISTS {name}; ALTER SCHEMA {name} OWNER TO CURRENT_USER; "
        f"CREATE OR REPLACE FUNCTION {name}.refuse() RETURNS event_trigger LANGUAGE plpgsql "
        f"SET search_path = pg_catalog, pg_temp AS {quote_literal(_body(owner))}; "
        f"ALTER FUNCTION {name}.refuse() OWNER TO CURRENT_USER; "
        f"DROP EVENT TRIGGER IF EXISTS {name}; "
        f"CREATE EVENT TRIGGER {name} ON ddl_command_start WHEN TAG IN ('CREATE RULE', 'CREATE TRIGGER') "
        f"EXECUTE FUNCTION {name}.refuse()"
    )


async def is_installed(connection: Connection, owner: str) -> bool:
    """Whether the database of ``connection`` has the event trigger as ``install`` makes it, and it is a superuser's."""
    return bool(await connection.fetchval(_IS_INSTALLED, NAME, _body(owner)))


_IS_INSTALLED = """
SELECT EXISTS (SELECT FROM pg_event_trigger t JOIN pg_proc p ON p.oid = t.evtfoid
  JOIN pg_namespace n ON n.oid = p.pronamespace JOIN pg_roles o ON o.oid = t.evtowner
  JOIN pg_roles f ON f.oid = p.proowner JOIN pg_roles s ON s.oid = n.nspowner
  WHERE t.evtname = $1 AND t.evtenabled = 'O' AND t.evtevent = 'ddl_command_start' AND p.prosrc = $2
    AND t.evttags @> ARRAY['CREATE RULE', 'CREATE TRIGGER'] AND o.rolsuper AND f.rolsuper AND s.rolsuper)
"""


def _body(owner: str) -> str:
    # if a dump was restored without the installation's roles, there is no tenant's role to refuse
    return (
        f"BEGIN IF to_regrole({quote_literal(quote_identifier(owner))}) IS NOT NULL "
        f"AND NOT pg_has_role(session_user, {quote_literal(owner)}::name, 'MEMBER') THEN "
        "RAISE EXCEPTION 'permission denied for %', tg_tag USING ERRCODE = 'insufficient_privilege'; END IF; END"
    )
