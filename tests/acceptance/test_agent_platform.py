"""The agent platform over HTTP, as its customers use it."""

from __future__ import annotations

import asyncio
import base64
import math
import secrets
import subprocess
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
import pytest_asyncio
from starlette.routing import Route

from examples.agent_platform.app import create_app
from examples.agent_platform.models import EMBEDDING_DIMENSIONS, Base
from examples.agent_platform.routes import RESOURCES
from examples.agent_platform.settings import create_config
from tenancy_orm import Tenancy
from tenancy_orm.events import ConnectionOpened
from tenancy_orm.quotas.rates import Allowed
from tenancy_orm.testing.embedded import EmbeddedServer
from tests.support.callers import KINDS, Callers, authenticators
from tests.support.postgres import Postgres
from tests.support.shell import ROOT, environment
from tests.support.suites import Suite

pytestmark = pytest.mark.asyncio(loop_scope="module")

NAMES = [resource.name for resource in RESOURCES]


def embedding(*components: float) -> list[float]:
    """An embedding that begins with ``components`` and is zero elsewhere."""
    return [*components, *([0.0] * (EMBEDDING_DIMENSIONS - len(components)))]


@dataclass
class Customer:
    """Someone with an API key."""

    http: httpx.AsyncClient
    key: str
    slug: str

    async def call(self, method: str, path: str, **options: Any) -> httpx.Response:
        headers = {"X-API-Key": self.key, **options.pop("headers", {})}
        return await self.http.request(method, path, headers=headers, **options)

    async def get(self, path: str, **options: Any) -> httpx.Response:
        return await self.call("GET", path, **options)

    async def post(self, path: str, body: Any) -> httpx.Response:
        return await self.call("POST", path, json=body)

    async def items(self, path: str, **parameters: Any) -> list[dict[str, Any]]:
        answer = await self.get(path, params=parameters)
        assert answer.status_code == 200, answer.text
        found: list[dict[str, Any]] = answer.json()["items"]
        return found

    async def create(self, path: str, **body: Any) -> dict[str, Any]:
        answer = await self.post(path, body)
        assert answer.status_code == 201, answer.text
        row: dict[str, Any] = answer.json()
        return row

    async def body(self, name: str, **given: Any) -> dict[str, Any]:
        """A valid body for a new row of resource ``name``, with the rows it refers to."""
        unique = uuid4().hex
        if name == "users":
            return {"email": f"{unique}@{self.slug}.test", "name": "Ada", **given}
        if name == "data_sources":
            return {"name": unique, "kind": "web", "uri": "https://example.org", **given}
        if name == "agents":
            owner = given.get("owner_id") or (await self.make("users"))["id"]
            return {"owner_id": owner, "name": unique, "model": "small-1", **given}
        agent = given.get("agent_id") or (await self.make("agents"))["id"]
        if name == "executions":
            return {"agent_id": agent, "input": {"question": unique}, **given}
        return {"agent_id": agent, "content": unique, "embedding": embedding(1.0), **given}

    async def make(self, name: str, **given: Any) -> dict[str, Any]:
        """Create a row of resource ``name``."""
        return await self.create(f"/{name}", **await self.body(name, **given))


@dataclass
class Platform:
    """The running application and its customers."""

    settings: dict[str, str]
    tenancy: Tenancy
    http: httpx.AsyncClient
    acme: Customer
    globex: Customer

    async def customer(self, slug: str, tier: str) -> Customer:
        created = await self.tenancy.tenants.create(slug, tier=tier)
        return Customer(self.http, created.api_key, slug)


@pytest.fixture(scope="module")
def server(postgres: Postgres) -> Iterator[Postgres]:
    """A server with pgvector: the embedded one, also where the run uses a server of somebody else's."""
    if postgres.data_dir is not None:
        yield postgres
        return
    with EmbeddedServer.for_tests() as embedded:
        yield Postgres(embedded.url(), embedded.server_version, postgres.run, postgres.worker)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def platform(server: Postgres) -> AsyncIterator[Platform]:
    """The application on a control database of its own, served in this process, with two customers."""
    database = server.new_name()
    prefix = f"ap{secrets.token_hex(4)}"
    settings = {
        "TENANCY_CONTROL_URL": await server.create_database(database),
        "TENANCY_SERVERS": f"default={server.admin_url}",
        "TENANCY_ENCRYPTION_KEYS": f"1:{base64.b64encode(secrets.token_bytes(32)).decode()}",
        "TENANCY_NAME_PREFIX": prefix,
    }
    tenancy = Tenancy(create_config(settings))
    app = create_app(tenancy)
    try:
        await tenancy.open(initialise=True)
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            created = [await tenancy.tenants.create(slug, tier="enterprise") for slug in ("acme", "globex")]
            acme, globex = (Customer(http, tenant.api_key, tenant.slug) for tenant in created)
            yield Platform(settings, tenancy, http, acme, globex)
    finally:
        await tenancy.close()
        await server.drop_database(database)
        await server.drop_all(prefix)


