"""The answers to refused requests."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest

from tenancy_orm.asgi import Problem, problem_for
from tenancy_orm.asgi.problems import INVALID_CREDENTIAL
from tenancy_orm.errors import (
    CheckoutRefusedError,
    CheckoutTimeoutError,
    ControlUnavailableError,
    CredentialsUnavailableError,
    CrossOriginError,
    CrossTenantError,
    InvalidCredentialError,
    InvalidInvitationError,
    MalformedRequestError,
    MarkerMismatchError,
    MissingScopeError,
    NoTenantError,
    NotOpenError,
    QuotaExceededError,
    ServerUnavailableError,
    TenancyError,
    TenantDeletedError,
    TenantMaintenanceError,
    TenantNotAllowedError,
    TenantNotFoundError,
    TenantProvisioningError,
    TenantSuspendedError,
    TooManyAttemptsError,
)
from tenancy_orm.tenant import Status, Tenant
from tests.support.asgi import http_scope, messages, websocket_scope

ACME = Tenant(id=UUID(int=1), slug="acme", status=Status.ACTIVE, tier="free")


def headers(problem: Problem) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in problem.headers}


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (InvalidCredentialError("missing"), 401, "missing-credential"),
        (InvalidCredentialError("ambiguous"), 401, "ambiguous-credential"),
        (InvalidCredentialError("unknown"), 401, "invalid-credential"),
        (MalformedRequestError("the header Host"), 400, "malformed-request"),
        (CrossTenantError("x", bound="acme", requested="globex"), 403, "cross-tenant"),
        (MissingScopeError("orders:write"), 403, "missing-scope"),
        (TenantNotAllowedError("globex"), 403, "cross-tenant"),
        (TenantNotAllowedError(), 403, "no-tenant"),
        (CrossOriginError("https://globex.example"), 403, "cross-origin"),
        (InvalidInvitationError("used"), 403, "invalid-invitation"),
        (CredentialsUnavailableError("no answer from db7"), 503, "credentials-unavailable"),
        (TenantSuspendedError("acme", reason="unpaid since May"), 403, "tenant-suspended"),
        (TenantDeletedError("acme"), 403, "tenant-unavailable"),
        (TenantNotFoundError("globex"), 404, "tenant-not-found"),
        (TenantProvisioningError("acme"), 503, "tenant-provisioning"),
        (TenantMaintenanceError("acme", reason="moving to db7"), 503, "tenant-maintenance"),
        (CheckoutTimeoutError(server="db7", tenant="acme", timeout=1, limit=5), 503, "busy"),
        (CheckoutRefusedError(server="db7", tenant="globex", timeout=1, limit=5, expected=9, left=1), 503, "busy"),
        (ServerUnavailableError(server="db7", tenant="acme", sqlstate="57P03"), 503, "database-unavailable"),
        (ControlUnavailableError("no answer from db7"), 503, "credentials-unavailable"),
        (TooManyAttemptsError(2.5), 429, "too-many-attempts"),
        (QuotaExceededError(tenant="acme", resource="users", limit=3, used=3, requested=1), 429, "quota-exceeded"),
    ],
)
def test_an_error_has_its_answer(error: TenancyError, status: int, code: str) -> None:
    """One status and one type of document for each; what the server knows stays inside."""
    problem = problem_for(error, tenant=ACME)
    assert problem is not None
    document = json.loads(problem.body)
    assert problem.status == document["status"] == status
    assert document["type"] == f"urn:tenancy:problem:{code}"
    assert document["title"] and document["detail"]
    for inside in ("globex", "db7", "57P03", "unpaid", "acme"):
        assert inside.encode() not in problem.body
    assert ("www-authenticate" in headers(problem)) == (status == 401 or code == "missing-scope")
    if status == 503 or isinstance(error, TooManyAttemptsError):
        assert int(headers(problem)["retry-after"]) >= 1


@pytest.mark.parametrize(
    "error",
    [
        NoTenantError(),
        NotOpenError("closed"),
        MarkerMismatchError(tenant="acme", database="db", expected="a", found="b"),
        TenancyError("anything else"),
    ],
)
def test_a_fault_of_the_server_has_no_answer(error: TenancyError) -> None:
    """It is raised on, for the application's error reporting to see."""
    assert problem_for(error) is None


@pytest.mark.parametrize("reason", ["malformed", "checksum", "unknown", "secret", "revoked", "expired", "network"])
def test_a_bad_key_is_never_explained(reason: str) -> None:
    """The very same answer, whatever is wrong with it."""
    assert problem_for(InvalidCredentialError(reason, credential_id="abc")) is INVALID_CREDENTIAL


