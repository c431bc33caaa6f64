"""The address of a PostgreSQL database, read as libpq reads it.

One reader for every connection: to the control database, to the servers, for invalidations, and for psql.
"""

from __future__ import annotations

import configparser
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, unquote

from ..errors import ConfigurationError
from . import parameters as known
from .parameters import CLIENT_SIZES, ENVIRONMENT, KEEPALIVES

DEFAULT_PORT: Final = 5432
_SCHEME = re.compile(r"(?:postgresql|postgres)(?:\+(?:asyncpg|psycopg))?://", re.IGNORECASE)
_FORM = "use postgresql://user:password@host/database"
_ESCAPE = re.compile(r"%([0-9A-Fa-f]{2})")
_PAIR = re.compile(
    r"\s*([^\s=]+)\s*=\s*(?:'((?:[^'\\]|\\.)*)'(?=\s|$)|((?:[^\s'\\]|\\.)(?:[^\s\\]|\\.)*)?)\s*", re.DOTALL
)
# A + is no space in libpq. SQLAlchemy writes one so; in these places libpq's reading would make no sense.
_SPACES = re.compile(r"(?:(?<=,)|(?<=%2C)|(?<=-c))\+|\+(?=-)")
# asyncpg takes these in a DSN alone
_IN_ASYNCPGS_DSN = (
    *("sslcert", "sslkey", "sslrootcert", "sslcrl", "sslpassword", "sslnegotiation"),
    *("ssl_min_protocol_version", "ssl_max_protocol_version", "service"),
)
_ARGUMENTS = {"sslmode": "ssl"} | {name: name for name in ("passfile", "target_session_attrs", "krbsrvname", "gsslib")}
_FILES = re.compile(r"(?:(?<=[?&\s])|^)(sslrootcert|sslcert|sslkey|sslcrl|sslcrldir|passfile)=('?)([^&\s']+)")
# asyncpg's and SQLAlchemy's own, and those that ``libpq_parameters`` sets itself or that not every libpq knows
_NOT_LIBPQS = frozenset(
    {*CLIENT_SIZES, "connect_timeout", "client_encoding", "min_protocol_version", "max_protocol_version", "replication"}
)
_ADDRESS = ("host", "hostaddr", "port", "user", "password", "dbname")


