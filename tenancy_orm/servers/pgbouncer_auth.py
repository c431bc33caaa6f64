"""The role of a PgBouncer, and the function by which it asks for the secrets of tenants' roles."""

from __future__ import annotations

from typing import Final

from ..control.names import Names
from ..postgres.quoting import quote_identifier, quote_literal

AUTH_DATABASE_SINCE: Final = (1, 19)
"""The first version that asks ``auth_query`` in one database (``auth_dbname``), and not in the client's own."""

# What the function returns, and the query of a version without ``auth_dbname``: it runs in a tenant's database, where
# the tenant may have operators and functions of its own, so every name is qualified.
_ROW_OF = (
    "SELECT r.rolname::pg_catalog.text, r.rolpassword FROM pg_catalog.pg_authid AS r "
    "WHERE r.rolname OPERATOR(pg_catalog.=) {user} AND r.rolcanlogin AND NOT r.rolsuper "
    "AND r.rolname::pg_catalog.text OPERATOR(pg_catalog.~) {pattern} "
    "AND (r.rolvaliduntil IS NULL OR r.rolvaliduntil OPERATOR(pg_catalog.>) pg_catalog.clock_timestamp())"
)
_ASK = "SELECT name, secret FROM {function}($1)"

_SQL = """\
-- Run it once as a superuser in the database {database} of server {server}: psql -f auth_query.sql {database}
-- {user} reads the secrets of this installation's tenants' roles, by a function, and nothing else.
BEGIN;
CREATE ROLE {user} LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOINHERIT NOREPLICATION NOBYPASSRLS CONNECTION LIMIT 10
    PASSWORD {verifier};
GRANT CONNECT ON DATABASE {database} TO {user};
CREATE SCHEMA {schema};
REVOKE ALL ON SCHEMA {schema} FROM PUBLIC;
GRANT USAGE ON SCHEMA {schema} TO {user};
CREATE FUNCTION {function}(username pg_catalog.text, OUT name pg_catalog.text, OUT secret pg_catalog.text)
    RETURNS SETOF record LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $function$
    {secret}
$function$;
REVOKE ALL ON FUNCTION {function}(pg_catalog.text) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION {function}(pg_catalog.text) TO {user};
COMMIT;
"""

_SQL_BEFORE = """\
-- Run it once as a superuser: psql -f auth_query.sql {database}
-- PgBouncer {version} asks auth_query in the client's own database. No other role may connect there but a superuser and
-- the owner: so {user} is a superuser. From 1.19 on it is a role without rights; prefer that.
CREATE ROLE {user} LOGIN SUPERUSER CONNECTION LIMIT -1 PASSWORD {verifier};
"""


def auth_user(names: Names) -> str:
    """The role that asks for secrets, which is also the schema of its function."""
    return f"{names.stem}_pgbouncer"


def function_name(names: Names) -> str:
    """The function by which it asks, with its schema, quoted."""
    return f"{quote_identifier(auth_user(names))}.secret_of"


def auth_query(names: Names, version: tuple[int, int]) -> str:
    """Return ``auth_query``: what PgBouncer asks for the secret of a role, which is its parameter."""
    if version < AUTH_DATABASE_SINCE:
        return _row_of(names, "$1")
    return _ASK.format(function=function_name(names))


def auth_script(names: Names, version: tuple[int, int], *, server: str, database: str, verifier: str) -> str:
    """Return ``auth_query.sql``, which makes the role, and the function where there is one.

    Args:
        names: The installation's names.
        version: PgBouncer's.
        server: The server's name.
        database: Its maintenance database, in which the function is made.
        verifier: The SCRAM secret of the role.
    """
    user = quote_identifier(auth_user(names))
    return (_SQL if version >= AUTH_DATABASE_SINCE else _SQL_BEFORE).format(
        version=".".join(map(str, version)),
        server=server,
        database=quote_identifier(database),
        user=user,
        schema=user,
        function=function_name(names),
        verifier=quote_literal(verifier),
        secret=_row_of(names, "username"),
    )


def _row_of(names: Names, user: str) -> str:
    """Return the query of a role's name and secret: of a tenant's role that can log in, and of no other."""
    return _ROW_OF.format(user=user, pattern=quote_literal(f"^{names.tenant_stem}[0-9a-f]{{32}}$"))


__all__ = ["AUTH_DATABASE_SINCE", "auth_query", "auth_script", "auth_user", "function_name"]
