"""The same preparation for each scope of an event loop of pytest-asyncio. Imported only where that plugin is loaded."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any, Literal

import pytest
import pytest_asyncio

from ._wanted import wanted
from .plugin import run_key

if TYPE_CHECKING:
    from ._provided import Provided

Scope = Literal["class", "module", "package", "session"]


@pytest_asyncio.fixture(loop_scope="function")
async def _tenancy_in_function_loop(request: pytest.FixtureRequest) -> AsyncIterator[Provided]:
    from ._provided import provide

    async with provide(request.config.stash[run_key], wanted(request, asynchronous=True, loop_ends=True)) as provided:
        yield provided


def _for_loops_of(scope: Scope) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """A fixture that closes what is open in such a loop at its end, and the preparation in it."""
    closing = f"_tenancy_of_{scope}_loop"

    @pytest_asyncio.fixture(scope=scope, loop_scope=scope, name=closing)
    async def close_with_loop(request: pytest.FixtureRequest) -> AsyncIterator[None]:
        yield
        await request.config.stash[run_key].leave()

    @pytest_asyncio.fixture(loop_scope=scope, name=f"_tenancy_in_{scope}_loop")
    async def prepare(request: pytest.FixtureRequest) -> AsyncIterator[Provided]:
        from ._provided import provide

        run = request.config.stash[run_key]
        async with provide(run, wanted(request, asynchronous=True, loop_ends=False)) as provided:
            yield provided

    return close_with_loop, prepare


_closing_in_class_loop, _in_class_loop = _for_loops_of("class")
_closing_in_module_loop, _in_module_loop = _for_loops_of("module")
_closing_in_package_loop, _in_package_loop = _for_loops_of("package")
_closing_in_session_loop, _in_session_loop = _for_loops_of("session")
