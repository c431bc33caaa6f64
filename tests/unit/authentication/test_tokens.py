"""Tokens that must be refused, each shown to be believed by a careless reader; and what a valid one becomes."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import hmac
import json
import logging
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm
from starlette.requests import HTTPConnection

from tenancy_orm.asgi import JwtAuthenticator
from tenancy_orm.asgi import tokens as asgi_tokens
from tenancy_orm.asgi.authenticators import Presented
from tenancy_orm.authentication import jwks, tokens
from tenancy_orm.authentication.credential import Credential
from tenancy_orm.errors import ConfigurationError, InvalidCredentialError, MissingExtraError, TenantNotFoundError
from tests.support.issuer import AUDIENCE, Signer, encode, public_jwk, public_pem, rsa_key

ISSUER = "https://issuer.example/"
SIGNER = Signer(ISSUER)
STRANGER = rsa_key(1_000)  # a key that is not the issuer's


def now() -> float:
    """The time of day."""
    return time.time()


def authenticator(**options: Any) -> JwtAuthenticator:
    """One with the issuer's keys."""
    given = {"issuer": ISSUER, "audience": AUDIENCE, "keys": SIGNER.jwks(), **options}
    return JwtAuthenticator(**{name: value for name, value in given.items() if value is not None})


def connection(*headers: tuple[str, str]) -> HTTPConnection:
    """A request with these headers."""
    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers]
    return HTTPConnection({"type": "http", "headers": raw})


def bearer(token: str) -> HTTPConnection:
    """A request with this token in its header."""
    return connection(("Authorization", f"Bearer {token}"))


async def refusal(subject: JwtAuthenticator, token: str) -> InvalidCredentialError:
    """The refusal of a token, which says nothing of the token itself."""
    with pytest.raises(InvalidCredentialError) as caught:
        await subject.verify(Presented(token))
    assert caught.value.kind == "token"
    for part in filter(None, token.split(".")):
        assert part not in f"{caught.value!s} {caught.value!r} {vars(caught.value)}"
    return caught.value


def careless(token: str) -> dict[str, Any]:
    """Read a token as it asks to be read: by its own algorithm and its own key, without a look at the claims."""
    head, body, signature = token.split(".")
    header, claims = (json.loads(base64.urlsafe_b64decode(part + "==")) for part in (head, body))
    signed, raw = f"{head}.{body}".encode(), base64.urlsafe_b64decode(signature + "==")
    if header["alg"].startswith("HS"):
        assert hmac.compare_digest(hmac.digest(public_pem(SIGNER.key).encode(), signed, hashlib.sha256), raw)
    elif header["alg"].startswith("RS"):
        key: Any = RSAAlgorithm.from_jwk(header["jwk"]) if "jwk" in header else SIGNER.key.public_key()
        key.verify(raw, signed, padding.PKCS1v15(), getattr(hashes, f"SHA{header['alg'][2:]}")())
    return dict(claims)


# --- forged and malformed -------------------------------------------------------------------------------------------


def forged(header: Mapping[str, Any], sign: Callable[[bytes], bytes] = lambda _: b"", **claims: Any) -> str:
    """A token with this header and this signature."""
    signed = f"{encode(header)}.{encode(SIGNER.claims(**claims))}"
    return f"{signed}.{encode(sign(signed.encode()))}"


def by_stranger(signed: bytes) -> bytes:
    return RSAAlgorithm(RSAAlgorithm.SHA256).sign(signed, STRANGER)


def by_sha512(signed: bytes) -> bytes:
    return RSAAlgorithm(RSAAlgorithm.SHA512).sign(signed, SIGNER.key)


def by_public_key(signed: bytes) -> bytes:
    return hmac.digest(public_pem(SIGNER.key).encode(), signed, hashlib.sha256)


RS256 = {"alg": "RS256", "kid": SIGNER.kid}

