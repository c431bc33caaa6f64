"""The team notes, as people with a browser, programs, visitors and a payment provider use them."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import secrets
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from http.cookies import SimpleCookie
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest
import pytest_asyncio
from starlette.routing import Route
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from examples.team_notes.app import create_app
from examples.team_notes.people import FREE_FAILURES
from examples.team_notes.settings import Settings, create_config
from tenancy_orm import Tenancy
from tests.support.postgres import Postgres
from tests.support.shell import ROOT, environment
from tests.support.walkthrough import blocks, walkthrough

pytestmark = pytest.mark.asyncio(loop_scope="module")

EXAMPLE = ROOT / "examples" / "team_notes"
PASSWORD = "correct horse battery"
DEADLINE = 60.0
COOKIE = "__Host-session"


@dataclass
class Browser:
    """Somebody's browser: it keeps cookies, and says which page a request comes from."""

    http: httpx.AsyncClient
    email: str = ""
    cookies: dict[str, str] = field(default_factory=dict)
    last_cookie: str = ""

    @property
    def headers(self) -> dict[str, str]:
        sent = {"Origin": str(self.http.base_url), "Sec-Fetch-Site": "same-origin"}
        if self.cookies:
            sent["Cookie"] = "; ".join(f"{name}={value}" for name, value in self.cookies.items())
        return sent

    async def call(self, method: str, path: str, body: Any = None, **headers: str) -> httpx.Response:
        answer = await self.http.request(method, path, json=body, headers={**self.headers, **headers})
        self.http.cookies.clear()  # those of all browsers
        for text in answer.headers.get_list("set-cookie"):
            self.last_cookie = text
            for name, morsel in SimpleCookie(text).items():
                if morsel["expires"].endswith("1970 00:00:00 GMT"):
                    self.cookies.pop(name, None)
                else:
                    self.cookies[name] = morsel.value
        return answer

    async def get(self, path: str, **headers: str) -> httpx.Response:
        return await self.call("GET", path, **headers)

    async def post(self, path: str, body: Any = None, **headers: str) -> httpx.Response:
        return await self.call("POST", path, body, **headers)

    @asynccontextmanager
    async def live(self, path: str, **headers: str) -> AsyncIterator[ClientConnection]:
        url = f"{self.http.base_url}{path}".replace("http", "ws", 1)
        sent = {**self.headers, **headers}
        origin: Any = sent.pop("Origin")
        async with connect(url, origin=origin, additional_headers=sent, proxy=None) as websocket:
            yield websocket

    def copied(self) -> Browser:
        """Another browser with the same cookies."""
        return Browser(self.http, self.email, dict(self.cookies))


@dataclass
class Site:
    """The running application."""

    http: httpx.AsyncClient
    tenancy: Tenancy
    webhook_secret: str

    async def person(self) -> Browser:
        """Somebody who has signed up, and so is logged in."""
        browser = Browser(self.http, f"{uuid4().hex}@example.test")
        answer = await browser.post("/signup", {"email": browser.email, "password": PASSWORD})
        assert answer.status_code == 201, answer.text
        return browser

    async def owner(self) -> tuple[Browser, str]:
        """The owner of a new team, and the team's slug."""
        browser, slug = await self.person(), f"t{uuid4().hex[:12]}"
        answer = await browser.post("/me/teams", {"slug": slug})
        assert answer.status_code == 201, answer.text
        return browser, slug

    async def member(self, owner: Browser, slug: str, role: str = "editor") -> Browser:
        """Somebody whom the owner has invited, and who has accepted."""
        browser = await self.person()
        invited = await owner.post(f"/t/{slug}/invitations", {"email": browser.email, "role": role})
        assert invited.status_code == 201, invited.text
        accepted = await browser.post("/me/invitations", invited.json())
        assert accepted.json() == {"slug": slug, "roles": [role]}
        return browser

    async def pay(self, event: Any, *, secret: str | None = None, age: float = 0) -> httpx.Response:
        """What the payment provider sends."""
        body = json.dumps(event)
        sent_at = int(time.time() - age)
        key = (secret or self.webhook_secret).encode()
        signature = hmac.new(key, f"{sent_at}.{body}".encode(), hashlib.sha256).hexdigest()
        headers = {"Stripe-Signature": f"t={sent_at},v1={signature}"}
        return await self.http.post("/webhooks/payments", content=body, headers=headers)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    """The application under uvicorn with two processes, on a real server."""
    names = [postgres.new_name() for _ in range(2)]
    control, people = [await postgres.create_database(name) for name in names]
    prefix = f"tn{secrets.token_hex(4)}"
    settings = {
        "TENANCY_CONTROL_URL": control,
        "TENANCY_SERVERS": f"default={postgres.admin_url}",
        "TENANCY_ENCRYPTION_KEYS": f"1:{base64.b64encode(secrets.token_bytes(32)).decode()}",
        "TENANCY_NAME_PREFIX": prefix,
        # everybody here has one address
        "TENANCY_QUOTAS_ADDRESS_REQUESTS_PER_SECOND": "10000",
        "PEOPLE_URL": people.replace("postgresql://", "postgresql+asyncpg://"),
        "SESSION_SECRET": secrets.token_hex(32),
        "WEBHOOK_SECRET": secrets.token_hex(32),
    }
    tenancy = Tenancy(create_config(settings))
    log = tmp_path_factory.mktemp("site") / "log"
    try:
        await tenancy.open(initialise=True)
        async with serving(settings, log) as http:
            yield Site(http, tenancy, settings["WEBHOOK_SECRET"])
    finally:
        await tenancy.close()
        for name in names:
            await postgres.drop_database(name)
        await postgres.drop_all(prefix)


