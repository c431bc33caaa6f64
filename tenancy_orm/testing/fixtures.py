"""The fixtures, for tests of every kind. What they return is made in the event loop of the test that asks for it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import pytest

from ._wanted import loop_scope_of, wanted
from .plugin import run_key

if TYPE_CHECKING:
    from ._provided import Provided


@pytest.fixture
def tenancy(request: pytest.FixtureRequest) -> Any:
    """The application's ``Tenancy``, open on the tests' own control database."""
    return _provided(request).tenancy


@pytest.fixture
def tenant(request: pytest.FixtureRequest) -> Any:
    """A tenant with an empty database: ``tenant.slug``, ``tenant.id``, and its key in ``tenant.api_key``."""
    return _provided(request).tenant


@pytest.fixture
def tenant_factory(request: pytest.FixtureRequest) -> Any:
    """A function that creates further tenants; awaited in a coroutine, called as it is in a plain function."""
    return _provided(request).tenant_factory


@pytest.fixture
def tenant_session(request: pytest.FixtureRequest) -> Any:
    """A session on the database of ``tenant``."""
    return _provided(request).tenant_session


@pytest.fixture
def tenant_client(request: pytest.FixtureRequest) -> Any:
    """An HTTP client of the application that sends the key of ``tenant``."""
    return _provided(request).tenant_client


@pytest.fixture
async def _tenancy_in_anyio(request: pytest.FixtureRequest) -> AsyncIterator[Provided]:
    from ._provided import provide

    async with provide(request.config.stash[run_key], wanted(request, asynchronous=True, loop_ends=True)) as provided:
        yield provided


@pytest.fixture
def _tenancy_in_background(request: pytest.FixtureRequest) -> Iterator[Provided]:
    from ._leftovers import unbind
    from ._provided import provide, synchronous_session
    from ._savepoints import running_test

    run, asked = request.config.stash[run_key], wanted(request, asynchronous=False, loop_ends=False)
    unbind()  # for the test itself; what prepares it runs in a copy of this context
    context = provide(run, asked)
    provided = run.background.run(context.__aenter__())
    running_test.set(provided.test)  # for the tasks of the requests, which begin here
    try:
        with synchronous_session(provided) if "tenant_session" in asked.names else nullcontext() as session:
            provided.tenant_session = session
            yield provided
    finally:
        running_test.set(None)
        try:
            run.background.run(context.__aexit__(None, None, None))  # it sees what is bound here, in a copy
        finally:
            unbind()


def _provided(request: pytest.FixtureRequest) -> Provided:
    """What was prepared for the test, in its event loop; what hinders it fails the test in one line."""
    from ..errors import TenancyError

    try:
        provided: Provided = request.getfixturevalue(_preparing_fixture(request))
    except (TenancyError, pytest.UsageError) as exc:
        if request.config.getoption("fulltrace", False):
            raise
        # its frames are those of the package, and pytest shows them with each test
        reason = "\n".join([str(exc), *getattr(exc, "__notes__", ())])
        raise pytest.fail.Exception(f"{reason}\n(pytest --full-trace shows where)", pytrace=False) from None
    return provided


def _preparing_fixture(request: pytest.FixtureRequest) -> str:
    if "anyio_backend" in request.fixturenames:
        return "_tenancy_in_anyio"
    scope = loop_scope_of(request.node)
    if scope is None:
        return "_tenancy_in_background"
    if scope != "function":  # first, so that it ends after what is prepared for this test
        request.getfixturevalue(f"_tenancy_of_{scope}_loop")
    return f"_tenancy_in_{scope}_loop"