@dataclass(frozen=True, repr=False)
class Dsn:
    """How to reach a database.

    ```python
    dsn = Dsn.parse("postgresql://app:secret@db1,db2:5433/control?sslmode=require&timezone=UTC")
    assert dsn.hosts == (("db1", 5432), ("db2", 5433))
    assert (dsn.parameters, dsn.settings) == ({"sslmode": "require"}, {"timezone": "UTC"})
    assert str(dsn) == "db1:5432,db2:5433/control"
    ```

    Its ``str`` and ``repr`` have neither the user nor a secret.
    """

    hosts: tuple[tuple[str, int], ...] = ()
    """Host names, addresses or directories of sockets, each with its port, in the order in which they are tried. Where
    empty, asyncpg looks for a local server, as libpq does."""
    user: str | None = None
    password: str | None = None
    database: str | None = None
    parameters: Mapping[str, str] = field(default_factory=dict)
    """The other parameters, by libpq's names."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Settings of the server that a connection starts with."""

    @classmethod
    def parse(cls, text: str) -> Dsn:
        """Read a URI, or libpq's ``host=db dbname=control`` form.

        Args:
            text: ``postgresql://``, ``postgres://`` or, as SQLAlchemy writes it, ``postgresql+asyncpg://``.

        Raises:
            ConfigurationError: it is malformed, or a parameter is unknown or cannot be honoured. No value of ``text``
                is in the message, since any may be a password.
        """
        if scheme := _SCHEME.match(text):
            pairs = list(_read_uri(text[scheme.end() :]))
        elif re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text):
            raise ConfigurationError(f"must begin with postgresql://, not {text.partition('://')[0]}://")
        elif re.match(r"\s*\w+\s*=", text):
            pairs = list(_read_pairs(text))
        else:
            raise ConfigurationError(f"is not a URL; {_FORM}")
        return cls._from_pairs(pairs)

    @classmethod
    def _from_pairs(cls, pairs: list[tuple[str, str]]) -> Dsn:
        found: dict[str, str] = {}
        settings: dict[str, str] = {}
        for given, text in pairs:
            name, value = known.canonical(given, text)
            if value == "" and name in known.KNOWN:
                found.pop(name, None)  # libpq's default
            elif known.check(name, value):
                found[name] = value
            else:
                settings[name] = value
        address = {name: found.pop(name, None) for name in _ADDRESS}
        if found.get("sslrootcert") == "system":
            found = _with_systems_certificates(found)
        return cls(
            hosts=_hosts(address["host"], address["hostaddr"], address["port"]),
            user=address["user"],
            password=address["password"],
            database=address["dbname"],
            parameters=found,
            settings=settings,
        )

    def __str__(self) -> str:
        """Return host, port and database, for messages."""
        return self.address()

    def __repr__(self) -> str:
        """Return host, port and database."""
        return f"Dsn({self.address()!r})"

    def address(self, database: str | None = None) -> str:
        """Return ``host:port/database``, for messages; with another database where one is given."""
        hosts = ",".join(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.hosts)
        if not hosts and (service := self.parameters.get("service")):
            hosts = f"service {service}"
        return f"{hosts or f'localhost:{DEFAULT_PORT}'}/{database or self.database or ''}"

    @property
    def has_secret(self) -> bool:
        """Whether it contains a password."""
        return self.password is not None or "sslpassword" in self.parameters

    @property
    def connect_timeout(self) -> float | None:
        """Seconds that opening a connection may take; None where it does not say, 0 and less included."""
        seconds = int(self.parameters.get("connect_timeout", 0))
        return float(seconds) if seconds > 0 else None

    @property
    def keepalives(self) -> dict[str, int]:
        """The parameters for keep-alives, by libpq's names, where they are given."""
        return {name: int(self.parameters[name]) for name in KEEPALIVES if name in self.parameters}

    def secret(self) -> str:
        """Return the password. It is passed as a method, so that the frames of a connect do not hold the text."""
        return self.password or ""

    def client_size(self, name: str) -> int | None:
        """Return ``statement_cache_size`` or ``prepared_statement_cache_size`` where it is given."""
        value = self.parameters.get(name)
        return None if value is None else int(value)

    def application_name(self, purpose: str) -> str:
        """Return the application_name of a connection for this purpose, after the DSN's own where it has one."""
        own = self.parameters.get("application_name")
        return f"{own}/{purpose}" if own else purpose

    def shares_host(self, other: Dsn) -> bool:
        """Whether a host of this one, with its port, is also one of ``other``: they lead to the same server."""
        return not {*self.reached}.isdisjoint(other.reached)

    @property
    def reached(self) -> tuple[tuple[str, int], ...]:
        """The hosts with their ports; the local machine's where none is named."""
        return self.hosts or (("localhost", DEFAULT_PORT),)

    def server_settings(self, **further: str) -> dict[str, str]:
        """Return the settings that a connection starts with: its own, and ``further`` ones, which win."""
        options = self.parameters.get("options")
        return {**({"options": options} if options else {}), **self.settings, **further}

    def arguments(self) -> dict[str, Any]:
        """Return arguments of ``asyncpg.connect``, all but password, timeout and ``server_settings``."""
        given: dict[str, Any] = {}
        if self.hosts:
            given["host"] = [host for host, _ in self.hosts]
            given["port"] = [port for _, port in self.hosts]
        given |= {name: value for name, value in (("user", self.user), ("database", self.database)) if value}
        given |= {_ARGUMENTS[name]: value for name, value in self.parameters.items() if name in _ARGUMENTS}
        if (size := self.client_size(CLIENT_SIZES[0])) is not None:
            given[CLIENT_SIZES[0]] = size
        in_dsn = {name: value for name, value in self.parameters.items() if name in _IN_ASYNCPGS_DSN}
        if in_dsn.get("sslrootcert") == "system":
            # the certificates that Python's ssl module trusts, and the host's name is verified
            given |= {"ssl": True, "direct_tls": in_dsn.get("sslnegotiation") == "direct"}
        elif in_dsn:
            given["dsn"] = "postgresql://?" + "&".join(f"{name}={quote(v, safe='')}" for name, v in in_dsn.items())
        return given

    def libpq_parameters(
        self, *, user: str, database: str, settings: Mapping[str, str], keepalives: Mapping[str, int]
    ) -> dict[str, str]:
        """Return the parameters of a connection that libpq opens, all but password and ``connect_timeout``.

        Args:
            user: The role.
            database: The database.
            settings: Further settings that it starts with; they win over its own.
            keepalives: The parameters for keep-alives where it has none.
        """
        found = {name: str(value) for name, value in keepalives.items()}
        # as asyncpg: it has no encryption by GSSAPI, and reads and writes UTF-8
        found |= {"gssencmode": "disable", "client_encoding": "utf8"}
        found |= {name: value for name, value in self.parameters.items() if name not in _NOT_LIBPQS}
        found |= {"user": user, "dbname": database}
        if self.hosts:
            found["host"] = ",".join(host for host, _ in self.hosts)
            found["port"] = ",".join(str(port) for _, port in self.hosts)
            found["hostaddr"] = ""  # otherwise PGHOSTADDR, which asyncpg does not read, would lead elsewhere
        given = {**self.settings, **settings}
        if "application_name" in given:
            found["application_name"] = given.pop("application_name")
        # libpq has no other way to send a setting; what comes last wins
        options = [*filter(None, [found.get("options")]), *(f"-c {name}={_escaped(v)}" for name, v in given.items())]
        if options:
            found["options"] = " ".join(options)
        return found

    def without_service(self) -> Dsn:
        """Return the same with what the service's file says of the server, and no service and credentials.

        libpq prefers what the file says to variables: a program with ``PGSERVICE`` would log in as the file's user.

        Raises:
            ConfigurationError: the file cannot be read, or has no such service.
        """
        given = {name: value for name, value in self.parameters.items() if name not in ("service", "passfile")}
        service = self.parameters.get("service")
        if service is None:
            return replace(self, parameters=given)
        # where asyncpg looks
        path = Path(os.environ.get("PGSERVICEFILE") or Path.home() / ".pg_service.conf")
        file = configparser.ConfigParser(interpolation=None)
        try:
            file.read_string(path.read_text("utf-8"))
            entries = dict(file[service])
        except (OSError, ValueError, KeyError, configparser.Error) as exc:
            raise ConfigurationError(f"service {service!r} cannot be read from {str(path)!r}") from exc
        credentials = {"user", "password", "dbname", "service", "passfile", "sslpassword"}
        found = Dsn._from_pairs([pair for pair in entries.items() if known.canonical(*pair)[0] not in credentials])
        return replace(
            self,
            hosts=self.hosts or found.hosts,
            parameters={**found.parameters, **given},
            settings={**found.settings, **self.settings},
        )

    def environment(self, *, user: str, database: str, purpose: str) -> dict[str, str]:
        """Return libpq's variables for a program such as psql, without a password.

        Keep-alives are left out: libpq has no variables for them.

        Raises:
            ConfigurationError: as ``without_service``.
        """
        if "service" in self.parameters:
            return self.without_service().environment(user=user, database=database, purpose=purpose)
        found = {ENVIRONMENT[name]: value for name, value in self.parameters.items() if name in ENVIRONMENT}
        found |= {"PGUSER": user, "PGDATABASE": database, "PGAPPNAME": self.application_name(purpose)}
        if self.hosts:
            found["PGHOST"] = ",".join(host for host, _ in self.hosts)
            found["PGPORT"] = ",".join(str(port) for _, port in self.hosts)
        settings = [f"-c {name}={_escaped(value)}" for name, value in self.settings.items()]
        if settings:
            found["PGOPTIONS"] = " ".join([*filter(None, [found.get("PGOPTIONS")]), *settings])
        return found

    def uri(self, *, user: str, password: str, database: str, purpose: str) -> str:
        """Return a URL for a program that takes one, with the parameters that libpq knows."""
        parameters = {name: value for name, value in self.parameters.items() if name in {*ENVIRONMENT, *KEEPALIVES}}
        parameters["application_name"] = self.application_name(purpose)
        settings = [f"-c {name}={_escaped(value)}" for name, value in self.settings.items()]
        if settings:
            parameters["options"] = " ".join([*filter(None, [parameters.get("options")]), *settings])
        hosts = ""
        if any(host.startswith("/") for host, _ in self.hosts):
            # a directory of sockets cannot stand where a host does
            parameters["host"] = ",".join(host for host, _ in self.hosts)
            parameters["port"] = ",".join(str(port) for _, port in self.hosts)
        else:
            hosts = ",".join(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.hosts)
        query = "&".join(f"{name}={quote(value, safe='')}" for name, value in parameters.items())
        return (
            f"postgresql://{quote(user, safe='')}:{quote(password, safe='')}@{hosts}/{quote(database, safe='')}?{query}"
        )