FORGED: dict[str, tuple[str, Callable[[], str]]] = {
    "without a signature": ("algorithm", lambda: forged({"alg": "none", "kid": SIGNER.kid})),
    "none in other letters": ("algorithm", lambda: forged({"alg": "nOnE", "kid": SIGNER.kid})),
    "the public key as a secret": ("algorithm", lambda: forged({**RS256, "alg": "HS256"}, by_public_key)),
    "an algorithm that is not named": ("algorithm", lambda: forged({**RS256, "alg": "RS512"}, by_sha512)),
    "a key of its own": ("signature", lambda: forged({**RS256, "jwk": public_jwk(STRANGER, None)}, by_stranger)),
    "a key of its own, by another id": (
        "unknown key",
        lambda: forged({"alg": "RS256", "kid": "x", "jwk": public_jwk(STRANGER, "x")}, by_stranger),
    ),
    "a header that must be understood": ("header", lambda: SIGNER.token(headers={"crit": ["exp"], "exp": 1})),
    "an unencoded payload": ("header", lambda: SIGNER.token(headers={"b64": True})),
    "another token inside": ("header", lambda: SIGNER.token(headers={"cty": "JWT"})),
    "compressed": ("header", lambda: SIGNER.token(headers={"zip": "DEF"})),
    "a kid that is not a text": ("header", lambda: SIGNER.token(headers={"kid": ["x"]})),
    "an unknown kid": ("unknown key", lambda: SIGNER.token(headers={"kid": "../../dev/null"})),
    "another kind of token": ("type", lambda: SIGNER.token(headers={"typ": "logout+jwt"})),
    "for another audience": ("audience", lambda: SIGNER.token(aud="https://other.example.com")),
    "for others' audiences": ("audience", lambda: SIGNER.token(aud=["https://a.example", f"{AUDIENCE}/b"])),
    "for no audience": ("missing claim", lambda: SIGNER.token(aud=None)),
    "for an empty audience": ("missing claim", lambda: SIGNER.token(aud=[])),
    "of another issuer": ("issuer", lambda: SIGNER.token(iss="https://evil.example/")),
    "of a part of the issuer": ("issuer", lambda: SIGNER.token(iss="https://issuer")),
    "of no issuer": ("missing claim", lambda: SIGNER.token(iss=None)),
    "without an end": ("missing claim", lambda: SIGNER.token(exp=None)),
    "expired": ("expired", lambda: SIGNER.token(exp=now() - 60)),
    "not yet valid": ("not yet valid", lambda: SIGNER.token(nbf=now() + 60)),
    "issued in the future": ("not yet valid", lambda: SIGNER.token(iat=now() + 60)),
    "an end past all clocks": ("malformed", lambda: SIGNER.token(exp=10**20)),
    "an end of infinity": ("malformed", lambda: SIGNER.token(exp=float("inf"))),
    "an end that is a text": ("malformed", lambda: SIGNER.token(exp=str(int(now()) + 60))),
    "an end that is true": ("malformed", lambda: SIGNER.token(exp=True)),
    "without a subject": ("subject", lambda: SIGNER.token(sub=None)),
    "an empty subject": ("subject", lambda: SIGNER.token(sub="")),
    "a number for a subject": ("malformed", lambda: SIGNER.token(sub=7)),
    "a long subject": ("subject", lambda: SIGNER.token(sub="a" * 256)),
    "a subject that PostgreSQL cannot hold": ("subject", lambda: SIGNER.token(sub="alice\0")),
    "a subject that is no text": ("subject", lambda: SIGNER.token(sub="\ud800")),
    "an id that is not a text": ("malformed", lambda: SIGNER.token(jti=7)),
    "bound to a key that was not shown": ("bound to a key", lambda: SIGNER.token(cnf={"jkt": "x"})),
    "a very long one": ("malformed", lambda: SIGNER.token(padding="x" * 13_000)),
    "an end given twice": (
        "malformed",
        lambda: SIGNER.sign(json.dumps(SIGNER.claims(exp=1))[:-1].encode() + f', "exp": {int(now()) + 60}}}'.encode()),
    ),
    "an algorithm given twice": (
        "malformed",
        lambda: SIGNER.sign(SIGNER.claims(), headers=b'{"alg":"none","kid":"key-0","alg":"RS256"}'),
    ),
}


@pytest.mark.parametrize(("reason", "make"), FORGED.values(), ids=FORGED)
async def test_a_token_that_a_careless_reader_believes_is_refused(reason: str, make: Callable[[], str]) -> None:
    """Each is signed as it says itself, and refused for what is wrong with it."""
    token = make()
    assert careless(token)
    error = await refusal(authenticator(), token)
    assert error.reason == reason
    # the same authenticator admits what is in order: it does not refuse whatever comes
    assert (await authenticator().authenticate(bearer(SIGNER.token()))).subject == "alice"  # type: ignore[union-attr]


