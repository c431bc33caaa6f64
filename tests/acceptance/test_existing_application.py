"""The page "Add it to an existing application", followed from ``before`` to ``after`` on real servers."""

from __future__ import annotations

import ast
import asyncio
import base64
import os
import re
import secrets
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import asyncpg
import httpx
import pytest
from packaging.requirements import Requirement

from tests.support.postgres import Postgres
from tests.support.shell import ROOT
from tests.support.walkthrough import Block, Walkthrough, blocks, walkthrough
from tests.support.warm import run_module

PAGE = ROOT / "docs" / "existing-application.md"
EXAMPLE = ROOT / "examples" / "existing_application"

_PROGRAMS = {"alembic": "alembic", "pytest": "pytest", "tenancy": "tenancy_orm.cli"}
_FILE = re.compile(r"# (?P<name>[\w./-]+\.py)\n")


LOGINS = """
    SELECT rolname FROM pg_roles
    WHERE rolcanlogin AND NOT rolsuper AND has_database_privilege(rolname, current_database(), 'CONNECT')
"""
"""Who may connect to the product's own database: no tenant."""


class Reader:
    """Does what the page says, in the directory of the product.

    Programs that end are forked from a warm process; a server runs in a terminal.
    """

    def __init__(self, walk: Walkthrough) -> None:
        self.walk = walk
        self.directory = walk.directory
        self.printed = ""
        """What the last commands printed."""

    def follow(self, heading: str) -> None:
        """Do what each block of a section says."""
        for block in blocks(PAGE, heading=heading):
            self.do(block)

    def do(self, block: Block) -> None:
        """Write a file, apply a diff, type commands, or compare what they have printed."""
        if block.language == "sh":
            self.printed = "".join(self.type(line) for line in block.text.splitlines())
        elif block.language == "diff":
            patch = ["patch", "-p1", "--fuzz=0"]
            subprocess.run(patch, input=block.text, cwd=self.directory, check=True, text=True, capture_output=True)
        elif block.language == "text":
            assert self.printed == block.text
        else:
            named = _FILE.match(block.text)
            assert named is not None, block.text
            (self.directory / named["name"]).write_text(block.text, encoding="utf-8")

    def type(self, line: str, *, ok: bool = True) -> str:
        """Type one command, and return what it printed."""
        words = [] if re.search(r"[$>|]", line) else shlex.split(line)
        if words[:2] == ["pip", "install"]:
            # it is installed, so it is enough that the extras exist
            wanted = Requirement(words[2])
            project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
            assert wanted.name == project["name"] and wanted.extras <= set(project["optional-dependencies"])
            return ""
        if words and words[0] == "python":
            module, *arguments = words[1].removesuffix(".py"), *words[2:]
        elif words and words[0] in _PROGRAMS:
            module, *arguments = _PROGRAMS[words[0]], *words[1:]
        else:
            self.walk.follow([Block("sh", line)])
            return self.walk.printed
        done = asyncio.run(run_module(module, *arguments, cwd=self.directory, env=self.walk.variables))
        assert (done.status == 0) is ok, f"{line}: {done.status}\n{done.out}{done.err}"
        return done.out


class Client(httpx.Client):
    """A person's browser at a real server. Its cookie is for https alone, so it is sent by hand."""

    def log_in(self, slug: str, *, sign_up: bool = False) -> None:
        """Send the form, and keep the cookie."""
        form = {"slug": slug, "name": slug.title(), "email": f"mara@{slug}.example", "password": "correct horse"}
        answer = self.post("/signup" if sign_up else "/login", json=form)
        assert answer.is_success, answer.text
        assert "HttpOnly" in answer.headers["set-cookie"]
        self.headers["cookie"] = answer.headers["set-cookie"].partition(";")[0]

    def titles(self) -> list[str]:
        """The tickets that it sees."""
        return [ticket["title"] for ticket in self.get("/tickets").json()]


@pytest.fixture
async def variables(postgres: Postgres, name_prefix: str) -> AsyncIterator[dict[str, str]]:
    """The product's databases and control databases, as variables; all but the control database are there."""
    names = [postgres.new_name() for _ in range(4)]
    urls = [await postgres.create_database(name) for name in names]
    try:
        yield {
            "DATABASE_URL": urls[0].replace("postgresql:", "postgresql+asyncpg:"),
            "TEST_DATABASE_URL": urls[1].replace("postgresql:", "postgresql+asyncpg:"),
            "TENANCY_CONTROL_URL": urls[2],
            "TEST_CONTROL_URL": urls[3],
            "TENANCY_ENCRYPTION_KEYS": "1:" + base64.b64encode(secrets.token_bytes(32)).decode(),
            "TENANCY_NAME_PREFIX": name_prefix,
            "JWT_SECRET": secrets.token_urlsafe(32),
        }
    finally:
        for name in names:
            await postgres.drop_database(name)


