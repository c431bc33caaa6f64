"""Finding the application under test, and its ``Tenancy``."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
from sqlalchemy import MetaData
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import Mount

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.asgi import TenancyMiddleware
from tenancy_orm.errors import ConfigurationError
from tenancy_orm.testing._application import find

CONFIG = TenancyConfig(control_url="postgresql://u@h/control", metadata=MetaData())
TENANCY = Tenancy(CONFIG)


class Outer:
    """A middleware around the whole application."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None: ...


async def bare(scope: Any, receive: Any, send: Any) -> None: ...


def with_state() -> Starlette:
    app = Starlette()
    app.state.whatever = TENANCY
    return app


guarded = Starlette(middleware=[Middleware(TenancyMiddleware, tenancy=TENANCY)])
OBJECTS: dict[str, Any] = {
    "middleware": guarded,
    "lifespan": Starlette(lifespan=TENANCY.lifespan),
    "factory": with_state,
    "wrapped": Outer(TenancyMiddleware(Starlette(), tenancy=TENANCY)),
    "mounted": Starlette(routes=[Mount("/api", app=guarded)]),
    "tenancy": TENANCY,
    "config": CONFIG,
    "bare": bare,
    "two": Starlette(middleware=[Middleware(TenancyMiddleware, tenancy=Tenancy(CONFIG))], lifespan=TENANCY.lifespan),
    "needy": lambda settings: with_state(),
    "number": 3,
}


@pytest.fixture(autouse=True)
def shop(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("shop_under_test")
    vars(module).update(OBJECTS)
    monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.parametrize("name", ["middleware", "lifespan", "factory", "wrapped", "mounted"])
def test_the_tenancy_of_an_application_is_found(name: str) -> None:
    """From the middleware, the lifespan or the state, of the application, of one around it or mounted in it."""
    found = find(f"shop_under_test:{name}")
    assert found.tenancy is TENANCY
    assert found.app is not None


def test_a_tenancy_and_a_configuration_are_enough() -> None:
    """Without an application there is no client, and all else works."""
    assert (find("shop_under_test:tenancy").tenancy, find("shop_under_test:tenancy").app) == (TENANCY, None)
    assert find("shop_under_test:config").tenancy.config is CONFIG


def test_a_tenancy_that_cannot_be_found_is_named() -> None:
    """For a bare function, and where there are two."""
    for name in ("bare", "two"):
        with pytest.raises(ConfigurationError, match=r"tenancy_object = \"module:attribute\""):
            find(f"shop_under_test:{name}")
        found = find(f"shop_under_test:{name}", "shop_under_test:tenancy")
        assert (found.app, found.tenancy) == (OBJECTS[name], TENANCY)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("shop_under_test:needy", "takes the arguments settings"),
        ("shop_under_test:number", "is a int: name an ASGI application"),
        ("shop_under_test:nothing", "cannot be loaded"),
        ("shop_under_test", "is not of the form module:attribute"),
    ],
)
def test_what_is_no_application_is_refused(path: str, reason: str) -> None:
    """The message says what it is, and what to name."""
    with pytest.raises(ConfigurationError, match=reason):
        find(path)
