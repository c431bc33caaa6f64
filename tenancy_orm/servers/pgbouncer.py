"""The configuration of a PgBouncer for tenants' sessions."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from ..config import TenancyConfig
from ..control.names import Names
from ..errors import ConfigurationError
from ..postgres.dsn import DEFAULT_PORT, Dsn
from ..postgres.quoting import quote_literal
from .pgbouncer_auth import AUTH_DATABASE_SINCE, auth_query, auth_script, auth_user
from .settings import TRACKED

CONSOLE_PORT: Final = 6432
PREPARED_SINCE: Final = (1, 21)
"""The first version that knows prepared statements in transaction mode."""

_AUTH_ENTRY: Final = "tenancy_auth"  # in [databases]; not in [pgbouncer], so that no tenant's database has this name
_LEAST_CLIENTS: Final = 1_000
_RESET: Final = "DISCARD ALL"
_QUERY_BYTES: Final = 480  # of connect_query: 1.18 closes the connection where it has more than about 500
_PLAIN: Final = re.compile(r"[0-9]+|hex|postgres|local")
# the settings that matter most where a role has given itself others
_FIRST: Final = (
    "search_path",
    "default_transaction_isolation",
    "default_transaction_read_only",
    "row_security",
    "statement_timeout",
    "lock_timeout",
    "idle_in_transaction_session_timeout",
    "transaction_timeout",
    "transform_null_equals",
    "bytea_output",
    "intervalstyle",
    "extra_float_digits",
    "default_transaction_deferrable",
    "synchronous_commit",
)
_LISTS: Final = frozenset({"search_path", "temp_tablespaces"})
# PgBouncer sets the first ones for each client; the last one can only be given at the login
_NOT_SET: Final = TRACKED | {"role", "application_name", "local_preload_libraries"}

_INI = """\
; PgBouncer {version} and later, for the tenants of server {server}; made by: tenancy servers pgbouncer
; Then: tenancy servers update {server} --tenants 'postgresql://HOST:{listen}?statement_cache_size=0'
; (statement_cache_size=0 says at once that a pooler answers; without it the first login of each process finds out)

[databases]
{auth_entry}; every other database, by its own name. PostgreSQL lets a tenant's role CONNECT to its own database alone.
; PgBouncer takes few startup parameters. So it sets them itself on each of its connections, and no role overrides them
; by ALTER ROLE; they are the server's values of the day that this file was made. Left out, since there is little room:
; {left_out}
* = host={host} port={port} connect_query='{settings}'

[pgbouncer]
listen_addr = *
listen_port = {listen}
logfile = /var/log/postgresql/pgbouncer.log
pidfile = /var/run/postgresql/pgbouncer.pid

; transactions of one tenant share its connections; "statement" would refuse BEGIN, and "session" saves few connections
pool_mode = transaction

; the secret of a tenant's role comes from PostgreSQL, and PgBouncer logs in with the client's proof: it has no password
auth_type = scram-sha-256
auth_file = {directory}/userlist.txt
auth_user = {user}
auth_query = {query}
{auth_database}
; a pool is one tenant's. Its role may have {least} connections (the smallest connection_limit of the tiers{shared})
default_pool_size = {pool}
max_db_connections = {pool}
min_pool_size = 0
reserve_pool_size = 0
; PgBouncer has no limit over all databases: {pool} times as many tenants as are busy. The server accepts {accepted};
; so what is idle is closed soon, and more than {busy} busy tenants at once may be refused (53300)
server_idle_timeout = 30
; the processes' pools: {processes} times pool.max_connections ({each}); each client needs a file descriptor
max_client_conn = {clients}
; a client waits no longer for a connection than pool.checkout_timeout
query_wait_timeout = {wait}
; a tenant that is activated again waits for as long after a login that was refused
server_login_retry = 1

; asked for in session mode alone. What a transaction leaves behind (SET, advisory locks, temporary tables) the next
; one of the same tenant finds; server_reset_query_always = 1 resets after each, for a round trip
server_reset_query = {reset}
server_reset_query_always = 0

; what is sent all the same: connect_query sets it
ignore_startup_parameters = {ignored}
{prepared}
; the console (SHOW CONFIG, SHOW POOLS), which "tenancy servers pgbouncer --check --console" reads
stats_users = {user}

