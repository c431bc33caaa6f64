"""FastAPI dependencies: the tenant, its session, and the scopes of the credential (extra ``fastapi``).

```python
app = FastAPI(lifespan=tenancy.lifespan)
app.add_middleware(TenancyMiddleware, tenancy=tenancy, exempt=["/docs", "/openapi.json"])


@app.get("/orders", dependencies=[RequireScope("orders:read")])
async def orders(session: TenantSession, tenant: CurrentTenant) -> list[Order]: ...
```

Sessions are closed, and transactions committed, after the path operation has returned and before the response is sent:
a commit that fails is an error of the request, and no connection is in use while a slow client reads. A streaming body
opens its own session. Every route that uses one of these dependencies shows the API key in the OpenAPI document, or
what ``set_security_schemes`` names in its place.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from copy import deepcopy
from typing import Annotated, Any

from sqlalchemy.ext.asyncio import AsyncSession
from starlette.requests import HTTPConnection

from ..asgi.middleware import TENANCY
from ..asgi.scopes import credential_of, demand_scopes
from ..authentication.credential import Credential
from ..context import current_tenant
from ..errors import ConfigurationError, InvalidCredentialError, MissingExtraError
from ..routing.replicas import check_demand
from ..tenancy import Tenancy
from ..tenant import Tenant

try:
    from fastapi import Depends, FastAPI, Security
    from fastapi.openapi.models import APIKey, HTTPBearer
    from fastapi.security import SecurityScopes
    from fastapi.security.base import SecurityBase
except ImportError as exc:
    raise MissingExtraError("fastapi", "fastapi") from exc


class _KeyScheme(SecurityBase):
    """Documents one way to send a key. The middleware has checked the credential already."""

    def __init__(self, model: APIKey | HTTPBearer, scheme_name: str) -> None:
        self.model = model
        self.scheme_name = scheme_name

    async def __call__(self, connection: HTTPConnection) -> None:
        """Do nothing: the scheme is for the OpenAPI document."""


api_key_header = _KeyScheme(
    # "in" is a keyword, so the fields are given as a mapping
    APIKey.model_validate({"in": "header", "name": "X-API-Key", "description": "The tenant's API key"}),
    "ApiKey",
)
"""The security scheme of an API key in ``X-API-Key``."""

bearer_token = _KeyScheme(HTTPBearer(description="The tenant's API key"), "ApiKeyBearer")
"""The security scheme of an API key in ``Authorization: Bearer``."""

_SHOWN_BY_DEFAULT = frozenset({api_key_header.scheme_name, bearer_token.scheme_name})


async def _credential(
    connection: HTTPConnection,
    _header: Annotated[None, Security(api_key_header)],
    _bearer: Annotated[None, Security(bearer_token)],
) -> Credential:
    credential = credential_of(connection)
    if credential is None:
        raise InvalidCredentialError("missing")
    return credential


async def _tenant(credential: Annotated[Credential, Depends(_credential)]) -> Tenant:
    return current_tenant()


async def _tenancy(connection: HTTPConnection) -> Tenancy:
    try:
        tenancy: Tenancy = connection.scope[TENANCY]
    except KeyError:
        raise ConfigurationError("the request did not pass TenancyMiddleware: add it to the application") from None
    return tenancy


async def _session(
    tenancy: Annotated[Tenancy, Depends(_tenancy)], tenant: Annotated[Tenant, Depends(_tenant)]
) -> AsyncIterator[AsyncSession]:
    async with tenancy.session(tenant) as session:
        yield session


async def _read_session(
    tenancy: Annotated[Tenancy, Depends(_tenancy)], tenant: Annotated[Tenant, Depends(_tenant)]
) -> AsyncIterator[AsyncSession]:
    async with tenancy.session(tenant, read_only=True) as session:
        yield session


async def _transaction(
    tenancy: Annotated[Tenancy, Depends(_tenancy)], tenant: Annotated[Tenant, Depends(_tenant)]
) -> AsyncIterator[AsyncSession]:
    async with tenancy.transaction(tenant) as session:
        yield session


async def _scopes(
    connection: HTTPConnection,
    required: SecurityScopes,
    credential: Annotated[Credential, Depends(_credential)],
) -> Credential:
    return demand_scopes(connection, *required.scopes)


CurrentCredential = Annotated[Credential, Depends(_credential)]
"""The credential that the request was admitted with: its kind, subject, tenant, roles and scopes."""

CurrentTenant = Annotated[Tenant, Depends(_tenant)]
"""The tenant of the request."""

CurrentTenancy = Annotated[Tenancy, Depends(_tenancy)]
"""The ``Tenancy`` that serves the application; needs no credential."""

TenantSession = Annotated[AsyncSession, Depends(_session, scope="function")]
"""A session on the tenant's database, as ``tenancy.session()``. Changes that are not committed are rolled back."""

TenantReadSession = Annotated[AsyncSession, Depends(_read_session, scope="function")]
"""A session that only reads, as ``tenancy.session(read_only=True)``: one round trip for a query, and no write."""

TenantTransaction = Annotated[AsyncSession, Depends(_transaction, scope="function")]
"""A session on the tenant's database, committed when the path operation returns, as ``tenancy.transaction()``."""


