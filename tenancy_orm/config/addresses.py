"""The addresses of the PostgreSQL servers that hold tenants: for administration, for tenants' traffic, replicas."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import Field, PlainValidator, WithJsonSchema, field_validator

from ..errors import ConfigurationError, SettingError
from ..postgres.dsn import Dsn
from .validation import Section
from .values import PostgresUrl, check_url

_SERVER_NAME = re.compile(r"[a-z][a-z0-9_-]{0,30}")
_URLS = ("admin", "tenants", "replicas", "peer")
_FORM = 'write a URL, or admin = "..." and tenants = "..."'
# A comma ends a URL where another name and URL follow; passwords and lists of hosts have commas as well.
_SEPARATOR = re.compile(r",?\s+|,(?=[a-z][a-z0-9_-]*(?:\.[a-z]+)?=postgres(?:ql)?(?:\+\w+)?://)")


class ServerAddresses(Section, frozen=True):
    """The addresses of one server. A URL in its place stands for both.

    ```python
    from tenancy_orm import TenancyConfig
    from tenancy_orm.config import ServerAddresses

    eu = ServerAddresses(
        admin="postgresql://tenancy_admin@db.example/postgres", tenants="postgresql://pooler.example:6432"
    )
    config = TenancyConfig(control_url="postgresql://tenancy@db.example/control", servers={"eu": eu})
    ```
    """

    admin: PostgresUrl = Field(repr=False)
    """The administrative URL. It must lead directly to PostgreSQL: advisory locks and startup parameters do not work
    through a connection pooler."""
    tenants: str | None = Field(default=None, repr=False)
    """Where tenants' sessions connect to, a connection pooler for example; the host of ``admin`` where None. It names
    no user, password or database: those are the tenant's. Its parameters are its own, none come from ``admin``."""
    replicas: Sequence[str] = Field(default=(), repr=False)
    """The standbys that follow this server, each written like ``tenants``, with one host. They have the roles and the
    passwords of this server, so the administrator logs in there as at ``admin``."""
    peer: str | None = Field(default=None, repr=False)
    """Where another server of tenants reads this one while a tenant is moved, written like ``tenants``; the address of
    ``admin`` where None. That server opens the connection, so the files that it names are read there: ``sslrootcert``,
    for example."""

    @field_validator("tenants", "peer", mode="after")
    @classmethod
    def _check_tenants(cls, url: str | None) -> str | None:
        return None if url is None else _without_login(url)

    @field_validator("replicas", mode="before")
    @classmethod
    def _check_replicas(cls, urls: object) -> tuple[str, ...]:
        if isinstance(urls, str):
            urls = (urls,)
        if not isinstance(urls, Sequence) or not all(isinstance(url, str) for url in urls):
            raise ValueError("must be URLs")
        for url in urls:
            if len(Dsn.parse(_without_login(url)).hosts) > 1:
                raise ValueError("names several hosts; write each replica as a URL of its own")
        return tuple(urls)

    @property
    def admin_dsn(self) -> Dsn:
        """``admin``, read."""
        return Dsn.parse(self.admin)

    @property
    def tenants_dsn(self) -> Dsn | None:
        """``tenants``, read; None where there is none."""
        return None if self.tenants is None else Dsn.parse(self.tenants)

    @property
    def peer_dsn(self) -> Dsn | None:
        """``peer``, read; None where there is none."""
        return None if self.peer is None else Dsn.parse(self.peer)

    @property
    def replica_dsns(self) -> tuple[Dsn, ...]:
        """``replicas``, read."""
        return tuple(Dsn.parse(url) for url in self.replicas)


def _without_login(url: str) -> str:
    """Return a URL that leads to a server and logs nobody in."""
    try:
        dsn = Dsn.parse(url)
    except ConfigurationError as exc:
        raise ValueError(str(exc)) from None
    if not dsn.hosts:
        raise ValueError("names no host")
    given = (("a user", dsn.user), ("a password", dsn.password), ("a database", dsn.database))
    named = [what for what, value in given if value is not None]
    named += [f"the parameter {name}" for name in ("passfile", "service") if name in dsn.parameters]
    if named:
        raise ValueError(f"names {' and '.join(named)}; those are the tenant's own: write host and port alone")
    return url


def _read_servers(value: object) -> object:
    if isinstance(value, str):
        value = _read_text(value)
    if not isinstance(value, Mapping):
        raise ValueError("must be a table of URLs by name")
    return MappingProxyType({name: _read_server(name, given) for name, given in value.items()})


def _read_text(text: str) -> dict[str, object]:
    """Read ``eu=url eu.tenants=url eu.replicas=url us=url``; a replica more is one more ``eu.replicas=url``."""
    pairs = [item.partition("=") for item in _SEPARATOR.split(text.strip()) if item]
    if not all(separator and "://" not in name for name, separator, _ in pairs):
        raise ValueError("must be name=url, separated by spaces or commas")
    found: dict[str, dict[str, Any]] = {}
    for name, _, url in pairs:
        server, dot, kind = name.partition(".")
        urls = found.setdefault(server, {})
        if kind == "replicas":
            urls.setdefault(kind, []).append(url)
        else:
            urls[kind if dot else "admin"] = url
    return {name: urls["admin"] if list(urls) == ["admin"] else urls for name, urls in found.items()}


def _read_server(name: object, given: object) -> str | ServerAddresses:
    # a name that is none may be a URL, with its password
    if not isinstance(name, str) or not _SERVER_NAME.fullmatch(name):
        raise ValueError("each server's name must be 1 to 31 of a-z, 0-9, _ and -, from a letter")
    if isinstance(given, ServerAddresses):
        return given
    if isinstance(given, str):
        check_url(given, f"the URL of server {name!r}")
        return given
    if not isinstance(given, Mapping):
        raise ValueError(f"must be a table of URLs by name; of server {name!r}: {_FORM}")
    if unknown := sorted(str(kind) for kind in set(given) - {*_URLS}):
        # a key that is none may be a URL, with its password
        kinds = f" {', '.join(unknown)}" if all(kind.isidentifier() for kind in unknown) else ""
        raise ValueError(f"server {name!r} has addresses of an unknown kind{kinds}; {_FORM}")
    problem = None
    try:
        return ServerAddresses(**given)
    except SettingError as exc:
        problem = "; ".join(f"{kind} {reason}" for kind, reason in exc.problems.items())
    raise ValueError(f"the address of server {name!r}: {problem}")


ServerUrls = Annotated[
    Mapping[str, str | ServerAddresses],
    PlainValidator(_read_servers),
    WithJsonSchema(
        {
            "type": "object",
            "additionalProperties": {
                "anyOf": [
                    {"type": "string"},
                    {
                        "type": "object",
                        "properties": {
                            **{kind: {"type": "string"} for kind in _URLS},
                            "replicas": {"type": "array", "items": {"type": "string"}},
                        },
                        "required": ["admin"],
                        "additionalProperties": False,
                    },
                ]
            },
        }
    ),
]


__all__ = ["ServerAddresses", "ServerUrls"]
