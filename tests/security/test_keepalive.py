"""One connection, several requests: nothing of one is seen by the next."""

from __future__ import annotations

import importlib.util

import pytest

from tenancy_orm.config import TenancyConfig
from tenancy_orm.tenancy import Tenancy
from tests.support.asgi import PARSERS, Answer, Wire
from tests.support.models import Note
from tests.support.served import uvicorn_command

# more than uvicorn buffers, so that it stops reading and begins again while the request is served
BODY = b"x" * 400_000

LOOPS = ["asyncio", *(["uvloop"] if importlib.util.find_spec("uvloop") else [])]

NOBODY = {"tenant": None, "notes": None, "length": 0}


@pytest.fixture
async def keys(tenancy: Tenancy) -> dict[str, str]:
    """Two tenants with a note each; their keys."""
    made = {}
    for slug in ("acme", "globex"):
        made[slug] = (await tenancy.tenants.create(slug)).api_key
        async with tenancy.transaction(slug) as session:
            session.add(Note(body=f"note of {slug}"))
    return made


async def upload_then_ask(port: int, key: str) -> tuple[Answer, Answer]:
    """Post as a tenant, then ask as nobody on the same connection."""
    async with Wire.to(port) as wire:
        first = await wire.request("/notes", [("X-API-Key", key)], method="POST", body=BODY)
        return first, await wire.request("/open")


async def upload_and_ask_at_once(port: int, key: str) -> tuple[Answer, Answer]:
    """The same, pipelined: the second request has arrived before the first is answered."""
    async with Wire.to(port) as wire:
        wire.ask("/notes", [("X-API-Key", key)], method="POST", body=BODY)
        wire.ask("/open")
        return await wire.answer(), await wire.answer()


@pytest.mark.parametrize("parser", PARSERS)
async def test_a_request_does_not_inherit_the_tenant_of_the_one_before(
    tenancy_config: TenancyConfig, keys: dict[str, str], parser: str
) -> None:
    """A naive middleware lets an anonymous request read the tenant's notes; this one does not."""
    options = ("--loop", "asyncio", "--http", parser)
    for attack in (upload_then_ask, upload_and_ask_at_once):
        async with uvicorn_command("create_naive", tenancy_config, *options) as port:
            _, leaked = await attack(port, keys["acme"])
            assert leaked.json() == {"tenant": "acme", "notes": ["note of acme"], "length": 0}, "the attack must work"
            assert leaked.header("x-outside") == "acme"

        async with uvicorn_command("create_guarded", tenancy_config, *options) as port:
            served, asked = await attack(port, keys["acme"])
            assert served.json() == {"tenant": "acme", "notes": ["note of acme"], "length": len(BODY)}
            assert asked.json() == NOBODY
            # not even what stands before the middleware sees a tenant: the server has none to carry
            assert asked.header("x-outside") == "None"


@pytest.mark.parametrize("parser", PARSERS)
@pytest.mark.parametrize("loop", LOOPS)
async def test_every_request_of_a_connection_has_its_own_tenant(
    tenancy_config: TenancyConfig, keys: dict[str, str], parser: str, loop: str
) -> None:
    """Whatever the order, and whether the next one waits or not."""
    order = ["acme", None, "globex", "globex", None, None, "acme", "nobody", "globex", "acme", None]
    async with uvicorn_command("create_guarded", tenancy_config, "--loop", loop, "--http", parser) as port:
        for at_once in (False, True):
            async with Wire.to(port) as wire:
                answers = []
                for slug in order:
                    headers = [("X-API-Key", keys.get(slug, "ten_live_nobody"))] if slug else []
                    wire.ask("/notes" if slug else "/open", headers, method="POST", body=BODY if slug else b"")
                    if not at_once:
                        answers.append(await wire.answer())
                if at_once:
                    answers = [await wire.answer() for _ in order]
            for slug, answer in zip(order, answers, strict=True):
                assert answer.header("x-outside") == "None"
                if slug == "nobody":
                    assert answer.status == 401
                elif slug is None:
                    assert answer.json() == NOBODY
                else:
                    expected = {"tenant": slug, "notes": [f"note of {slug}"], "length": len(BODY)}
                    assert answer.json() == expected