def ReadSession(*, replica: bool = False, max_staleness: float | None = None) -> Any:  # noqa: N802 - as RequireScope
    """Depend on a session that only reads, also on a replica: as ``tenancy.session(read_only=True, replica=True)``.

    For ``Annotated[AsyncSession, ReadSession(replica=True, max_staleness=5.0)]``. Without ``replica`` it is what
    ``TenantReadSession`` is.

    Args:
        replica: Whether a replica may serve it; where none can, the primary does.
        max_staleness: How old what it sees on a replica may be, in seconds; ``replicas.max_staleness`` where None.

    Raises:
        ConfigurationError: the bound is no number of seconds above 0, or is given without ``replica``.
    """
    if not replica and max_staleness is not None:
        raise ConfigurationError("max_staleness is a bound for reads on replicas: give replica=True as well")
    check_demand(read_only=True, max_staleness=max_staleness, isolation_level=None)

    async def session_of(
        tenancy: Annotated[Tenancy, Depends(_tenancy)], tenant: Annotated[Tenant, Depends(_tenant)]
    ) -> AsyncIterator[AsyncSession]:
        async with tenancy.session(tenant, read_only=True, replica=replica, max_staleness=max_staleness) as session:
            yield session

    return Depends(session_of, scope="function")


def RequireScope(*scopes: str) -> Any:  # noqa: N802 - capitalised like FastAPI's Depends and Security
    """Demand all ``scopes`` of the request's credential; the dependency's value is the ``Credential``.

    For ``dependencies=[RequireScope("orders:read")]``, and for ``Annotated[Credential, RequireScope("orders:read")]``.

    Raises:
        ConfigurationError: no scope is given.
    """
    if not scopes:
        raise ConfigurationError("RequireScope needs at least one scope")
    return Security(_scopes, scopes=list(scopes))


def set_security_schemes(app: FastAPI, *schemes: SecurityBase) -> None:
    """Show ``schemes`` in the OpenAPI document where a route uses a dependency from here, in place of API keys.

    The document then says what the middleware's authenticators accept. The schemes are FastAPI's own, which only
    describe here: ``APIKeyCookie(name="__Host-session")``, ``HTTPBearer(bearerFormat="JWT")``, ``OpenIdConnect(...)``.
    Name ``api_key_header`` and ``bearer_token`` among them where keys are accepted as well. A second call replaces
    what the first one has set.

    Args:
        app: The application; its routes may be added before or after.
        schemes: One or more; a request needs one of them.

    Raises:
        ConfigurationError: there is none, one is no security scheme, or two have one name.
    """
    given: tuple[object, ...] = schemes
    if unknown := [scheme for scheme in given if not isinstance(scheme, SecurityBase)]:
        raise ConfigurationError(f"{unknown[0]!r} is not a security scheme of FastAPI")
    by_name = {scheme.scheme_name: scheme for scheme in schemes}
    if not schemes or len(by_name) < len(schemes):
        raise ConfigurationError("set_security_schemes needs one or more schemes, each with a scheme_name of its own")
    given_before: object = app.openapi
    generate = given_before.generate if isinstance(given_before, _Document) else app.openapi
    # the way to extend the document that FastAPI describes
    app.openapi = _Document(generate, by_name)  # type: ignore[method-assign]


class _Document:
    """What makes the OpenAPI document of an application, with its own schemes."""

    def __init__(self, generate: Callable[[], dict[str, Any]], schemes: Mapping[str, SecurityBase]) -> None:
        self.generate = generate
        self._schemes = schemes

    def __call__(self) -> dict[str, Any]:
        return _with_schemes(self.generate(), self._schemes)


def _with_schemes(document: dict[str, Any], schemes: Mapping[str, SecurityBase]) -> dict[str, Any]:
    """Return a copy of an OpenAPI document that shows ``schemes`` in place of API keys."""
    shown = deepcopy(document)
    paths = [*shown.get("paths", {}).values(), *shown.get("webhooks", {}).values()]
    replaced = False
    for operation in (operation for path in paths for operation in path.values() if isinstance(operation, dict)):
        needed: list[dict[str, list[str]]] = operation.get("security", [])
        scopes = next((entry[name] for entry in needed for name in entry if name in _SHOWN_BY_DEFAULT), None)
        if scopes is not None:
            replaced = True
            others = [entry for entry in needed if _SHOWN_BY_DEFAULT.isdisjoint(entry)]
            operation["security"] = [*({name: scopes} for name in schemes), *others]
    if replaced:
        described: dict[str, Any] = shown["components"]["securitySchemes"]
        for name in _SHOWN_BY_DEFAULT:
            described.pop(name, None)
        for name, scheme in schemes.items():
            described[name] = scheme.model.model_dump(mode="json", by_alias=True, exclude_none=True)
    return shown


__all__ = [
    "CurrentCredential",
    "CurrentTenancy",
    "CurrentTenant",
    "ReadSession",
    "RequireScope",
    "TenantReadSession",
    "TenantSession",
    "TenantTransaction",
    "api_key_header",
    "bearer_token",
    "set_security_schemes",
]
