"""The keys that the tokens of an identity provider are verified with: which are usable, and for which algorithms.

PyJWT reads the keys. A key is used for the algorithms that the configuration names and that suit its type, never for
one that a token asks for: a public RSA key is no HMAC secret. Extra ``jwt``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from ..errors import ConfigurationError, MissingExtraError

MIN_RSA_BITS: Final = 2_048
MAX_RSA_BITS: Final = 8_192  # a larger one makes each verification slow
MAX_KEYS: Final = 32  # of a provider; the further ones are not read

# the type of key, and its curve, that each algorithm takes
_SUITED: Final[Mapping[str, tuple[str, str | None]]] = {
    **{f"{family}{bits}": ("RSA", None) for family in ("RS", "PS") for bits in (256, 384, 512)},
    "ES256": ("EC", "P-256"),
    "ES384": ("EC", "P-384"),
    "ES512": ("EC", "P-521"),
    "EdDSA": ("OKP", "Ed25519"),
}
_HMAC: Final[Mapping[str, int]] = {"HS256": 32, "HS384": 48, "HS512": 64}  # with the bytes that a secret must have
PUBLIC_KEY_ALGORITHMS: Final = frozenset(_SUITED)
SECRET_ALGORITHMS: Final = frozenset(_HMAC)

_CURVES: Final = {"secp256r1": "P-256", "secp384r1": "P-384", "secp521r1": "P-521"}
_PUBLIC_MEMBERS: Final = ("kty", "crv", "n", "e", "x", "y")


class UnusableKeyError(ValueError):
    """A key cannot be used; the message says why, without the key."""


@dataclass(frozen=True, slots=True)
class VerifyingKey:
    """A key, and the algorithms that it is used for. Two are equal that verify the same tokens."""

    kid: str | None
    algorithms: frozenset[str]
    fingerprint: str = field(repr=False)
    material: Any = field(repr=False, compare=False)


class KeySet:
    """Keys, found by the ``kid`` that a token names."""

    __slots__ = ("_known", "keys")

    def __init__(self, keys: Iterable[VerifyingKey]) -> None:
        self.keys = tuple(keys)
        self._known = frozenset(self.keys)

    def __contains__(self, key: VerifyingKey) -> bool:
        """Whether it has this key."""
        return key in self._known

    def __eq__(self, other: object) -> bool:
        """Whether both have the same keys."""
        return isinstance(other, KeySet) and self._known == other._known

    def __hash__(self) -> int:
        """Hash the keys."""
        return hash(self._known)

    def named(self, kid: str | None) -> tuple[VerifyingKey, ...]:
        """The keys that a token with this ``kid`` may be signed by: without one, all.

        A key that has no id itself, as one given as PEM, may be that of any token.
        """
        return self.keys if kid is None else tuple(key for key in self.keys if key.kid is None or key.kid == kid)


def import_jwt() -> ModuleType:
    """Import PyJWT.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import jwt
    except ModuleNotFoundError as exc:
        raise MissingExtraError("PyJWT", "jwt") from exc
    return jwt


def check_algorithms(algorithms: Iterable[str]) -> frozenset[str]:
    """Return them; each must be one that is supported, and none may take a secret where another takes a public key.

    Raises:
        ConfigurationError: they are not so.
    """
    if isinstance(algorithms, str):
        raise ConfigurationError(f"algorithms is a list of names, not one: algorithms=({algorithms!r},)")
    pinned = frozenset(algorithms)
    if not pinned:
        raise ConfigurationError("algorithms must name at least one algorithm, such as RS256")
    if unknown := sorted(pinned - PUBLIC_KEY_ALGORITHMS - SECRET_ALGORITHMS):
        raise ConfigurationError(
            f"algorithm {unknown[0]!r} is not supported; these are: "
            f"{', '.join(sorted(PUBLIC_KEY_ALGORITHMS | SECRET_ALGORITHMS))}"
        )
    if pinned & SECRET_ALGORITHMS and pinned & PUBLIC_KEY_ALGORITHMS:
        raise ConfigurationError(
            "algorithms names HMAC beside algorithms with public keys: whoever knows a public key could sign; "
            "use two authenticators"
        )
    return pinned


# --- reading keys ---------------------------------------------------------------------------------------------------


def read_jwk(data: object, pinned: frozenset[str]) -> VerifyingKey:
    """Read a public key of a JWKS.

    Raises:
        UnusableKeyError: it is malformed, weak, for another use, or suits none of the ``pinned`` algorithms.
    """
    if not isinstance(data, Mapping):
        raise UnusableKeyError("it is not an object")
    kid, use, operations = data.get("kid"), data.get("use"), data.get("key_ops")
    if kid is not None and not isinstance(kid, str):
        raise UnusableKeyError("its kid is not a string")
    if use not in (None, "sig") or (operations is not None and "verify" not in _as_list(operations)):
        raise UnusableKeyError("it is not for signatures")
    # without the private members, if an issuer should publish them
    public = {name: data[name] for name in _PUBLIC_MEMBERS if name in data}
    if not all(isinstance(value, str) for value in public.values()):
        raise UnusableKeyError("it is malformed")
    suited = _suited(public.get("kty"), public.get("crv"), pinned)
    if "alg" in data:
        suited = frozenset(name for name in suited if name == data["alg"])
    if not suited:
        raise UnusableKeyError("it suits none of the algorithms")
    jwt = import_jwt()
    try:
        material = jwt.PyJWK(public, min(suited)).key
    except (jwt.PyJWTError, ValueError, TypeError, KeyError, UnsupportedAlgorithm) as exc:
        raise UnusableKeyError("it is malformed") from exc
    return _key(kid, suited, material)


