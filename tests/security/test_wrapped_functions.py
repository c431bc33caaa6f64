"""``tenancy.wrap``: a tenant goes with a function into threads, executors and callbacks, and does not stay there."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
import inspect
import pickle
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextvars import Context
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

import pytest
import pytest_asyncio

from tenancy_orm import Tenancy, TenancyConfig, Tenant, current_tenant, current_tenant_or_none
from tenancy_orm.context import bind, set_current
from tenancy_orm.errors import (
    AdmissionEndedError,
    ConfigurationError,
    CrossTenantError,
    NoTenantError,
    NotOpenError,
    TenantNotFoundError,
    TenantSuspendedError,
    WrongEventLoopError,
)
from tests.support.models import Base, Note
from tests.support.postgres import Postgres
from tests.support.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="module")

COUNT = "SELECT count(*) FROM notes"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def opened(postgres: Postgres) -> AsyncIterator[Tenancy]:
    """Two tenants: acme with one note, globex with none; and one that is suspended."""
    name, prefix = postgres.new_name(), "wrapped"
    tenancy = Tenancy(
        TenancyConfig(
            control_url=await postgres.create_database(name),
            servers={"default": postgres.admin_url},
            metadata=Base.metadata,
            encryption_keys={"1": "a2V5" * 10 + "a2U="},
            name_prefix=f"{prefix}{postgres.worker}",
        )
    )
    await tenancy.open(initialise=True)
    try:
        for slug in ("acme", "globex", "initech"):
            await tenancy.tenants.create(slug)
        await tenancy.tenants.suspend("initech", reason="unpaid")
        async with tenancy.transaction("acme") as session:
            session.add(Note(body="of acme"))
        yield tenancy
    finally:
        await tenancy.close()
        await postgres.drop_all(f"{prefix}{postgres.worker}")
        await postgres.drop_database(name)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """One thread, which all calls share."""
    with ThreadPoolExecutor(1) as executor:
        yield executor


def slug() -> str | None:
    """The tenant that is bound here."""
    found = current_tenant_or_none()
    return None if found is None else found.slug


def add(first: int, second: int = 0) -> tuple[str, int]:
    """Add."""
    return current_tenant().slug, first + second


def returning(tenancy: Tenancy) -> Any:
    """Return a coroutine, as a plain function may."""
    return count(tenancy)


async def count(tenancy: Tenancy) -> int:
    """Count the bound tenant's notes."""
    return int(await tenancy.fetch_value(COUNT))


async def in_pool(pool: Executor, func: Callable[..., Any], *args: Any) -> Any:
    """What a function returns in a pool's thread."""
    return await asyncio.get_running_loop().run_in_executor(pool, func, *args)


# --- without it -----------------------------------------------------------------------------------------------------


async def test_a_thread_of_a_pool_has_no_tenant_and_keeps_what_is_bound_in_it(
    opened: Tenancy, pool: ThreadPoolExecutor
) -> None:
    """The two things that go wrong by hand: a binding that does not follow, and one that stays for the next job."""
    async with opened.scope("acme") as acme:
        assert await in_pool(pool, slug) is None
        await in_pool(pool, set_current, acme)
    async with opened.scope("globex"):
        assert await in_pool(pool, slug) == "acme"


# --- with it --------------------------------------------------------------------------------------------------------


async def test_the_bound_tenant_goes_along_everywhere(opened: Tenancy, pool: ThreadPoolExecutor) -> None:
    """Submit, map, run_in_executor, a thread, a thread's initializer, a callback; and stays nowhere."""
    seen: list[str | None] = []
    async with opened.scope("acme"):
        wrapped, look = opened.wrap(add), opened.wrap(lambda: seen.append(slug()))
    assert slug() is None
    loop = asyncio.get_running_loop()
    assert await asyncio.wrap_future(pool.submit(wrapped, 1, second=2)) == ("acme", 3)
    assert await asyncio.to_thread(lambda: list(pool.map(wrapped, [1, 2]))) == [("acme", 1), ("acme", 2)]
    assert await loop.run_in_executor(pool, wrapped, 4) == ("acme", 4)
    assert await in_pool(pool, slug) is None
    thread = threading.Thread(target=look)
    thread.start()
    await asyncio.to_thread(thread.join)
    with ThreadPoolExecutor(1, initializer=look) as initialised:
        assert await in_pool(initialised, slug) is None
    loop.call_soon(look)
    await until(lambda: len(seen) == 3)
    assert seen == ["acme"] * 3
    assert slug() is None


