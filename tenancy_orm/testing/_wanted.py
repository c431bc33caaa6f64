"""What a test asks for: which fixtures, in which mode, and in which event loop it runs."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import pytest

from ._run import MODES
from .plugin import run_key

NAMES = frozenset({"tenancy", "tenant", "tenant_factory", "tenant_session", "tenant_client"})
_FIXTURES = f"{__package__}.fixtures"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a test asks for.

    Args:
        names: Of the fixtures.
        mode: "rollback" or "clone".
        asynchronous: Whether it is a coroutine.
        loop_ends: Whether its event loop ends with it.
    """

    names: frozenset[str]
    mode: str
    asynchronous: bool
    loop_ends: bool


def wanted(request: pytest.FixtureRequest, *, asynchronous: bool, loop_ends: bool) -> Wanted:
    """What the test of ``request`` asks for."""
    item = request.node
    definitions = item._fixtureinfo.name2fixturedefs
    # not a fixture of the same name that the project has itself
    ours = {
        name
        for name in NAMES & {*item.fixturenames}
        if any(definition.func.__module__ == _FIXTURES for definition in definitions.get(name, ()))
    }
    mode = mode_of(item)
    if "tenant_session" in ours and not asynchronous:
        mode = _for_synchronous_session(item)
    return Wanted(frozenset(ours), mode, asynchronous, loop_ends)


def _for_synchronous_session(item: pytest.Item) -> str:
    """Clone: the session's connection is psycopg's, and the application's is another one."""
    marker = item.get_closest_marker("tenancy")
    if marker is not None and marker.kwargs.get("mode") == "rollback":
        raise pytest.UsageError(
            f"{item.nodeid}: tenant_session of a plain function has a connection of its own, and cannot share that "
            'of mode rollback; use @pytest.mark.tenancy(mode="clone"), or make the test a coroutine function'
        )
    return "clone"


def mode_of(item: pytest.Item) -> str:
    """The mode that the marker of a test says, or else the configuration.

    Raises:
        pytest.UsageError: there is no such mode.
    """
    marker = item.get_closest_marker("tenancy")
    configured = item.config.stash[run_key].options.mode
    mode = configured if marker is None else marker.kwargs.get("mode", configured)
    if mode not in MODES or (marker is not None and (marker.args or marker.kwargs.keys() - {"mode"})):
        raise pytest.UsageError(f'{item.nodeid}: write @pytest.mark.tenancy(mode="rollback") or mode="clone"')
    return str(mode)


def loop_scope_of(item: pytest.Item) -> str | None:
    """The scope of the event loop that pytest-asyncio runs a test in; None where it does not run it.

    Raises:
        pytest.UsageError: it is a coroutine function that nothing runs.
    """
    if item.config.pluginmanager.has_plugin("asyncio"):
        import pytest_asyncio

        if pytest_asyncio.is_async_test(item):
            marker = item.get_closest_marker("asyncio")
            given = (marker.kwargs.get("loop_scope") or marker.kwargs.get("scope")) if marker is not None else None
            return str(given or item.config.getini("asyncio_default_test_loop_scope") or "function")
    if inspect.iscoroutinefunction(getattr(item, "function", None)):
        raise pytest.UsageError(
            f"{item.nodeid} is a coroutine function that no plugin runs: install pytest-asyncio and mark it with "
            "@pytest.mark.asyncio, or with @pytest.mark.anyio"
        )
    return None


__all__ = ["Wanted", "loop_scope_of", "mode_of", "wanted"]