def read_pem(text: str | bytes, pinned: frozenset[str]) -> VerifyingKey:
    """Read a public key, or the public key of a certificate.

    Raises:
        UnusableKeyError: it is malformed, private, weak, or suits none of the ``pinned`` algorithms.
    """
    raw = text.encode() if isinstance(text, str) else text
    if b"PRIVATE KEY" in raw:
        raise UnusableKeyError("it is a private key; give the public one")
    try:
        if b"BEGIN CERTIFICATE" in raw:
            material: Any = x509.load_pem_x509_certificate(raw).public_key()
        else:
            material = serialization.load_pem_public_key(raw)
    except (ValueError, UnsupportedAlgorithm) as exc:
        raise UnusableKeyError("it is not a public key in PEM") from exc
    if isinstance(material, rsa.RSAPublicKey):
        suited = _suited("RSA", None, pinned)
    elif isinstance(material, ec.EllipticCurvePublicKey):
        suited = _suited("EC", _CURVES.get(material.curve.name), pinned)
    elif isinstance(material, ed25519.Ed25519PublicKey):
        suited = _suited("OKP", "Ed25519", pinned)
    else:
        suited = frozenset()
    if not suited:
        raise UnusableKeyError("it suits none of the algorithms")
    return _key(None, suited, material)


def read_secret(secret: str | bytes, pinned: frozenset[str]) -> KeySet:
    """Return the set of one HMAC secret.

    Raises:
        ConfigurationError: the secret is too short, or the text of a public key.
    """
    raw = secret.encode() if isinstance(secret, str) else secret
    needed = max(_HMAC[name] for name in pinned)
    if len(raw) < needed:
        raise ConfigurationError(f"secret must have at least {needed} bytes for {', '.join(sorted(pinned))}")
    jwt = import_jwt()
    try:
        jwt.get_algorithm_by_name(min(pinned)).prepare_key(raw)
    except jwt.InvalidKeyError:
        raise ConfigurationError(
            "secret is a public key, which everybody knows; give it as keys, with its algorithm"
        ) from None
    return KeySet([VerifyingKey(None, pinned, "secret", raw)])


def read_keys(keys: Mapping[str, Any] | str | bytes | Iterable[str | bytes], pinned: frozenset[str]) -> KeySet:
    """Read keys that the configuration gives: a JWKS, one JWK, a PEM or several.

    Raises:
        ConfigurationError: one of them cannot be used.
    """
    if isinstance(keys, Mapping):
        found = keys.get("keys", [keys])
        read: list[VerifyingKey] = []
        unusable: list[str] = []
        for number, data in enumerate(_as_list(found), 1):
            try:
                read.append(read_jwk(data, pinned))
            except UnusableKeyError as exc:
                unusable.append(f"key {number}: {exc}")
        if not read:  # a set may hold further keys, for encryption for example
            raise ConfigurationError(f"keys has none that can be used; {'; '.join(unusable) or 'it is empty'}")
        return KeySet(read)
    given = [keys] if isinstance(keys, str | bytes) else list(keys)
    if not given:
        raise ConfigurationError("keys is empty")
    try:
        return KeySet([read_pem(text, pinned) for text in given])
    except UnusableKeyError as exc:
        raise ConfigurationError(f"a key of keys cannot be used: {exc}") from None


def read_published(document: object, pinned: frozenset[str]) -> tuple[KeySet, list[str]]:
    """Read the JWKS that an issuer publishes: the keys that can be used, and why the others cannot.

    Raises:
        ValueError: it is no JWKS.
    """
    if not isinstance(document, Mapping) or not isinstance(document.get("keys"), list):
        raise ValueError("the answer is not a set of keys")
    read: list[VerifyingKey] = []
    unusable: list[str] = []
    for data in document["keys"][:MAX_KEYS]:
        try:
            read.append(read_jwk(data, pinned))
        except UnusableKeyError as exc:
            unusable.append(str(exc))
    return KeySet(read), unusable


def load_json(raw: bytes) -> Any:
    """Parse JSON in which no object has a name twice, and no number is infinite: two parsers may not read it apart.

    Raises:
        ValueError: it is not so.
    """
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_without_repeats, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is repeated")
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _as_list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _suited(kty: object, curve: object, pinned: frozenset[str]) -> frozenset[str]:
    curve = None if kty == "RSA" else curve
    return frozenset(name for name in pinned if _SUITED.get(name) == (kty, curve))


def _key(kid: str | None, algorithms: frozenset[str], material: Any) -> VerifyingKey:
    if isinstance(material, rsa.RSAPublicKey) and not MIN_RSA_BITS <= material.key_size <= MAX_RSA_BITS:
        raise UnusableKeyError(f"an RSA key has {MIN_RSA_BITS} to {MAX_RSA_BITS} bits, and this {material.key_size}")
    encoded = material.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return VerifyingKey(kid, algorithms, hashlib.sha256(encoded).hexdigest(), material)
