import hashlib
import hmac
import os
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated

import jwt
from fastapi import Cookie, Depends, HTTPException, Response

from models import User

SECRET = os.environ["JWT_SECRET"]


@dataclass
class Person:
    id: int
    org_id: int


def hash_password(password: str) -> str:
    salt = os.urandom(16)
    return f"{salt.hex()}:{_scrypt(password, salt).hex()}"


def is_password(password: str, stored: str) -> bool:
    salt, digest = (bytes.fromhex(part) for part in stored.split(":"))
    return hmac.compare_digest(_scrypt(password, salt), digest)


def _scrypt(password: str, salt: bytes) -> bytes:
    return hashlib.scrypt(password.encode(), salt=salt, n=2**14, r=8, p=1)


def log_in(response: Response, user: User) -> None:
    claims = {"sub": str(user.id), "org_id": user.org_id, "exp": datetime.now(UTC) + timedelta(hours=12)}
    token = jwt.encode(claims, SECRET, "HS256")
    response.set_cookie("session", token, max_age=12 * 3600, httponly=True, secure=True, samesite="lax")


async def current_person(session: Annotated[str | None, Cookie()] = None) -> Person:
    try:
        claims = jwt.decode(session or "", SECRET, ["HS256"])
    except jwt.InvalidTokenError:
        raise HTTPException(401, "log in first") from None
    return Person(int(claims["sub"]), claims["org_id"])


CurrentPerson = Annotated[Person, Depends(current_person)]
