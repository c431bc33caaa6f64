"""Signed statements about the audit log, to be kept out of reach of everyone who could rewrite the log.

A checkpoint states the chain's hash at a sequence number. A cut states it for the last entry that
retention removed. Both are signed with Ed25519, under a key derived from the installation's encryption keys, so that
they can be verified with a public key alone.

Encryption keys are retired, and signatures must outlive them. So the newest key signs a voucher for each other key
while both are known; the vouchers are stored in the control database. Write access there is not enough to forge one: a
voucher counts only if a configured key signed it.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterable, Mapping
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
_VOUCHER_FORMAT = "tenancy-audit-key-1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A signed statement of the chain's hash at one entry.

    Args:
        kind: "checkpoint", or "cut" for the last entry that retention removed.
        installation: The id of the log's installation.
        sequence: The entry's number.
        hash: The entry's hash, 32 bytes.
        occurred_at: The entry's time.
        signed_at: When this statement was signed.
        key_id: The id of the key that signed it.
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
        """The signed bytes: every field but the signature, as JSON with sorted keys and no spaces."""
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
        """Return one JSON object, which ``from_json`` reads."""
        return json.dumps({**self._fields(), "signature": base64.b64encode(self.signature).decode()}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Checkpoint:
        """Parse what ``to_json`` wrote. The signature is not verified.

        Raises:
            AuditError: the text is not a checkpoint.
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
                # converted to UTC here: a time before the year 1 overflows, and was never signed
                occurred_at=datetime.fromisoformat(values["occurred_at"]).astimezone(UTC),
                signed_at=datetime.fromisoformat(values["signed_at"]).astimezone(UTC),
                key_id=str(values["key_id"]),
                signature=base64.b64decode(values["signature"], validate=True),
            )
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as exc:
            raise AuditError(f"this is not a checkpoint of the audit log: {exc}") from exc


@dataclass(frozen=True, slots=True, kw_only=True)
class Voucher:
    """One key's signed statement that another is a public key of the installation.

    Args:
        installation: The id of the installation.
        key_id: The id of the key that is vouched for.
        public_key: Its Ed25519 public key, 32 bytes.
        signed_by: The id of the key that vouches.
        signature: Ed25519 over ``payload``.
    """

    installation: UUID
    key_id: str
    public_key: bytes = field(repr=False)
    signed_by: str
    signature: bytes = field(default=b"", repr=False)

    @property
    def payload(self) -> bytes:
        """The signed bytes. Their format has another name than a checkpoint's, so that neither passes for the other."""
        fields = {
            "format": _VOUCHER_FORMAT,
            "installation": str(self.installation),
            "key_id": self.key_id,
            "public_key": self.public_key.hex(),
            "signed_by": self.signed_by,
        }
        return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()