DEEP = b'{"alg":"RS256","x":' + b"[" * 6_000 + b"]" * 6_000 + b"}"


@pytest.mark.parametrize(
    "token",
    [
        "",
        "..",
        "a.b.c",
        SIGNER.token()[:-3] + "AAA",
        SIGNER.token() + "=",
        SIGNER.token() + ".",
        SIGNER.token().replace(".", "..", 1),
        SIGNER.token() + ".a.b",  # five parts, as an encrypted one
        "é" + SIGNER.token(),
        SIGNER.sign(b"[]"),
        SIGNER.sign(b'"text"'),
        SIGNER.sign(b"\xff\xfe"),
        SIGNER.sign(SIGNER.claims(), headers=DEEP),
        SIGNER.sign(SIGNER.claims(), headers=b"[]"),
        SIGNER.sign(SIGNER.claims(), headers={"alg": ["RS256"]}),
    ],
)
async def test_what_is_no_token_is_refused(token: str) -> None:
    """Without any other error."""
    with pytest.raises(InvalidCredentialError):
        await authenticator().verify(Presented(token))


async def test_only_a_verified_token_has_its_id_in_the_refusal() -> None:
    """What is written into the audit log was not made up by the caller."""
    subject = authenticator()
    expired = SIGNER.token(exp=now() - 60, jti="t-1")
    assert ((error := await refusal(subject, expired)).reason, error.credential_id) == ("expired", "t-1")
    head, body, _ = expired.split(".")
    unsigned = f"{head}.{body}.{encode(by_stranger(b''))}"
    assert ((error := await refusal(subject, unsigned)).reason, error.credential_id) == ("signature", None)


async def test_claims_that_differ_for_two_readers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a plain parser the last of two ends counts, and the token is admitted."""
    token = FORGED["an end given twice"][1]()
    await refusal(authenticator(), token)
    monkeypatch.setattr(tokens, "load_json", json.loads)
    assert await authenticator().authenticate(bearer(token))


async def test_the_algorithm_of_the_key_counts_too() -> None:
    """Where two are named, a key is used for what suits it: an elliptic curve's key for no RSA token."""
    curve = ec.generate_private_key(ec.SECP256R1())
    published = {**ECAlgorithm.to_jwk(curve.public_key(), as_dict=True), "kid": "ec", "use": "sig"}
    subject = authenticator(keys={"keys": [published, *SIGNER.jwks()["keys"]]}, algorithms=("RS256", "ES256", "RS512"))

    def by_curve(signed: bytes) -> bytes:
        return ECAlgorithm(ECAlgorithm.SHA256).sign(signed, curve)

    assert await subject.authenticate(bearer(forged({"alg": "ES256", "kid": "ec"}, by_curve)))
    assert (await refusal(subject, forged({"alg": "RS256", "kid": "ec"}, by_curve))).reason == "algorithm"
    # the key says RS256 itself
    assert (await refusal(subject, forged({**RS256, "alg": "RS512"}, by_sha512))).reason == "algorithm"
    with pytest.raises(InvalidSignature):
        careless(forged({"alg": "RS256", "kid": "ec"}, by_curve))


async def test_weak_keys_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """An RSA key of 1024 bits is refused when it is read; without the bound its tokens are admitted."""
    weak = rsa_key(2_000, 1024)

    def sign(signed: bytes) -> bytes:
        return RSAAlgorithm(RSAAlgorithm.SHA256).sign(signed, weak)

    published = {"keys": [public_jwk(weak, "weak")]}
    for keys in (published, public_pem(weak)):
        with pytest.raises(ConfigurationError, match="2048 to 8192 bits, and this 1024"):
            authenticator(keys=keys)
    monkeypatch.setattr(jwks, "MIN_RSA_BITS", 1024)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert await authenticator(keys=published).authenticate(bearer(forged({"alg": "RS256", "kid": "weak"}, sign)))


# --- keys -----------------------------------------------------------------------------------------------------------


async def test_keys_in_pem_have_no_id_and_verify_any() -> None:
    """One, several, and with or without a ``kid`` in the token."""
    for keys in (public_pem(SIGNER.key), [public_pem(STRANGER), public_pem(SIGNER.key)]):
        for headers in ({}, {"kid": "anything"}):
            subject = authenticator(keys=keys)
            assert await subject.authenticate(bearer(SIGNER.token(headers=headers)))
            assert (await refusal(subject, forged({"alg": "RS256"}))).reason == "signature"


