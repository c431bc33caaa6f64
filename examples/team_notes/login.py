"""Log in and out, on Starlette's SessionMiddleware."""

from __future__ import annotations

import secrets
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tenancy_orm.asgi import Credential, Origins

from .people import TooManyFailuresError
from .requests import actor_of, person_of, read_fields

if TYPE_CHECKING:
    from tenancy_orm import Tenancy

    from .people import People, Person

SESSION_LIFETIME = timedelta(hours=12)
SHORTEST_PASSWORD, LONGEST_PASSWORD = 12, 256

_own_origin = Origins()


class LoginSession:
    """An ``Authenticator``: turns the session that the cookie holds into a credential."""

    async def authenticate(self, connection: HTTPConnection) -> Credential | None:
        session = connection.session
        if "person" not in session:
            return None
        issued_at = datetime.fromtimestamp(session["at"], UTC)
        return Credential(
            "session",
            session["person"],
            id=session["id"],
            issued_at=issued_at,
            expires_at=issued_at + SESSION_LIFETIME,
        )


async def sign_up(request: Request) -> Response:
    _own_origin.check(request.scope)
    fields = await read_fields(request, "email", "password")
    if not SHORTEST_PASSWORD <= len(fields["password"]) <= LONGEST_PASSWORD:
        raise HTTPException(422, f"a password has {SHORTEST_PASSWORD} characters or more")
    person = await people_of(request).sign_up(fields["email"], fields["password"])
    if person is None:
        raise HTTPException(409, "this address is taken")
    begin_session(request, person)
    return JSONResponse({"id": person.id}, 201)


async def log_in(request: Request) -> Response:
    # the path is exempt, so nobody else has checked: another site's page must not log its visitor in as somebody else
    _own_origin.check(request.scope)
    fields = await read_fields(request, "email", "password")
    try:
        person = await people_of(request).log_in(fields["email"], fields["password"][:LONGEST_PASSWORD])
    except TooManyFailuresError as error:
        return JSONResponse({"detail": str(error)}, 429, {"Retry-After": str(error.seconds)})
    if person is None:
        raise HTTPException(401, "the address or the password is wrong")
    begin_session(request, person)
    return JSONResponse({"id": person.id})


def begin_session(request: Request, person: Person) -> None:
    """Begin a new session, with nothing of the one before: one that somebody else has planted gains nothing."""
    request.session.clear()
    request.session.update(person=person.id, id=secrets.token_urlsafe(16), at=datetime.now(UTC).timestamp())


async def log_out(request: Request) -> Response:
    """End this session. The cookie alone does not suffice: it may have been copied."""
    person = person_of(request)
    await tenancy_of(request).revocations.add(
        token_id=person.id, expires_at=person.expires_at, reason="logged out", actor=actor_of(request)
    )
    request.session.clear()
    return Response(status_code=204)


async def log_out_everywhere(request: Request) -> Response:
    """End all sessions of the person, on every device, with what they have open."""
    person = person_of(request)
    await tenancy_of(request).revocations.add(
        subject=person.subject,
        expires_at=datetime.now(UTC) + SESSION_LIFETIME,
        reason="logged out everywhere",
        actor=actor_of(request),
    )
    request.session.clear()
    return Response(status_code=204)


def people_of(request: Request) -> People:
    people: People = request.app.state.people
    return people


def tenancy_of(connection: HTTPConnection) -> Tenancy:
    tenancy: Tenancy = connection.app.state.tenancy
    return tenancy


routes = [
    Route("/signup", sign_up, methods=["POST"]),
    Route("/login", log_in, methods=["POST"]),
    Route("/me/logout", log_out, methods=["POST"]),
    Route("/me/logout-everywhere", log_out_everywhere, methods=["POST"]),
]
