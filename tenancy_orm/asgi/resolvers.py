"""Resolvers: read the API key from a request, and any tenant that the request names besides its credential.

A ``KeyResolver`` finds the API key, one kind of credential. A ``TenantResolver`` finds the tenant that the request
claims by sub-domain, path or header. The claimed tenant is only compared with those that the credential allows: it
gives no access, and does not reveal which tenants exist. It is looked up on public paths alone.

All of them read ``scope`` and the headers that they declared, which the middleware collects in one pass.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from functools import lru_cache
from urllib.parse import quote

from starlette.types import Scope

from ..errors import ConfigurationError, InvalidCredentialError, MalformedRequestError
from ..tenant import Tenant

Headers = Mapping[bytes, bytes]
"""The headers that the resolvers declared, by lower-case name."""

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,126}[A-Za-z0-9])?")
_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_HOST = re.compile(rb"(\[[0-9a-f:.]+\]|[a-z0-9_-]+(?:\.[a-z0-9_-]+)*)\.?(?::[0-9]{1,5})?")
_DOMAIN = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*")


class Resolver:
    """Reads one thing from a request.

    ``headers`` lists the names of the headers that it reads, as lower-case bytes. A request with one of them twice is
    refused before any resolver is called.
    """

    headers: tuple[bytes, ...] = ()

    def adapt_scope(self, scope: Scope) -> None:
        """Change ``scope`` for the application once the request is admitted. Does nothing by default."""


class KeyResolver(Resolver, ABC):
    """Finds the request's API key."""

    @abstractmethod
    def key(self, scope: Scope, headers: Headers) -> str | None:
        """Return the key as it was sent, even if malformed, or None where none was sent this way."""


class ApiKeyHeader(KeyResolver):
    """Reads the key from a header: its whole value.

    Args:
        name: The header's name, in any case.
    """

    def __init__(self, name: str = "X-API-Key") -> None:
        self.name = name
        self._header = _check_header_name(name)
        self.headers = (self._header,)

    def key(self, scope: Scope, headers: Headers) -> str | None:
        """Return the header's value."""
        value = headers.get(self._header)
        return None if value is None else value.decode("latin-1")


class BearerToken(KeyResolver):
    """Reads the key from ``Authorization: Bearer``. Other schemes are left to the application."""

    headers = (b"authorization",)

    def key(self, scope: Scope, headers: Headers) -> str | None:
        """Return the token."""
        value = headers.get(b"authorization")
        if value is None or value[:6].lower() != b"bearer" or value[6:7] not in (b"", b" "):
            return None
        return value[7:].strip(b" ").decode("latin-1")


class WebSocketKeyProtocol(KeyResolver):
    """Reads the key from a websocket sub-protocol: ``new WebSocket(url, ["chat", "tenancy.key." + key])``.

    For browsers, which cannot set headers on a websocket. It is not on by default: proxies log sub-protocols more often
    than ``Authorization``. The application does not see this sub-protocol, so it cannot echo the key. The browser must
    therefore offer one of the application's sub-protocols as well, and the application must accept that one.

    Args:
        prefix: The text before the key.
    """

    def __init__(self, prefix: str = "tenancy.key.") -> None:
        if not _HEADER_NAME.fullmatch(prefix):
            raise ConfigurationError(f"sub-protocol prefix {prefix!r} is not a token as RFC 9110 defines it")
        self.prefix = prefix

    def key(self, scope: Scope, headers: Headers) -> str | None:
        """Return the key among the offered sub-protocols.

        Raises:
            InvalidCredentialError: several were offered.
        """
        offers = [offer for offer in scope.get("subprotocols", ()) if offer.startswith(self.prefix)]
        if not offers:
            return None
        if len(offers) > 1:
            raise InvalidCredentialError("ambiguous")
        return str(offers[0]).removeprefix(self.prefix)

    def adapt_scope(self, scope: Scope) -> None:
        """Remove the key from the offered sub-protocols."""
        offers = scope.get("subprotocols")
        if offers:
            scope["subprotocols"] = [offer for offer in offers if not offer.startswith(self.prefix)]


class TenantResolver(Resolver, ABC):
    """Finds the tenant that the request names besides its credential.

    ``name`` says where, in events and the audit log. ``is_address`` tells whether it is part of the address that people
    visit, as host and path are: only such a name binds a tenant on a public path.
    """

    name: str
    is_address = False

    @abstractmethod
    def claimed_tenant(self, scope: Scope, headers: Headers) -> str | None:
        """Return the slug, id or domain that the request claims, or None where it claims none.

        Raises:
            MalformedRequestError: the value cannot be any of these.
        """

    def matches(self, claimed: str, tenant: Tenant) -> bool:
        """Return whether ``claimed`` is the slug, the id or an alias of ``tenant``, which the credential allows."""
        return claimed == tenant.slug or claimed in tenant.aliases or claimed == str(tenant.id)

    def redirect_url(self, scope: Scope, claimed: str, tenant: Tenant) -> str | None:
        """Return the URL to redirect to where ``claimed`` is a former slug of ``tenant``; None serves the request."""
        return None

    def inner_path(self, path: str) -> str:
        """Return what is left for the application's routes of a path, without the part that names the tenant."""
        return path


class HeaderResolver(TenantResolver):
    """Reads the claimed tenant from a header.

    Args:
        name: The header's name, in any case.
    """

    name = "header"

    def __init__(self, name: str = "X-Tenant") -> None:
        self._title = name
        self._header = _check_header_name(name)
        self.headers = (self._header,)

    def claimed_tenant(self, scope: Scope, headers: Headers) -> str | None:
        """Return the header's value."""
        value = headers.get(self._header)
        return None if value is None else _check_name(value.decode("latin-1"), f"the header {self._title}")


