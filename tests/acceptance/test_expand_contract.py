"""The releases of docs/expand-contract.md, side by side in processes of their own, while their fleet is migrated."""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from tenancy_orm import Tenancy, TenancyConfig
from tests.acceptance.test_docs import ROOT, blocks_of
from tests.support.fleet import fleet_config
from tests.support.postgres import Postgres
from tests.support.projects import Project
from tests.support.served import uvicorn_command, variables
from tests.support.waiting import until
from tests.support.warm import run_module

PAGE = ROOT / "docs" / "expand-contract.md"
TENANTS = [f"tenant-{number}" for number in range(6)]
SERVED = {"200", "201"}
OUTSIDE = "503 tenant-revision"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files of the page."""
    monkeypatch.chdir(tmp_path)
    for block in blocks_of(PAGE, PAGE.read_text("utf-8")):
        if block.file is not None:
            path = tmp_path / block.file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.code, "utf-8")
        elif "init_directory(" in block.code or "copytree(" in block.code:
            exec(f"import shutil\n{block.code}")  # noqa: S102 - the page's own code, which makes directories
    return tmp_path


@dataclass
class Traffic:
    """What the clients of all tenants were answered, by release and tenant, in order; and how many rows each has."""

    keys: dict[str, str]
    answers: dict[tuple[str, str], list[str]] = field(default_factory=lambda: defaultdict(list))
    added: Counter[str] = field(default_factory=Counter)

    @asynccontextmanager
    async def to(self, release: str, port: int) -> AsyncIterator[None]:
        """Send requests to a release for the body, for each tenant one after the other."""
        ended = asyncio.Event()
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:

            async def work(slug: str, key: str) -> None:
                while not ended.is_set():
                    for method in ("POST", "GET"):
                        sent = {"name": "Ada"} if method == "POST" else None
                        answer = await client.request(method, "/people", json=sent, headers={"X-API-Key": key})
                        said = str(answer.status_code)
                        if answer.status_code == 503:
                            said += " " + answer.json()["type"].rpartition(":")[2]
                        self.added[slug] += answer.status_code == 201
                        self.answers[release, slug].append(said)

            tasks = [asyncio.create_task(work(slug, key)) for slug, key in self.keys.items()]
            try:
                yield
            finally:
                ended.set()
                await asyncio.gather(*tasks)

    def seen(self, release: str) -> set[str]:
        return {said for (name, _), all_said in self.answers.items() if name == release for said in all_said}

    async def until_all(self, release: str, last: set[str]) -> None:
        """Wait until the last two answers to each tenant are among these."""

        async def reached() -> bool:
            found = [self.answers[release, slug][-2:] for slug in self.keys]
            return all(len(answers) == 2 and set(answers) <= last for answers in found)

        await until(reached)

    def changes(self, release: str) -> list[list[str]]:
        """For each tenant, whether it was served or outside, and when that changed."""
        found = []
        for slug in self.keys:
            states = ["outside" if said == OUTSIDE else "served" for said in self.answers[release, slug]]
            found.append([one for one, before in zip(states, [None, *states], strict=False) if one != before])
        return found


async def migrate(site: Path, release: int, config: TenancyConfig, *arguments: str) -> str:
    """Run ``tenancy migrate`` with the code of a release, and return its status and what it printed."""
    env = {
        **os.environ,
        **variables(config),
        "TENANCY_MIGRATIONS": str(site / f"release{release}" / "migrations"),
        "TENANCY_COMPATIBLE_REVISIONS": {2: "0002,0003,0004"}.get(release, "0004:"),
    }
    done = await run_module("tenancy_orm.cli", "migrate", *arguments, cwd=site, env=env, timeout=120)
    return f"{done.status} {done.out}{done.err}"


async def test_two_releases_serve_side_by_side_during_a_run(
    site: Path, postgres: Postgres, control_url: str, name_prefix: str
) -> None:
    """No request fails but those of tenants outside a release's range, and those say so; no row is lost."""
    config = fleet_config(postgres, control_url, name_prefix, Project(site / "release1"))
    tenancy = Tenancy(config)
    await tenancy.open(initialise=True)
    try:
        traffic = Traffic({slug: str((await tenancy.tenants.create(slug)).api_key) for slug in TENANTS})
    finally:
        await tenancy.close()

    def server(release: int) -> AbstractAsyncContextManager[int]:
        return uvicorn_command(f"release{release}.app:create_app", config, "--app-dir", str(site))

    async with server(2) as second:
        # expand, while release 1 serves
        async with server(1) as first, traffic.to("1", first), traffic.to("2", second):
            await traffic.until_all("1", SERVED)
            await traffic.until_all("2", {OUTSIDE})
            said = await migrate(site, 2, config, "compatible")
            assert said.startswith("1 ") and "6 tenants, 6 of them at revisions outside 0002, 0003, 0004" in said, said
            assert (said := await migrate(site, 2, config, "upgrade")).startswith("0 "), said
            await traffic.until_all("2", SERVED)
            said = await migrate(site, 2, config, "compatible", "--json")
            assert said.startswith("0 ") and json.loads(said[2:])["outside"] == 0, said
        assert (traffic.seen("1"), traffic.seen("2")) == (SERVED, {*SERVED, OUTSIDE})
        assert traffic.changes("2") == [["outside", "served"]] * len(TENANTS)
        traffic.answers.clear()
        async with server(3) as third, traffic.to("2", second), traffic.to("3", third):
            # fill the column and require it, while release 2 serves
            await traffic.until_all("3", {OUTSIDE})
            assert (said := await migrate(site, 3, config, "upgrade")).startswith("0 "), said
            await traffic.until_all("3", SERVED)
            assert (traffic.seen("2"), traffic.seen("3")) == (SERVED, {*SERVED, OUTSIDE})
            assert traffic.changes("3") == [["outside", "served"]] * len(TENANTS)
            traffic.answers.clear()
            # contract, too early for release 2
            await traffic.until_all("2", SERVED)
            assert (said := await migrate(site, 4, config, "upgrade")).startswith("0 "), said
            await traffic.until_all("2", {OUTSIDE})
            assert (traffic.seen("2"), traffic.seen("3")) == ({*SERVED, OUTSIDE}, SERVED)
            assert traffic.changes("2") == [["served", "outside"]] * len(TENANTS)
        async with server(3) as third, httpx.AsyncClient(base_url=f"http://127.0.0.1:{third}") as client:
            for slug, key in traffic.keys.items():
                names = (await client.get("/people", headers={"X-API-Key": key})).json()
                assert names == ["Ada"] * traffic.added[slug]
