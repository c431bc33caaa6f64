"""``tenancy run module:function``: a function of the application's, called for each tenant."""

from __future__ import annotations

import asyncio
import inspect
import json
import traceback
import typing
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from sqlalchemy.ext.asyncio import AsyncSession

from ..config.values import load_object
from ..errors import ConfigurationError, counted
from ..tenancy import Tenancy
from ..tenant import Tenant
from .output import cell, json_text, note, print_json, print_table
from .runtime import EXIT_FAILED, Json, exit_on_error, extend_path, fail, operator, run
from .selection import All, Also, Named, Selection, Statuses, Tiers
from .values import plain

_GIVEN: Mapping[str, type] = {"tenancy": Tenancy, "tenant": Tenant, "session": AsyncSession}


def call(
    function: Annotated[str, typer.Argument(metavar="MODULE:FUNCTION", help="What to call; sync or async.")],
    tenants: Named = None,
    tenant: Also = None,
    tier: Tiers = None,
    status: Statuses = None,
    everyone: All = False,
    arguments: Annotated[
        str | None, typer.Option("--args", metavar="JSON", help="Arguments by name, as a JSON object.")
    ] = None,
    argument: Annotated[
        list[str] | None,
        typer.Option("--arg", metavar="NAME=TEXT|NAME:=JSON", help="One argument; repeatable."),
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, max=64, help="How many tenants at once.")] = 1,
    as_json: Json = False,
) -> None:
    """Call a function for each tenant, which is bound while it runs. Exit status 1 if it failed for any. Audited.

    A parameter that is called tenancy, tenant or session, or annotated with Tenancy, Tenant or AsyncSession, gets the
    object itself. A session is committed where the function succeeds.
    """
    extend_path()
    found = exit_on_error(lambda: Function.load(function))
    given = exit_on_error(lambda: found.check(_arguments(arguments, argument or ())))
    selection = Selection.of([*(tenants or ()), *(tenant or ())], tier, status, everyone)

    async def command(tenancy: Tenancy) -> list[Result]:
        chosen = await selection.find(tenancy)
        if chosen:
            detail = {"function": function, "tenants": [one.slug for one in chosen[:1_000]], "count": len(chosen)}
            async with tenancy.internals.control.transaction() as connection:
                await tenancy.audit.append(connection, action="fleet.run", detail=detail, actor=operator())
        return await _call_for_all(tenancy, found, given, chosen, concurrency)

    results = run(command)
    failed = [result for result in results if result.error is not None]
    if as_json:
        print_json([result.document() for result in results])
    else:
        rows = [(result.tenant.slug, _shown(result.value)) for result in results if result.error is None]
        if rows:
            print_table("results", ("tenant", "result"), rows)
    for result in failed:
        note(f"{result.tenant.slug}: {result.traceback or result.error}".rstrip())
    if failed:
        note(f"failed for {len(failed)} of {counted(len(results))}")
        raise typer.Exit(EXIT_FAILED)


@dataclass(frozen=True, slots=True)
class Result:
    """What the function has returned for one tenant, or raised."""

    tenant: Tenant
    value: Any = None
    error: str | None = None
    traceback: str | None = None

    def document(self) -> dict[str, Any]:
        """Return it for JSON."""
        document: dict[str, Any] = {"tenant": self.tenant.slug, "id": self.tenant.id}
        return document | ({"result": _json(self.value)} if self.error is None else {"error": self.error})