class SubdomainResolver(TenantResolver):
    """Reads the claimed tenant from the sub-domain: ``acme.example.com``.

    Only ``Host`` is read. Behind a proxy that rewrites it, configure the server to restore it: anybody can send
    ``X-Forwarded-Host``.

    Args:
        domain: The application's domain, which follows the tenant's label.
        reserved: Labels that are not tenants.
        custom_domains: Whether hosts outside ``domain`` must be a verified domain of the tenant. Otherwise they claim
            no tenant, which requests to an address or a container's name need.
        hosts: Further hosts of the application that claim no tenant: those that probes and proxies use.
        redirect: Whether a request to a former slug's host is answered by 308 to the current one. By default it is
            served, since many clients do not send credentials to another host.
    """

    name = "subdomain"
    is_address = True
    headers = (b"host",)

    def __init__(
        self,
        domain: str,
        *,
        reserved: Iterable[str] = ("www", "api", "app"),
        custom_domains: bool = False,
        hosts: Iterable[str] = (),
        redirect: bool = False,
    ) -> None:
        self.redirect = redirect
        self.hosts = frozenset(host.lower().rstrip(".") for host in hosts)
        self.domain = domain.lower().strip(".")
        if not _DOMAIN.fullmatch(self.domain):
            raise ConfigurationError(f"domain {domain!r} is not a domain name without a port")
        self.reserved = frozenset(label.lower() for label in reserved)
        self.custom_domains = custom_domains
        self._suffix = f".{self.domain}"

    def claimed_tenant(self, scope: Scope, headers: Headers) -> str | None:
        """Return the label before the domain."""
        value = headers.get(b"host")
        if value is None:
            return None
        host = parse_host(value)
        if host == self.domain or host in self.hosts:
            return None
        if not host.endswith(self._suffix):
            return host if self.custom_domains else None
        label = host.removesuffix(self._suffix)
        return None if label in self.reserved else label

    def redirect_url(self, scope: Scope, claimed: str, tenant: Tenant) -> str | None:
        """Return the same URL on the host of the tenant's current slug."""
        if not self.redirect or claimed == tenant.slug or "." in claimed or claimed not in tenant.aliases:
            return None
        host = dict(scope["headers"])[b"host"].decode("latin-1")
        port = host[host.rindex(":") :] if ":" in host else ""
        query = scope["query_string"].decode("latin-1")
        raw: bytes = scope.get("raw_path") or b""
        # as the client wrote it, where the server has it: in the decoded path %2F and a slash are the same
        path = raw.decode("latin-1") if raw[:1] == b"/" else quote(scope["path"], safe="/:@!$&'()*+,;=~")
        return f"//{tenant.slug}{self._suffix}{port}{path}" + (f"?{query}" if query else "")


class PathPrefixResolver(TenantResolver):
    """Reads the claimed tenant from the path: ``/t/acme/orders`` with the template ``/t/{tenant}``.

    The application gets the prefix in ``root_path``, as below a Starlette ``Mount``: its routes match the rest of the
    path, and the URLs it builds keep the prefix. Paths without the prefix claim no tenant.

    Args:
        template: A path with ``{tenant}`` as its last segment.
    """

    name = "path"
    is_address = True

    def __init__(self, template: str = "/t/{tenant}") -> None:
        prefix, placeholder, rest = template.partition("{tenant}")
        if not placeholder or rest or not re.fullmatch(r"/([A-Za-z0-9_-]+/)*", prefix):
            raise ConfigurationError(f"path template {template!r} must look like /t/{{tenant}}")
        self.template = template
        self._prefix = prefix

    def claimed_tenant(self, scope: Scope, headers: Headers) -> str | None:
        """Return the segment after the prefix."""
        path = route_path(scope)
        if not path.startswith(self._prefix):
            return None
        return _check_name(path[len(self._prefix) :].partition("/")[0], "the path")

    def inner_path(self, path: str) -> str:
        """Return the path after the prefix and the tenant's name."""
        if not path.startswith(self._prefix):
            return path
        _, slash, rest = path[len(self._prefix) :].partition("/")
        return slash + rest

    def adapt_scope(self, scope: Scope) -> None:
        """Move the prefix into ``root_path``."""
        claimed = self.claimed_tenant(scope, {})
        if claimed is not None:
            path: str = scope["path"]
            taken = len(path) - len(route_path(scope)) + len(self._prefix) + len(claimed)
            scope["root_path"] = path[:taken]


def route_path(scope: Scope) -> str:
    """Return the path that an application's routes are matched with: the part after ``root_path``, as in Starlette."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    if not root or not path.startswith(root):
        return path
    rest = path[len(root) :]
    return rest if not rest or rest[0] == "/" else path


@lru_cache(maxsize=4096)
def parse_host(value: bytes) -> str:
    """Return the host name of a ``Host`` header in lower case, without port and final dot.

    Raises:
        MalformedRequestError: it is not a host name.
    """
    found = _HOST.fullmatch(value.lower()) if len(value) <= 262 else None
    if found is None:
        raise MalformedRequestError("the header Host")
    return found[1].decode("ascii")


def _check_name(name: str, where: str) -> str:
    if not _NAME.fullmatch(name):
        raise MalformedRequestError(where)
    return name


def _check_header_name(name: str) -> bytes:
    if not _HEADER_NAME.fullmatch(name):
        raise ConfigurationError(f"{name!r} is not the name of a header")
    return name.lower().encode("ascii")