def problem(answer: httpx.Response, status: int) -> dict[str, Any]:
    """The problem document of an answer with ``status``."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    document: dict[str, Any] = answer.json()
    assert document["status"] == status
    return document


# --- rows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
async def test_a_row_is_created_read_and_listed(platform: Platform, name: str) -> None:
    """What POST creates, GET by id and the list return alike."""
    row = await platform.acme.make(name)
    assert (await platform.acme.get(f"/{name}/{row['id']}")).json() == row
    assert (await platform.acme.items(f"/{name}"))[0] == row


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "identity", ["1x", "0", "-1", "0b9dd1c0-6a1f-4a3e-9d51-3d5c8a9a2f11", "9" * 5000, "%00", "' OR 1=1"]
)
async def test_an_id_without_a_row_is_404(platform: Platform, name: str, identity: str) -> None:
    """An id that no row has, and one that no row can have, are answered alike."""
    problem(await platform.acme.get(f"/{name}/{identity}"), 404)


async def test_a_bigint_id_is_not_one_beyond_its_range(platform: Platform) -> None:
    """An id that PostgreSQL's bigint cannot hold is an id without a row."""
    problem(await platform.acme.get(f"/executions/{2**63}"), 404)
    problem(await platform.acme.get(f"/executions/{2**63 - 1}"), 404)


async def test_a_body_that_does_not_validate_is_422_with_pointers(platform: Platform) -> None:
    """Each mistake is told with its place, and no value is repeated."""
    body = {"email": "nobody", "role": "emperor", "password": "hunter2"}
    answer = await platform.acme.post("/users", body)
    document = problem(answer, 422)
    places = {error["pointer"] for error in document["errors"]}
    assert places == {"/email", "/name", "/role", "/password"}
    assert "hunter2" not in answer.text


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b'{"name": "\\ud800"}'])
async def test_what_is_not_a_json_object_is_422(platform: Platform, content: bytes) -> None:
    """A body that is not a JSON object is a problem of the client's."""
    problem(await platform.acme.call("POST", "/agents", content=content), 422)


async def test_what_postgresql_does_not_admit_is_422(platform: Platform) -> None:
    """A NUL character is valid JSON, but no PostgreSQL text or jsonb."""
    problem(await platform.acme.post("/users", {"email": "a@b.test", "name": "A\0"}), 422)
    body = await platform.acme.body("executions", input={"text": "\0"})
    problem(await platform.acme.post("/executions", body), 422)


async def test_a_name_that_is_taken_is_409(platform: Platform) -> None:
    """An address differs from another by more than its case."""
    user = await platform.acme.make("users")
    body = {"email": user["email"].upper(), "name": "Ada"}
    problem(await platform.acme.post("/users", body), 409)


async def test_a_reference_to_no_row_is_422(platform: Platform) -> None:
    """A row cannot refer to one that does not exist."""
    body = await platform.acme.body("agents", owner_id=str(uuid4()))
    problem(await platform.acme.post("/agents", body), 422)


async def test_no_such_path_and_method_are_problems(platform: Platform) -> None:
    """Starlette's own refusals are problem documents too."""
    problem(await platform.acme.get("/nothing"), 404)
    problem(await platform.acme.call("PUT", "/agents"), 405)


# --- pages ----------------------------------------------------------------------------------------------------------


async def test_pages_hold_every_row_once_newest_first(platform: Platform) -> None:
    """Walking by ``next`` meets each row once, though rows are added at the same time."""
    agent = (await platform.acme.make("agents"))["id"]
    made = [(await platform.acme.make("executions", agent_id=agent))["id"] for _ in range(5)]
    seen: list[int] = []
    query: dict[str, Any] = {"agent_id": agent, "limit": 2}
    while True:
        page = (await platform.acme.get("/executions", params=query)).json()
        seen += [row["id"] for row in page["items"]]
        await platform.acme.make("executions", agent_id=agent)
        if page["next"] is None:
            break
        query["after"] = page["next"]
    assert seen == made[::-1]