@asynccontextmanager
async def serving(settings: dict[str, str], log: Path) -> AsyncIterator[httpx.AsyncClient]:
    """Run uvicorn with two workers; yields a client once it answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener, log.open("wb") as output:
        port = listener.getsockname()[1]
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "uvicorn", "examples.team_notes.app:app", "--workers", "2"),
            *("--fd", str(listener.fileno()), "--no-access-log"),
            cwd=ROOT,
            env=environment(**settings),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=[listener.fileno()],
        )
    try:
        # each request has a connection of its own, so that either process may answer
        limits = httpx.Limits(max_keepalive_connections=0)
        url = f"http://127.0.0.1:{port}"
        async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=DEADLINE, limits=limits) as http:
            answer = await http.get("/healthz")
            assert answer.status_code == 200, answer.text
            yield http
    finally:
        process.terminate()
        try:
            await asyncio.wait_for(process.wait(), DEADLINE)
        except TimeoutError:
            process.kill()
            await process.wait()


async def eventually(ask: Callable[[], Awaitable[httpx.Response]], status: int, *, times: int = 8) -> None:
    """Repeat a request until several answers in a row have ``status``: those of either process."""
    deadline = time.monotonic() + DEADLINE
    row = 0
    while row < times:
        answer = await ask()
        row = row + 1 if answer.status_code == status else 0
        assert time.monotonic() < deadline, answer.text


async def assert_closed(websocket: ClientConnection, code: int) -> None:
    """The server closes it with this code."""
    with pytest.raises(ConnectionClosed) as closed:
        await asyncio.wait_for(websocket.recv(), DEADLINE)
    assert closed.value.rcvd is not None and closed.value.rcvd.code == code


def kind_of(answer: httpx.Response) -> str:
    """The type of the problem that an answer is."""
    return str(answer.json()["type"]).rpartition(":")[2]


# --- the way of a person ----------------------------------------------------------------------------------------------


async def test_a_person_logs_in_works_and_logs_out(site: Site) -> None:
    """From nobody to nobody: the cookie is all that a browser keeps, and a copy of it ends with the session."""
    ada, slug = await site.owner()
    cookie = ada.last_cookie.lower()
    assert cookie.startswith(COOKIE.lower() + "=") and "domain" not in cookie
    assert {"path=/", "httponly", "secure", "samesite=lax"} <= {part.strip() for part in cookie.split(";")}
    assert (await ada.post(f"/t/{slug}/notes", {"text": "hello"})).status_code == 201
    # a member of one team need not name it
    for path in (f"/t/{slug}/notes", "/notes"):
        assert [note["text"] for note in (await ada.get(path)).json()] == ["hello"]
    assert (await ada.get("/me/tenants")).json() == [{"slug": slug, "roles": ["owner"], "url": f"/t/{slug}/notes"}]
    thief = ada.copied()
    assert (await ada.post("/me/logout")).status_code == 204
    assert ada.cookies == {}
    assert (await ada.get("/notes")).status_code == 401
    await eventually(lambda: thief.get("/notes"), 401)


async def test_a_login_begins_a_new_session(site: Site) -> None:
    """A session that somebody else has planted gains nothing, and each login is told apart."""
    planted = await site.person()
    victim = Browser(site.http, f"{uuid4().hex}@example.test", dict(planted.cookies))
    body = {"email": victim.email, "password": PASSWORD}
    await victim.post("/signup", body)
    assert victim.cookies != planted.cookies
    victim.cookies = dict(planted.cookies)
    await victim.post("/login", body)
    assert victim.cookies != planted.cookies
    again = Browser(site.http, victim.email)
    await again.post("/login", body)
    assert again.cookies != victim.cookies
    # ending one of two sessions of a person leaves the other
    await again.post("/me/logout")
    assert (await victim.get("/me/tenants")).status_code == 200
    assert (await planted.get("/me/tenants")).status_code == 200


async def test_a_wrong_password_is_refused_and_guessing_is_slow(site: Site) -> None:
    """An address that nobody has gets the same answer; after a few failures not even the right password is tried."""
    ada = await site.person()
    wrong = {"email": ada.email, "password": "wrong"}
    answers = [await Browser(site.http).post("/login", wrong | {"email": email}) for email in (ada.email, "nobody")]
    assert [(answer.status_code, answer.text) for answer in answers] == [(401, answers[0].text)] * 2
    for _ in range(FREE_FAILURES + 3):
        await Browser(site.http).post("/login", wrong)
    refused = await Browser(site.http).post("/login", {"email": ada.email, "password": PASSWORD})
    assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
    # who is logged in is not concerned
    assert (await ada.get("/me/tenants")).status_code == 200

    # guesses that come all at once are no more than those that come one by one
    bob = await site.person()
    guesses = [Browser(site.http).post("/login", {"email": bob.email, "password": "wrong"}) for _ in range(20)]
    statuses = [answer.status_code for answer in await asyncio.gather(*guesses)]
    # a second after the last free one there is another
    assert FREE_FAILURES <= statuses.count(401) <= FREE_FAILURES + 2 and set(statuses) == {401, 429}, statuses


async def test_a_forged_cookie_is_nobody(site: Site) -> None:
    """The signature makes the session."""
    ada, _ = await site.owner()
    value = ada.cookies[COOKIE]
    content, _, signature = value.partition(".")
    for forged in (value[:-2] + "xx", content, f"{base64.b64encode(b'{}').decode()}.{signature}", "null"):
        browser = Browser(site.http, cookies={COOKIE: forged})
        assert kind_of(await browser.get("/notes")) == "missing-credential"


async def test_another_sites_page_cannot_use_a_login_nor_make_one(site: Site) -> None:
    """By a form, by a script, by a websocket; a page of the application itself can."""
    ada, slug = await site.owner()
    evil = {"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"}
    for path in (f"/t/{slug}/notes", "/me/logout", "/me/logout-everywhere"):
        answer = await ada.post(path, {"text": "x"}, **evil)
        assert (answer.status_code, kind_of(answer)) == (403, "cross-origin")
    for path in ("/login", "/signup"):
        answer = await ada.post(path, {"email": "e@example.test", "password": PASSWORD}, **evil)
        assert (answer.status_code, kind_of(answer)) == (403, "cross-origin")
    with pytest.raises(InvalidStatus) as refused:
        async with ada.live(f"/t/{slug}/live", **evil):
            pass
    assert refused.value.response.status_code == 403
    assert (await ada.get(f"/t/{slug}/notes")).json() == []
    async with ada.live(f"/t/{slug}/live") as websocket:
        await websocket.send("from a page of ours")
        assert await websocket.recv() == "saved"


# --- teams ------------------------------------------------------------------------------------------------------------


async def test_one_login_serves_several_teams(site: Site) -> None:
    """The path names one; without it the answer lists them; a team of others is refused and recorded."""
    ada, first = await site.owner()
    assert (await ada.post("/me/teams", {"slug": first})).status_code == 422
    second = f"t{uuid4().hex[:12]}"
    assert (await ada.post("/me/teams", {"slug": second})).status_code == 201
    _, others = await site.owner()
    slugs = sorted([first, second])
    assert [team["slug"] for team in (await ada.get("/me/tenants")).json()] == slugs
    which = await ada.get("/notes")
    assert (which.status_code, kind_of(which), which.json()["tenants"]) == (409, "tenant-not-named", slugs)
    for slug in slugs:
        await ada.post(f"/t/{slug}/notes", {"text": slug})
        assert [note["text"] for note in (await ada.get(f"/t/{slug}/notes")).json()] == [slug]
    for slug in (others, "no-such-team"):
        for answer in (
            await ada.get(f"/t/{slug}/notes"),
            await ada.post(f"/t/{slug}/notes", {"text": "x"}),
        ):
            assert (answer.status_code, kind_of(answer)) == (403, "cross-tenant")
        # below a path without a tenant the address does not count, and nothing of that team is shown
        assert [team["slug"] for team in (await ada.get(f"/t/{slug}/me/tenants")).json()] == slugs


async def test_roles_give_scopes(site: Site) -> None:
    """A reader reads, an editor writes, an owner does everything; nobody gives more than they have."""
    ada, slug = await site.owner()
    people = [ada, *[await site.member(ada, slug, role) for role in ("manager", "editor", "reader")]]
    members = (await ada.get(f"/t/{slug}/members")).json()
    assert [(one["email"], one["roles"]) for one in members] == [
        (who.email, [role]) for who, role in zip(people, ("owner", "manager", "editor", "reader"), strict=True)
    ]
    owner = members[0]["id"]
    calls: list[tuple[str, str, Any, int, int, int, int]] = [
        ("GET", "notes", None, 200, 200, 200, 200),
        ("POST", "notes", {"text": "x"}, 201, 201, 201, 403),
        ("GET", "members", None, 200, 200, 403, 403),
        ("POST", "invitations", {"email": "a@b.test", "role": "editor"}, 201, 201, 403, 403),
        ("POST", "invitations", {"email": "a@b.test", "role": "owner"}, 201, 403, 403, 403),
        ("POST", "invitations", {"email": "a@b.test", "role": "emperor"}, 422, 422, 403, 403),
        ("POST", "keys", {"name": "x"}, 201, 403, 403, 403),
        ("DELETE", f"members/{owner}", None, 409, 403, 403, 403),
        ("DELETE", "members/x", None, 204, 204, 403, 403),
    ]
    for method, path, body, *expected in calls:
        found = [(await who.call(method, f"/t/{slug}/{path}", body)).status_code for who in people]
        assert found == expected, (method, path)
    assert (await people[1].call("DELETE", f"/t/{slug}/members/{members[2]['id']}")).status_code == 204


async def test_an_invitation_is_accepted_once_by_whoever_is_logged_in(site: Site) -> None:
    """Its text alone is no login, and the person comes from the session."""
    ada, slug = await site.owner()
    text = (await ada.post(f"/t/{slug}/invitations", {"email": "b@example.test", "role": "reader"})).json()
    assert (await Browser(site.http).post("/me/invitations", text)).status_code == 401
    bob, eve = [await site.person() for _ in range(2)]
    assert (await bob.post("/me/invitations", {**text, "subject": "x"})).status_code == 422
    assert (await bob.post("/me/invitations", text)).status_code == 200
    for refused in (text, {"invitation": "forged"}):
        answer = await eve.post("/me/invitations", refused)
        assert (answer.status_code, kind_of(answer)) == (403, "invalid-invitation")
    assert (await eve.get("/me/tenants")).json() == []
    assert kind_of(await eve.get("/notes")) == "no-tenant"


async def test_who_is_removed_or_logs_out_everywhere_is_out_at_once(site: Site) -> None:
    """On open websockets, on every device, in every process; logging in again works."""
    ada, slug = await site.owner()
    bob, carol = [await site.member(ada, slug) for _ in range(2)]
    members = {one["email"]: one["id"] for one in (await ada.get(f"/t/{slug}/members")).json()}
    path = f"/t/{slug}/live"
    async with bob.live(path) as removed, carol.live(path) as first, carol.live(path) as second, ada.live(path) as own:
        for websocket in (removed, first, second, own):
            await websocket.send("before")
            assert await websocket.recv() == "saved"
        assert (await ada.call("DELETE", f"/t/{slug}/members/{members[bob.email]}")).status_code == 204
        phone = carol.copied()
        assert (await carol.post("/me/logout-everywhere")).status_code == 204
        for websocket in (removed, first, second):
            await assert_closed(websocket, 4401)
        await own.send("after")
        assert await own.recv() == "saved"
    await eventually(lambda: bob.get(f"/t/{slug}/notes"), 403)
    await eventually(lambda: phone.get(f"/t/{slug}/notes"), 401)
    assert (await carol.post("/login", {"email": carol.email, "password": PASSWORD})).status_code == 200
    assert (await carol.get(f"/t/{slug}/notes")).status_code == 200


async def test_what_a_session_no_longer_allows_ends_what_it_has_open(site: Site) -> None:
    """One session's websockets at its logout, a member's with fewer roles, all of a suspended team's."""
    ada, slug = await site.owner()
    bob, carol = [await site.member(ada, slug) for _ in range(2)]
    laptop = Browser(site.http)
    await laptop.post("/login", {"email": bob.email, "password": PASSWORD})
    members = {one["email"]: one["id"] for one in (await ada.get(f"/t/{slug}/members")).json()}
    path = f"/t/{slug}/live"
    async with bob.live(path) as first, laptop.live(path) as second, carol.live(path) as third:
        await laptop.post("/me/logout")
        await site.tenancy.members.add(slug, members[carol.email], ["reader"])
        await assert_closed(second, 4401)
        await assert_closed(third, 4401)
        await first.send("still logged in")
        assert await first.recv() == "saved"
        await site.tenancy.tenants.suspend(slug, reason="unpaid")
        await assert_closed(first, 4403)
    for browser, path, kind in ((bob, "notes", "tenant-suspended"), (bob, "p/board", "tenant-not-found")):
        assert kind_of(await browser.get(f"/t/{slug}/{path}")) == kind


