"""The parameters of a connection, by libpq's names: which are taken, which values they have, and which are refused.

The names are those of https://www.postgresql.org/docs/current/libpq-connect.html. asyncpg serves some of them under
other names, and cannot serve others. A parameter that asks for a protection which asyncpg cannot give is refused: to
ignore it would be worse.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Final

from ..errors import ConfigurationError

SSL_MODES: Final = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
SSL_FILES: Final = ("sslrootcert", "sslcert", "sslkey", "sslcrl")
KEEPALIVES: Final = ("keepalives", "keepalives_idle", "keepalives_interval", "keepalives_count", "tcp_user_timeout")
CLIENT_SIZES: Final = ("statement_cache_size", "prepared_statement_cache_size")
"""Sizes of asyncpg's and of SQLAlchemy's cache of prepared statements: theirs, not libpq's."""

_TLS_VERSIONS = ("TLSv1", "TLSv1.1", "TLSv1.2", "TLSv1.3")
_ATTRIBUTES = ("any", "read-write", "read-only", "primary", "standby", "prefer-standby")
_ADDRESS = ("host", "hostaddr", "port", "user", "password", "dbname")

# None: any value; a tuple: these values; int: a whole number
_TAKEN: Final[Mapping[str, tuple[str, ...] | type[int] | None]] = {
    **dict.fromkeys(_ADDRESS),
    **dict.fromkeys(("passfile", "service", "options", "application_name", "fallback_application_name")),
    **dict.fromkeys((*SSL_FILES, "sslpassword")),
    **dict.fromkeys(("krbsrvname", "gsslib")),
    **dict.fromkeys(("connect_timeout", *KEEPALIVES, *CLIENT_SIZES), int),
    "sslmode": SSL_MODES,
    "sslnegotiation": ("postgres", "direct"),
    "ssl_min_protocol_version": _TLS_VERSIONS,
    "ssl_max_protocol_version": _TLS_VERSIONS,
    "target_session_attrs": _ATTRIBUTES,
    "load_balance_hosts": ("disable", "random"),
}

_NO_GSS = "asyncpg does not encrypt by GSSAPI; use sslmode=verify-full"
_NO_OAUTH = "asyncpg does not log in by OAuth"
_NO_PROOF = "asyncpg logs in by the password itself"
_REFUSED: Final[Mapping[str, tuple[tuple[str, ...], str]]] = {
    # the values that asyncpg fulfils anyway, and why it cannot fulfil the others
    "channel_binding": (("prefer", "disable"), "asyncpg has no channel binding; use sslmode=verify-full"),
    "require_auth": ((), "asyncpg logs in as the server asks it to; use sslmode=verify-full"),
    "requirepeer": ((), "asyncpg does not ask who runs the server of a socket"),
    "gssencmode": (("disable", "prefer"), _NO_GSS),
    "gssdelegation": (("0",), "asyncpg does not pass on GSSAPI credentials"),
    "sslcompression": (("0",), "asyncpg does not compress"),
    "sslcertmode": (("allow",), "asyncpg sends a certificate where it has one and the server asks for it"),
    "sslcrldir": ((), "asyncpg reads one file of revoked certificates; use sslcrl"),
    "sslsni": (("1",), "asyncpg always sends the name of the host"),
    "sslkeylogfile": ((), "asyncpg writes no keys; set the variable SSLKEYLOGFILE"),
    "replication": (("false", "off", "no", "0"), "a connection for replication runs no ordinary statements"),
    "client_encoding": (("utf8", "utf-8", "unicode", "auto"), "asyncpg reads and writes UTF-8 alone"),
    "min_protocol_version": (("3.0",), "asyncpg speaks version 3.0"),
    "max_protocol_version": (("3.0", "3.2", "latest"), "asyncpg speaks version 3.0"),
    **dict.fromkeys(("scram_client_key", "scram_server_key"), ((), _NO_PROOF)),
    **dict.fromkeys(("oauth_issuer", "oauth_client_id", "oauth_client_secret", "oauth_scope"), ((), _NO_OAUTH)),
    # asyncpg's own arguments, which would end as settings of the server
    "timeout": ((), "write connect_timeout"),
    "command_timeout": ((), "set sessions.statement_timeout, or write statement_timeout"),
    "direct_tls": ((), "write sslnegotiation=direct"),
}

