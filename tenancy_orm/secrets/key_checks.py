"""Check values: whether a configured key is the one that this installation has used under its id.

Without them, another key under a known id is noticed by nobody at first: new passwords are sealed with it, and those
of existing tenants cannot be opened any more; or, with a pepper, no API key is valid.

A check value is derived from the key by HKDF, with the installation and the key's id, and stored in the control
database. It does not help to guess the key, which is 256 random bits; a sealed password, or a digest of a known API
key, would let a guess be tested as well. HKDF's output tells nothing about the key itself.

Data keys need none: they are unwrapped by an authenticated cipher, under ids that are never used twice.
"""

from __future__ import annotations

import hmac
import logging
from collections.abc import Iterable, Mapping
from typing import Final, Literal
from uuid import UUID

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from sqlalchemy import ARRAY, Text, bindparam, select, text
from sqlalchemy.dialects.postgresql import insert

from ..control.database import ControlDatabase
from ..control.models import key_checks
from ..errors import ConfigurationError, SecretError, counted
from .keyring import Keyring

logger = logging.getLogger("tenancy_orm.secrets")

Kind = Literal["encryption", "pepper"]

# so many passwords are opened to see whether a key is right that has no check value yet
_SAMPLE: Final = 20

_SEALED_UNDER = text("""
    SELECT id, slug, sealed FROM (
        SELECT id, slug, sealed_password AS sealed FROM tenancy.tenants
        UNION ALL SELECT id, slug, next_sealed_password FROM tenancy.tenants
    ) AS stored WHERE substring(sealed for :length) = :prefix LIMIT :sample
""")
# in hexadecimal, since asyncpg knows the type text[], and would ask the server for bytea[], which takes 10 ms
_UNKNOWN_KEYS = text("""
    SELECT key_id, count(*) AS tenants FROM (
        SELECT substring(sealed_password from 3 for get_byte(sealed_password, 1)) AS key_id
        FROM tenancy.tenants WHERE length(sealed_password) > 2
    ) AS stored WHERE encode(key_id, 'hex') <> ALL (:known) GROUP BY 1 ORDER BY 1
""").bindparams(bindparam("known", type_=ARRAY(Text)))


def check_value(key: bytes, *, kind: Kind, key_id: str, installation: UUID) -> bytes:
    """Return the check value of a key: 32 bytes that are the same only for this key, id and installation."""
    info = f"tenancy-key-check:{kind}:{key_id}".encode()
    return HKDF(algorithm=hashes.SHA256(), length=32, salt=installation.bytes, info=info).derive(key)


async def check_keys(
    control: ControlDatabase,
    *,
    encryption_keys: Mapping[str, bytes],
    peppers: Mapping[str, bytes] | None = None,
    accept: bool = False,
) -> None:
    """Compare the configured keys with their check values; those that have none are recorded.

    An encryption key without a check value must open a password that is sealed under its id, if there is one.

    Args:
        control: The control database, open.
        encryption_keys: The configured keys by id, without data keys.
        peppers: The peppers of API keys' digests, by version.
        accept: Record the configured keys in place of other ones.

    Raises:
        ConfigurationError: a key is not the one that was used under its id.
        ControlUnavailableError: the control database does not answer.
    """
    given: dict[tuple[Kind, str], bytes] = {
        **{("encryption", key_id): key for key_id, key in encryption_keys.items()},
        **{("pepper", version): pepper for version, pepper in (peppers or {}).items()},
    }
    values = {
        (kind, key_id): check_value(key, kind=kind, key_id=key_id, installation=control.installation)
        for (kind, key_id), key in given.items()
    }
    known = await _recorded(control)
    missing = [name for name in values if accept or name not in known]
    for kind, key_id in missing:
        if kind == "encryption":
            await _prove(control, key_id, encryption_keys[key_id])
    if missing:
        await _record(control, {name: values[name] for name in missing}, replace=accept)
        # another process may have been faster, with another key
        known = await _recorded(control)
    for (kind, key_id), value in values.items():
        if not hmac.compare_digest(known[kind, key_id], value):
            raise ConfigurationError(_wrong_key(key_id) if kind == "encryption" else _wrong_pepper(key_id))


async def report_unknown_keys(control: ControlDatabase, known: Iterable[str]) -> None:
    """Log an error that names the keys that passwords are sealed under and that are not configured."""
    parameters = {"known": [key_id.encode().hex() for key_id in known]}
    async with control.connect() as connection:
        rows = (await connection.execute(_UNKNOWN_KEYS, parameters)).all()
    for key_id, count in rows:
        logger.error(
            "the passwords of %s are sealed under key %r, which is not configured: they cannot be reached; "
            "configure it again, or, if it is lost, run: tenancy secrets rotate-passwords",
            counted(count),
            key_id.decode(errors="replace"),
        )


async def _recorded(control: ControlDatabase) -> dict[tuple[str, str], bytes]:
    async with control.connect() as connection:
        rows = await connection.execute(select(key_checks.c.kind, key_checks.c.id, key_checks.c.value))
        return {(row.kind, row.id): row.value for row in rows}


async def _record(control: ControlDatabase, values: Mapping[tuple[Kind, str], bytes], *, replace: bool) -> None:
    rows = [{"kind": kind, "id": key_id, "value": value} for (kind, key_id), value in values.items()]
    statement = insert(key_checks)
    if replace:
        statement = statement.on_conflict_do_update(
            index_elements=["kind", "id"], set_={"value": statement.excluded.value}
        )
    else:
        statement = statement.on_conflict_do_nothing()
    async with control.transaction() as connection:
        await connection.execute(statement, rows)


async def _prove(control: ControlDatabase, key_id: str, key: bytes) -> None:
    """Refuse a key that opens none of the passwords that are sealed under its id."""
    keyring = Keyring({key_id: key})
    encoded = key_id.encode()
    prefix = bytes([1, len(encoded)]) + encoded
    parameters = {"prefix": prefix, "length": len(prefix), "sample": _SAMPLE}
    async with control.connect() as connection:
        rows = (await connection.execute(_SEALED_UNDER, parameters)).all()
    unopened = []
    for row in rows:
        try:
            keyring.open_password(row.id, row.sealed)
        except SecretError:
            unopened.append(row.slug)
    if rows and len(unopened) == len(rows):
        raise ConfigurationError(_wrong_key(key_id))
    if unopened:
        logger.error(
            "passwords that are sealed under key %r were sealed with another key of that id, of tenant %s among "
            "others; run: tenancy secrets rotate-passwords",
            key_id,
            unopened[0],
        )


def _wrong_key(key_id: str) -> str:
    return (
        f"encryption key {key_id!r} is not the key that this installation has used under that id: configure the right "
        "one, or give a new key an id of its own; if the old one is lost, configure the new one alone, and run: "
        "tenancy secrets rotate-passwords, which resets the passwords of all tenants' roles and loses no data. If this "
        "one is right, and another was configured by mistake before, run: tenancy secrets accept-keys"
    )


def _wrong_pepper(version: str) -> str:
    return (
        f"key pepper {version!r} is not the one that this installation has used under that id: configure the right "
        "one, or give a new pepper an id of its own; if the old one is lost, the API keys that were issued with it are "
        "lost too, and must be issued again. If this one is right, and another was configured by mistake before, run: "
        "tenancy secrets accept-keys"
    )


__all__ = ["check_keys", "check_value", "report_unknown_keys"]