async def test_the_audit_log_names_the_person(site: Site) -> None:
    """With the address that the request came from."""
    ada, slug = await site.owner()
    bob = await site.member(ada, slug)
    entries = await site.tenancy.audit.events(tenant=slug)
    actors = {entry.action: (entry.actor.kind, entry.actor.id, entry.actor.source) for entry in entries}
    people = {one["email"]: one["id"] for one in (await ada.get(f"/t/{slug}/members")).json()}
    assert actors["invitation.create"] == ("session", people[ada.email], "127.0.0.1")
    assert ("session", people[bob.email], "127.0.0.1") in actors.values()


# --- others -----------------------------------------------------------------------------------------------------------


async def test_a_key_serves_its_team_beside_a_cookie(site: Site) -> None:
    """The key decides where both are sent; it is no person, so nothing of a person's is its own."""
    ada, slug = await site.owner()
    key = (await ada.post(f"/t/{slug}/keys", {"name": "importer"})).json()["key"]
    program = Browser(site.http)
    sent = {"X-API-Key": key}
    assert (await program.post(f"/t/{slug}/notes", {"text": "by a program"}, **sent)).status_code == 201
    assert (await program.get("/notes", **sent)).status_code == 200
    assert (await program.post(f"/t/{slug}/keys", {"name": "x"}, **sent)).status_code == 403
    for path in ("/me/logout", "/me/logout-everywhere", "/me/teams", "/me/invitations"):
        assert (await program.post(path, **sent)).status_code == 403
    _, others = await site.owner()
    other = (await program.get(f"/t/{others}/notes", **sent)).status_code
    assert other == 403
    # owner by cookie, editor by key: the first that is found decides
    assert (await ada.post(f"/t/{slug}/keys", {"name": "x"}, **sent)).status_code == 403