@dataclass(frozen=True, slots=True, kw_only=True)
class SignedStatement:
    """A signed statement of another kind than these two: a backup's manifest, or a certificate.

    Args:
        format: The name of its kind, which is signed too, so that none passes for another: ``tenancy-backup-1``.
        fields: What it states, as JSON values.
        key_id: The id of the key that signed it.
        signature: Ed25519 over ``payload``.
    """

    format: str
    fields: Mapping[str, Any]
    key_id: str
    signature: bytes = field(default=b"", repr=False)

    @property
    def payload(self) -> bytes:
        """The signed bytes: everything but the signature, as JSON with sorted keys and no spaces."""
        return _canonical({"format": self.format, "key_id": self.key_id, "statement": self.fields})

    def to_bytes(self) -> bytes:
        """Return one JSON object, which ``from_bytes`` reads."""
        signature = base64.b64encode(self.signature).decode()
        values = {"format": self.format, "key_id": self.key_id, "statement": self.fields, "signature": signature}
        return _canonical(values) + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes, *, kind: str) -> SignedStatement:
        """Parse what ``to_bytes`` wrote, byte for byte. The signature is not verified.

        Raises:
            AuditError: it is not a statement of this format.
        """
        try:
            values = json.loads(data)
            if values["format"] != kind:
                raise ValueError("another format")
            found = cls(
                format=kind,
                fields=dict(values["statement"]),
                key_id=str(values["key_id"]),
                signature=base64.b64decode(values["signature"], validate=True),
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
            raise AuditError(f"this is not a signed statement ({kind}): {exc}") from exc
        # one way to write it, so that no byte of it can be changed
        if found.to_bytes() != data:
            raise AuditError(f"this signed statement ({kind}) was changed")
        return found


class Verifier:
    """Verifies signatures with public keys alone, for an auditor without secrets.

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

    @property
    def public_keys(self) -> dict[str, str]:
        """The public keys in base64, by key id; publish them with the checkpoints."""
        return {key_id: base64.b64encode(key.public_bytes_raw()).decode() for key_id, key in self._keys.items()}

    def verify(self, checkpoint: Checkpoint) -> None:
        """Verify the signature.

        Raises:
            AuditError: the key is unknown, or the signature is not valid.
        """
        if checkpoint.key_id not in self._keys:
            raise AuditError(
                f"the {checkpoint.kind} was signed with key {checkpoint.key_id!r}, which is not known; "
                "give a Verifier with its public key"
            )
        if not self._signed(checkpoint.key_id, checkpoint.signature, checkpoint.payload):
            raise AuditError(f"the signature of the {checkpoint.kind} is not valid")

    def verify_statement(self, statement: SignedStatement) -> None:
        """Verify the signature of a statement.

        Raises:
            AuditError: the key is unknown, or the signature is not valid.
        """
        if statement.key_id not in self._keys:
            raise AuditError(
                f"it was signed with key {statement.key_id!r}, which is not known; give a Verifier with its public key"
            )
        if not self._signed(statement.key_id, statement.signature, statement.payload):
            raise AuditError("its signature is not valid")

    def including(self, vouchers: Iterable[Voucher]) -> Verifier:
        """Return a verifier that also knows the keys that this one's keys vouch for."""
        found = {
            voucher.key_id: base64.b64encode(voucher.public_key).decode()
            for voucher in vouchers
            if self._signed(voucher.signed_by, voucher.signature, voucher.payload)
        }
        return Verifier({**found, **self.public_keys})

    def _signed(self, key_id: str, signature: bytes, payload: bytes) -> bool:
        if (key := self._keys.get(key_id)) is None:
            return False
        try:
            key.verify(signature, payload)
        except InvalidSignature:
            return False
        return True


class Signer(Verifier):
    """Signs with the newest key and verifies with any.

    Args:
        keys: The installation's 32-byte encryption keys by id, oldest first. Signing keys are derived from them by
            HKDF-SHA256, so that no key is used by two algorithms.
    """

    def __init__(self, keys: Mapping[str, bytes]) -> None:
        self._private: dict[str, Ed25519PrivateKey] = {}
        self.current: str | None = None
        super().__init__({})
        self.add_keys(keys)

    def __repr__(self) -> str:
        """Name the key ids only."""
        return f"Signer({', '.join(self._private)})"

    def add_keys(self, keys: Mapping[str, bytes]) -> None:
        """Also verify with these keys from now on, and sign with the last of them."""
        self._private.update((key_id, _derive(key)) for key_id, key in keys.items())
        self._keys = {key_id: key.public_key() for key_id, key in self._private.items()}
        self.current = list(keys)[-1] if keys else None

    def sign(
        self, kind: Kind, *, installation: UUID, sequence: int, digest: bytes, occurred_at: datetime
    ) -> Checkpoint:
        """Return a signed statement about one entry.

        Raises:
            ConfigurationError: there is no key.
        """
        values: dict[str, Any] = {
            "kind": kind,
            "installation": installation,
            "sequence": sequence,
            "hash": digest,
            "occurred_at": occurred_at,
            "signed_at": datetime.now(UTC),
            "key_id": self._current_id(),
        }
        return Checkpoint(**values, signature=self._sign(Checkpoint(**values).payload))

    def sign_statement(self, kind: str, fields: Mapping[str, Any]) -> SignedStatement:
        """Return a signed statement.

        Args:
            kind: The name of its format; another one than those of this module.
            fields: What it states, as JSON values.

        Raises:
            ConfigurationError: there is no key.
        """
        values: dict[str, Any] = {"format": kind, "fields": fields, "key_id": self._current_id()}
        return SignedStatement(**values, signature=self._sign(SignedStatement(**values).payload))

    def vouch(self, *, installation: UUID, key_id: str, public_key: bytes) -> Voucher:
        """Return the newest key's statement about another one.

        Raises:
            ConfigurationError: there is no key.
        """
        values: dict[str, Any] = {
            "installation": installation,
            "key_id": key_id,
            "public_key": public_key,
            "signed_by": self._current_id(),
        }
        return Voucher(**values, signature=self._sign(Voucher(**values).payload))

    def _current_id(self) -> str:
        if self.current is None:
            raise ConfigurationError("encryption_keys is empty; a checkpoint is signed with a key derived from them")
        return self.current

    def _sign(self, payload: bytes) -> bytes:
        return self._private[self._current_id()].sign(payload)


def _derive(key: bytes) -> Ed25519PrivateKey:
    seed = HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=b"tenancy_orm audit signature").derive(key)
    return Ed25519PrivateKey.from_private_bytes(seed)


def _time(value: datetime) -> str:
    return value.astimezone(UTC).isoformat(timespec="microseconds")


def _canonical(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