@pytest.fixture
def old(user_directory: Path, variables: dict[str, str]) -> Iterator[Walkthrough]:
    """The product as it was, served from a directory of its own, with its tables and no rows."""
    directory = user_directory.with_name("old")
    copy(EXAMPLE / "before", directory)
    with walkthrough(directory, **variables) as walk:
        Reader(walk).type("alembic upgrade head")
        walk.follow([Block("sh", "uvicorn app:app\n")])
        yield walk


def test_the_product_gets_a_database_for_each_organisation(
    user_directory: Path, variables: dict[str, str], old: Walkthrough
) -> None:
    """Every step of the page does what it says, no row is lost, and the leak is closed; the result is ``after``."""
    user_directory.rmdir()
    copy(EXAMPLE / "before", user_directory)
    with walkthrough(user_directory, **variables) as walk, ExitStack() as browsers:
        reader = Reader(walk)

        # the leak, in the product's own tests and through its real server
        [leak, test] = blocks(PAGE, heading="A test that fails")
        reader.do(leak)
        said = reader.type(test.text.strip(), ok=False)
        assert "1 failed, 5 passed" in said and "assert 200 == 404" in said, said
        url = f"http://127.0.0.1:{old.port}"
        # after an error that the product does not handle, uvicorn closes the connection
        once = httpx.Limits(max_keepalive_connections=0)
        acme, globex, initech = (browsers.enter_context(Client(base_url=url, limits=once)) for _ in range(3))
        acme.log_in("acme", sign_up=True)
        globex.log_in("globex", sign_up=True)
        initech.log_in("initech", sign_up=True)
        numbers = [acme.post("/tickets", json={"title": title}).json() for title in ("Printer on fire", "No toner")]
        assert acme.post(f"/tickets/{numbers[0]}/comments", json={"text": "Again?"}).status_code == 201
        globex.post("/tickets", json={"title": "No coffee"})
        assert globex.get(f"/tickets/{numbers[0]}").json()["comments"] == ["Again?"]

        for heading in (
            "Install",
            "Two kinds of tables",
            "The tenants' own migrations",
            "Login and sessions",
            "The worker",
            "The tests",
        ):
            reader.follow(heading)
        assert "6 passed" in reader.printed, reader.printed

        # the old version serves and writes beside the new one
        moving = blocks(PAGE, heading="Move the rows")
        for block in moving[:-2]:
            if block.text == "python move.py acme\n":
                asyncio.run(interrupt_a_move(walk, globex))
            reader.do(block)
        assert acme.post("/tickets", json={"title": "too late"}).status_code == 500
        early = browsers.enter_context(Client(base_url=f"http://127.0.0.1:{walk.port}", limits=once))
        early.log_in("initech")
        assert early.get("/me").status_code == 200
        assert early.get("/tickets").json()["type"] == "urn:tenancy:problem:no-tenant"
        asyncio.run(execute(variables, "UPDATE organisations SET tenant_id = NULL"))
        assert acme.post("/tickets", json={"title": "still here"}).status_code == 201
        assert "1: 3 tickets" in reader.type("python move.py acme")
        with ThreadPoolExecutor(1) as threads:
            writing = threads.submit(write_until_refused, initech)
            reader.do(moving[-2])
            written = writing.result(timeout=60)
        late, last = (browsers.enter_context(Client(base_url=url, limits=once)) for _ in range(2))
        late.log_in("umbrella", sign_up=True)
        assert late.post("/tickets", json={"title": "No light"}).status_code == 201
        reader.do(moving[-1])
        assert "1 tickets" in reader.printed
        titles = ["Printer on fire", "No toner", "still here"]
        assert acme.titles() == titles
        assert asyncio.run(execute(variables, LOGINS)) == []

        for client, slug in ((acme, "acme"), (globex, "globex"), (initech, "initech"), (late, "umbrella")):
            client.base_url = httpx.URL(f"http://127.0.0.1:{walk.port}")
            assert client.get("/tickets").status_code == 401
            client.log_in(slug)
            assert client.get(f"{url}/tickets").status_code == 401
        assert acme.titles() == titles
        assert initech.titles() == written
        assert late.titles() == ["No light"]
        assert acme.get(f"/tickets/{numbers[0]}").json()["comments"] == ["Again?"]
        assert globex.get(f"/tickets/{numbers[0]}").status_code == 404
        assert acme.get("/me").json() == {"email": "mara@acme.example", "organisation": "Acme"}
        assert acme.post("/tickets", json={"title": "No paper"}).status_code == 201
        forged = acme.post("/tickets", json={"title": "forged"}, headers={"Origin": "https://evil.example"})
        assert forged.status_code == 403
        assert "'acme': 0, 'globex': 0, 'initech': 0" in reader.type("python worker.py")
        assert "acme" not in reader.type("python move.py")
        assert acme.titles() == [*titles, "No paper"]

        # a copy of the cookie is worth nothing after the logout, and another session of the person goes on
        copied = dict(acme.headers)
        acme.log_in("acme")
        assert acme.post("/logout", headers=copied).is_success
        assert acme.get("/tickets", headers=copied).status_code == 401
        assert acme.titles() == [*titles, "No paper"]

        *later, dropping = blocks(PAGE, heading="Later: without `org_id`")
        for block in later:
            reader.do(block)
        last.log_in("zenith", sign_up=True)  # at the old version, which should have been stopped
        assert last.post("/tickets", json={"title": "No heat"}).status_code == 201
        assert "not moved: zenith; stop the old version, and run python move.py" in reader.type(
            "alembic upgrade head", ok=False
        )
        assert asyncio.run(execute(variables, "SELECT title FROM tickets WHERE title = 'No heat'")) != []
        assert "1 tickets" in reader.type("python move.py")
        reader.do(dropping)
        assert "6 passed" in reader.printed, reader.printed
        assert "'acme': 0, 'globex': 0, 'initech': 0" in reader.type("python worker.py")

    assert_same(user_directory, EXAMPLE / "after")