def test_a_quota_names_its_figures_and_when_to_come_back() -> None:
    """Only to the tenant of the request."""
    error = QuotaExceededError(
        tenant="acme",
        resource="api_calls",
        limit=1_000,
        used=1_000,
        requested=1,
        resets_at=datetime.now(UTC) + timedelta(seconds=90),
    )
    problem = problem_for(error, tenant=ACME)
    assert problem is not None
    wait = headers(problem)["retry-after"]
    assert 85 <= int(wait) <= 90
    assert headers(problem)["ratelimit-policy"] == '"api_calls";q=1000'
    assert headers(problem)["ratelimit"] == f'"api_calls";r=0;t={wait}'
    document = json.loads(problem.body)
    assert (document["resource"], document["limit"], document["used"]) == ("api_calls", 1_000, 1_000)
    assert document["resets_at"].endswith("+00:00")


def test_a_quota_of_another_tenant_is_not_told() -> None:
    """Nor is one told to nobody."""
    error = QuotaExceededError(
        tenant="globex", resource="users", limit=3, used=3, requested=1, resets_at=datetime.now(UTC)
    )
    for asking in (ACME, None):
        problem = problem_for(error, tenant=asking)
        assert problem is not None and not problem.members and not problem.headers


def test_a_lifetime_quota_has_no_time_to_come_back() -> None:
    """Waiting would not help; what is left may be enough for less."""
    error = QuotaExceededError(tenant="acme", resource="users", limit=3, used=2, requested=2, period="lifetime")
    problem = problem_for(error, tenant=ACME)
    assert problem is not None and "retry-after" not in headers(problem)
    assert headers(problem)["ratelimit"] == '"users";r=1'


def test_what_is_held_may_be_free_again_at_any_moment() -> None:
    """So a caller at a limit on concurrency comes back soon."""
    error = QuotaExceededError(tenant="acme", resource="jobs", limit=2, used=2, requested=1, period="concurrent")
    problem = problem_for(error, tenant=ACME)
    assert problem is not None
    assert headers(problem) == {"ratelimit-policy": '"jobs";q=2', "ratelimit": '"jobs";r=0', "retry-after": "1"}


def test_a_scope_that_would_break_the_header_is_left_out_of_it() -> None:
    """No route's scope can inject a header."""
    problem = problem_for(MissingScopeError('x"\r\nset-cookie: a=b'))
    assert problem is not None
    assert headers(problem)["www-authenticate"] == 'Bearer error="insufficient_scope"'


async def test_http_is_answered_with_a_document() -> None:
    """With its length, and not to be cached."""
    start, body = await messages(INVALID_CREDENTIAL, http_scope())
    assert start["status"] == 401
    found = dict(start["headers"])
    assert found[b"content-type"] == b"application/problem+json"
    assert found[b"cache-control"] == b"no-store"
    assert found[b"www-authenticate"] == b'Bearer error="invalid_token"'
    assert int(found[b"content-length"]) == len(body["body"])


async def test_a_websocket_is_refused_with_a_document_where_the_server_can() -> None:
    """By the extension websocket.http.response."""
    scope = websocket_scope(extensions={"websocket.http.response": {}})
    start, body = await messages(INVALID_CREDENTIAL, scope)
    assert start["type"] == "websocket.http.response.start" and start["status"] == 401
    assert body["type"] == "websocket.http.response.body"
    assert json.loads(body["body"])["status"] == 401


@pytest.mark.parametrize("more", [{}, {"extensions": None}, {"extensions": {}}])
async def test_a_websocket_is_closed_where_the_server_cannot(more: dict[str, Any]) -> None:
    """Before it is accepted, so the server answers the handshake with 403."""
    assert await messages(INVALID_CREDENTIAL, websocket_scope(**more)) == [
        {"type": "websocket.close", "code": 1008, "reason": "Credential not valid"}
    ]


@pytest.mark.parametrize(
    ("error", "reason", "seconds"),
    [
        (CheckoutTimeoutError(server="db7", tenant="acme", timeout=1, limit=5), "timed-out", b"1"),
        (
            CheckoutRefusedError(server="db7", tenant="acme", timeout=1, limit=5, expected=9, left=1, retry_after=7.2),
            "cannot-be-served-in-time",
            b"8",
        ),
        (
            CheckoutRefusedError(server="db7", tenant="acme", timeout=1, limit=5, reason="queue"),
            "too-many-waiting",
            b"1",
        ),
    ],
)
def test_a_busy_database_says_why_and_when_to_try_again(error: TenancyError, reason: str, seconds: bytes) -> None:
    """The reason is a word, and the time is rounded up."""
    problem = problem_for(error, tenant=ACME)
    assert problem is not None
    assert json.loads(problem.body)["reason"] == reason
    assert (b"retry-after", seconds) in problem.headers
