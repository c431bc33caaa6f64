"""Keeps a tenant's role from queueing for locks on the catalogue that all databases share.

CREATE RULE and CREATE TRIGGER wait for their lock on a table before PostgreSQL asks whether the role may do that. With
a second connection that has read ``pg_roles`` in an open transaction, ``CREATE RULE ... ON pg_authid`` waits for ever;
and every login to the server, whoever it is, waits behind it. An event trigger refuses the command before that.

Only a superuser can create an event trigger. It is put into the template, so every new tenant has it.
"""

from __future__ import annotations

from ..postgres.connections import Connection
from ..postgres.quoting import quote_identifier, quote_literal
from . import roles

NAME = "tenancy_guard"


async def install(connection: Connection, owner: str) -> None:
    """Refuse these commands to whoever is not a member of ``owner``. Does nothing where this administrator may not.

    Args:
        connection: To a template under construction, as the administrator.
        owner: The owner of tenants' databases.
    """
    if not await roles.is_superuser(connection):
        return
    name = quote_identifier(NAME)
    # where a dump was restored without the installation's roles, there is nobody to keep out
    body = (
        f"BEGIN IF to_regrole({quote_literal(quote_identifier(owner))}) IS NOT NULL "
        f"AND NOT pg_has_role(session_user, {quote_literal(owner)}::name, 'MEMBER') THEN "
        "RAISE EXCEPTION 'permission denied for %', tg_tag USING ERRCODE = 'insufficient_privilege'; END IF; END"
    )
    await connection.execute(
        f"CREATE SCHEMA {name}; "
        f"CREATE FUNCTION {name}.refuse() RETURNS event_trigger LANGUAGE plpgsql "
        f"SET search_path = pg_catalog, pg_temp AS {quote_literal(body)}; "
        f"CREATE EVENT TRIGGER {name} ON ddl_command_start WHEN TAG IN ('CREATE RULE', 'CREATE TRIGGER') "
        f"EXECUTE FUNCTION {name}.refuse()"
    )
