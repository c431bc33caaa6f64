"""Signed statements about the audit log, to be kept where whoever can rewrite the log cannot reach them.

A checkpoint says: at this sequence number the chain's hash was this. A cut says the same about the last entry that
retention removed. Both are signed with Ed25519, under a key derived from the installation's encryption keys, so that
they can be verified with a public key alone.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, get_args
from uuid import UUID

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from ..errors import AuditError, ConfigurationError

Kind = Literal["checkpoint", "cut"]

_FORMAT = "tenancy-audit-1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What the chain was at one entry.

    Args:
        kind: "checkpoint", or "cut" for the last entry that retention removed.
        installation: The id of the installation whose log it is.
        sequence: The entry's number.
        hash: The entry's hash, 32 bytes.
        occurred_at: The entry's time.
        signed_at: When this was signed.
        key_id: Which key signed it.
        signature: Ed25519 over ``payload``.
    """

    kind: Kind
    installation: UUID
    sequence: int
    hash: bytes = field(repr=False)
    occurred_at: datetime
    signed_at: datetime
    key_id: str
    signature: bytes = field(default=b"", repr=False)

    @property
    def payload(self) -> bytes:
        """What is signed: every field but the signature, as JSON with sorted keys and no spaces."""
        return json.dumps(self._fields(), sort_keys=True, separators=(",", ":")).encode()

    def _fields(self) -> dict[str, Any]:
        return {
            "format": _FORMAT,
            "kind": self.kind,
            "installation": str(self.installation),
            "sequence": self.sequence,
            "hash": self.hash.hex(),
            "occurred_at": _time(self.occurred_at),
            "signed_at": _time(self.signed_at),
            "key_id": self.key_id,
        }

    def to_json(self) -> str:
        """Return it as one JSON object, as ``from_json`` reads it."""
        return json.dumps({**self._fields(), "signature": base64.b64encode(self.signature).decode()}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Checkpoint:
        """Read what ``to_json`` wrote. The signature is not verified here.

        Raises:
            AuditError: it is not a checkpoint.
        """
        try:
            values = json.loads(text)
            if values["format"] != _FORMAT or values["kind"] not in get_args(Kind):
                raise ValueError("another format")
            return cls(
                kind=values["kind"],
                installation=UUID(values["installation"]),
                sequence=int(values["sequence"]),
                hash=bytes.fromhex(values["hash"]),
                occurred_at=datetime.fromisoformat(values["occurred_at"]),
                signed_at=datetime.fromisoformat(values["signed_at"]),
                key_id=str(values["key_id"]),
                signature=base64.b64decode(values["signature"], validate=True),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            raise AuditError(f"this is not a checkpoint of the audit log: {exc}") from exc


class Verifier:
    """Verifies signatures with public keys alone: for an auditor who has no secret.

    Args:
        public_keys: 32-byte Ed25519 public keys in base64, by key id, as ``Signer.public_keys`` gives them.

    Raises:
        ConfigurationError: a key is malformed.
    """

    def __init__(self, public_keys: Mapping[str, str]) -> None:
        self._keys: dict[str, Ed25519PublicKey] = {}
        for key_id, text in public_keys.items():
            try:
                raw = base64.b64decode(text, validate=True)
                self._keys[key_id] = Ed25519PublicKey.from_public_bytes(raw)
            except (binascii.Error, ValueError) as exc:
                raise ConfigurationError(f"public key {key_id!r} is not 32 bytes in base64") from exc

    def verify(self, checkpoint: Checkpoint) -> None:
        """Check the signature.

        Raises:
            AuditError: the key is unknown, or the signature is not that key's over this content.
        """
        key = self._keys.get(checkpoint.key_id)
        if key is None:
            raise AuditError(
                f"the {checkpoint.kind} was signed with key {checkpoint.key_id!r}, which is not known here"
            )
        try:
            key.verify(checkpoint.signature, checkpoint.payload)
        except InvalidSignature:
            raise AuditError(f"the signature of the {checkpoint.kind} is not valid") from None


class Signer(Verifier):
    """Signs with the newest key and verifies with any.

    Args:
        keys: The installation's 32-byte encryption keys by id, oldest first. Signing keys are derived from them by
            HKDF-SHA256, so that one secret need not serve two algorithms.
    """

    def __init__(self, keys: Mapping[str, bytes]) -> None:
        self._private = {key_id: _derive(key) for key_id, key in keys.items()}
        super().__init__(self.public_keys)

    def __repr__(self) -> str:
        """Name the key ids only."""
        return f"Signer({', '.join(self._private)})"

    @property
    def public_keys(self) -> dict[str, str]:
        """The public keys in base64, by key id: publish them beside the checkpoints."""
        return {
            key_id: base64.b64encode(key.public_key().public_bytes_raw()).decode()
            for key_id, key in self._private.items()
        }

    def sign(
        self, kind: Kind, *, installation: UUID, sequence: int, digest: bytes, occurred_at: datetime
    ) -> Checkpoint:
        """Return a signed statement about one entry.

        Raises:
            ConfigurationError: there is no key.
        """
        if not self._private:
            raise ConfigurationError("encryption_keys is empty; a checkpoint is signed with a key derived from them")
        key_id = list(self._private)[-1]
        values: dict[str, Any] = {
            "kind": kind,
            "installation": installation,
            "sequence": sequence,
            "hash": digest,
            "occurred_at": occurred_at,
            "signed_at": datetime.now(UTC),
            "key_id": key_id,
        }
        return Checkpoint(**values, signature=self._private[key_id].sign(Checkpoint(**values).payload))


def _derive(key: bytes) -> Ed25519PrivateKey:
    seed = HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=b"tenancy_orm audit signature").derive(key)
    return Ed25519PrivateKey.from_private_bytes(seed)


def _time(value: datetime) -> str:
    return value.astimezone(UTC).isoformat(timespec="microseconds")