async def test_visitors_see_what_is_published(site: Site) -> None:
    """Of the team that the path names, without markup of the team's; no page tells which teams there are."""
    ada, slug = await site.owner()
    await ada.post(f"/t/{slug}/notes", {"text": "<script>", "published": "yes"})
    await ada.post(f"/t/{slug}/notes", {"text": "secret"})
    for visitor in (Browser(site.http), ada, await site.person()):
        board = await visitor.get(f"/t/{slug}/p/board")
        assert (board.status_code, "&lt;script&gt;" in board.text, "secret" in board.text) == (200, True, False)
    visitor = Browser(site.http)
    assert (await visitor.get("/t/no-such-team/p/board")).status_code == 404
    assert (await ada.get("/p/board")).status_code == 404
    assert (await visitor.get(f"/t/{slug}/notes")).status_code == 401


async def test_a_payment_reaches_the_team_that_paid(site: Site) -> None:
    """Once, if it is signed, recently, for a customer that is known; nothing of the payload counts before."""
    _, slug = await site.owner()
    customer = f"cus_{uuid4().hex}"
    await site.tenancy.tenants.update(slug, merge_metadata={"stripe_customer_id": customer})

    def paid(who: Any) -> Any:
        invoice = {"customer": who, "amount_paid": 4200}
        return {"id": f"evt_{customer}", "type": "invoice.paid", "data": {"object": invoice}}

    assert (await site.pay(paid(customer), secret="x" * 32)).status_code == 400
    assert (await site.pay(paid(customer), age=3600)).status_code == 400
    assert [(await site.pay(paid(who))).status_code for who in ("cus_of_nobody", "", None)] == [404, 500, 500]
    for _ in range(2):
        assert (await site.pay(paid(customer))).status_code == 204
    assert await site.tenancy.fetch_value("SELECT sum(amount) FROM payments", tenant=slug) == 4200
    assert (await Browser(site.http).post("/webhooks/payments", paid(customer))).status_code == 400