async def interrupt_a_move(walk: Walkthrough, other: Client) -> None:
    """Kill the move of acme after it has copied some rows; another organisation's writes do not wait for it."""
    connection = await asyncpg.connect(walk.variables["DATABASE_URL"].replace("+asyncpg", ""))
    try:
        async with connection.transaction():
            await connection.execute("LOCK TABLE comments")
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "move.py", "acme"),
                cwd=walk.directory,
                env={**walk.variables, "PYTHONUNBUFFERED": "1"},
                stdout=asyncio.subprocess.PIPE,
            )
            assert process.stdout is not None
            assert await process.stdout.readline() == b"organisation 1: 2 tickets\n"
            assert other.post("/tickets", json={"title": "No milk"}).status_code == 201
            process.kill()
            await process.communicate()
    finally:
        await connection.close()


async def execute(variables: dict[str, str], statement: str) -> list[asyncpg.Record]:
    """Execute a statement in the product's own database."""
    connection = await asyncpg.connect(variables["DATABASE_URL"].replace("+asyncpg", ""))
    try:
        return list(await connection.fetch(statement))
    finally:
        await connection.close()


def write_until_refused(client: Client) -> list[str]:
    """Open tickets until one is refused, and return those that were not."""
    written: list[str] = []
    while client.post("/tickets", json={"title": str(len(written))}).status_code == 201:
        written.append(str(len(written)))
    return written


def copy(source: Path, target: Path) -> None:
    """Copy the product, without what running it has left."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", ".pytest_cache"))


def assert_same(found: Path, expected: Path) -> None:
    """Two directories have the same files, but for the time at which Alembic has written a revision.

    With ``TENANCY_TEST_WRITE=1`` the second is written, after the page has changed.
    """
    if os.environ.get("TENANCY_TEST_WRITE"):
        shutil.rmtree(expected, ignore_errors=True)
        copy(found, expected)
    assert texts(found) == texts(expected)


def texts(directory: Path) -> dict[str, str]:
    """The text of each file."""
    return {
        str(path.relative_to(directory)): re.sub(r"(?m)^Create Date: .*$", "", path.read_text("utf-8"))
        for path in sorted(directory.rglob("*"))
        if path.is_file() and not {"__pycache__", ".pytest_cache"} & set(path.parts)
    }


def test_the_page_counts_the_lines_of_the_boundary() -> None:
    """The figure is that of the two calls in ``after``."""
    lines = 0
    for name, call in (("security.py", "authenticator = "), ("app.py", "app.add_middleware")):
        tree = ast.parse((EXAMPLE / "after" / name).read_text("utf-8"))
        [found] = [node for node in tree.body if ast.unparse(node).startswith(call)]
        assert found.end_lineno is not None
        lines += found.end_lineno - found.lineno + 1
    assert f"`add_middleware(...)`: {lines} lines." in PAGE.read_text("utf-8")
