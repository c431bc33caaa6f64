"""The keys of a real identity provider on loopback: fetched, kept, rotated; the provider silent, slow, and lying."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import pytest

from tenancy_orm.asgi import JwtAuthenticator
from tenancy_orm.asgi.authenticators import Presented
from tenancy_orm.authentication.credential import Credential
from tenancy_orm.authentication.issuer import IssuerKeys
from tenancy_orm.errors import CredentialError, CredentialsUnavailableError, InvalidCredentialError
from tests.support.issuer import Issuer, public_jwk, rsa_key
from tests.support.tls import write_certificate
from tests.support.waiting import until

IDLE = 1e-9


@pytest.fixture(scope="module")
def running() -> Iterator[Issuer]:
    """One issuer for all tests of this file: starting one takes a while."""
    with Issuer() as issuer:
        yield issuer


@pytest.fixture
def issuer(running: Issuer) -> Iterator[Issuer]:
    """The issuer, with nothing counted and nothing unusual."""
    running.counts.clear()
    yield running
    running.gate.set()
    running.lies, running.odd, running.published, running.headers = {}, None, None, {}
    running.number, running.retired = 0, []


def authenticator(issuer: Issuer, **options: Any) -> JwtAuthenticator:
    """One that discovers the keys."""
    return JwtAuthenticator(**{"issuer": issuer.url, "audience": issuer.audience, **options})


def keys_of(subject: JwtAuthenticator) -> IssuerKeys:
    """Its keys."""
    assert isinstance(subject._keys, IssuerKeys)
    return subject._keys


def pass_time(subject: JwtAuthenticator, seconds: float) -> None:
    """Let the keys be older by so much, and no token."""
    keys = keys_of(subject)
    keys.due -= seconds
    keys._aged_at -= seconds
    keys._stale_at -= seconds
    keys._tried_at -= seconds


async def admit(subject: JwtAuthenticator, token: str) -> Credential:
    """Admit a token as a request does."""
    presented = Presented(token)
    return subject.peek(presented) or await subject.verify(presented)


async def outcome(subject: JwtAuthenticator, token: str) -> Credential | CredentialError:
    """The credential, or the error."""
    try:
        return await admit(subject, token)
    except CredentialError as error:
        return error


async def reason(subject: JwtAuthenticator, token: str) -> str:
    """Why a token is refused."""
    with pytest.raises(InvalidCredentialError) as caught:
        await admit(subject, token)
    return caught.value.reason


async def fetched(subject: JwtAuthenticator) -> None:
    """Wait for the fetch in the background."""
    task = keys_of(subject)._task
    assert task is not None
    await asyncio.wait((task,))


async def test_the_keys_are_discovered_once_for_all_who_wait(issuer: Issuer) -> None:
    """A hundred requests before the answer, one of which goes away; the loop runs on."""
    subject = authenticator(issuer)
    issuer.gate.clear()
    waiting = [asyncio.create_task(admit(subject, issuer.token(jti=str(number)))) for number in range(100)]
    await until(lambda: issuer.counts.total() == 1)
    waiting[0].cancel()
    issuer.gate.set()
    found = await asyncio.gather(*waiting, return_exceptions=True)
    assert isinstance(found[0], asyncio.CancelledError)
    assert [one.id for one in found[1:] if isinstance(one, Credential)] == [str(number) for number in range(1, 100)]
    assert issuer.counts == {"/.well-known/openid-configuration": 1, "/jwks": 1}


async def test_an_address_of_the_keys_needs_no_discovery(issuer: Issuer) -> None:
    """And what is refused for its form alone needs no keys."""
    subject = authenticator(issuer, jwks_url=f"{issuer.url}jwks")
    for token in ("a.b.c", issuer.token(headers={"alg": "none"}), issuer.token(exp=True)):
        assert await reason(subject, token) in {"malformed", "algorithm"}
    assert issuer.counts == {}
    await admit(subject, issuer.token())
    assert issuer.counts == {"/jwks": 1}


async def test_unknown_keys_cause_one_fetch_a_minute(issuer: Issuer) -> None:
    """However many tokens name them; and each valid token is served all the while."""
    subject = authenticator(issuer)
    known = issuer.token()
    flood = [issuer.token(headers={"kid": f"made-up-{number}"}) for number in range(50)]
    for fetches in (1, 2):
        refused = await asyncio.gather(*(outcome(subject, token) for token in flood))
        assert {error.reason for error in refused if isinstance(error, InvalidCredentialError)} == {"unknown key"}
        assert [await reason(subject, token) for token in flood] == ["unknown key"] * 50
        await admit(subject, known)
        assert issuer.fetches == fetches
        pass_time(subject, 60)
    # with no least time between two fetches, each of them is one
    keys_of(subject)._refresh_seconds = IDLE
    for token in flood[:5]:
        await reason(subject, token)
    assert issuer.fetches == 2 + 5


async def test_a_rotated_key_is_fetched_and_a_removed_one_refused(issuer: Issuer) -> None:
    """Tokens that were verified before are kept with their key, and refused without it."""
    subject = authenticator(issuer)
    old = issuer.token(jti="old")
    first = await admit(subject, old)
    issuer.rotate()
    new = issuer.token(jti="new")
    assert await reason(subject, new) == "unknown key"  # within the minute
    pass_time(subject, 60)
    second = await admit(subject, new)
    assert issuer.fetches == 2
    assert (await admit(subject, old), await admit(subject, new)) == (first, second)
    assert subject.peek(Presented(old)) is first

    issuer.retired.clear()
    assert await admit(subject, old) is first  # nothing was fetched since
    pass_time(subject, 600)
    await admit(subject, new)  # and so fetches, in the background
    await fetched(subject)
    assert subject.peek(Presented(old)) is None
    assert await reason(subject, old) == "unknown key"
    assert subject.peek(Presented(new)) is second
    assert issuer.fetches == 3


async def test_keys_without_an_id_are_rotated_too(issuer: Issuer) -> None:
    """A signature that fits none of them may be that of a new key."""
    issuer.published = {"keys": [public_jwk(rsa_key(0), None)]}
    subject = authenticator(issuer)
    await admit(subject, issuer.token(headers={"kid": None}))
    issuer.rotate()
    issuer.published = {"keys": [public_jwk(rsa_key(1), None)]}
    assert await reason(subject, issuer.token()) == "signature"
    pass_time(subject, 60)
    await admit(subject, issuer.token())
    assert issuer.fetches == 2


async def test_old_keys_are_fetched_in_the_background_and_very_old_ones_first(issuer: Issuer) -> None:
    """A busy process waits for no fetch; an idle one does not use keys of yesterday."""
    subject = authenticator(issuer)
    token = issuer.token()
    first = await admit(subject, token)
    pass_time(subject, 600)
    issuer.gate.clear()
    assert await admit(subject, token) is first  # and does not wait
    await admit(subject, issuer.token(jti="x"))
    issuer.gate.set()
    await fetched(subject)
    assert issuer.fetches == 2
    pass_time(subject, 1_200)
    issuer.rotate(keep=False)
    assert await reason(subject, token) == "unknown key"
    assert issuer.fetches == 3


@pytest.mark.parametrize(("said", "seconds"), [("max-age=120", 120), ("public, max-age=5", 60), ("max-age=9999", 600)])
async def test_the_issuer_may_shorten_the_time(issuer: Issuer, said: str, seconds: float) -> None:
    """Within ``refresh_seconds`` and ``keys_seconds``."""
    issuer.headers = {"Cache-Control": said}
    subject = authenticator(issuer)
    await admit(subject, issuer.token())
    assert keys_of(subject).due - keys_of(subject)._tried_at == pytest.approx(seconds)


async def test_known_keys_outlive_the_issuer_for_a_day(issuer: Issuer, caplog: pytest.LogCaptureFixture) -> None:
    """Then there are none, and it is not the caller's fault; when the issuer is back, all is well."""
    subject = authenticator(issuer)
    keys = keys_of(subject)
    token = issuer.token(exp=10**10)
    first = await admit(subject, token)
    issuer.stop()
    try:
        pass_time(subject, 600)
        assert await admit(subject, token) is first
        await fetched(subject)
        keys.due += 30  # however slow this machine is
        for number in range(20):
            await admit(subject, issuer.token(jti=str(number)))
        assert await reason(subject, issuer.token(headers={"kid": "x"})) == "unknown key"
        assert keys._failures == 1  # not one for each request
        assert "the keys that are known are used for up to 85" in caplog.text
        pass_time(subject, 86_400)
        with pytest.raises(CredentialsUnavailableError, match=f"{issuer.url}.well-known/openid-configuration: Connect"):
            await admit(subject, token)
        assert keys._failures == 2
        keys.due += 30
    finally:
        issuer.start()
    assert isinstance(await outcome(subject, token), CredentialsUnavailableError)  # a fetch has just failed
    pass_time(subject, 60)
    assert (await admit(subject, token)).subject == "alice"
    assert keys._failures == 0