async def test_hmac_needs_a_secret() -> None:
    """Both sides then hold it."""
    secret = "s" * 32

    def sign(signed: bytes) -> bytes:
        return hmac.digest(secret.encode(), signed, hashlib.sha256)

    subject = authenticator(keys=None, secret=secret, algorithms=("HS256",))
    assert await subject.authenticate(bearer(forged({"alg": "HS256"}, sign)))
    assert (await refusal(subject, forged({"alg": "HS256"}, lambda s: sign(s + b"x")))).reason == "signature"
    assert (await refusal(subject, forged({"alg": "none"}))).reason == "algorithm"
    assert secret not in repr(vars(subject)["_keys"].keys.keys) + repr(subject)


async def test_elliptic_curves_and_edwards_curves() -> None:
    """Signatures of each kind of key."""
    curve, edwards = ec.generate_private_key(ec.SECP384R1()), ed25519.Ed25519PrivateKey.generate()
    form = (serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    signs: dict[str, tuple[Any, Callable[[bytes], bytes]]] = {
        "ES384": (curve, lambda signed: ECAlgorithm(ECAlgorithm.SHA384).sign(signed, curve)),
        "EdDSA": (edwards, lambda signed: OKPAlgorithm().sign(signed, edwards)),
    }
    for name, (key, sign) in signs.items():
        subject = authenticator(keys=key.public_key().public_bytes(*form), algorithms=(name,))
        assert await subject.authenticate(bearer(forged({"alg": name}, sign)))
        with pytest.raises(ConfigurationError, match="suits none of the algorithms"):
            authenticator(keys=key.public_key().public_bytes(*form), algorithms=("ES256",))


PRIVATE = STRANGER.private_bytes(
    serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
).decode()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"issuer": ""}, "issuer must be given"),
        ({"audience": ""}, "audience must be given"),
        ({"audience": []}, "audience must be given"),
        ({"audience": [AUDIENCE, ""]}, "audience must be given"),
        ({"algorithms": ("none",)}, "algorithm 'none' is not supported"),
        ({"algorithms": "RS256"}, r"algorithms=\('RS256',\)"),
        ({"algorithms": ()}, "at least one algorithm"),
        ({"algorithms": ("RS256", "HS256")}, "whoever knows a public key could sign"),
        ({"algorithms": ("HS256",)}, "need secret="),
        ({"keys": None, "secret": "s" * 32}, "need secret="),
        ({"keys": None, "secret": "short", "algorithms": ("HS256",)}, "at least 32 bytes"),
        ({"keys": None, "secret": public_pem(STRANGER), "algorithms": ("HS256",)}, "is a public key"),
        ({"secret": "s" * 32, "algorithms": ("HS256",)}, "give one of keys and secret"),
        ({"jwks_url": "https://issuer.example/keys"}, "give one of jwks_url and keys"),
        ({"keys": PRIVATE}, "private key"),
        ({"keys": "text"}, "not a public key in PEM"),
        ({"keys": []}, "keys is empty"),
        ({"keys": {"keys": []}}, "it is empty"),
        ({"keys": {"keys": [{**public_jwk(STRANGER, "x"), "use": "enc"}]}}, "not for signatures"),
        ({"keys": {"keys": [{"kty": "oct", "k": "c2VjcmV0", "alg": "RS256"}]}}, "suits none"),
        ({"keys": {"kty": "RSA", "n": 3, "e": "AQAB"}}, "malformed"),
        ({"keys": {"kty": "RSA", "n": "!", "e": "AQAB"}}, "malformed"),
        ({"keys": None, "jwks_url": "http://issuer.example/keys"}, "is not https"),
        ({"keys": None, "jwks_url": "https://user:password@issuer.example/keys"}, "is not the URL of a host"),
        ({"keys": None, "jwks_url": "https://[x/keys"}, "cannot be fetched from"),
        ({"keys": None, "issuer": "http://issuer.example"}, "is not https"),
        ({"keys": None, "issuer": "accounts.example"}, "is not"),
        ({"keys": None, "refresh_seconds": 0}, "must be positive"),
        ({"keys": None, "timeout": 0}, "timeout must be positive"),
        ({"header": False}, "a header, a cookie, or both"),
        ({"cookie": "a b"}, "not the name of a cookie"),
        ({"leeway": 301}, "leeway"),
        ({"leeway": float("nan")}, "leeway"),
        ({"max_age": 0}, "max_age"),
        ({"cache_size": 0}, "cache_size"),
    ],
)
def test_a_wrong_setting_is_an_error_at_once(options: dict[str, Any], says: str) -> None:
    """When the authenticator is made, not with the first request; no secret is in the text."""
    with pytest.raises(ConfigurationError, match=says) as caught:
        authenticator(**options)
    assert "password" not in str(caught.value)
    assert PRIVATE[100:140] not in str(caught.value)