async def test_a_page_of_uuid_keys_continues_where_it_ended(platform: Platform) -> None:
    """The cursor works for tables whose ids have no order as well."""
    for _ in range(3):
        await platform.acme.make("data_sources")
    everything = [row["id"] for row in await platform.acme.items("/data_sources", limit=100)]
    first = (await platform.acme.get("/data_sources", params={"limit": 1})).json()
    rest = await platform.acme.items("/data_sources", limit=100, after=first["next"])
    assert [first["items"][0]["id"], *(row["id"] for row in rest)] == everything


@pytest.mark.parametrize("query", ["after=x", "after=MQ", "after=%00", "limit=0", "limit=101", "limit=x", "order=id"])
async def test_a_query_that_does_not_validate_is_422(platform: Platform, query: str) -> None:
    """A cursor of nobody's making, a limit out of range and an unknown parameter are refused."""
    problem(await platform.acme.get(f"/executions?{query}"), 422)


async def test_a_list_is_filtered(platform: Platform) -> None:
    """Executions can be asked for by agent and by status."""
    mine = await platform.acme.make("executions")
    await platform.acme.make("executions")
    assert await platform.acme.items("/executions", agent_id=mine["agent_id"]) == [mine]
    assert await platform.acme.items("/executions", agent_id=mine["agent_id"], status="failed") == []


# --- memories -------------------------------------------------------------------------------------------------------


async def test_search_returns_the_nearest_first(platform: Platform) -> None:
    """Memories come in order of their cosine distance, which is told."""
    agent = (await platform.acme.make("agents"))["id"]
    angles = {"same": 0.0, "near": 0.3, "far": 1.2, "opposite": math.pi}
    for content in ("far", "same", "opposite", "near"):
        direction = embedding(math.cos(angles[content]), math.sin(angles[content]))
        await platform.acme.make("memories", agent_id=agent, content=content, embedding=direction)
    search = {"embedding": embedding(2.0), "agent_id": agent, "limit": 3}
    found = (await platform.acme.post("/memories/search", search)).json()["items"]
    assert [match["memory"]["content"] for match in found] == ["same", "near", "far"]
    for match in found:
        expected = 1 - math.cos(angles[match["memory"]["content"]])
        assert match["distance"] == pytest.approx(expected, abs=1e-5)


async def test_a_search_of_many_memories_is_not_cut_short(platform: Platform) -> None:
    """Where the index is used, more can be asked for than HNSW looks at by itself (``hnsw.ef_search``, 40)."""
    customer = await platform.customer("elephant", "enterprise")
    agent = (await customer.make("agents"))["id"]
    await platform.tenancy.execute(
        "INSERT INTO memories (agent_id, content, embedding)"
        " SELECT :agent, n, (SELECT array_agg(sin(n * k)) FROM generate_series(1, :size) AS k)::vector"
        " FROM generate_series(1, 1000) AS n",
        {"agent": UUID(agent), "size": EMBEDDING_DIMENSIONS},
        tenant="elephant",
    )
    found = (await customer.post("/memories/search", {"embedding": embedding(1.0), "limit": 100})).json()["items"]
    assert len(found) == 100
    distances = [match["distance"] for match in found]
    assert distances == sorted(distances)


@pytest.mark.parametrize("vector", [[], [1.0], [0.0] * EMBEDDING_DIMENSIONS, "1"])
async def test_a_search_without_a_direction_is_422(platform: Platform, vector: Any) -> None:
    """An embedding has the right length and is not all zeros."""
    problem(await platform.acme.post("/memories/search", {"embedding": vector}), 422)


# --- isolation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
async def test_a_list_holds_the_rows_of_its_own_tenant_alone(platform: Platform, name: str) -> None:
    """What one tenant creates is in its own list, and in no other's."""
    row = await platform.acme.make(name)
    other = await platform.globex.make(name)
    assert row in await platform.acme.items(f"/{name}", limit=100)
    assert row not in await platform.globex.items(f"/{name}", limit=100)
    assert other in await platform.globex.items(f"/{name}", limit=100)
    assert other not in await platform.acme.items(f"/{name}", limit=100)


@pytest.mark.parametrize("name", ["users", "agents", "data_sources"])
async def test_another_tenants_id_is_404(platform: Platform, name: str) -> None:
    """An id that is another tenant's is an id without a row."""
    row = await platform.globex.make(name)
    assert (await platform.globex.get(f"/{name}/{row['id']}")).status_code == 200
    problem(await platform.acme.get(f"/{name}/{row['id']}"), 404)


