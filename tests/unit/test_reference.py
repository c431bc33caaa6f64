"""What is public, as the documentation's build reads it: ``make docs`` looks for each name in the reference."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import textwrap
import typing
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import tenancy_orm
from docs import hooks
from tenancy_orm.events import Event

ROOT = Path(__file__).parents[2]


@cache
def read() -> set[str]:
    """The public names of this repository."""
    return hooks.public_names(ROOT)


def name_of(value: object) -> str:
    """Where a class or a function is defined, dotted."""
    return f"{value.__module__}.{value.__qualname__}"  # type: ignore[attr-defined]


def descendants(base: type[object]) -> Iterator[type[object]]:
    """Every class of the package that derives from ``base``, as far as it is imported."""
    for derived in base.__subclasses__():
        if derived.__module__.startswith("tenancy_orm."):
            yield derived
        yield from descendants(derived)


def test_what_the_package_and_its_rooms_offer_is_public() -> None:
    """Each class and function that an importable ``__all__`` names."""
    rooms = [
        importlib.import_module(f"tenancy_orm.{m.name}") for m in pkgutil.iter_modules(tenancy_orm.__path__) if m.ispkg
    ]
    offered = {
        name_of(value)
        for module in (tenancy_orm, *rooms)
        for value in (getattr(module, name) for name in getattr(module, "__all__", ()))
        if inspect.isclass(value) or inspect.isfunction(value)
    }
    assert len(offered) > len(tenancy_orm.__all__)
    assert offered - read() == set()


def test_the_classes_behind_the_properties_of_tenancy_are_public() -> None:
    """Whoever holds a ``Tenancy`` can call them."""
    behind = {
        name_of(found)
        for member in vars(tenancy_orm.Tenancy).values()
        if isinstance(member, property) and member.fget is not None and not member.fget.__name__.startswith("_")
        for found in (typing.get_type_hints(member.fget)["return"],)
        if found.__module__.startswith("tenancy_orm.")
    }
    assert name_of(type(tenancy_orm.Tenancy(tenancy_orm.TenancyConfig(control_url="embedded")).events)) in read()
    assert behind
    assert behind - read() == set()


@pytest.mark.parametrize("base", [tenancy_orm.TenancyError, Event])
def test_every_error_and_every_event_is_public(base: type) -> None:
    """They can be caught and subscribed to."""
    found = {name_of(derived) for derived in descendants(base) if not derived.__name__.startswith("_")}
    assert len(found) > 20
    assert found - read() == set()


def test_the_reference_begins_with_all_of_its_pages() -> None:
    """Its first page says what each other one is for."""
    reference = ROOT / "docs" / "reference"
    linked = set(re.findall(r"\]\((\w+\.md)\)", (reference / "index.md").read_text("utf-8")))
    assert linked == {page.name for page in reference.glob("*.md")} - {"index.md"}


def test_the_page_on_tenancy_has_each_of_its_members_in_a_group() -> None:
    """Since the page lists them itself, the documentation's build would not miss a new one."""
    page = (ROOT / "docs" / "reference" / "tenancy.md").read_text("utf-8")
    listed = re.findall(r"^::: tenancy_orm\.Tenancy\.(\w+)$", page, re.MULTILINE)
    members = [name for name in vars(tenancy_orm.Tenancy) if not name.startswith("_")]
    assert sorted(listed) == sorted(members)


# --- each rule, on a package of a few lines -------------------------------------------------------------------------

