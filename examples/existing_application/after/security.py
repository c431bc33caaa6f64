import hashlib
import hmac
import os
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated
from uuid import uuid4

import jwt
from fastapi import Depends, Response

from models import Organisation, User
from tenancy_orm.asgi import JwtAuthenticator
from tenancy_orm.integrations.fastapi import CurrentCredential

SECRET = os.environ["JWT_SECRET"]

authenticator = JwtAuthenticator(
    issuer="helpdesk",
    audience="helpdesk",
    secret=SECRET,
    algorithms=["HS256"],
    tenants_claim="org",
    header=False,
    cookie="session",
)


@dataclass
class Person:
    id: int


def hash_password(password: str) -> str:
    salt = os.urandom(16)
    return f"{salt.hex()}:{_scrypt(password, salt).hex()}"


def is_password(password: str, stored: str) -> bool:
    salt, digest = (bytes.fromhex(part) for part in stored.split(":"))
    return hmac.compare_digest(_scrypt(password, salt), digest)


def _scrypt(password: str, salt: bytes) -> bytes:
    return hashlib.scrypt(password.encode(), salt=salt, n=2**14, r=8, p=1)


def log_in(response: Response, user: User, organisation: Organisation) -> None:
    now = datetime.now(UTC)
    claims = {
        "iss": "helpdesk",
        "aud": "helpdesk",
        "sub": str(user.id),
        "jti": str(uuid4()),
        "iat": now,
        "exp": now + timedelta(hours=12),
    }
    if organisation.tenant_id is not None:  # until its move an organisation has no tenant
        claims["org"] = str(organisation.tenant_id)
    token = jwt.encode(claims, SECRET, "HS256")
    response.set_cookie("session", token, max_age=12 * 3600, httponly=True, secure=True, samesite="lax")


async def current_person(credential: CurrentCredential) -> Person:
    return Person(int(credential.subject))


CurrentPerson = Annotated[Person, Depends(current_person)]