def _escaped(value: str) -> str:
    """A value within ``options``, where a backslash keeps a space from ending it."""
    return re.sub(r"([\\\s])", r"\\\1", value)


def _with_systems_certificates(found: dict[str, str]) -> dict[str, str]:
    """The parameters with ``sslrootcert=system``, which verifies the host's name, as libpq does."""
    if found.setdefault("sslmode", "verify-full") != "verify-full":
        raise ConfigurationError("the parameter sslrootcert=system needs sslmode=verify-full")
    further = {"sslcert", "sslkey", "sslcrl", "ssl_min_protocol_version", "ssl_max_protocol_version"} & found.keys()
    if further:
        raise ConfigurationError(
            f"the parameter sslrootcert=system does not go with {', '.join(sorted(further))}; name a file instead"
        )
    return found


def _hosts(host: str | None, hostaddr: str | None, port: str | None) -> tuple[tuple[str, int], ...]:
    if host is not None and hostaddr is not None:
        raise ConfigurationError(
            "the parameter hostaddr beside host is not supported: asyncpg resolves the host itself"
        )
    names = (host or hostaddr or "").split(",")
    texts = (port or "").split(",")
    if len(texts) == 1:
        texts *= len(names)
    if len(texts) != len(names):
        raise ConfigurationError(f"there are {len(texts)} ports for {len(names)} hosts")
    if names == [""] and texts == [""]:
        return ()
    return tuple((name or "localhost", _port(text)) for name, text in zip(names, texts, strict=True))