FILES = {
    "tenancy_orm/__init__.py": """
        from .tenancy import Tenancy
        from .room import offered
        __all__ = ["Tenancy", "offered"]
        """,
    "tenancy_orm/tenancy.py": """
        from .room.inside import Attribute, Part
        class Tenancy:
            def __init__(self, config: object) -> None:
                self.events = Attribute(config)
                self._private = Hidden()
            @property
            def part(self) -> Part | None: ...
            @property
            def _inner(self) -> Hidden: ...
        class Hidden: ...
        """,
    "tenancy_orm/room/__init__.py": """
        from .inside import in_room
        from .offers import offered
        __all__ = ["in_room"]
        """,
    "tenancy_orm/room/inside.py": """
        from dataclasses import dataclass
        class Base: ...
        class Attribute: ...
        class Part(Base):
            def __init__(self, given: Hidden) -> None: ...
            def returns(self) -> "list[Returned]": ...
            def _returns(self) -> Hidden: ...
        @dataclass
        class Returned:
            field: dict[str, Field]
            _hidden: Hidden
        class Field: ...
        class Hidden: ...
        class Derived(Base): ...
        class _Derived(Base): ...
        class Imported: ...
        class Shown: ...
        class Example: ...
        def in_room() -> None: ...
        __all__ = ["Attribute", "Hidden"]
        """,
    "tenancy_orm/room/offers.py": "def offered() -> None: ...",
    "tenancy_orm/whole.py": """
        class Listed: ...
        class Unlisted: ...
        __all__ = ["Listed"]
        """,
    "tenancy_orm/integrations/__init__.py": "",
    "tenancy_orm/integrations/framework.py": """
        from ..room.inside import Hidden
        class Adapter: ...
        def _hidden() -> None: ...
        """,
    "tenancy_orm/testing/__init__.py": "",
    "tenancy_orm/testing/_hidden.py": "class Hidden: ...",
    "README.md": "```python\nfrom tenancy_orm.room.inside import Imported\n```\n",
    "docs/page.md": "```python\nfrom tenancy_orm.room.inside import (\n    Shown as Other,\n)\n```\n",
    "examples/app.py": "from tenancy_orm import whole\nfrom tenancy_orm.room.inside import Example  # noqa",
}

PUBLIC = {
    "tenancy_orm.tenancy.Tenancy",
    "tenancy_orm.room.offers.offered",
    "tenancy_orm.room.inside.in_room",
    "tenancy_orm.room.inside.Attribute",
    "tenancy_orm.room.inside.Part",
    "tenancy_orm.room.inside.Base",
    "tenancy_orm.room.inside.Derived",
    "tenancy_orm.room.inside.Returned",
    "tenancy_orm.room.inside.Field",
    "tenancy_orm.whole.Listed",
    "tenancy_orm.integrations.framework.Adapter",
    "tenancy_orm.room.inside.Imported",
    "tenancy_orm.room.inside.Shown",
    "tenancy_orm.room.inside.Example",
}


def write(root: Path, files: dict[str, str]) -> None:
    """Write the files, with the directories they are in."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(textwrap.dedent(text), "utf-8")


def test_what_users_reach_is_public_and_nothing_else(tmp_path: Path) -> None:
    """Offered, imported by a page, behind a property, returned, a field, a base, derived; nothing that is private."""
    write(tmp_path, FILES)
    assert hooks.public_names(tmp_path) == PUBLIC


def test_links_of_pages_outside_the_documentation_lead_somewhere(tmp_path: Path) -> None:
    """A missing file or heading is found in every such page; other sites and code are no concern of this check."""
    text = """
        # A `code` [link](docs/a.md): it's *one*
        [a](docs/a.md#x-1) [b](docs/b.md 'title') [c](https://c.example#c) [d](#d) [e](#a-code-link-its-one)
        `[g](g.md)` [h](docs/a.md#y) [i](docs/a.md#in-code) [j](y.py#L1) [k](docs/a.md#x-1 'title')
        ```text
        [l](l.md)
        ```
        """
    write(
        tmp_path,
        {
            "docs/a.md": "### X 1\n```sh\n# in code\n```\n<!-- python\n# y\n-->\n",
            "README.md": text,
            "y.py": "",
            ".github/NOTE.md": "[g](g.md)",
            "examples/x/README.md": "[h](y.py)",
        },
    )
    assert list(hooks.broken_links(tmp_path)) == [
        (".github/NOTE.md", "g.md"),
        ("README.md", "docs/b.md"),
        ("README.md", "#d"),
        ("README.md", "docs/a.md#y"),
        ("README.md", "docs/a.md#in-code"),
        ("examples/x/README.md", "y.py"),
    ]