@pytest.mark.parametrize("module", ["jwt", "httpx"])
def test_a_missing_extra_is_named(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error has the command that installs it."""
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=r"tenancy-orm\[jwt\]"):
        authenticator(keys=None)


# --- the credential -------------------------------------------------------------------------------------------------


async def admitted(subject: JwtAuthenticator, **claims: Any) -> Credential:
    """The credential of a token with these claims."""
    credential = await subject.authenticate(bearer(SIGNER.token(**claims)))
    assert credential is not None
    return credential


async def test_what_a_token_says_is_in_the_credential() -> None:
    """Who, until when, since when, and everything else it says."""
    at = int(now())
    found = await admitted(authenticator(leeway=10, subject_prefix="idp|"), iat=at, exp=at + 60, jti="t-1", email="a@b")
    assert (found.kind, found.subject, found.id, found.sent_by_browser) == ("token", "idp|alice", "t-1", False)
    assert (found.tenants, found.scopes) == (None, frozenset({"*"}))  # limited by memberships alone
    assert found.issued_at == datetime.fromtimestamp(at, UTC)
    assert found.expires_at == datetime.fromtimestamp(at + 70, UTC)  # until when it is accepted
    assert found.claims["email"] == "a@b"
    with pytest.raises(TypeError):
        found.claims["email"] = "c"  # type: ignore[index]
    assert "a@b" not in repr(found)
    assert (await admitted(authenticator(), iat=None)).issued_at is None


TENANT = uuid4()


async def tenants_later(claims: Mapping[str, Any]) -> list[UUID]:
    return [TENANT] if claims["org_id"] == "org_1" else []


@pytest.mark.parametrize(
    ("claim", "org_id", "tenants"),
    [
        ("org_id", "acme", ("acme",)),
        ("org_id", ["acme", "beta"], ("acme", "beta")),
        ("org_id", None, ()),
        (lambda claims: [claims["org_id"].removeprefix("org_")], "org_acme", ("acme",)),
        (lambda claims: None, "org_acme", None),
        (tenants_later, "org_1", (TENANT,)),
    ],
)
async def test_a_claim_gives_the_tenants(claim: Any, org_id: Any, tenants: Any) -> None:
    """One, several, none; or what a function makes of the claims."""
    found = await admitted(authenticator(tenants_claim=claim), org_id=org_id)
    assert found.tenants == tenants
    assert found.scopes == ({"*"} if tenants is None else frozenset())


async def test_a_tenant_that_is_created_later_is_found() -> None:
    """Until then the token allows none; that is not remembered, as what was found is."""
    asked = []

    async def find(claims: Mapping[str, Any]) -> list[UUID]:
        asked.append(claims["org_id"])
        if len(asked) == 1:
            raise TenantNotFoundError("org_1")
        return [TENANT]

    subject = authenticator(tenants_claim=find, cookie="token")
    presented = Presented(SIGNER.token(org_id="org_1"), sent_by_browser=True)
    for tenants in ((), (TENANT,), (TENANT,)):
        found = await subject.verify(presented)
        assert (found.tenants, found.sent_by_browser) == (tenants, True)
    assert asked == ["org_1"] * 2


@pytest.mark.parametrize(
    ("claim", "value", "scopes"),
    [
        ("scope", "notes:read notes:write", {"notes:read", "notes:write"}),
        ("permissions", ["notes:read"], {"notes:read"}),
        ("scope", None, set()),
        ("scope", "* notes:read", {"notes:read"}),
        ("permissions", ["*"], set()),
        (lambda claims: {"*"}, "x", {"*"}),
    ],
)
async def test_a_claim_gives_the_scopes(claim: Any, value: Any, scopes: set[str]) -> None:
    """A provider's wildcard gives nothing; a function of the application's own may."""
    name = claim if isinstance(claim, str) else "role"
    assert (await admitted(authenticator(scopes_claim=claim), **{name: value})).scopes == scopes


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("tenants_claim", 7),
        ("tenants_claim", [7]),
        ("tenants_claim", {"acme": {}}),
        ("tenants_claim", ["a\0"]),
        ("tenants_claim", [""]),
        ("scopes_claim", 7),
        ("scopes_claim", [["a"]]),
    ],
)
async def test_a_claim_of_another_form_is_refused(option: str, value: Any) -> None:
    """It is not taken for none."""
    error = await refusal(authenticator(**{option: "x"}), SIGNER.token(x=value, jti="t-1"))
    assert (error.reason, error.credential_id) == (option.removesuffix("_claim"), "t-1")


async def test_further_claims_and_an_age_can_be_demanded() -> None:
    """``require`` names claims; ``max_age`` counts from ``iat``, and the credential ends with it."""
    at = int(now())
    strict = authenticator(require=("jti", "nbf"), max_age=120, leeway=0)
    for claims in ({"jti": "x"}, {"nbf": at}, {"jti": "x", "nbf": at, "iat": None}):
        assert (await refusal(strict, SIGNER.token(**claims))).reason == "missing claim"
    assert (await refusal(strict, SIGNER.token(jti="x", nbf=at, iat=at - 130))).reason == "expired"
    found = await admitted(strict, jti="x", nbf=at, iat=at - 60)
    assert found.expires_at == datetime.fromtimestamp(at + 60, UTC)


async def test_a_clock_may_differ_by_the_leeway() -> None:
    """And no more."""
    generous, exact = authenticator(leeway=60), authenticator(leeway=0)
    for name, at in (("exp", now() - 30), ("nbf", now() + 30), ("iat", now() + 30)):
        token = SIGNER.token(**{name: at})  # type: ignore[arg-type]
        assert await generous.authenticate(bearer(token))
        await refusal(exact, token)


# --- reading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        (),
        (("Authorization", "Basic YTpi"),),
        (("Authorization", "Bearer"),),
        (("Authorization", "Bearer ten_live_0123456789abcdef"),),
        (("Authorization", "Bearer opaque.token"),),
        (("Authorization", "Bearer not.a.token"),),
        (("Authorization", f"Bearer {SIGNER.token()}.x.y"),),
        (("Authorization", f"Bearer {Signer('https://other.example/').token()}"),),
        (("Authorization", f"Bearer {SIGNER.token(iss=None)}"),),
        (("Cookie", f"token={SIGNER.token()}"),),  # of another name
        (("Cookie", f"x__Host-token={SIGNER.token()}; __Host-tokens={SIGNER.token()}"),),
        (("Cookie", "__Host-token=; __Host-token"),),
    ],
)
async def test_what_is_not_its_own_is_left_alone(headers: tuple[tuple[str, str], ...]) -> None:
    """For the next authenticator, or the application."""
    assert await authenticator(cookie="__Host-token").authenticate(connection(*headers)) is None


async def test_a_token_of_another_issuer_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where two issuers serve one application, each request of one comes by the authenticator of the other."""
    read: list[bytes] = []

    def record(raw: bytes) -> str | None:
        read.append(raw)
        return tokens.unverified_issuer(raw)

    monkeypatch.setattr(asgi_tokens, "unverified_issuer", record)
    monkeypatch.setattr(asgi_tokens, "_FOREIGN", 5)
    subject = authenticator()
    foreign = [bearer(Signer("https://other.example/").token(jti=str(number))) for number in range(10)]
    for connection in [*foreign, *foreign[5:] * 3]:
        assert await subject.authenticate(connection) is None
    assert len(read) == 10
    assert len(subject._foreign) == 5


async def test_a_slash_that_is_missing_in_the_issuer_is_told() -> None:
    """The token is refused as that of another issuer, not left alone without a word."""
    with pytest.raises(InvalidCredentialError) as caught:
        await authenticator(issuer=ISSUER.rstrip("/")).authenticate(bearer(SIGNER.token()))
    assert caught.value.reason == "issuer"


async def test_a_cookie_is_read_if_it_is_named() -> None:
    """Among others, quoted, in either of two headers; its requests are sent by the browser."""
    token = SIGNER.token()
    subject = authenticator(cookie="__Host-token")
    headers: list[tuple[str, str]] = [("Cookie", f"__Host-token={token}")]
    found = await subject.authenticate(connection(*headers))
    assert found is not None
    for headers in (
        [("Cookie", f'a=b;  __Host-token="{token}" ;c=d')],
        [("Cookie", "a=b"), ("Cookie", f"__Host-token={token}")],
        [("Cookie", f"__Host-token={token}; __Host-token={token}")],
    ):
        assert await subject.authenticate(connection(*headers)) is found
    assert found.sent_by_browser
    by_header = await subject.authenticate(bearer(token))
    assert by_header is not None
    assert not by_header.sent_by_browser
    assert by_header == dataclasses.replace(found, sent_by_browser=False)
    # a page of another origin cannot set the header
    both = connection(("Authorization", f"Bearer {token}"), ("Cookie", f"__Host-token={token}"))
    assert await subject.authenticate(both) is by_header
    cookie_only = authenticator(cookie="__Host-token", header=False)
    assert await cookie_only.authenticate(bearer(token)) is None
    assert await cookie_only.authenticate(both)
    assert await authenticator().authenticate(connection(*headers)) is None


async def test_two_different_tokens_are_refused() -> None:
    """In two cookies, of which another host of the domain may have set one, in two headers, or in one of each."""
    one, other = SIGNER.token(), SIGNER.token(sub="mallory")
    subject = authenticator(cookie="token")
    for headers in (
        [("Cookie", f"token={one}; token={other}")],
        [("Cookie", f"token={one}"), ("Cookie", f"token={other}")],
        [("Authorization", f"Bearer {one}"), ("Authorization", f"Bearer {other}")],
        [("Authorization", f"Bearer {one}"), ("Cookie", f"token={other}")],
    ):
        with pytest.raises(InvalidCredentialError) as caught:
            await subject.authenticate(connection(*headers))
        assert caught.value.reason == "ambiguous"


# --- the cache ------------------------------------------------------------------------------------------------------


class Clocks:
    """The clocks that the cache reads, set by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wall, self.steady = time.time(), time.monotonic()
        monkeypatch.setattr(time, "time", lambda: self.wall)
        monkeypatch.setattr(time, "monotonic", lambda: self.steady)

    def pass_(self, seconds: float) -> None:
        """Time passes."""
        self.wall += seconds
        self.steady += seconds


async def test_a_verified_token_is_the_same_object_until_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """By either clock: the time of day may be set back, and the other may stand still."""
    clocks = Clocks(monkeypatch)
    subject = authenticator(leeway=0, cookie="token")
    token = SIGNER.token(exp=int(clocks.wall) + 60)
    for presented in (Presented(token), Presented(token, sent_by_browser=True)):
        found = await subject.verify(presented)
        assert subject.peek(presented) is found
        assert await subject.verify(presented) is found
        assert found.sent_by_browser is presented.sent_by_browser
        clocks.pass_(50)
        assert subject.peek(presented) is found
        clocks.wall -= 50  # set back
        clocks.steady += 20
        assert subject.peek(presented) is None
        clocks.steady -= 70
        clocks.wall += 61  # as after a sleep of the machine
        assert subject.peek(presented) is None
        clocks.wall -= 61


async def test_the_cache_is_bounded_and_holds_no_token() -> None:
    """A thousand tokens of one person take no more room than the bound."""
    subject = authenticator(cache_size=5)
    token = ""
    for number in range(20):
        token = SIGNER.token(jti=str(number))
        assert await subject.authenticate(bearer(token))
    assert len(subject._entries) == 5
    held = repr([(key, *(getattr(entry, name) for name in entry.__slots__)) for key, entry in subject._entries.items()])
    assert token not in held
    assert token.split(".")[2] not in held
    # and by a salt that differs for each, so that nobody can look a known token up in a dump
    assert subject._verified.digest(b"x") != authenticator()._verified.digest(b"x")


async def test_no_token_is_in_a_repr_or_a_log(caplog: pytest.LogCaptureFixture) -> None:
    """Neither a valid one, nor one that is refused."""
    caplog.set_level(logging.DEBUG)
    subject = authenticator()
    valid, expired = SIGNER.token(), SIGNER.token(exp=1)
    credential = await subject.verify(Presented(valid))
    await refusal(subject, expired)
    written = caplog.text + repr(subject) + repr(credential)
    assert not any(part in written for token in (valid, expired) for part in token.split("."))