@pytest.mark.parametrize("name", ["executions", "memories"])
async def test_an_equal_id_is_each_tenants_own_row(platform: Platform, name: str) -> None:
    """Numbered rows have the same ids in every tenant: each key gets its own."""
    column = "content" if name == "memories" else "input"
    await platform.acme.make(name)
    await platform.globex.make(name)
    ours, theirs = [(await x.get(f"/{name}/1")).json() for x in (platform.acme, platform.globex)]
    assert ours["id"] == theirs["id"] == 1
    assert ours[column] != theirs[column]


async def test_search_finds_no_memory_of_another_tenant(platform: Platform) -> None:
    """Two tenants remember the same direction: each finds its own memory alone."""
    direction = embedding(0.0, 0.0, 0.0, 1.0)
    mine = await platform.acme.make("memories", embedding=direction)
    await platform.globex.make("memories", content="theirs", embedding=direction)
    search = {"embedding": direction, "limit": 100}
    found = (await platform.acme.post("/memories/search", search)).json()["items"]
    assert found[0]["memory"] == mine
    assert "theirs" not in {match["memory"]["content"] for match in found}


async def test_a_row_cannot_refer_to_another_tenants(platform: Platform) -> None:
    """Another tenant's user cannot own an agent: there is no such user."""
    owner = (await platform.globex.make("users"))["id"]
    body = await platform.acme.body("agents", owner_id=owner)
    problem(await platform.acme.post("/agents", body), 422)


async def test_every_route_but_health_needs_a_key(platform: Platform) -> None:
    """Whatever routes there are, without a key they answer 401."""
    assert (await platform.http.get("/healthz")).json() == {"status": "ok"}
    app = create_app(platform.tenancy)
    asked = 0
    for route in app.routes:
        assert isinstance(route, Route)
        if route.path == "/healthz":
            continue
        for method in route.methods or ():
            answer = await platform.http.request(method, route.path.replace("{id}", "1"))
            assert answer.status_code == 401, (method, route.path)
            asked += 1
    assert asked > 3 * len(RESOURCES)


