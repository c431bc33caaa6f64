"""FastAPI dependencies: the tenant, its session, and its key's scopes (extra ``fastapi``).

```python
app = FastAPI(lifespan=tenancy.lifespan)
app.add_middleware(TenancyMiddleware, tenancy=tenancy, exempt=["/docs", "/openapi.json"])


@app.get("/orders", dependencies=[RequireScope("orders:read")])
async def orders(session: TenantSession, tenant: CurrentTenant) -> list[Order]: ...
```

Sessions are closed, and transactions committed, after the path operation has returned and before the response is sent:
a commit that fails is an error of the request, and no connection is in use while a slow client reads. A streaming body
opens its own session. Every route that uses one of these dependencies shows the API key in the OpenAPI document.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any

from sqlalchemy.ext.asyncio import AsyncSession
from starlette.requests import HTTPConnection

from ..asgi.middleware import TENANCY
from ..asgi.scopes import credential_of, demand_scopes
from ..authentication.credential import Credential
from ..context import current_tenant
from ..errors import ConfigurationError, InvalidCredentialError, MissingExtraError
from ..tenancy import Tenancy
from ..tenant import Tenant

try:
    from fastapi import Depends, Security
    from fastapi.openapi.models import APIKey, HTTPBearer
    from fastapi.security import SecurityScopes
    from fastapi.security.base import SecurityBase
except ImportError as exc:
    raise MissingExtraError("fastapi", "fastapi") from exc


class _KeyScheme(SecurityBase):
    """Documents one way to send the key. The middleware has checked the key already."""

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
"""The security scheme of ``X-API-Key``."""

bearer_token = _KeyScheme(HTTPBearer(description="The tenant's API key"), "ApiKeyBearer")
"""The security scheme of ``Authorization: Bearer``."""


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
"""The credential that the request was admitted with: its tenant, its key's id and scopes."""

CurrentTenant = Annotated[Tenant, Depends(_tenant)]
"""The tenant of the request."""

CurrentTenancy = Annotated[Tenancy, Depends(_tenancy)]
"""The ``Tenancy`` that serves the application; needs no key."""

TenantSession = Annotated[AsyncSession, Depends(_session, scope="function")]
"""A session on the tenant's database, as ``tenancy.session()``. Changes that are not committed are rolled back."""

TenantTransaction = Annotated[AsyncSession, Depends(_transaction, scope="function")]
"""A session on the tenant's database, committed when the path operation returns, as ``tenancy.transaction()``."""


def RequireScope(*scopes: str) -> Any:  # noqa: N802 - capitalised like FastAPI's Depends and Security
    """Demand all ``scopes`` of the request's key; the dependency's value is the ``Credential``.

    For ``dependencies=[RequireScope("orders:read")]``, and for ``Annotated[Credential, RequireScope("orders:read")]``.

    Raises:
        ConfigurationError: no scope is given.
    """
    if not scopes:
        raise ConfigurationError("RequireScope needs at least one scope")
    return Security(_scopes, scopes=list(scopes))


__all__ = [
    "CurrentCredential",
    "CurrentTenancy",
    "CurrentTenant",
    "RequireScope",
    "TenantSession",
    "TenantTransaction",
    "api_key_header",
    "bearer_token",
]
