"""A replaced function is replaced in the contexts that ask for it, and in no other."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace

from tenancy_orm.migrations.substitution import Substitution


def test_other_threads_get_the_original() -> None:
    """Threads that copy the context get the replacement, as an application's event loop does not."""
    owner = SimpleNamespace(call=lambda: "original")
    original = owner.call
    found: dict[str, str] = {}

    async def main() -> None:
        with Substitution(owner, "call", lambda: "replacement").active():
            found["here"] = owner.call()
            found["copied"] = await asyncio.to_thread(owner.call)
            thread = threading.Thread(target=lambda: found.update(thread=owner.call()))
            thread.start()
            await asyncio.to_thread(thread.join)

    asyncio.run(main())
    assert found == {"here": "replacement", "copied": "replacement", "thread": "original"}
    assert owner.call is original


def test_the_last_of_several_puts_the_original_back() -> None:
    owner = SimpleNamespace(call=lambda: "original")
    original = owner.call
    substitution = Substitution(owner, "call", lambda: "replacement")
    first, second = substitution.active(), substitution.active()
    first.__enter__()
    with second:
        first.__exit__(None, None, None)
        assert owner.call is not original
    assert owner.call is original


def test_what_others_have_put_there_since_is_kept() -> None:
    """A tracer that wraps the function while it is replaced works on afterwards, and so does the replacement."""
    owner = SimpleNamespace(call=lambda: "original")
    substitution = Substitution(owner, "call", lambda: "replacement")
    with substitution.active():
        inner = owner.call
        owner.call = lambda: f"traced {inner()}"
    assert owner.call() == "traced original"
    with substitution.active():
        assert owner.call() == "replacement"
    assert owner.call() == "traced original"
