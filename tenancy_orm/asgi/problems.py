"""The answers to refused requests: problem documents (RFC 9457).

They say what the caller can do, and nothing about the inside: no database, no server, no other tenant, and not why a
credential is invalid. Only this room knows HTTP status codes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

from starlette.types import Receive, Scope, Send

from ..correlation import current_request_id
from ..errors import (
    AdmissionEndedError,
    CheckoutRefusedError,
    CheckoutTimeoutError,
    ControlUnavailableError,
    CredentialsUnavailableError,
    CrossOriginError,
    CrossTenantError,
    ExportRunningError,
    InvalidCredentialError,
    InvalidInvitationError,
    MalformedRequestError,
    MissingScopeError,
    QuotaExceededError,
    ServerUnavailableError,
    TenancyError,
    TenantMaintenanceError,
    TenantNotAllowedError,
    TenantNotFoundError,
    TenantNotNamedError,
    TenantPausedError,
    TenantProvisioningError,
    TenantRevisionError,
    TenantSuspendedError,
    TenantUnavailableError,
    TooManyAttemptsError,
)
from ..quotas.rates import Allowed, Denied
from ..tenant import Tenant

POLICY_VIOLATION = 1008
"""The close code of a websocket (RFC 6455) where the server cannot answer the handshake with a document."""

_SCOPE_TOKEN = re.compile(r"[\x21\x23-\x5b\x5d-\x7e]+")


@dataclass(frozen=True)
class Problem:
    """A refusal, and an ASGI application that answers with it.

    ``code`` is the last part of the document's ``type``; ``members`` are added to the standard members.
    """

    status: int
    code: str
    title: str
    detail: str
    headers: tuple[tuple[bytes, bytes], ...] = ()
    members: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def body(self) -> bytes:
        """The document."""
        return self._body()

    def _body(self, **more: str) -> bytes:
        document = {
            "type": f"urn:tenancy:problem:{self.code}",
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
            **self.members,
            **more,
        }
        return json.dumps(document, separators=(",", ":")).encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse a websocket before it is accepted."""
        prefix = ""
        if scope["type"] == "websocket":
            if "websocket.http.response" not in (scope.get("extensions") or {}):
                await send({"type": "websocket.close", "code": POLICY_VIOLATION, "reason": self.title})
                return
            prefix = "websocket."
        request_id = current_request_id()
        body = self.body if request_id is None else self._body(request_id=request_id)
        headers = [
            (b"content-type", b"application/problem+json"),
            (b"content-length", str(len(body)).encode()),
            (b"cache-control", b"no-store"),
            *self.headers,
        ]
        await send({"type": f"{prefix}http.response.start", "status": self.status, "headers": headers})
        await send({"type": f"{prefix}http.response.body", "body": body})


def _retry_after(seconds: int) -> tuple[tuple[bytes, bytes], ...]:
    return ((b"retry-after", str(seconds).encode()),)