def _port(text: str) -> int:
    if text and (not re.fullmatch(r"\s*[0-9]{1,5}\s*", text) or not 1 <= int(text) <= 65535):
        raise ConfigurationError(
            "a port is not a number from 1 to 65535; if a password has one of : / ? # @ in it, write %3A and so on"
        )
    return int(text or DEFAULT_PORT)


# --- URIs -------------------------------------------------------------------------------------------------------------


def _read_uri(rest: str) -> Iterator[tuple[str, str]]:
    """The parameters in a URI, after its scheme, as libpq's conninfo_uri_parse_options finds them."""
    user, password, rest = _split_credentials(rest)
    if user:
        yield "user", _decoded(user)
    if password:
        yield "password", _decoded(password)
    hosts, ports, rest = _split_hosts(rest)
    if any(hosts):
        yield "host", _decoded(",".join(hosts))
    if any(ports):
        yield "port", _decoded(",".join(ports))
    if rest.startswith("/"):
        database, mark, query = rest[1:].partition("?")
        if database:
            yield "dbname", _decoded(database)
    else:
        _, mark, query = rest.partition("?")
    if mark and query:
        yield from _read_query(query)


def _split_credentials(rest: str) -> tuple[str, str, str]:
    """Return user, password and what follows."""
    # the first @ before any /: a later one is part of the database's name, or of a value
    credentials = re.match(r"([^@/]*)@", rest)
    if credentials is None:
        # libpq takes a / in a password for the end of a port and refuses that; SQLAlchemy takes it as part of it
        credentials = re.match(r"([^:/@\[]*:(?!\d*(,[^:/@]*(:\d*)?)*/)[^@]*)@", rest)
    if credentials is None:
        return "", "", rest
    user, _, password = credentials[1].partition(":")
    return user, password, rest[credentials.end() :]


