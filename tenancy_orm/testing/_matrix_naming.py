"""Ways in which a request can name a tenant."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from ..asgi.resolvers import HeaderResolver, PathPrefixResolver, SubdomainResolver, TenantResolver
from ..tenant import Tenant
from ._matrix_client import Call
from ._matrix_report import NOTHING
from ._matrix_routes import JSON, WEBSOCKET
from ._matrix_values import NAMES_OF_TENANTS

# what proxies and applications read a tenant from, besides what the middleware is configured with
_HEADERS: Final = ("X-Tenant", "X-Tenant-ID", "X-Tenant-Slug", "X-Org", "X-Org-ID", "X-Organization", "X-Account")
_HOST_HEADERS: Final = ("X-Forwarded-Host", "X-Original-Host", "Forwarded")


@dataclass(frozen=True)
class Naming:
    """A way to name the owner, besides what the path has of it."""

    label: str
    apply: Callable[[Call], Call | None]
    by_everyone: bool = True


def namings(resolvers: Sequence[TenantResolver], tenant: Tenant, *, only_addresses: bool = False) -> Iterator[Naming]:
    """Ways to name a tenant, beginning with none; with ``only_addresses`` those that people visit."""
    slug, tenant_id = tenant.slug, str(tenant.id)
    if not only_addresses:
        yield Naming(NOTHING, lambda call: call)
    configured = set()
    for resolver in resolvers:
        if isinstance(resolver, PathPrefixResolver):
            prefix = resolver.template.replace("{tenant}", slug)
            yield Naming(f"path {resolver.template}", _prefixed(prefix))
        elif isinstance(resolver, SubdomainResolver):
            host = f"{slug}.{resolver.domain}"
            yield Naming("host", _headed({"Host": host}))
            if not only_addresses:
                headers = dict.fromkeys(_HOST_HEADERS, host) | {"Forwarded": f"host={host}"}
                yield Naming("header X-Forwarded-Host and the like", _headed(headers), by_everyone=False)
        elif isinstance(resolver, HeaderResolver) and not only_addresses:
            for name in resolver.headers:
                title = name.decode().title()
                configured.add(title.lower())
                yield Naming(f"header {title}", _headed({title: slug}))
    if only_addresses:
        return
    names = [name for name in _HEADERS if name.lower() not in configured]
    for value in (slug, tenant_id):
        yield Naming(f"headers {names[0]} and the like", _headed(dict.fromkeys(names, value)))
    for said in names_of(slug, tenant_id):
        yield Naming("query (tenant, tenant_id, org and the like)", _asked(said))
        yield Naming("body (tenant, tenant_id, org and the like)", _embodied(said), by_everyone=False)


def names_of(slug: str, tenant_id: str) -> tuple[Mapping[str, str], ...]:
    """Return fields that name a tenant, under what applications call one: by slug or id as each says, and by id."""
    by_kind = {name: tenant_id if name.lower().endswith("id") else slug for name in NAMES_OF_TENANTS}
    return (by_kind, dict.fromkeys(NAMES_OF_TENANTS, tenant_id))


def _prefixed(prefix: str) -> Callable[[Call], Call | None]:
    return lambda call: None if call.path.startswith(prefix) else replace(call, path=prefix + call.path)


def _headed(headers: Mapping[str, str]) -> Callable[[Call], Call | None]:
    return lambda call: replace(call, headers={**call.headers, **headers})


def _asked(query: Mapping[str, str]) -> Callable[[Call], Call | None]:
    return lambda call: replace(call, query={**query, **call.query})


def _embodied(fields: Mapping[str, str]) -> Callable[[Call], Call | None]:
    def apply(call: Call) -> Call | None:
        try:
            body = json.loads(call.content) if call.content else {}
        except ValueError:
            return None
        if call.method in ("GET", "HEAD", WEBSOCKET) or not isinstance(body, dict):
            return None
        # only those that are there already, where there are any: a model may take no others
        own = {name: fields[name] for name in body if name in fields}
        return replace(call, content=json.dumps({**body, **(own or fields)}).encode(), media=JSON)

    return apply
