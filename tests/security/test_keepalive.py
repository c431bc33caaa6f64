"""One connection, several requests: nothing of one is seen by the next."""

from __future__ import annotations

import importlib.util

import pytest

from tenancy_orm.config import TenancyConfig
from tenancy_orm.tenancy import Tenancy
from tests.support.asgi import PARSERS, Answer, Wire
from tests.support.callers import EVERYONE, Caller, Callers
from tests.support.models import Note
from tests.support.served import uvicorn_command

# more than uvicorn buffers, so that it stops reading and begins again while the request is served
BODY = b"x" * 400_000

LOOPS = ["asyncio", *(["uvloop"] if importlib.util.find_spec("uvloop") else [])]

NOBODY = {"tenant": None, "notes": None, "length": 0}


@pytest.fixture
async def everyone(tenancy: Tenancy) -> dict[tuple[str, str], Caller]:
    """Callers of two tenants with a note each, by kind and tenant."""
    for slug in ("acme", "globex"):
        await tenancy.tenants.create(slug)
        async with tenancy.transaction(slug) as session:
            session.add(Note(body=f"note of {slug}"))
    callers = Callers(tenancy)
    return {(kind, slug): await callers.make(kind, slug) for kind in EVERYONE for slug in ("acme", "globex")}


async def upload_then_ask(port: int, caller: Caller) -> tuple[Answer, Answer]:
    """Post as a tenant, then ask as nobody on the same connection."""
    async with Wire.to(port) as wire:
        first = await wire.request(caller.path("/notes"), caller.headers, method="POST", body=BODY)
        return first, await wire.request("/open")


async def upload_and_ask_at_once(port: int, caller: Caller) -> tuple[Answer, Answer]:
    """The same, pipelined: the second request has arrived before the first is answered."""
    async with Wire.to(port) as wire:
        wire.ask(caller.path("/notes"), caller.headers, method="POST", body=BODY)
        wire.ask("/open")
        return await wire.answer(), await wire.answer()


@pytest.mark.parametrize("parser", PARSERS)
async def test_a_request_does_not_inherit_the_tenant_of_the_one_before(
    tenancy_config: TenancyConfig, everyone: dict[tuple[str, str], Caller], parser: str
) -> None:
    """A naive middleware lets an anonymous request read the tenant's notes, whoever was there before; this one not."""
    options = ("--loop", "asyncio", "--http", parser)
    async with (
        uvicorn_command("create_naive", tenancy_config, *options) as naive,
        uvicorn_command("create_guarded", tenancy_config, *options) as guarded,
    ):
        for kind in EVERYONE:
            caller = everyone[kind, "acme"]
            for attack in (upload_then_ask, upload_and_ask_at_once):
                _, leaked = await attack(naive, caller)
                expected = {"tenant": "acme", "notes": ["note of acme"], "length": 0}
                assert leaked.json() == expected, f"the attack must work: {kind}"
                assert leaked.header("x-outside") == "acme"

                served, asked = await attack(guarded, caller)
                assert served.json() == {"tenant": "acme", "notes": ["note of acme"], "length": len(BODY)}, kind
                assert asked.json() == NOBODY
                # not even what stands before the middleware sees a tenant: the server has none to carry
                assert asked.header("x-outside") == "None"


@pytest.mark.parametrize("parser", PARSERS)
@pytest.mark.parametrize("loop", LOOPS)
async def test_every_request_of_a_connection_has_its_own_tenant(
    tenancy_config: TenancyConfig, everyone: dict[tuple[str, str], Caller], parser: str, loop: str
) -> None:
    """Whatever the order, and whether the next one waits or not."""
    others = [(kind, slug) for kind in EVERYONE[1:] for slug in ("acme", "globex")]
    order = ["acme", None, "globex", "globex", None, None, "acme", "nobody", "globex", *others, None, "acme", None]
    async with uvicorn_command("create_guarded", tenancy_config, "--loop", loop, "--http", parser) as port:
        for at_once in (False, True):
            async with Wire.to(port) as wire:
                answers = []
                for asked in order:
                    caller = everyone.get(asked if isinstance(asked, tuple) else ("key", str(asked)))
                    headers = [("X-API-Key", "ten_live_nobody")] if asked == "nobody" else []
                    path = caller.path("/notes") if caller else "/notes" if asked else "/open"
                    wire.ask(path, caller.headers if caller else headers, method="POST", body=BODY if asked else b"")
                    if not at_once:
                        answers.append(await wire.answer())
                if at_once:
                    answers = [await wire.answer() for _ in order]
            for asked, answer in zip(order, answers, strict=True):
                assert answer.header("x-outside") == "None"
                if asked == "nobody":
                    assert answer.status == 401
                elif asked is None:
                    assert answer.json() == NOBODY
                else:
                    slug = asked[1] if isinstance(asked, tuple) else asked
                    expected = {"tenant": slug, "notes": [f"note of {slug}"], "length": len(BODY)}
                    assert answer.json() == expected, asked