async def test_known_keys_are_not_used_past_their_day_while_the_next_fetch_waits(issuer: Issuer) -> None:
    """After failures the next fetch waits for up to a minute, and what was verified needs none."""
    subject = authenticator(issuer)
    await admit(subject, issuer.token(exp=10**10))
    keys = keys_of(subject)
    pass_time(subject, 86_390)  # ten seconds before the end of the day
    for _ in range(10):
        keys._fail("no answer")
    assert keys.due == keys._stale_at


async def test_an_issuer_that_has_never_answered_is_asked_at_growing_intervals(issuer: Issuer) -> None:
    """Each request in between is answered at once, and none by 401."""
    subject = authenticator(issuer)
    keys = keys_of(subject)
    issuer.stop()
    try:
        for failures, least in ((1, 0.5), (2, 1), (3, 2), (8, 40)):
            keys._failures = failures - 1
            pass_time(subject, 60)
            refused = await asyncio.gather(*(outcome(subject, issuer.token(jti=str(number))) for number in range(20)))
            assert {type(error) for error in refused} == {CredentialsUnavailableError}
            assert least < keys.due - keys._tried_at <= 70
            keys.due += 30  # however slow this machine is
            assert isinstance(await outcome(subject, issuer.token()), CredentialsUnavailableError)
            assert keys._failures == failures
    finally:
        issuer.start()


