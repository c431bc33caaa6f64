"""What a build of the documentation checks besides MkDocs itself; mkdocs.yml names this file.

Every public name is in the reference, and the links of the repository's other pages lead somewhere. What is wrong is a
warning, which fails a build with ``--strict``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import get_plugin_logger
from mkdocstrings import Inventory

PACKAGE = "tenancy_orm"
# Rooms that have no names of their own, because each module needs an extra of its own.
ROOMS_OF_EXTRAS = ("integrations", "testing")

IMPORT = re.compile(rf"^\s*from ({PACKAGE}[\w.]*) import (\([^)]*\)|[\w, ]+)", re.MULTILINE)
FENCED = re.compile(r"^ *(```+|~~~+).*?^ *\1|<!--.*?-->", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`[^`\n]*`")
LINK = re.compile(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]+))?[^)]*\)")
HEADING = re.compile(r"^#+ +(.+?)(?: +#+)?$", re.MULTILINE)

logger = get_plugin_logger("hooks")


def on_post_build(config: MkDocsConfig) -> None:
    """Warn of public names without a place in the reference, and of links outside docs/ that lead nowhere."""
    root = Path(config.config_file_path).parent
    with Path(config.site_dir, "objects.inv").open("rb") as file:
        documented = set(Inventory.parse_sphinx(file))
    for name in sorted(public_names(root) - documented):
        logger.warning("%s is public, but no page in docs/reference/ has it", name)
    for page, target in broken_links(root):
        logger.warning("%s contains a link '%s', but there is no such file or heading", page, target)


def public_names(root: Path) -> set[str]:
    """The full name of everything that users of the package can rely on, where it is defined.

    These are the names in ``__all__`` of the package and of its rooms, what the modules of extras define, what the
    documentation and the examples import (of a module, the names in its ``__all__``), and the classes behind the
    properties of ``Tenancy``. What these classes return, derive from and are derived from is public too. The source is
    read, not run, so that no extra is needed.
    """
    package = _target(griffe.load(PACKAGE, search_paths=[root], try_relative_path=False, resolve_aliases=True))
    reached: dict[str, griffe.Object] = {}
    waiting = [*_offered(package), *_imported(package, root), *_behind(_target(package["Tenancy"]))]
    derived = _derived(package)
    while waiting:
        found = waiting.pop()
        if found.path in reached or found.is_module:
            continue
        reached[found.path] = found
        if isinstance(found, griffe.Class):
            waiting += [*_bases(found), *derived.get(found.path, ()), *_returned(found)]
    return set(reached)


def broken_links(root: Path) -> Iterator[tuple[str, str]]:
    """Relative links of the pages that MkDocs does not build, README.md for one: the page and the target.

    An anchor of a page has to be that of one of its headings.
    """
    pages = [*root.glob("*.md"), *root.glob(".github/**/*.md"), *root.glob("examples/**/*.md")]
    for page in sorted(pages):
        for match in LINK.finditer(CODE.sub("", _prose(page))):
            path, anchor = match.groups()
            target = page.parent / path if path else page
            if not target.exists() or (anchor and target.suffix == ".md" and anchor not in _anchors(target)):
                yield str(page.relative_to(root)), f"{path}#{anchor}" if anchor else path


def _prose(page: Path) -> str:
    """What a page says, without its blocks of code and its comments."""
    return FENCED.sub("", page.read_text("utf-8"))


def _anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, where MkDocs and GitHub make the same ones."""
    # of a link in a heading, its text
    headings = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading) for heading in HEADING.findall(_prose(page)))
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def _target(found: griffe.Object | griffe.Alias) -> griffe.Object:
    return found.final_target if isinstance(found, griffe.Alias) else found


def _offered(package: griffe.Object) -> Iterator[griffe.Object]:
    """What the package and its rooms name in ``__all__``, and what the modules of extras define."""
    rooms = [module for module in package.modules.values() if module.is_subpackage]
    extras = [
        module
        for room in rooms
        if room.name in ROOMS_OF_EXTRAS
        for module in room.modules.values()
        # of a plugin of pytest's, pytest alone uses the names
        if not module.name.startswith("_") and not module.name.endswith("plugin")
    ]
    for module in (package, *(room for room in rooms if room.exports), *extras):
        yield from _exported(module)


def _exported(module: griffe.Object) -> Iterator[griffe.Object]:
    """The names in a module's ``__all__``; without one, what it defines."""
    yield from (_target(member) for member in module.members.values() if member.is_public)


def _imported(package: griffe.Object, root: Path) -> Iterator[griffe.Object]:
    """What the documentation and the examples import."""
    for page in (root / "README.md", *root.glob("docs/**/*.md"), *root.glob("examples/**/*.py")):
        for module, names in IMPORT.findall(page.read_text("utf-8")):
            for name in re.findall(r"\w+", re.sub(r" as \w+", "", names)):
                found = _target(package[f"{module}.{name}".removeprefix(f"{PACKAGE}.")])
                yield from _exported(found) if found.is_module else (found,)


def _behind(tenancy: griffe.Object) -> Iterator[griffe.Object]:
    """The classes of the parts: of its properties, and of the attributes that it makes at once."""
    for member in tenancy.members.values():
        if isinstance(member, griffe.Attribute) and not member.name.startswith("_"):
            made = member.value.function if isinstance(member.value, griffe.ExprCall) else None
            yield from _classes(tenancy, member.annotation or made)


def _returned(found: griffe.Class) -> Iterator[griffe.Object]:
    """The classes that its public methods return, and that its properties and fields have."""
    for member in found.members.values():
        if member.is_alias or member.name.startswith("_"):
            continue
        if isinstance(member, griffe.Function):
            yield from _classes(found, member.returns)
        elif isinstance(member, griffe.Attribute) and ("property" in member.labels or "dataclass" in found.labels):
            yield from _classes(found, member.annotation)


def _bases(found: griffe.Class) -> Iterator[griffe.Object]:
    for base in found.bases:
        yield from _classes(found, base)


def _derived(package: griffe.Object) -> dict[str, list[griffe.Object]]:
    """The classes with a public name that derive from each class."""
    derived: dict[str, list[griffe.Object]] = {}
    modules: list[griffe.Object] = [package]
    while modules:
        module = modules.pop()
        modules += [_target(inner) for inner in module.modules.values() if not inner.is_alias]
        for found in module.classes.values():
            if not found.is_alias and not found.name.startswith("_"):
                for base in _bases(found):
                    derived.setdefault(base.path, []).append(found)
    return derived


def _classes(scope: griffe.Object, expression: str | griffe.Expr | None) -> Iterator[griffe.Object]:
    """This package's classes that an annotation or a call names; a private one is not meant for users."""
    names: Iterable[str | griffe.Expr] = expression.iterate(flat=True) if isinstance(expression, griffe.Expr) else ()
    for name in names:
        # an argument's path has its function's parentheses in it
        if isinstance(name, griffe.ExprName) and re.fullmatch(rf"{PACKAGE}\.[\w.]+", name.canonical_path):
            found = _target(scope.package[name.canonical_path.removeprefix(f"{PACKAGE}.")])
            if found.is_class and not found.name.startswith("_"):
                yield found