async def test_every_route_needs_a_credential_unless_it_is_said_to_need_none(site: Site) -> None:
    """Whatever routes there are: without one they answer 401, and no key or person of another team is let in."""
    app = create_app(site.tenancy, Settings("", ""))
    _, slug = await site.owner()
    eve, evil = await site.owner()
    nobody = Browser(site.http)
    key = {"X-API-Key": (await site.tenancy.keys.issue(evil)).text}
    free = {"/healthz", "/signup", "/login", "/webhooks/payments", "/p/board"}
    asked = 0
    for route in app.routes:
        if not isinstance(route, Route) or route.path in free:
            continue
        for method in sorted(route.methods or ()):
            for path in (route.path, f"/t/{slug}{route.path}"):
                answer = await nobody.call(method, path.replace("{subject}", "x"))
                assert answer.status_code == 401, (method, path)
            if not route.path.startswith("/me/"):
                other = await eve.call(method, f"/t/{slug}{route.path.replace('{subject}', 'x')}")
                assert other.status_code == 403, (method, route.path)
            by_key = await site.http.request(method, f"/t/{slug}{route.path.replace('{subject}', 'x')}", headers=key)
            assert by_key.status_code == 403, (method, route.path)
            asked += 1
    assert asked > 10
    assert [team["slug"] for team in (await eve.get("/me/tenants")).json()] == [evil]


