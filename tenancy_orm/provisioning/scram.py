"""SCRAM-SHA-256 verifiers, computed here so that no password is ever part of a statement.

``CREATE ROLE ... PASSWORD 'secret'`` puts the secret into the server's log (``log_statement = ddl``), into
``pg_stat_activity`` and into whatever watches the wire. PostgreSQL takes a finished verifier in its place
(RFC 5803, ``SCRAM-SHA-256$<iterations>:<salt>$<StoredKey>:<ServerKey>``), and logs in against it on every version.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os

_SALT_BYTES = 16
_LEAST_CHARACTERS = 43  # 256 bits in base64


def scram_verifier(password: str, *, salt: bytes | None = None, iterations: int = 1) -> str:
    """Return the verifier of a random ``password``, as ``CREATE ROLE ... PASSWORD`` takes it.

    Iterations slow down a guesser who has the verifier and tries likely passwords; 4,096 of them cost every guess,
    and also every CREATE ROLE and every login, 2 to 5 ms. Against 256 random bits there is nothing likely to try:
    half of 2**256 hashes are out of reach at any price per hash, so one iteration is as strong as a million. That is
    sound for random secrets only, which is why a short password is refused here whatever its origin.

    Args:
        password: At least 43 printable ASCII characters, as ``secrets.keyring.new_password`` makes them. (Others
            would have to pass SASLprep first, which maps some to others.)
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
