"""Test suites as a user of the plugin has them: a directory with an application and tests, run by pytest itself."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import dedent

from tests.support.modules import write_module
from tests.support.postgres import Postgres
from tests.support.shell import python_path

SECONDS = 120.0
PLUGIN = "tenancy_orm.testing.plugin"

APPLICATION = """
from sqlalchemy import select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.routing import Route

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.asgi import TenancyMiddleware


class Base(DeclarativeBase): ...


class Note(Base):
    __tablename__ = "notes"
    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


tenancy = Tenancy(TenancyConfig(control_url="postgresql://app:secret@db.invalid/control", metadata=Base.metadata))


async def notes(request):
    async with tenancy.transaction() as session:
        if request.method == "POST":
            session.add(Note(text=(await request.json())["text"]))
            await session.flush()
        return JSONResponse([note.text for note in await session.scalars(select(Note).order_by(Note.id))])


app = Starlette(
    routes=[Route("/notes", notes, methods=["GET", "POST"])],
    middleware=[Middleware(TenancyMiddleware, tenancy=tenancy)],
    lifespan=tenancy.lifespan,
)
"""


@dataclass(frozen=True)
class Outcome:
    """What a run of pytest said."""

    status: int
    text: str

    @property
    def counts(self) -> dict[str, int]:
        """How many tests passed, failed and so on."""
        summary = re.findall(r"(\d+) (passed|failed|errors?|skipped|warnings?)", self.text.strip().rsplit("\n", 1)[-1])
        return {name.rstrip("s") if name.startswith("error") else name: int(number) for number, name in summary}


@dataclass
class Suite:
    """A directory with an application and its tests.

    Args:
        directory: Where it is.
        postgres: The server that its tests run on.
        settings: Lines of ``[tool.pytest.ini_options]``.
    """

    directory: Path
    postgres: Postgres
    settings: dict[str, str] = field(default_factory=lambda: {"tenancy_app": '"shop:app"', "asyncio_mode": '"auto"'})

    def write(self, **files: str) -> None:
        """Write ``name=text`` as name.py, and the configuration."""
        for name, text in {"shop": APPLICATION, **files}.items():
            write_module(self.directory / f"{name}.py", dedent(text))
        self.write_configuration()

    def write_configuration(self) -> None:
        """Write the settings alone."""
        settings = {
            "pythonpath": '["."]',
            "asyncio_default_fixture_loop_scope": '"function"',
            "filterwarnings": '["error"]',
            **self.settings,
        }
        lines = "\n".join(f"{name} = {value}" for name, value in settings.items())
        (self.directory / "pyproject.toml").write_text(f"[tool.pytest.ini_options]\n{lines}\n", "utf-8")

    async def run(self, *arguments: str, **variables: str) -> Outcome:
        """Run pytest in it, in a process of its own."""
        hidden = ("TENANCY_", "PYTEST_", "COV_")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
        environment |= {"TENANCY_TEST_DSN": self.postgres.admin_url, "PYTHONPATH": python_path(), **variables}
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "pytest", "-q", "-rA", "--tb=short", "-p", "no:cacheprovider"),
            *("-p", "no:faker", "-p", "no:pytest_postgresql", *([] if is_installed() else ["-p", PLUGIN]), *arguments),
            cwd=self.directory,
            env={name: value for name, value in environment.items() if value},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        try:
            async with asyncio.timeout(SECONDS):
                output, _ = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        return Outcome(process.returncode or 0, output.decode())

    def prefix(self, place: int = 0) -> str:
        """What the names of its databases and roles begin with."""
        database = self.postgres.database_of(self.postgres.admin_url)
        return f"t{hashlib.sha256(f'{self.directory}/{database}'.encode()).hexdigest()[:8]}x{place}"

    async def remove(self) -> None:
        """Drop what its runs keep for the next one."""
        for place in range(4):
            await self.postgres.drop_all(self.prefix(place))


def is_installed() -> bool:
    """Whether pytest finds the plugin by its entry point: an older editable install lacks it."""
    from importlib.metadata import entry_points

    return any(entry.value == PLUGIN for entry in entry_points(group="pytest11"))
