"""ASGI middleware for web applications: binds each request to its tenant, and answers the requests that it refuses."""

from ..authentication.credential import Credential, Membership
from .authenticators import ApiKeyAuthenticator, Authenticator, Presented, TextAuthenticator
from .exempt import ExemptPaths
from .exports import ExportEndpoint
from .middleware import TenancyMiddleware
from .origins import Origins
from .problems import Problem, problem_for
from .resolvers import (
    ApiKeyHeader,
    BearerToken,
    HeaderResolver,
    KeyResolver,
    PathPrefixResolver,
    Resolver,
    SubdomainResolver,
    TenantResolver,
    WebSocketKeyProtocol,
)
from .scopes import credential_of, demand_scopes, require_scope
from .tokens import JwtAuthenticator

__all__ = [
    "ApiKeyAuthenticator",
    "ApiKeyHeader",
    "Authenticator",
    "BearerToken",
    "Credential",
    "ExemptPaths",
    "ExportEndpoint",
    "HeaderResolver",
    "JwtAuthenticator",
    "KeyResolver",
    "Membership",
    "Origins",
    "PathPrefixResolver",
    "Presented",
    "Problem",
    "Resolver",
    "SubdomainResolver",
    "TenancyMiddleware",
    "TenantResolver",
    "TextAuthenticator",
    "WebSocketKeyProtocol",
    "credential_of",
    "demand_scopes",
    "problem_for",
    "require_scope",
]