async def test_it_is_the_function_otherwise(opened: Tenancy) -> None:
    """Its attributes, signature and errors; several calls at once; wrapped twice, copied, a partial, an object."""

    class Adder:
        def __call__(self, number: int) -> tuple[str, int]:
            return add(number)

    async with opened.scope("acme"):
        wrapped = opened.wrap(add)
        twice = opened.wrap(wrapped)
        assert opened.wrap(functools.partial(add, 1))(2) == opened.wrap(Adder())(3) == ("acme", 3)
        failing = opened.wrap(lambda: 1 // 0)
    assert (wrapped.__name__, wrapped.__doc__, wrapped.__module__) == (add.__name__, "Add.", __name__)
    assert inspect.signature(wrapped) == inspect.signature(add)
    assert inspect.unwrap(twice) is add
    assert twice(1) == copy.deepcopy(wrapped)(1) == copy.copy(wrapped)(1) == ("acme", 1)
    assert "add" in repr(wrapped)
    with pytest.raises(ZeroDivisionError):
        failing()
    assert slug() is None
    barrier = threading.Barrier(4, timeout=30)
    async with opened.scope("globex"):
        meet = opened.wrap(lambda: (barrier.wait(), slug()))
    with ThreadPoolExecutor(4) as several:
        found = await asyncio.gather(*(in_pool(several, meet) for _ in range(4)))
    assert {name for _, name in found} == {"globex"}


async def test_coroutine_functions_stay_coroutine_functions(opened: Tenancy) -> None:
    """Also of an object, of a partial, and where a plain function returns the coroutine."""

    class Counter:
        async def __call__(self) -> int:
            return await count(opened)

    async with opened.scope("acme"):
        all_wrapped: list[Callable[[], Any]] = [
            opened.wrap(functools.partial(count, opened)),
            opened.wrap(Counter()),
        ]
        plain = opened.wrap(functools.partial(returning, opened))
    for wrapped in all_wrapped:
        assert inspect.iscoroutinefunction(wrapped)
    for each in (*all_wrapped, plain):
        task = asyncio.get_running_loop().create_task(each(), context=Context())
        assert await task == 1
    assert slug() is None


async def test_a_named_tenant_is_looked_up_with_every_call(opened: Tenancy, pool: ThreadPoolExecutor) -> None:
    """From a thread it is waited for. What it is named by may be any of its names; a suspended or unknown one fails."""
    acme = await opened.tenants.get("acme")
    for ref in ("acme", acme.id, str(acme.id), acme):
        assert await in_pool(pool, opened.wrap(add, ref), 1) == ("acme", 1)
        assert await opened.wrap(count, ref)(opened) == 1
    for missing, error in (("nobody", TenantNotFoundError), ("initech", TenantSuspendedError)):
        with pytest.raises(error):
            await in_pool(pool, opened.wrap(add, missing), 1)
        with pytest.raises(error):
            await opened.wrap(count, missing)(opened)
        with pytest.raises(error):
            await in_pool(pool, opened.wrap(functools.partial(returning, opened), missing))
    assert await in_pool(pool, slug) is None


async def test_a_plain_function_cannot_wait_for_the_loop_it_stands_in(opened: Tenancy) -> None:
    """It would wait for itself; nor for a loop that does not run, or a ``Tenancy`` that is not open."""
    with pytest.raises(ConfigurationError, match="own thread"):
        opened.wrap(add, "acme")(1)
    closed = Tenancy(opened.config)
    wrapped = closed.wrap(add, "acme")
    with pytest.raises(NotOpenError):
        await asyncio.to_thread(wrapped, 1)

    def between_runs() -> None:
        loop = asyncio.new_event_loop()
        other = Tenancy(opened.config)
        loop.run_until_complete(other.open())
        try:
            with pytest.raises(WrongEventLoopError):
                other.wrap(add, "acme")(1)
        finally:
            loop.run_until_complete(other.close())
            loop.close()

    await asyncio.to_thread(between_runs)


# --- what is refused ------------------------------------------------------------------------------------------------


async def test_without_a_tenant_there_is_nothing_to_take_along(opened: Tenancy) -> None:
    """It fails where it is wrapped, and not in a thread some time later."""
    with pytest.raises(NoTenantError):
        opened.wrap(add)


async def test_another_tenant_is_never_reached(opened: Tenancy, pool: ThreadPoolExecutor) -> None:
    """Not by name while one is bound; not where another one is bound at the call, in a thread or a task."""
    async with opened.scope("acme"):
        captured, captured_async = opened.wrap(add), opened.wrap(count)
        with pytest.raises(CrossTenantError):
            opened.wrap(add, "globex")
    named, named_async = opened.wrap(add, "acme"), opened.wrap(count, "acme")
    async with opened.scope("globex") as globex:
        for wrapped in (captured, named):
            with pytest.raises(CrossTenantError):
                await asyncio.to_thread(wrapped, 1)
        for wrapped_async in (captured_async, named_async):
            with pytest.raises(CrossTenantError):
                await wrapped_async(opened)
        assert current_tenant() is globex


class Ended:
    """An admission that can be ended."""

    def __init__(self) -> None:
        self.ended = False

    def check(self) -> None:
        """Refuse once it has ended."""
        if self.ended:
            raise AdmissionEndedError("revoked", credential_id="key")


async def test_what_let_the_request_in_is_checked_again(opened: Tenancy, pool: ThreadPoolExecutor) -> None:
    """With each call and each statement; naming the bound tenant does not shake it off."""
    admission = Ended()
    acme = await opened.tenants.get("acme")
    with bind(replace(acme, admission=admission)):
        wrapped = [opened.wrap(add), opened.wrap(add, "acme")]
        wrapped_async = [opened.wrap(count), opened.wrap(count, acme)]
        revoking = opened.wrap(revoke_then_count)
    for plain in wrapped:
        assert await in_pool(pool, plain, 1) == ("acme", 1)
    async with opened.scope("acme"):
        # a job's own scope does not shake it off either
        with pytest.raises(AdmissionEndedError):
            await revoking(opened, admission)
    for plain in wrapped:
        with pytest.raises(AdmissionEndedError):
            await in_pool(pool, plain, 1)
    for each in wrapped_async:
        with pytest.raises(AdmissionEndedError):
            await each(opened)
    with bind(replace(acme, admission=admission)), pytest.raises(AdmissionEndedError):
        opened.wrap(add, "acme")


async def revoke_then_count(opened: Tenancy, admission: Ended) -> int:
    """Lose the admission amid the work."""
    admission.ended = True
    return await count(opened)


async def test_synchronous_sessions_of_a_wrapped_function_are_the_tenant_s(
    opened: Tenancy, pool: ThreadPoolExecutor
) -> None:
    """Captured and named; and they end with the request's admission as well."""
    admission = Ended()
    acme = await opened.tenants.get("acme")

    def counting() -> int:
        return int(opened.sync.fetch_value(COUNT))

    def counting_after_the_end() -> int:
        admission.ended = True
        return counting()

    with bind(replace(acme, admission=admission)):
        captured, ending = opened.wrap(counting), opened.wrap(counting_after_the_end)
    assert await in_pool(pool, captured) == 1
    assert await in_pool(pool, opened.wrap(counting, "globex")) == 0
    with pytest.raises(NoTenantError):
        await in_pool(pool, counting)
    with pytest.raises(AdmissionEndedError):
        await in_pool(pool, ending)


async def test_nothing_is_gained_where_the_tenant_is_bound_already(opened: Tenancy) -> None:
    """The request's admission stays, and an operator's right does not come from elsewhere."""
    acme = await opened.tenants.get("acme")
    with bind(replace(acme, operator=True)):
        wrapped: Callable[[], Tenant] = opened.wrap(current_tenant)
    assert wrapped().operator
    admission = Ended()
    with bind(replace(acme, admission=admission)):
        assert not wrapped().operator
        assert wrapped().admission is admission


async def test_what_cannot_be_wrapped_is_refused(opened: Tenancy, pool: ThreadPoolExecutor) -> None:
    """Generators, as their bodies run later; a coroutine; what cannot be called."""

    def generator() -> Iterator[int]:
        yield 1

    async def async_generator() -> AsyncIterator[int]:
        yield 1

    class Generating:
        def __call__(self) -> Iterator[int]:
            yield 1

    for wrong in (generator, async_generator, functools.partial(generator), Generating()):
        with pytest.raises(ConfigurationError, match="generator"):
            opened.wrap(wrong, "acme")
    with pytest.raises(ConfigurationError, match="not the coroutine"):
        opened.wrap(count(opened), "acme")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="not int"):
        opened.wrap(1, "acme")  # type: ignore[arg-type]

    def returned(make: Callable[[], Any]) -> Any:
        return make()

    for hidden in (generator, async_generator):
        with pytest.raises(ConfigurationError, match="generator"):
            await in_pool(pool, opened.wrap(returned, "acme"), hidden)


async def test_it_does_not_go_to_another_process(opened: Tenancy) -> None:
    """A pool of processes says what to do instead, where pickle alone would speak of other things."""
    wrapped = opened.wrap(add, "acme")
    with pytest.raises(ConfigurationError, match="send the tenant's id"):
        pickle.dumps(wrapped)
    processes = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
    with contextlib.closing(_Closing(processes)), pytest.raises(ConfigurationError, match="another process"):
        await in_pool(processes, wrapped, 1)


class _Closing:
    def __init__(self, executor: Executor) -> None:
        self.executor = executor

    def close(self) -> None:
        """End the processes."""
        self.executor.shutdown()