KNOWN: Final = frozenset({*_TAKEN, *_REFUSED})
"""Every name that is not a setting of the server."""

ENVIRONMENT: Final[Mapping[str, str]] = {
    "passfile": "PGPASSFILE",
    "service": "PGSERVICE",
    "options": "PGOPTIONS",
    "connect_timeout": "PGCONNECT_TIMEOUT",
    "sslmode": "PGSSLMODE",
    "sslnegotiation": "PGSSLNEGOTIATION",
    "sslcert": "PGSSLCERT",
    "sslkey": "PGSSLKEY",
    "sslrootcert": "PGSSLROOTCERT",
    "sslcrl": "PGSSLCRL",
    "ssl_min_protocol_version": "PGSSLMINPROTOCOLVERSION",
    "ssl_max_protocol_version": "PGSSLMAXPROTOCOLVERSION",
    "krbsrvname": "PGKRBSRVNAME",
    "gsslib": "PGGSSLIB",
    "target_session_attrs": "PGTARGETSESSIONATTRS",
    "load_balance_hosts": "PGLOADBALANCEHOSTS",
}
"""libpq's variables for parameters. It has none for keep-alives and for ``sslpassword``."""

_ALIASES = {"database": "dbname", "username": "user"}
_SETTING_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_$]*(\.[A-Za-z_][A-Za-z0-9_$]*)*")
_NUMBER = re.compile(r"\s*[+-]?[0-9]{1,9}\s*")
_ALIKE = 0.85  # "sslmod", "conect_timeout"; but no name of a setting that PostgreSQL has
_SETTINGS_ALIKE = frozenset({"tcp_keepalives_idle", "tcp_keepalives_interval", "tcp_keepalives_count"})


def canonical(name: str, value: str) -> tuple[str, str]:
    """Return a parameter by libpq's name: ``ssl`` is ``sslmode``, as drivers write it."""
    if name == "ssl":
        return "sslmode", {"true": "require", "1": "require", "false": "disable", "0": "disable"}.get(value, value)
    return _ALIASES.get(name, name), value


def check(name: str, value: str) -> bool:
    """Check a parameter, and return whether it is one; otherwise it is a setting of the server.

    Raises:
        ConfigurationError: it cannot be honoured, its value is malformed, or the name is misspelt. The value is not in
            the message.
    """
    if name in _REFUSED:
        fulfilled, reason = _REFUSED[name]
        if value.lower() not in fulfilled:
            allowed = f" other than {' or '.join(fulfilled)}" if fulfilled else ""
            raise ConfigurationError(f"the parameter {name}{allowed} is not supported: {reason}")
        return True
    if name in _TAKEN:
        _check_value(name, value)
        return True
    alike = difflib.get_close_matches(name.lower(), KNOWN | {"ssl"}, n=1, cutoff=_ALIKE)
    if alike and name.lower() not in _SETTINGS_ALIKE:
        raise ConfigurationError(f"there is no parameter {name}; did you mean {alike[0]}?")
    if not _SETTING_NAME.fullmatch(name):
        raise ConfigurationError("a parameter's name is malformed")
    return False


def _check_value(name: str, value: str) -> None:
    kind = _TAKEN[name]
    if isinstance(kind, tuple):
        if value not in kind:
            raise ConfigurationError(f"the parameter {name} must be one of {', '.join(kind)}")
    elif kind is int:
        if not _NUMBER.fullmatch(value):
            raise ConfigurationError(f"the parameter {name} must be a whole number")
        if name in CLIENT_SIZES and int(value) < 0:
            raise ConfigurationError(f"the parameter {name} must be at least 0")
    elif name == "gsslib" and value not in ("gssapi", "sspi"):
        raise ConfigurationError("the parameter gsslib must be gssapi or sspi")
