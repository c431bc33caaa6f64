"""The names the package offers: all importable, all documented, and no others."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import subprocess
import sys
import types

import pytest

import tenancy_orm

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(tenancy_orm.__path__, "tenancy_orm.")
    # run by Alembic, which gives them what they need
    if ".migrations.versions." not in module.name and not module.name.endswith((".migrations.env", ".__main__"))
)


def test_all_names_exactly_what_the_package_offers() -> None:
    """``__all__`` is what ``tenancy_orm`` defines, apart from its rooms; each name is imported when it is asked for."""
    for name in dir(tenancy_orm):
        getattr(tenancy_orm, name)
    offered = {
        name
        for name, value in vars(tenancy_orm).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType) and name != "annotations"
    }
    assert set(tenancy_orm.__all__) == offered
    assert list(tenancy_orm.__all__) == sorted(tenancy_orm.__all__)


_PROGRAM = """
import importlib, pickle, sys
import tenancy_orm
assert not [name for name in sys.modules if name.startswith(("tenancy_orm.", "sqlalchemy"))]
assert set(tenancy_orm.__all__) < set(dir(tenancy_orm)) and not hasattr(tenancy_orm, "Tenency")
assert tenancy_orm.errors.TenancyError is tenancy_orm.TenancyError and tenancy_orm.config.Limit
namespace = {}
exec("from tenancy_orm import *", namespace)
assert set(tenancy_orm.__all__) == namespace.keys() - {"__builtins__"}
assert pickle.loads(pickle.dumps(tenancy_orm.Status.ACTIVE)) is namespace["Status"].ACTIVE
assert importlib.reload(tenancy_orm).Tenancy is namespace["Tenancy"]
"""


def test_names_that_are_imported_lazily_are_as_others() -> None:
    """By ``*``, in pickles, after a reload; and the modules that they are from are attributes, as checkers see them."""
    subprocess.run([sys.executable, "-c", _PROGRAM], check=True)


@pytest.mark.parametrize("name", tenancy_orm.__all__)
def test_every_public_name_is_documented(name: str) -> None:
    """Each has a docstring of its own, and so has each of its public methods."""
    value = getattr(tenancy_orm, name)
    assert inspect.getdoc(value)
    if inspect.isclass(value):
        bare = [
            member
            for member, attribute in vars(value).items()
            if not member.startswith("_")
            and (inspect.isfunction(attribute) or isinstance(attribute, property))
            and not inspect.getdoc(attribute)
        ]
        assert bare == []


@pytest.mark.parametrize("module", MODULES)
def test_every_module_is_importable_and_documented(module: str) -> None:
    """Each says in one sentence what it is for, and what its ``__all__`` names exists."""
    imported = importlib.import_module(module)
    assert imported.__doc__
    missing = [name for name in getattr(imported, "__all__", ()) if not hasattr(imported, name)]
    assert missing == []
