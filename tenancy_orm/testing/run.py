"""One test run in one process: its server, its installation, the application under test, and what they leave."""

from __future__ import annotations

import asyncio
import hashlib
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ..assembly import Assembly
from ..config import TenancyConfig
from ..errors import TenancyError
from ..events import EventBus
from ..lifetime import build, pop_builder, push_builder
from ..postgres import login
from ..quotas.rates import Rates
from ..seeds import Seed
from . import application
from .application import Application
from .background import BackgroundLoop
from .installation import Installation
from .openings import Openings
from .server import TestServer

if TYPE_CHECKING:
    import pytest


@dataclass(frozen=True, slots=True)
class Options:
    """What the pytest configuration says.

    Args:
        app: ``tenancy_app``.
        tenancy: ``tenancy_object``.
        dsn: ``TENANCY_TEST_DSN``, or ``tenancy_test_dsn``.
        mode: ``tenancy_mode``.
        directory: Where the embedded server is.
        project: Eight hexadecimal digits of this checkout, which the names on the server begin with.
    """

    app: str
    tenancy: str
    dsn: str = field(repr=False)
    mode: str
    directory: Path
    project: str


class TestRun:
    """One process of a test run. Everything is made when it is first needed."""

    __test__ = False

    def __init__(self, options: Options) -> None:
        self.options = options
        self.background = BackgroundLoop()
        self.server = TestServer(options.dsn, options.directory)
        self._claiming = threading.Lock()  # protects the next one
        self._installation: Installation | None = None
        self._prepared = False
        push_builder(self._build)
        login.add_check(self.server.check)

    @classmethod
    def of(cls, config: pytest.Config) -> TestRun:
        """The run that the pytest configuration describes."""
        root = config.rootpath
        return cls(
            Options(
                app=config.getini("tenancy_app"),
                tenancy=config.getini("tenancy_object"),
                dsn=os.environ.get("TENANCY_TEST_DSN") or config.getini("tenancy_test_dsn"),
                mode=config.getini("tenancy_mode") or "rollback",
                directory=_cache_directory(config) / "tenancy",
                project=hashlib.sha256(str(root).encode()).hexdigest()[:8],
            )
        )

    @cached_property
    def application(self) -> Application:
        """The application under test, imported at the first use."""
        return application.find(self.options.app, self.options.tenancy)

    @cached_property
    def openings(self) -> Openings:
        """Its ``Tenancy`` in the event loops of the tests."""
        return Openings(self.application.tenancy)

    def installation(self) -> Installation:
        """The installation of this process; the server is started and the control database created if need be.

        Raises:
            TenancyError: there is no server.
        """
        with self._claiming:
            if self._installation is None:
                self.server.start()
                self._installation = self.background.run(Installation.claim(self.server.url, self.options.project))
            return self._installation

    async def _build(
        self, config: TenancyConfig, events: EventBus, rates: Rates, initialise: bool | None, seeds: Sequence[Seed]
    ) -> Assembly:
        """Open the parts of a ``Tenancy``, this application's or any other, on the installation of the tests."""
        installation = await asyncio.to_thread(self.installation)
        redirected = installation.redirect(config)
        if self._prepared:
            return await build(redirected, events, rates, initialise, seeds)
        try:
            assembly = await build(redirected, events, rates, True, seeds)
        except TenancyError:
            if installation.is_new:
                raise
            # of another version of the package, or with other keys: nothing in it is worth keeping
            await self.background.call(installation.recreate())
            assembly = await build(redirected, events, rates, True, seeds)
        self._prepared = True
        return assembly

    def close(self) -> None:
        """Remove what was made, and stop what was started."""
        pop_builder(self._build)
        login.remove_check(self.server.check)
        try:
            if self._installation is not None:
                self.background.run(self._installation.release())
        finally:
            self.background.stop()
            self.server.stop()


def _cache_directory(config: pytest.Config) -> Path:
    """Pytest's own cache directory, also where its plugin is switched off."""
    try:
        name = config.getini("cache_dir")
    except (KeyError, ValueError):
        name = ".pytest_cache"
    return config.rootpath / Path(os.path.expandvars(name)) / "d"


__all__ = ["Options", "TestRun"]