; over a network: client_tls_sslmode = require, with client_tls_key_file and client_tls_cert_file
{tls}"""

_PREPARED = """\
; the package prepares nothing under a name behind a pooler
max_prepared_statements = 0
"""


@dataclass(frozen=True, slots=True)
class PgBouncerFiles:
    """What a PgBouncer needs.

    Attributes:
        ini: ``pgbouncer.ini``.
        sql: ``auth_query.sql``: the role and the function, to be run once by a superuser.
        userlist: ``userlist.txt``: the role's password, which PgBouncer needs in the clear.
        pool_size: ``default_pool_size``.
    """

    ini: str
    sql: str
    userlist: str
    pool_size: int

    def __repr__(self) -> str:
        """Leave the password out."""
        return f"<PgBouncerFiles pool_size={self.pool_size}>"


def parse_version(text: str) -> tuple[int, int]:
    """Read ``1.18`` or ``1.25.2``.

    Raises:
        ConfigurationError: it is neither, or older than 1.14, which cannot pass SCRAM on.
    """
    parts = text.split(".")
    if len(parts) < 2 or not all(part.isdecimal() for part in parts):
        raise ConfigurationError(f"{text!r} is not a version of PgBouncer, such as 1.25")
    version = (int(parts[0]), int(parts[1]))
    if version < (1, 14):
        raise ConfigurationError(f"PgBouncer {text} cannot log in with a client's SCRAM proof; use 1.14 or later")
    return version


def files(
    server: str,
    dsn: Dsn,
    names: Names,
    config: TenancyConfig,
    *,
    verifier: str,
    password: str,
    version: tuple[int, int],
    accepted: int,
    database: str,
    least_limit: int,
    settings: Mapping[str, str] = MappingProxyType({}),
    processes: int = 4,
    poolers: int = 1,
    directory: str = "/etc/pgbouncer",
) -> PgBouncerFiles:
    """Return the configuration of a PgBouncer for one server.

    Args:
        server: Its name.
        dsn: The administrator's address: PgBouncer connects to the same host.
        names: The installation's names.
        config: Its configuration.
        verifier: The SCRAM secret of ``password``.
        password: The password of PgBouncer's own role.
        version: The oldest version that it is for.
        accepted: How many connections the server accepts.
        database: Its maintenance database, in which the function is made.
        least_limit: The smallest ``connection_limit`` of the tiers.
        settings: What tenants' sessions start with, by name.
        processes: How many processes of the application connect.
        poolers: How many PgBouncers share a role's connections.
        directory: Where the files will be.

    Raises:
        ConfigurationError: the server has several hosts, or the PgBouncers are too many for a role's connections.
    """
    if len(dsn.hosts) > 1:
        raise ConfigurationError(
            f"server {server!r} has {len(dsn.hosts)} hosts, of which PgBouncer cannot find the primary; give a proxy's "
            "address that leads to it"
        )
    if poolers < 1 or least_limit // poolers < 1:
        raise ConfigurationError(
            f"{poolers} PgBouncers cannot share {least_limit} connections of a role; raise the connection_limit of the "
            "tiers, or run fewer"
        )
    pool = least_limit // poolers
    host, port = dsn.hosts[0] if dsn.hosts else ("localhost", DEFAULT_PORT)
    # where that is not set, the processes share what the server accepts
    each = config.pool.max_connections or max(1, accepted // max(1, processes))
    separate = version >= AUTH_DATABASE_SINCE
    user, target = auth_user(names), f"host={host} port={port}"
    sent = _sent(config)
    connect_query, left_out = _connect_query(sent, settings)
    ini = _INI.format(
        version=".".join(map(str, version)),
        server=server,
        listen=CONSOLE_PORT,
        host=host,
        port=port,
        auth_entry=f"; where auth_query is asked\n{_AUTH_ENTRY} = {target} dbname={database}\n" if separate else "",
        directory=directory,
        user=user,
        query=auth_query(names, version),
        auth_database=f"auth_dbname = {_AUTH_ENTRY}\n" if separate else "",
        least=least_limit,
        shared=f", shared by {poolers} PgBouncers" if poolers > 1 else "",
        pool=pool,
        accepted=accepted,
        busy=accepted // (pool * poolers),
        processes=processes,
        each=each,
        clients=max(_LEAST_CLIENTS, 2 * processes * each),
        wait=max(1, round(config.pool.checkout_timeout)),
        reset=_RESET,
        settings=connect_query.replace("'", "''"),
        left_out=" ".join(left_out) or "none",
        ignored=", ".join(sorted(sent)),
        prepared=_PREPARED if version >= PREPARED_SINCE else "",
        tls=_tls(dsn),
    )
    script = auth_script(names, version, server=server, database=database, verifier=verifier)
    return PgBouncerFiles(ini, script, f'"{user}" "{password}"\n', pool)


def new_password() -> str:
    """Return a random password of 256 bits for PgBouncer's own role."""
    return secrets.token_urlsafe(32)


def _sent(config: TenancyConfig) -> dict[str, str]:
    """Return the settings that clients send as startup parameters."""
    sent = dict(config.sessions.settings)
    if config.sessions.statement_timeout > 0:
        sent["statement_timeout"] = f"{round(config.sessions.statement_timeout * 1000)}ms"
    return sent


def _connect_query(sent: Mapping[str, str], pinned: Mapping[str, str]) -> tuple[str, tuple[str, ...]]:
    """``SET`` statements for as many settings as PgBouncer sends, and the names of the pinned ones that are left out.

    Raises:
        ConfigurationError: what the configuration says takes more.
    """
    rest = {name: value for name, value in pinned.items() if name not in _NOT_SET and name not in sent}
    ranks = {name: rank for rank, name in enumerate(_FIRST)}
    query, left_out = "", []
    for name, value in (*sent.items(), *sorted(rest.items(), key=lambda item: (ranks.get(item[0], 99), item[0]))):
        further = f"{query}SET {name}={_value(name, value)};"
        if len(further.encode()) <= _QUERY_BYTES:
            query = further
        elif name in sent:
            raise ConfigurationError(
                f"sessions.settings are too long for PgBouncer's connect_query, which takes {_QUERY_BYTES} bytes"
            )
        else:
            left_out.append(name)
    return query, tuple(left_out)


def _value(name: str, value: str) -> str:
    # quoted as a whole a list would be the name of one schema
    if name in _LISTS and value:
        return value
    return value if _PLAIN.fullmatch(value) else quote_literal(value)


def _tls(dsn: Dsn) -> str:
    mode = dsn.parameters.get("sslmode", "prefer")
    lines = [f"server_tls_sslmode = {mode}"]
    root = dsn.parameters.get("sslrootcert")
    if root and root != "system":
        lines.append(f"server_tls_ca_file = {root}")
    elif mode.startswith("verify"):
        lines.append("server_tls_ca_file = /etc/ssl/certs/ca-certificates.crt")
    return "\n".join(lines) + "\n"


__all__ = ["PREPARED_SINCE", "PgBouncerFiles", "files", "new_password", "parse_version"]