WRONG: dict[str, tuple[str, dict[str, Any]]] = {
    "another issuer": ("names another issuer", {"lies": {"issuer": "https://evil.example/"}}),
    "the issuer in other words": ("names another issuer", {"lies": {"issuer": "http://localhost/"}}),
    "no address": ("no jwks_uri", {"lies": {"jwks_uri": None}}),
    "an address without TLS": ("is not https", {"lies": {"jwks_uri": "http://keys.example/jwks"}}),
    "an address of a file": ("is not", {"lies": {"jwks_uri": "file:///etc/passwd"}}),
    "a password in it": ("not the URL of a host", {"lies": {"jwks_uri": "https://user:secret@keys.example/"}}),
    "a list": ("not an object", {"odd": (200, b"[]", {})}),
    "a page": ("Expecting value", {"odd": (200, b"<html>secret</html>", {})}),
    "an error": ("answers 500", {"odd": (500, b"{}", {})}),
    "a redirect": ("redirects are not followed", {"odd": (302, b"", {"Location": "http://127.0.0.1:1/"})}),
    "a flood": ("longer than", {"odd": (200, b" " * 300_000 + b"{}", {})}),
    "a bomb": (
        "compressed",
        {"odd": (200, gzip.compress(b" " * 300_000), {"Content-Encoding": "gzip"})},
    ),
    "one issuer twice": ("repeated", {"odd": (200, b'{"issuer": "a", "issuer": "b"}', {})}),
    "depth": ("nested", {"odd": (200, b"[" * 100_000, {})}),
    "no set": ("not a set of keys", {"published": {"keys": {}}}),
    "no keys": ("not a set of keys", {"published": []}),
}