MISSING_CREDENTIAL = Problem(
    401,
    "missing-credential",
    "Credential required",
    "this request needs a credential",
    ((b"www-authenticate", b"Bearer"),),
)
AMBIGUOUS_CREDENTIAL = Problem(
    401,
    "ambiguous-credential",
    "More than one credential",
    "send exactly one credential",
    ((b"www-authenticate", b'Bearer error="invalid_request"'),),
)
INVALID_CREDENTIAL = Problem(
    401,
    "invalid-credential",
    "Credential not valid",
    "the credential is not valid",
    ((b"www-authenticate", b'Bearer error="invalid_token"'),),
)
CROSS_TENANT = Problem(
    403, "cross-tenant", "Another tenant", "the request names a tenant that its credential does not allow"
)
EXPORTING = Problem(
    409,
    "export-running",
    "Export under way",
    "an export of this tenant is under way; try again when it has ended",
    _retry_after(30),
)
NO_TENANT = Problem(403, "no-tenant", "No tenant", "this credential allows no tenant")
CROSS_ORIGIN = Problem(
    403,
    "cross-origin",
    "Another origin",
    "this request comes from a page of another origin, which may not use a cookie",
)
SUSPENDED = Problem(403, "tenant-suspended", "Tenant suspended", "this tenant is suspended")
UNAVAILABLE = Problem(403, "tenant-unavailable", "Tenant not available", "this tenant is not available")
NOT_FOUND = Problem(404, "tenant-not-found", "No such tenant", "this tenant does not exist")
PROVISIONING = Problem(
    503,
    "tenant-provisioning",
    "Tenant not ready",
    "this tenant is being created or upgraded; try again shortly",
    _retry_after(2),
)
PAUSED = Problem(
    503, "tenant-paused", "Tenant paused", "this tenant's data is being moved; try again shortly", _retry_after(2)
)
REVISION = Problem(
    503,
    "tenant-revision",
    "Tenant being upgraded",
    "this tenant's data is at another version than this service works with; try again shortly",
    _retry_after(10),
)
MAINTENANCE = Problem(
    503,
    "tenant-maintenance",
    "Tenant in maintenance",
    "this tenant is in maintenance; try again later",
    _retry_after(60),
)
BUSY = Problem(503, "busy", "Too busy", "all connections to the database are in use; try again")
DATABASE_AWAY = Problem(
    503, "database-unavailable", "Database not available", "the database does not answer; try again", _retry_after(5)
)
CONTROL_AWAY = Problem(
    503,
    "credentials-unavailable",
    "Credentials cannot be checked",
    "the credential cannot be checked now; try again",
    _retry_after(5),
)
RATE_LIMITED = Problem(429, "rate-limited", "Too many requests", "this tenant sends too many requests; slow down")
ADDRESS_LIMITED = Problem(
    429, "rate-limited", "Too many requests", "too many requests come from this address; slow down"
)
INVALID_INVITATION = Problem(
    403, "invalid-invitation", "Invitation not valid", "this invitation is not valid, or not any more"
)
QUOTA_EXCEEDED = Problem(429, "quota-exceeded", "Quota exceeded", "the request would pass a limit")


def rate_headers(outcome: Allowed | Denied, policy: str = "tenant") -> list[tuple[bytes, bytes]]:
    """Return the headers about a client's request rate (draft-ietf-httpapi-ratelimit-headers-10).

    ``RateLimit-Policy`` has the number of requests that may come at once (q); ``RateLimit`` has the number that still
    may (r), and the seconds until q may come again (t). Without a limit there are no headers. ``policy`` says what the
    rate is counted by.
    """
    if outcome.limit is None:
        return []
    reset = math.ceil(outcome.reset)
    headers = [
        (b"ratelimit-policy", b'"%s";q=%d' % (policy.encode(), outcome.limit)),
        (b"ratelimit", b'"%s";r=%d;t=%d' % (policy.encode(), outcome.remaining or 0, reset)),
    ]
    if isinstance(outcome, Denied):
        headers += _retry_after(max(1, math.ceil(outcome.retry_after)))
    return headers


def problem_for(error: TenancyError, *, tenant: Tenant | None = None) -> Problem | None:
    """Return the answer to ``error``, or None where neither the request nor a temporary condition caused it.

    Args:
        error: What was raised.
        tenant: The request's tenant: figures in an error about another tenant are left out.
    """
    for cls in type(error).__mro__:
        answer = _ANSWERS.get(cls)
        if answer is not None:
            return answer if isinstance(answer, Problem) else answer(error, tenant)
    return None


def _bad_credential(error: InvalidCredentialError, tenant: Tenant | None) -> Problem:
    # missing and ambiguous the caller knows anyway; malformed, unknown, revoked and expired ones share one answer
    return {"missing": MISSING_CREDENTIAL, "ambiguous": AMBIGUOUS_CREDENTIAL}.get(error.reason, INVALID_CREDENTIAL)


def _malformed(error: MalformedRequestError, tenant: Tenant | None) -> Problem:
    return Problem(400, "malformed-request", "Malformed request", str(error))


def _too_many_attempts(error: TooManyAttemptsError, tenant: Tenant | None) -> Problem:
    headers = _retry_after(max(1, math.ceil(error.retry_after)))
    return Problem(429, "too-many-attempts", "Too many attempts", "too many invalid credentials; wait", headers)