async def test_no_route_reaches_another_tenant_with_any_kind_of_credential(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each route and method with the other tenant's ids and bodies: 403, 404 or 422, and no connection to its database.

    With the application's own middleware, and authenticators for every kind besides.
    """
    theirs = {name: await platform.globex.make(name) for name in NAMES}
    owned = {"agents": {"owner_id": theirs["users"]["id"]}}
    for name in ("executions", "memories"):
        owned[name] = {"agent_id": theirs["agents"]["id"]}
    bodies = {name: await platform.acme.body(name, **owned.get(name, {})) for name in NAMES}
    secret = [str(row["id"]) for name, row in theirs.items() if name not in ("executions", "memories")]
    secret += [theirs["memories"]["content"], theirs["executions"]["input"]["question"]]
    app = create_app(platform.tenancy)
    app.user_middleware[0].kwargs["authenticators"] = authenticators()
    callers = Callers(platform.tenancy)
    globex = await platform.tenancy.tenants.get("globex")
    platform.tenancy.internals.router.retire(globex.id)
    opened: list[ConnectionOpened] = []
    platform.tenancy.events.subscribe(ConnectionOpened, opened.append)
    asked: Counter[int] = Counter()
    monkeypatch.setattr(platform.tenancy.internals.rates, "acquire_address", lambda source: Allowed(None, None, 0.0))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as http:
        for kind in KINDS:
            headers = dict((await callers.make(kind, "acme")).headers)
            for route in app.routes:
                assert isinstance(route, Route)
                name = route.path.split("/")[1]
                if name == "healthz":
                    continue
                path = route.path.replace("{id}", str(theirs[name]["id"]))
                for method in route.methods or ():
                    content: dict[str, Any] = {"json": bodies[name]} if method == "POST" else {}
                    named = await http.request(
                        method, path, headers={**headers, "Host": "globex.example.test"}, **content
                    )
                    assert named.status_code == 403, (kind, method, path)
                    answer = await http.request(method, path, headers=headers, **content)
                    asked[answer.status_code] += 1
                    assert not any(text in answer.text for text in secret), (kind, method, path)
                    if "{id}" in route.path and name not in ("executions", "memories"):
                        assert answer.status_code == 404, (kind, method, path)
                    if method == "POST" and name in owned:
                        # a search has another body, which this is not
                        assert answer.status_code == 422, (kind, path)
    assert asked[404] >= 4 * len(KINDS) and asked[200] >= len(KINDS), asked
    assert {event.slug for event in opened} <= {"acme"}
    for name, row in theirs.items():
        assert (await platform.globex.get(f"/{name}/{row['id']}")).json() == row


@pytest.mark.parametrize("domain", ["example.test", "localhost"])
async def test_a_key_fits_its_own_sub_domain_alone(platform: Platform, domain: str) -> None:
    """The sub-domain must name the key's tenant."""
    own = await platform.acme.get("/agents", headers={"Host": f"acme.{domain}"})
    assert own.status_code == 200, own.text
    problem(await platform.acme.get("/agents", headers={"Host": f"globex.{domain}"}), 403)


async def test_a_suspended_tenant_is_refused(platform: Platform) -> None:
    """Suspension refuses the key at once, and activation admits it again."""
    customer = await platform.customer("hooli", "pro")
    assert (await customer.get("/agents")).status_code == 200
    await platform.tenancy.tenants.suspend("hooli", reason="unpaid")
    problem(await customer.get("/agents"), 403)
    await platform.tenancy.tenants.activate("hooli")
    assert (await customer.get("/agents")).status_code == 200


# --- quotas ---------------------------------------------------------------------------------------------------------


async def seats(platform: Platform, slug: str) -> int:
    """How many users the quota counts."""
    usages = await platform.tenancy.quotas.usage(slug)
    return next(usage.used for usage in usages if usage.resource == "users")


async def test_users_are_refused_beyond_the_tiers_limit(platform: Platform) -> None:
    """The free tier has three users: the fourth is refused and not inserted; a deleted one makes room."""
    customer = await platform.customer("tiny", "free")
    users = [await customer.make("users") for _ in range(3)]
    body = await customer.body("users")
    problem(await customer.post("/users", body), 429)
    assert await customer.items("/users") == users[::-1]
    assert (await customer.call("DELETE", f"/users/{users[0]['id']}")).status_code == 204
    assert (await customer.post("/users", body)).status_code == 201
    problem(await customer.post("/users", await customer.body("users")), 429)


async def test_a_user_who_is_refused_takes_no_seat(platform: Platform) -> None:
    """A seat taken for a row that the database refuses is given back."""
    customer = await platform.customer("frugal", "free")
    user = await customer.make("users")
    for _ in range(5):
        problem(await customer.post("/users", {"email": user["email"], "name": "Eve"}), 409)
    assert await seats(platform, "frugal") == 1


async def test_a_user_who_owns_agents_keeps_the_seat(platform: Platform) -> None:
    """Deleting a user who owns agents is refused, and frees nothing."""
    customer = await platform.customer("careful", "free")
    agent = await customer.make("agents")
    problem(await customer.call("DELETE", f"/users/{agent['owner_id']}"), 409)
    problem(await customer.call("DELETE", f"/users/{uuid4()}"), 404)
    assert await seats(platform, "careful") == 1


# --- the schema -----------------------------------------------------------------------------------------------------


async def test_every_tenant_has_the_models_tables_and_indexes(platform: Platform) -> None:
    """The migrations make what the models say: five tables, 18 indexes besides the keys, one of them HNSW."""
    expected = {str(index.name) for table in Base.metadata.tables.values() for index in table.indexes}
    rows = await platform.tenancy.fetch_all(
        "SELECT indexname, indexdef, tablename FROM pg_indexes WHERE schemaname = 'public'",
        tenant="acme",
    )
    found = {row.indexname: row.indexdef for row in rows if row.tablename != "alembic_version"}
    assert {name for name in found if not name.startswith("pk_")} == expected
    assert len(expected) == 18
    assert "USING hnsw" in found["ix_memories_embedding"]


async def alembic(platform: Platform, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Alembic's own command line on the example, from the root of the repository."""
    return await asyncio.to_thread(
        subprocess.run,
        ["alembic", "-c", "examples/agent_platform/alembic.ini", *arguments],
        cwd=ROOT,
        env=environment(**platform.settings),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


async def test_the_migrations_make_what_the_models_say(platform: Platform) -> None:
    """``alembic check`` finds nothing that a new revision would have to change."""
    done = await alembic(platform, "check")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No new upgrade operations detected" in done.stdout + done.stderr


async def test_alembic_shows_every_tenant_at_head(platform: Platform) -> None:
    """``alembic current`` asks each tenant's database."""
    done = await alembic(platform, "current")
    assert done.returncode == 0, done.stdout + done.stderr
    for slug in ("acme", "globex"):
        assert any(slug in line and "0001" in line for line in done.stdout.splitlines()), done.stdout


async def test_the_platforms_own_tests_pass(postgres: Postgres) -> None:
    """Those that stand beside the application: they use the pytest plugin, and need no fixture of their own for it."""
    suite = Suite(ROOT / "examples" / "agent_platform", postgres)
    try:
        outcome = await suite.run()
        assert outcome.counts == {"passed": 5}, outcome.text
    finally:
        await suite.remove()