@dataclass(frozen=True, slots=True)
class Function:
    """A function, and the parameters that get an object: the parameter's name by that of the object."""

    function: Callable[..., Any]
    objects: Mapping[str, str]

    @classmethod
    def load(cls, path: str) -> Function:
        """Import it, and read its signature.

        Raises:
            ConfigurationError: it cannot be imported, or is no function.
        """
        function = load_object(path)
        if not callable(function):
            raise ConfigurationError(f"{path!r} is not a function")
        try:
            parameters = inspect.signature(function).parameters
        except ValueError as exc:
            raise ConfigurationError(f"{path!r} has no signature that can be read") from exc
        try:
            hints = typing.get_type_hints(function)
        except Exception:  # noqa: BLE001 - a name that only the type checker imports; parameters' names are enough
            hints = {}
        objects: dict[str, str] = {}
        for name in parameters:
            hint = hints.get(name)
            for given, kind in _GIVEN.items():
                # an annotation says more than a name
                if hint is kind or (hint is None and name == given):
                    objects[given] = name
        return cls(function, objects)

    def check(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments, if the function takes them.

        Raises:
            ConfigurationError: one is missing, not taken, or given by this program.
        """
        if taken := set(arguments) & set(self.objects.values()):
            raise ConfigurationError(f"the argument {min(taken)!r} is given by the program")
        try:
            inspect.signature(self.function).bind(**dict.fromkeys(self.objects.values()), **arguments)
        except TypeError as exc:
            raise ConfigurationError(f"the function does not take these arguments: {exc}") from exc
        return dict(arguments)

    async def call(self, tenancy: Tenancy, tenant: Tenant, arguments: Mapping[str, Any]) -> Any:
        """Call it with the tenant bound; a plain function runs in a thread of its own."""
        async with _session(tenancy, tenant, wanted="session" in self.objects) as session:
            objects = {"tenancy": tenancy, "tenant": tenant, "session": session}
            given = {name: objects[kind] for kind, name in self.objects.items()}
            return await tenancy.run(tenant, self.function, **given, **arguments)


@asynccontextmanager
async def _session(tenancy: Tenancy, tenant: Tenant, *, wanted: bool) -> AsyncIterator[AsyncSession | None]:
    if not wanted:
        yield None
        return
    async with tenancy.transaction(tenant, operator=True) as session:
        yield session


async def _call_for_all(
    tenancy: Tenancy, function: Function, arguments: Mapping[str, Any], tenants: Sequence[Tenant], concurrency: int
) -> list[Result]:
    """Call the function for each tenant, several at once; results are in order of the tenants."""
    waiting = deque(enumerate(tenants))
    results: dict[int, Result] = {}

    async def work() -> None:
        while waiting:
            number, tenant = waiting.popleft()
            try:
                results[number] = Result(tenant, await function.call(tenancy, tenant, arguments))
            except Exception as exc:  # noqa: BLE001 - the application's own, which is shown
                text = "".join(traceback.format_exception(exc.with_traceback(_own(exc))))
                results[number] = Result(tenant, error=f"{type(exc).__name__}: {exc}", traceback=text)

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(tenants))):
            group.create_task(work())
    return [results[number] for number in sorted(results)]


def _own(error: BaseException) -> Any:
    """The traceback without the frames of this program that called the function."""
    found = error.__traceback__
    while found is not None and found.tb_next is not None and "tenancy_orm" in found.tb_frame.f_code.co_filename:
        found = found.tb_next
    return found


def _arguments(text: str | None, single: Iterable[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if text is not None:
        found = _parsed(text, "--args")
        if not isinstance(found, dict):
            fail("--args must be a JSON object: arguments by name", kind="ConfigurationError")
    for one in single:
        name, sign, value = one.partition("=")
        if not sign or not name.removesuffix(":").isidentifier():
            fail(f"{one!r} is not an argument: write NAME=TEXT or NAME:=JSON", kind="ConfigurationError")
        found[name.removesuffix(":")] = _parsed(value, one) if name.endswith(":") else value
    return found


def _parsed(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        fail(f"{what} is not JSON", kind="ConfigurationError")


def _json(value: Any) -> Any:
    found = plain(value)
    try:
        json_text(found)
    except TypeError:
        return str(value)
    return found


def _shown(value: Any) -> str:
    found = _json(value)
    return cell(found if isinstance(found, (list, dict)) or found is None else str(found))


__all__ = ["Function", "Result", "call"]