def _server_away(error: ServerUnavailableError, tenant: Tenant | None) -> Problem:
    if error.retry_after is None:
        return DATABASE_AWAY
    return replace(DATABASE_AWAY, headers=_retry_after(max(1, math.ceil(error.retry_after))))


def _not_allowed(error: TenantNotAllowedError, tenant: Tenant | None) -> Problem:
    return NO_TENANT if error.requested is None else CROSS_TENANT


def _not_named(error: TenantNotNamedError, tenant: Tenant | None) -> Problem:
    detail = "this credential allows several tenants; name one of them in the request"
    return Problem(409, "tenant-not-named", "Which tenant?", detail, members={"tenants": list(error.slugs)})


def _busy(error: CheckoutTimeoutError, tenant: Tenant | None) -> Problem:
    reason = error.reason if isinstance(error, CheckoutRefusedError) else "timeout"
    return replace(
        BUSY, headers=_retry_after(max(1, math.ceil(error.retry_after))), members={"reason": _BUSY_REASONS[reason]}
    )


_BUSY_REASONS = {
    "timeout": "timed-out",  # it has waited
    "deadline": "cannot-be-served-in-time",
    "queue": "too-many-waiting",
}


def _missing_scope(error: MissingScopeError, tenant: Tenant | None) -> Problem:
    challenge = 'Bearer error="insufficient_scope"'
    if _SCOPE_TOKEN.fullmatch(error.scope):
        challenge += f', scope="{error.scope}"'
    return Problem(
        403,
        "missing-scope",
        "Scope missing",
        str(error),
        ((b"www-authenticate", challenge.encode()),),
        {"scope": error.scope},
    )


def _quota(error: QuotaExceededError, tenant: Tenant | None) -> Problem:
    if tenant is None or error.tenant != tenant.slug:
        return QUOTA_EXCEEDED
    members: dict[str, Any] = {"resource": error.resource, "limit": error.limit, "used": error.used}
    limit = f'"{error.resource}";r={max(error.limit - error.used, 0)}'
    retry: tuple[tuple[bytes, bytes], ...] = ()
    if error.resets_at is not None:
        seconds = max(1, math.ceil((error.resets_at - datetime.now(UTC)).total_seconds()))
        limit, retry = f"{limit};t={seconds}", _retry_after(seconds)
        members["resets_at"] = error.resets_at.astimezone(UTC).isoformat()
    elif error.period == "concurrent":
        retry = _retry_after(1)  # a hold may be released at any moment
    policy = (b"ratelimit-policy", f'"{error.resource}";q={error.limit}'.encode())
    return replace(QUOTA_EXCEEDED, headers=(policy, (b"ratelimit", limit.encode()), *retry), members=members)


_ANSWERS: Mapping[type[BaseException], Problem | Callable[[Any, Tenant | None], Problem]] = {
    InvalidCredentialError: _bad_credential,
    AdmissionEndedError: INVALID_CREDENTIAL,
    MalformedRequestError: _malformed,
    InvalidInvitationError: INVALID_INVITATION,
    CrossTenantError: CROSS_TENANT,
    ExportRunningError: EXPORTING,
    CrossOriginError: CROSS_ORIGIN,
    CredentialsUnavailableError: CONTROL_AWAY,
    TenantNotAllowedError: _not_allowed,
    TenantNotNamedError: _not_named,
    TooManyAttemptsError: _too_many_attempts,
    MissingScopeError: _missing_scope,
    TenantNotFoundError: NOT_FOUND,
    TenantProvisioningError: PROVISIONING,
    TenantPausedError: PAUSED,
    TenantRevisionError: REVISION,
    TenantMaintenanceError: MAINTENANCE,
    TenantSuspendedError: SUSPENDED,
    TenantUnavailableError: UNAVAILABLE,
    QuotaExceededError: _quota,
    CheckoutTimeoutError: _busy,
    ServerUnavailableError: _server_away,
    ControlUnavailableError: CONTROL_AWAY,
}
