"""What the routes share: bodies, the person who calls, and who did it for the audit log."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request

from tenancy_orm import Actor
from tenancy_orm.asgi import Credential, credential_of

MAX_BODY_BYTES = 64 * 1024


async def read_body(request: Request) -> bytes:
    """The body, unless it is too long: whoever calls may be nobody yet."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise HTTPException(413, "the body is too long")
    return body


async def read_fields(request: Request, *names: str, optional: Iterable[str] = ()) -> dict[str, Any]:
    """The fields of a JSON object, all of them text that is not empty."""
    try:
        found = json.loads(await read_body(request))
    except ValueError:
        found = None
    allowed = {*names, *optional}
    if not isinstance(found, dict) or not set(names) <= found.keys() <= allowed:
        raise HTTPException(422, f"send a JSON object with {', '.join(names)}")
    for name, value in found.items():
        if not isinstance(value, str) or not value.strip() or "\x00" in value:
            raise HTTPException(422, f"{name} must be text")
    return found


def person_of(request: Request) -> Credential:
    """The credential of the person who calls; a key is no person."""
    credential = credential_of(request)
    if credential is None or credential.kind != "session":
        raise HTTPException(403, "log in first")
    return credential


def actor_of(request: Request) -> Actor:
    """Who calls, for the audit log; on paths that need a credential."""
    credential = credential_of(request)
    if credential is None:
        raise HTTPException(403, "log in first")
    return credential.actor(source=request.client.host if request.client else None)
