"""The pytest plugin: ``tenancy_app`` in the pytest configuration is all that a test suite needs.

It is loaded by every run of pytest where this package is installed. So this module imports nothing but pytest, and does
nothing unless ``tenancy_app`` is set.
"""

from __future__ import annotations

import gc
import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING

import pytest

from . import matrix_plugin

if TYPE_CHECKING:
    from ._run import TestRun

run_key: pytest.StashKey[TestRun] = pytest.StashKey()
_environment_key: pytest.StashKey[dict[str, str | None]] = pytest.StashKey()

_SETTINGS = {
    "tenancy_app": "module:attribute of the application under test: an ASGI application, a function that returns one, "
    "or a Tenancy",
    "tenancy_object": "module:attribute of its Tenancy, where that cannot be found from the application",
    "tenancy_test_dsn": "an administrator's URL of the PostgreSQL server to test on; TENANCY_TEST_DSN wins. Without "
    "one, the embedded server is started",
    "tenancy_mode": "how tests are kept apart where no marker says it: rollback (the default) or clone",
}
_MARKER = (
    'tenancy(mode="rollback" | "clone"): how the tenants of this test are kept apart from those of others: by a '
    "transaction that is rolled back, or by databases of its own"
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the settings."""
    for name, text in _SETTINGS.items():
        parser.addini(name, text, default="")
    matrix_plugin.add_options(parser)


def is_configured(config: pytest.Config) -> bool:
    """Whether this run is of a project that uses the plugin."""
    return bool(config.getini("tenancy_app") or config.getini("tenancy_object"))


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Hide where production is before any of the project's own modules is imported."""
    if is_configured(early_config):
        _hide_production(early_config)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Offer the fixtures and the marker where they are asked for."""
    if not is_configured(config):
        if config.getoption(matrix_plugin.OPTION):
            raise pytest.UsageError(f"{matrix_plugin.OPTION} needs tenancy_app in the pytest configuration")
        return
    _hide_production(config)
    matrix_plugin.register(config, config.stash[run_key])
    config.addinivalue_line("markers", _MARKER)
    if not config.option.help:
        config.pluginmanager.register(import_module(f"{__package__}.fixtures"), "tenancy-fixtures")
        if config.pluginmanager.has_plugin("asyncio"):
            config.pluginmanager.register(import_module(f"{__package__}._asyncio_fixtures"), "tenancy-asyncio-fixtures")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove what the run has made, and restore the environment."""
    try:
        if (run := config.stash.get(run_key, None)) is not None:
            run.close()
    except Exception as exc:  # noqa: BLE001 - the run has ended, and its result is not this
        from ..postgres.errors import describe

        print(  # noqa: T201
            f"\ntenancy: what the tests have made could not be removed, and the next run removes it: {describe(exc)}",
            file=sys.stderr,
        )
    finally:
        for name, value in config.stash.get(_environment_key, {}).items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _hide_production(config: pytest.Config) -> None:
    """Have nothing of this process reach the databases that the application's own settings name."""
    if run_key in config.stash:
        return
    # what is imported stays to the end, and looking through it takes a fifth of the time
    collects = gc.isenabled()
    gc.disable()
    try:
        from ..errors import ConfigurationError
        from ._run import TestRun
        from ._variables import hide_production
    finally:
        if collects:
            gc.freeze()
            gc.enable()
    config.stash[_environment_key] = hide_production()
    try:
        config.stash[run_key] = TestRun.of(config)
    except ConfigurationError as exc:
        raise pytest.UsageError(str(exc)) from exc