def _split_hosts(rest: str) -> tuple[list[str], list[str], str]:
    """Return the hosts, their ports and what follows; a host or a port may be empty."""
    hosts, ports = [], []
    while True:
        if rest.startswith("["):
            host, bracket, rest = rest[1:].partition("]")
            if not bracket or not host or (rest and rest[0] not in ":/?,"):
                raise ConfigurationError("the address in [ ] is malformed")
        else:
            host = re.match(r"[^:/?,]*", rest)[0]  # type: ignore[index]  # it matches anything
            rest = rest[len(host) :]
        port = ""
        if rest.startswith(":"):
            port = re.match(r"[^/?,]*", rest[1:])[0]  # type: ignore[index]
            rest = rest[1 + len(port) :]
        hosts.append(host)
        ports.append(port)
        if not rest.startswith(","):
            return hosts, ports, rest
        rest = rest[1:]


def _read_query(query: str) -> Iterator[tuple[str, str]]:
    hosts: list[str] = []
    for item in query.split("&"):
        name, separator, value = item.partition("=")
        if not separator or "=" in value:
            raise ConfigurationError("a parameter is not name=value; write = and & in a value as %3D and %26")
        name = _decoded(name)
        if name == "options" or name not in known.KNOWN:
            value = _SPACES.sub("%20", value)
        value = _decoded(value)
        if name == "host":
            hosts.append(value)
        else:
            yield name, value
    if len(hosts) > 1 or re.fullmatch(r"[^/:,]+:[0-9]+(,[^/:,]+:[0-9]+)*", "".join(hosts[:1])):
        # SQLAlchemy's form, with a port in each
        found = [host.rpartition(":") for host in ",".join(hosts).split(",")]
        yield "host", ",".join(host if colon else port for host, colon, port in found)
        yield "port", ",".join(port if colon else "" for _, colon, port in found)
    elif hosts:
        yield "host", hosts[0]


def _decoded(text: str) -> str:
    """Return percent-encoded text; a ``+`` is no space."""
    if "%" in _ESCAPE.sub("", text) or "%00" in text:
        raise ConfigurationError("a percent sign is not followed by two hexadecimal digits; write it as %25")
    try:
        return re.sub(rb"%([0-9A-Fa-f]{2})", lambda match: bytes.fromhex(match[1].decode()), text.encode()).decode()
    except UnicodeDecodeError:
        raise ConfigurationError("percent-encoded text is not UTF-8") from None


# --- host=... port=... ------------------------------------------------------------------------------------------------


def _read_pairs(text: str) -> Iterator[tuple[str, str]]:
    position = 0
    while position < len(text):
        pair = _PAIR.match(text, position)
        if pair is None or pair.end() == position:
            raise ConfigurationError("is not of the form name=value name='value'")
        position = pair.end()
        value = pair[2] if pair[2] is not None else pair[3] or ""
        yield pair[1], re.sub(r"\\(.)", r"\1", value, flags=re.DOTALL)


# --- files ------------------------------------------------------------------------------------------------------------


def with_files_in(directory: Path, text: str) -> str:
    """Return a DSN, or several in one text, with the relative paths of certificates and keys in ``directory``.

    Nothing is checked; ``Dsn.parse`` does that.
    """
    is_uri = "://" in text

    def replaced(found: re.Match[str]) -> str:
        name, quotation, value = found.groups()
        path = unquote(value) if is_uri else value
        if path.startswith(("/", "~")) or (name, path) == ("sslrootcert", "system"):
            return found[0]
        path = str(directory / path)
        if is_uri:
            return f"{name}={quotation}{quote(path)}"
        return f"{name}={quotation}" + (re.sub(r"(['\\])", r"\\\1", path) if quotation else _escaped(path))

    return _FILES.sub(replaced, text)


__all__ = ["DEFAULT_PORT", "Dsn", "with_files_in"]