async def test_a_body_that_is_not_as_it_should_be_is_refused(site: Site) -> None:
    """Neither a fault of ours, nor kept in memory for as long as it comes."""
    nobody = Browser(site.http)
    bodies: list[Any] = [[], {}, {"email": "a"}, {"email": 1, "password": "x"}, {"email": "a\0", "password": PASSWORD}]
    for body in bodies:
        assert (await nobody.post("/login", body)).status_code == 422
    assert (await nobody.post("/signup", {"email": "a@b.test", "password": "short"})).status_code == 422
    assert (await nobody.post("/login", {"email": "a" * 70_000, "password": "x"})).status_code == 413
    ada = await site.person()
    again = await nobody.post("/signup", {"email": f" {ada.email.upper()}", "password": PASSWORD})
    assert again.status_code == 409


async def test_it_does_not_start_without_secrets(site: Site) -> None:
    """One that is in the repository would be none."""
    app = create_app(site.tenancy, Settings("short", "x" * 32))
    with pytest.raises(RuntimeError, match="set SESSION_SECRET to"):
        async with app.router.lifespan_context(app):
            pass


@pytest.mark.asyncio(loop_scope="function")
async def test_the_readme_is_what_happens(user_directory: Path) -> None:
    """Each command prints what the README says."""
    (user_directory / "examples").symlink_to(ROOT / "examples")

    def follow() -> None:
        with walkthrough(user_directory) as walk:
            walk.follow(blocks(EXAMPLE / "README.md", heading="Run it"))

    await asyncio.to_thread(follow)
