"""The settings that every tenant's connection starts with, whatever the tenant's role has set for itself.

A role may run ``ALTER ROLE CURRENT_USER SET search_path = ...``, and every later connection of that role starts with
that value. A startup parameter overrides it, and ``RESET ALL`` returns to the startup parameter; a ``SET`` after the
login would be undone by ``RESET ALL``, and would cost a round trip. So each connection sends the server's own values.

Pinned are the settings that SQLAlchemy and asyncpg rely on, those that change the meaning of a statement, and those
that keep a statement from working at all. Not pinned are:

- ``temp_file_limit`` and ``work_mem``, which an administrator sets for the tenants' roles (the bounds on transactions
  are set for them too, and are pinned to the same values);
- settings that only a superuser may change, so that no tenant's role can: ``session_preload_libraries``,
  ``lc_messages``, ``session_replication_role``;
- the planner's settings (``enable_*``, ``jit``, costs): they change how fast an answer comes, not the answer;
- ``client_encoding``, which asyncpg sends by itself, and ``escape_string_warning`` and ``client_min_messages``, which
  change what the server logs and sends as notices, not the answer.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterable, Mapping
from typing import Final

import asyncpg

from ..postgres.connections import Connection
from ..postgres.dsn import Dsn

PINNED: Final = frozenset(
    {
        # what SQLAlchemy reads once and assumes for every connection
        "default_transaction_isolation",
        "standard_conforming_strings",
        "search_path",
        # how literals are read, and how values are written as text
        "backslash_quote",
        "bytea_output",
        "datestyle",
        "extra_float_digits",
        "intervalstyle",
        "lc_monetary",
        "lc_numeric",
        "lc_time",
        "quote_all_identifiers",  # reflection reads what pg_get_constraintdef writes
        "timezone",
        "timezone_abbreviations",
        "xmlbinary",
        "xmloption",
        # what gives the same statement another meaning
        "array_nulls",
        "default_text_search_config",
        "gin_fuzzy_search_limit",  # a search leaves rows out
        "row_security",
        "transform_null_equals",
        # what keeps a statement, or a new table, from working, or a commit from lasting
        "default_table_access_method",
        "default_tablespace",
        "default_transaction_deferrable",
        "default_transaction_read_only",
        "exit_on_error",
        "idle_session_timeout",
        "local_preload_libraries",
        "lock_timeout",
        "statement_timeout",
        "synchronous_commit",
        "temp_tablespaces",
    }
)
"""In lower case, as PostgreSQL compares them. ``role``, which no view lists, is pinned to ``none`` as well."""

PINNED_WHERE_KNOWN: Final = frozenset({"restrict_nonsystem_relation_kind", "transaction_timeout"})
"""Further pinned settings, which not every PostgreSQL version has."""

TRACKED: Final = frozenset({"datestyle", "standard_conforming_strings", "timezone"})
"""Pinned settings that PgBouncer keeps for each of its clients: it takes them at a login, and sets them on each
connection to PostgreSQL that it gives to that client. It refuses others unless it is configured to do otherwise."""

BOUNDS: Final = ("idle_in_transaction_session_timeout", "transaction_timeout")
"""Bounds that an administrator sets for tenants' roles. A role that set them very low would lose its connections."""

# values from other sources are those of the administrator's role, or of the database that it has connected to
_SERVERS_OWN = frozenset({"default", "environment variable", "configuration file", "command line", "global"})
_READ = (
    "SELECT s.name, s.setting, s.boot_val, s.source FROM pg_catalog.pg_settings AS s "
    "WHERE pg_catalog.lower(s.name) OPERATOR(pg_catalog.=) ANY ($1::pg_catalog.text[]) "
    # a GRANT SET may let a role change a superuser's setting, but PostgreSQL would refuse it as a startup parameter
    "AND s.context OPERATOR(pg_catalog.=) 'user'"
)
_READ_FILES = "SELECT f.name, f.setting FROM pg_catalog.pg_file_settings AS f WHERE f.applied"
_IDENTIFIER = re.compile(r'\s*(?:"((?:[^"]|"")*)"|([^",\s][^",]*?))\s*(?:,|$)')


async def read_settings(
    connection: Connection, bounds: Mapping[str, str], *, named: Collection[str] | None = None
) -> dict[str, str]:
    """Return the server's own values of the pinned settings, by name.

    Args:
        connection: An administrative one. The settings of its role and of its database do not count; those in the
            server's URL do.
        bounds: Values of ``BOUNDS`` in tenants' roles, which override the server's.
        named: Which of the settings that the connection has started with count as the server's; all where None.

    Raises:
        asyncpg.PostgresError: the server refuses.
    """
    values, hidden = {"role": "none"}, set()
    for row in await connection.fetch(_READ, [*PINNED, *PINNED_WHERE_KNOWN, *BOUNDS]):
        name = row["name"].lower()
        if name in bounds:
            values[name] = bounds[name]
            continue
        ours = row["source"] == "client" and (named is None or name in named)
        if row["source"] in _SERVERS_OWN or ours:
            values[name] = str(row["setting"])
        else:
            hidden.add(name)
            values[name] = str(row["boot_val"] or "")
    if hidden:
        values.update(await _read_files(connection, hidden))
    return values


async def _read_files(connection: Connection, names: set[str]) -> dict[str, str]:
    """The values in the configuration files of settings that the administrator's role or database overrides."""
    try:
        rows = await connection.fetch(_READ_FILES)
    except asyncpg.InsufficientPrivilegeError:
        return {}  # only a superuser may read this view; otherwise PostgreSQL's own default is used
    return {row["name"].lower(): row["setting"] for row in rows if row["name"].lower() in names}


def named_in(dsn: Dsn) -> frozenset[str]:
    """The names of the settings in a server's DSN, as parameters or within ``options``; in lower case."""
    names = {name.lower() for name in (*dsn.settings, *dsn.parameters)}
    words = shlex.split(dsn.parameters.get("options", ""))
    for position, word in enumerate(words):
        if word == "-c" and position + 1 < len(words):
            names.add(_name_of(words[position + 1]))
        elif word.startswith(("-c", "--")):
            names.add(_name_of(word[2:]))
    return frozenset(names)


def _name_of(assignment: str) -> str:
    return assignment.partition("=")[0].replace("-", "_").lower()


def without(settings: Mapping[str, str], names: Iterable[str]) -> dict[str, str]:
    """The settings without those of these names."""
    taken = frozenset(names)
    return {name: value for name, value in settings.items() if name not in taken}


def default_schema(search_path: str) -> str:
    """The schema in which tables are created with this ``search_path``, if no schema has the role's name."""
    for quoted, plain in _IDENTIFIER.findall(search_path):
        name = str(quoted.replace('""', '"') if quoted else plain.lower())
        if name not in ("$user", "pg_temp"):
            return name
    return "public"


__all__ = [
    "BOUNDS",
    "PINNED",
    "PINNED_WHERE_KNOWN",
    "TRACKED",
    "default_schema",
    "named_in",
    "read_settings",
    "without",
]