@pytest.mark.parametrize(("says", "answer"), WRONG.values(), ids=WRONG)
async def test_an_answer_that_is_wrong_is_as_none(
    issuer: Issuer, says: str, answer: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """The error says what is wrong, without what was answered; the keys that were known are used on."""
    subject = authenticator(issuer)
    other = authenticator(issuer)
    token = issuer.token()
    await admit(other, token)
    for name, value in answer.items():
        setattr(issuer, name, value)
    with pytest.raises(CredentialsUnavailableError, match=says):
        await admit(subject, token)
    pass_time(other, 600)
    await admit(other, token)
    await fetched(other)
    assert keys_of(other)._failures == 1
    await admit(other, token)
    assert "secret" not in caplog.text


async def test_an_issuer_without_keys_is_believed(issuer: Issuer, caplog: pytest.LogCaptureFixture) -> None:
    """All its tokens are refused, also those that were verified; keys for other uses are none."""
    subject = authenticator(issuer)
    token = issuer.token()
    await admit(subject, token)
    for published in ([], [{**public_jwk(rsa_key(0), issuer.kid), "use": "enc"}], [{"kty": "oct", "k": "AAAA"}, 7]):
        issuer.published = {"keys": published}
        pass_time(subject, 1_200)
        assert await reason(subject, token) == "unknown key"
    assert "publishes no key that can be used" in caplog.text
    assert "it is not for signatures" in caplog.text


async def test_a_slow_issuer_is_not_waited_for(issuer: Issuer) -> None:
    """Nor by those who hold keys."""
    subject, other = authenticator(issuer, timeout=0.1), authenticator(issuer)
    token = issuer.token()
    first = await admit(other, token)
    issuer.gate.clear()
    with pytest.raises(CredentialsUnavailableError, match=r"no answer within 0\.1 s"):
        await admit(subject, token)
    pass_time(other, 600)
    assert await admit(other, token) is first


async def test_an_unknown_authority_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless the environment names its certificate."""
    certificate = tmp_path / "issuer.pem"
    write_certificate(certificate)
    with Issuer(certificate=certificate) as issuer:
        token = issuer.token()
        with pytest.raises(CredentialsUnavailableError, match="ConnectError"):
            await admit(authenticator(issuer), token)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert (await admit(authenticator(issuer), token)).subject == "alice"


async def test_the_requests_context_is_not_that_of_the_fetch(issuer: Issuer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tenant of the request that happens to be first has nothing to do with the keys."""
    variable = ContextVar[str]("variable")
    variable.set("acme")
    seen = []
    subject = authenticator(issuer)

    async def read() -> Any:
        seen.append(variable.get(None))
        raise ValueError("stop")

    monkeypatch.setattr(keys_of(subject), "_read", read)
    await outcome(subject, issuer.token())
    assert seen == [None]


def test_one_object_serves_one_loop_after_another(issuer: Issuer) -> None:
    """It is made when the application is imported; a fetch of a loop that has ended is no fetch."""
    subject = authenticator(issuer)

    async def leave() -> None:
        issuer.gate.clear()
        task = asyncio.create_task(admit(subject, issuer.token()))
        await until(lambda: issuer.counts.total() == 1)
        task.cancel()

    asyncio.run(leave())
    issuer.gate.set()
    assert asyncio.run(admit(subject, issuer.token())).subject == "alice"
    assert asyncio.run(admit(subject, issuer.token(jti="x"))).id == "x"
    assert issuer.fetches == 1


async def test_no_token_is_in_what_is_logged(issuer: Issuer, caplog: pytest.LogCaptureFixture) -> None:
    """Not with the log of httpx either."""
    caplog.set_level(logging.DEBUG)
    token = issuer.token()
    await admit(authenticator(issuer), token)
    issuer.odd = (500, json.dumps({"error": "x"}).encode(), {})
    await outcome(authenticator(issuer), token)
    assert caplog.text
    assert not any(part in caplog.text for part in token.split("."))
