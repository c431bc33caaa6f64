"""One test run in one process: its server, its installation, the application under test, and what they leave."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ..assembly import Assembly
from ..config import TenancyConfig
from ..errors import ConfigurationError, TenancyError
from ..events import EventBus
from ..lifetime import build, pop_builder, push_builder
from ..postgres import login
from ..postgres.dsn import Dsn
from ..quotas.rates import Rates
from ..seeds import Seed
from ..tenant import Status
from ..tenants.tiers import differing
from . import _application as application
from ._application import Application
from ._background import BackgroundLoop
from ._cloning import Cloner
from ._installation import Installation
from ._leftovers import Watch, unbind
from ._lending import Lending
from ._openings import Openings
from ._reopening import ReopenedAssembly
from ._server import DSN_SETTINGS, TestServer

if TYPE_CHECKING:
    import pytest

MODES = ("rollback", "clone")


@dataclass(frozen=True, slots=True)
class Options:
    """What the pytest configuration says.

    Args:
        app: ``tenancy_app``.
        tenancy: ``tenancy_object``.
        dsn: ``TENANCY_TEST_DSN``, or ``tenancy_test_dsn``.
        mode: ``tenancy_mode``.
        directory: Where the embedded server is.
        project: The directory of the checkout, a digest of which is in the names on the server.
    """

    app: str
    tenancy: str
    dsn: str = field(repr=False)
    mode: str
    directory: Path
    project: str

    def check(self) -> None:
        """Check what can be known before anything is imported or started.

        Raises:
            ConfigurationError: a setting is malformed; the message names it.
        """
        for name, path in (("tenancy_app", self.app), ("tenancy_object", self.tenancy)):
            module, _, attribute = path.partition(":")
            if path and not (module and attribute):
                raise ConfigurationError(f'{name} = {path!r} is not of the form "module:attribute", as "app:app"')
        if self.mode not in MODES:
            raise ConfigurationError(f'tenancy_mode = {self.mode!r} is not a mode: write "rollback" or "clone"')
        try:
            TestServer(self.dsn, self.directory)
        except ConfigurationError as exc:
            raise ConfigurationError(f"{DSN_SETTINGS} {exc} (or write embedded:<directory>)") from exc


class TestRun:
    """One process of a test run. Everything is made when it is first needed."""

    __test__ = False

    def __init__(self, options: Options) -> None:
        self.options = options
        self.background = BackgroundLoop()
        self.server = TestServer(options.dsn, options.directory)
        self.lending = Lending(self.background)
        self.watch: Watch | None = None
        self._claiming = threading.Lock()  # protects the next two
        self._installation: Installation | None = None
        self._unclaimed: TenancyError | None = None
        self._not_found: ConfigurationError | None = None
        self._prepared = False
        self._known: dict[EventBus, Assembly] = {}
        push_builder(self._build)
        login.add_check(self._check)

    @classmethod
    def of(cls, config: pytest.Config) -> TestRun:
        """The run that the pytest configuration describes.

        Raises:
            ConfigurationError: a setting is malformed; the message names it.
        """
        options = Options(
            app=config.getini("tenancy_app"),
            tenancy=config.getini("tenancy_object"),
            dsn=os.environ.get("TENANCY_TEST_DSN") or config.getini("tenancy_test_dsn"),
            mode=config.getini("tenancy_mode") or "rollback",
            directory=_cache_directory(config) / "tenancy",
            project=str(config.rootpath),
        )
        options.check()
        return cls(options)

    @cached_property
    def application(self) -> Application:
        """The application under test, imported at the first use.

        Raises:
            ConfigurationError: it is not found; it is not imported again with each test.
        """
        if self._not_found is None:
            try:
                return application.find(self.options.app, self.options.tenancy)
            except ConfigurationError as exc:
                self._not_found = exc
        raise self._not_found.with_traceback(None)

    @cached_property
    def openings(self) -> Openings:
        """Its ``Tenancy`` in the event loops of the tests."""
        return Openings(self.application.tenancy)

    async def leave(self) -> None:
        """Close what is open in the running loop, which ends; nothing is where the application was not found."""
        if "openings" in vars(self):
            await self.openings.leave()

    def installation(self) -> Installation:
        """The installation of this process; the server is started and the control database created if need be.

        Raises:
            TenancyError: there is no server; or there was none before, which is not tried again with each test.
        """
        with self._claiming:
            if self._unclaimed is not None:
                raise self._unclaimed.with_traceback(None)
            if self._installation is None:
                try:
                    self.server.start()
                    self._installation = self.background.run(Installation.claim(self.server.url, self.options.project))
                except TenancyError as exc:
                    self._unclaimed = exc
                    raise
                self.lending.cloner = Cloner(self.server.url)
            return self._installation

    async def _build(
        self, config: TenancyConfig, events: EventBus, rates: Rates, initialise: bool | None, seeds: Sequence[Seed]
    ) -> Assembly:
        """Open the parts of a ``Tenancy``, this application's or any other, on the installation of the tests."""
        # a thread only where it takes a while: each event loop would start one, and wait for it at its end
        installation = self._installation
        if installation is None:
            installation = await asyncio.to_thread(self.installation)
        if self.watch is not None:
            self.watch.follow(events)
        if not initialise and (known := self._known.get(events)) is not None and self.openings.is_brief(events):
            return await ReopenedAssembly.of(known, events, rates)
        redirected = installation.redirect(config)
        if self._prepared:
            return await build(redirected, events, rates, initialise, seeds)
        try:
            assembly = await build(redirected, events, rates, not installation.is_initialised, seeds)
        except TenancyError:
            if installation.is_new:
                raise
            # of another version of the package, or with other keys: nothing in it is worth keeping
            await self.background.call(installation.recreate())
            assembly = await build(redirected, events, rates, True, seeds)
        if not installation.is_new:
            await _remove_leftovers(assembly)
        if installation.is_initialised:
            await _apply_tiers(assembly)
        else:
            await self.background.call(installation.note_initialised())
        self._prepared = True
        self._known[events] = assembly
        return assembly

    def _check(self, dsn: Dsn, user: str | None, database: str | None) -> None:
        """Look at a connection of this process before it is opened."""
        self.server.check(dsn)
        self.lending.check(user, database)

    def close(self) -> None:
        """Remove what was made, and stop what was started.

        Raises:
            Exception: something could not be removed, as where the server has stopped; the next run removes it.
        """
        with ExitStack() as stack:
            stack.callback(login.remove_check, self._check)
            stack.callback(pop_builder, self._build)
            stack.callback(self.server.stop)
            stack.callback(self.background.stop)
            if self._installation is not None:
                unbind()  # what a test has bound that no fixture looks after
                self.background.run(self._remove_tenants(self._installation))

    async def _remove_tenants(self, installation: Installation) -> None:
        try:
            if self._prepared:
                await self.openings.enter()
                try:
                    await self.lending.remove_all(self.application.tenancy)
                finally:
                    await self.openings.leave()
        finally:
            if self.lending.cloner is not None:
                await self.lending.cloner.close()
            await self.lending.states.close()
            await installation.release()


async def _remove_leftovers(assembly: Assembly) -> None:
    """Remove the tenants of a run that was killed."""
    left = [tenant async for tenant in assembly.tenants.iterate(status=[one for one in Status if one != "purged"])]
    if not left:
        return
    for tenant in left:
        if tenant.status is not Status.PROVISIONING:
            await assembly.tenants.delete(tenant.id)
            await assembly.tenants.purge(tenant.id)
    await assembly.provisioner.reconcile(drop_unknown=True, thorough=False)


async def _apply_tiers(assembly: Assembly) -> None:
    """Put the configured tiers in force: they have changed since the last run, or a test of it has applied others."""
    tiers, configured = assembly.tiers, assembly.config.tiers
    in_force, weights = await tiers.limits_and_weights()
    if [*in_force] != [*configured] or differing(in_force, configured, weights):
        await tiers.apply(configured)


def _cache_directory(config: pytest.Config) -> Path:
    """Pytest's own cache directory, also where its plugin is switched off."""
    try:
        name = config.getini("cache_dir")
    except (KeyError, ValueError):
        name = ".pytest_cache"
    return config.rootpath / Path(os.path.expandvars(name)) / "d"


__all__ = ["MODES", "Options", "TestRun"]
