"""A token that was verified before, beside an API key that is in the directory's cache: the hot path of each.

Run by ``make bench ARGS='-k tokens'``. Every ratio is of two things measured in the same run.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from starlette.types import Scope

from tenancy_orm.asgi import BearerToken, JwtAuthenticator
from tenancy_orm.asgi.authenticators import Presented
from tests.support.control import control_plane
from tests.support.issuer import Signer


def per_call(call: Callable[[], object], *, count: int = 100_000, rounds: int = 5) -> float:
    """Seconds of one call: the best of some rounds."""
    best = float("inf")
    for _ in range(rounds):
        started = time.perf_counter()
        for _ in range(count):
            call()
        best = min(best, time.perf_counter() - started)
    return best / count


async def test_bench_tokens_and_keys(control_url: str) -> None:
    """Reading a token and finding it costs less than 10 us more than reading a key and finding it."""
    signer = Signer("https://issuer.example/")
    authenticator = JwtAuthenticator(
        issuer=signer.url, audience=signer.audience, keys=signer.jwks(), tenants_claim="org_id", cookie="__Host-token"
    )
    token = signer.token(org_id="acme", jti="t-1", scope="notes:read notes:write", email="alice@acme.example")
    browser = [
        (b"host", b"app.example.com"),
        (b"accept", b"text/html,application/xhtml+xml"),
        (b"accept-language", b"en"),
        (b"user-agent", b"Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0"),
    ]
    by_header: Scope = {"type": "http", "headers": [*browser, (b"authorization", f"Bearer {token}".encode())]}
    by_cookie: Scope = {"type": "http", "headers": [*browser, (b"cookie", f"a=b; __Host-token={token}".encode())]}
    await authenticator.verify(Presented(token))
    headers = {b"authorization": f"Bearer {token}".encode()}

    def find(scope: Scope, found: dict[bytes, bytes]) -> object:
        presented = authenticator.read(scope, found)
        assert presented is not None
        credential = authenticator.peek(presented)
        assert credential is not None
        return credential

    async with control_plane(control_url) as plane:
        _, key = await plane.tenant("acme")
        await plane.directory.authenticate(key)
        with_key = {b"authorization": f"Bearer {key}".encode()}
        reader = BearerToken()

        def find_key() -> object:
            text = reader.key(by_header, with_key)
            assert text is not None
            found = plane.directory.peek(text, None)
            assert found is not None
            return found

        a_key = per_call(find_key)
        in_header = per_call(lambda: find(by_header, headers))
        in_cookie = per_call(lambda: find(by_cookie, {}))
    verifier, keys = authenticator._verifier, authenticator._keys.keys
    assert keys is not None
    verified = per_call(lambda: verifier.verify(token, verifier.check_form(token), keys), count=2_000)
    print(f"\na token of {len(token)} characters; a key of {len(key)}")
    for name, seconds in (("key", a_key), ("token in a header", in_header), ("token in a cookie", in_cookie)):
        more, times = (seconds - a_key) * 1e6, seconds / a_key
        print(f"{name:>18}: {seconds * 1e6:6.2f} us, {more:+6.2f} us, {times:5.2f} times a key")
    print(f"{'verified first':>18}: {verified * 1e6:6.2f} us, {verified / a_key:5.1f} times a key")
