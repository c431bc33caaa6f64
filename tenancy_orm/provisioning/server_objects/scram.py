"""SCRAM-SHA-256 verifiers, computed here so that no password is part of a statement.

``CREATE ROLE ... PASSWORD 'secret'`` would put the secret into the server's log (``log_statement = ddl``), into
``pg_stat_activity`` and onto the network. PostgreSQL accepts a verifier instead (RFC 5803,
``SCRAM-SHA-256$<iterations>:<salt>$<StoredKey>:<ServerKey>``), on every version.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os

_SALT_BYTES = 16
_LEAST_CHARACTERS = 43  # 256 bits in base64


def scram_verifier(password: str, *, salt: bytes | None = None, iterations: int = 1) -> str:
    """Return the verifier of a random ``password``, for ``CREATE ROLE ... PASSWORD``.

    Iterations slow down an attacker who has the verifier and tries likely passwords: with 4,096 of them every guess,
    and also every CREATE ROLE and every login, takes 2 to 5 ms. For 256 random bits there are no likely passwords, and
    half of 2**256 hashes cannot be computed at any cost per hash, so one iteration is as strong as a million. This is
    true for random secrets only, so a short password is refused.

    Args:
        password: At least 43 printable ASCII characters, as from ``secrets.keyring.new_password``. (Other characters
            would need SASLprep, which maps some to others.)
        salt: 16 random bytes where None.
        iterations: PBKDF2 rounds.

    Raises:
        ValueError: the password is short, or not printable ASCII.

    >>> scram_verifier("x" * 43, salt=bytes(16))
    'SCRAM-SHA-256$1:AAAAAAAAAAAAAAAAAAAAAA==$gHWG7MSjPfO8wgOWDLKcFRVxQ59fMMhCo8y7xdjHA0w=:...'
    """
    if len(password) < _LEAST_CHARACTERS or not password.isascii() or not password.isprintable():
        raise ValueError(f"a tenant's password must be random: at least {_LEAST_CHARACTERS} printable ASCII characters")
    salt = os.urandom(_SALT_BYTES) if salt is None else salt
    salted = hashlib.pbkdf2_hmac("sha256", password.encode("ascii"), salt, iterations)
    stored_key = hashlib.sha256(hmac.digest(salted, b"Client Key", "sha256")).digest()
    server_key = hmac.digest(salted, b"Server Key", "sha256")
    return f"SCRAM-SHA-256${iterations}:{_base64(salt)}${_base64(stored_key)}:{_base64(server_key)}"


def _base64(value: bytes) -> str:
    return base64.b64encode(value).decode("ascii")
