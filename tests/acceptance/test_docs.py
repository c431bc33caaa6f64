"""The documentation runs: every Python block of README.md and docs/, in order, on a real PostgreSQL.

How a page is run is described for its author in CONTRIBUTING.md.
"""

from __future__ import annotations

import ast
import inspect
import os
import re
import sys
import textwrap
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tenancy_orm import Tenancy, TenancyConfig
from tests.support import models
from tests.support.postgres import Postgres
from tests.support.shell import python_path
from tests.support.warm import run_module

ROOT = Path(__file__).parents[2]
# test_existing_application.py follows that page, in the project that it is about
PAGES = [
    ROOT / "README.md",
    *sorted(page for page in (ROOT / "docs").rglob("*.md") if page.name != "existing-application.md"),
]
PROGRAM_SECONDS = 60.0

FENCE = re.compile(r"(?P<indent> *)(?P<fence>```+|~~~+) *(?P<language>\w*)(?P<rest>.*)")
HIDDEN = re.compile(r" *<!-- python *")
FILE = re.compile(r"# (?P<path>[\w/]+\.py)\s*")


@dataclass(frozen=True)
class Block:
    """One piece of Python of a page.

    Args:
        page: The file.
        line: The line its code begins at, counted from 1.
        code: The code, without indentation.
    """

    page: Path
    line: int
    code: str

    @property
    def file(self) -> str | None:
        """The file it shows, which its first line names, or None when it is run as part of the page."""
        match = FILE.fullmatch(self.code.split("\n", 1)[0])
        return match["path"] if match else None

    def compile(self) -> types.CodeType:
        """Compile it so that a traceback shows the page and the line in it, and ``await`` may stand at the top."""
        padded = "\n" * (self.line - 1) + self.code
        code: types.CodeType = compile(
            padded, str(self.page), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True
        )
        return code


def blocks_of(page: Path, text: str) -> Iterator[Block]:
    """Every ```python block and every ``<!-- python`` comment of a page, in order."""
    lines = iter(enumerate(text.split("\n"), start=1))
    for number, line in lines:
        if HIDDEN.fullmatch(line):
            end, language = "-->", "python"
        elif match := FENCE.fullmatch(line):
            end, language = match["fence"], match["language"]
        else:
            continue
        body = []
        for _, inner in lines:
            if inner.strip() == end:
                break
            body.append(inner)
        else:
            raise ValueError(f"{page}:{number}: the block is not closed")
        if language in ("python", "py", "python3"):
            yield Block(page, number + 1, textwrap.dedent("\n".join(body)))


RUNNABLE = {page: blocks for page in PAGES if (blocks := list(blocks_of(page, page.read_text("utf-8"))))}


@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: str(page.relative_to(ROOT)))
async def test_the_page_runs(
    page: Path,
    tenancy: Tenancy,
    tenancy_config: TenancyConfig,
    postgres: Postgres,
    control_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every block runs, in order: files as programs of their own, everything else in one namespace."""
    blocks = RUNNABLE[page]
    files = {block.file for block in blocks}
    metadata = "models:Base.metadata" if "models.py" in files else "tests.support.models:Base.metadata"
    for variable, value in settings(tenancy_config, metadata).items():
        monkeypatch.setenv(variable, value)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    # a real module, because SQLAlchemy looks annotations up in the module that a class names as its own
    module = types.ModuleType("docs_page")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    module.__dict__.update(
        tenancy=tenancy,
        opened=tenancy,
        config=tenancy_config,
        postgres=postgres,
        control_url=control_url,
        page=page,
        Base=models.Base,
        Note=models.Note,
    )
    imported = set(sys.modules)
    try:
        for block in blocks:
            if block.file is not None:
                await run_file(block, tmp_path)
            else:
                await run_inline(block, module.__dict__)
    finally:
        # the page's own files, so that another page's models.py is not taken for this one's
        for name in set(sys.modules) - imported:
            if str(getattr(sys.modules[name], "__file__", None)).startswith(str(tmp_path)):
                del sys.modules[name]


def settings(config: TenancyConfig, metadata: str) -> dict[str, str]:
    """The TENANCY_* variables that make ``Tenancy()`` use the test's own control database."""
    return {
        "TENANCY_CONTROL_URL": config.control_url,
        "TENANCY_SERVERS": " ".join(f"{name}={url}" for name, url in (config.servers or {}).items()),
        "TENANCY_ENCRYPTION_KEYS": ",".join(
            f"{key}:{value!s}" for key, value in (config.encryption_keys or {}).items()
        ),
        "TENANCY_NAME_PREFIX": config.name_prefix,
        "TENANCY_METADATA": metadata,
    }


async def run_inline(block: Block, namespace: dict[str, Any]) -> None:
    """Run a block in the page's namespace; an exception's traceback leads to the line of the page."""
    code = block.compile()
    result = eval(code, namespace)  # noqa: S307 - exec cannot await, and the code is this repository's
    if code.co_flags & inspect.CO_COROUTINE:
        await result


async def run_file(block: Block, directory: Path) -> None:
    """Write a block to the file that it shows, and run that as a user would: it must end with status 0."""
    assert block.file is not None
    path = directory / block.file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(block.code, "utf-8")
    env = {**os.environ, "PYTHONPATH": python_path(directory, ROOT)}
    try:
        done = await run_module(str(path), cwd=directory, env=env, timeout=PROGRAM_SECONDS)
    except TimeoutError:
        pytest.fail(f"{block.page}:{block.line}: {block.file} does not end within {PROGRAM_SECONDS:.0f} s")
    if done.status != 0:
        pytest.fail(f"{block.page}:{block.line}: {block.file} failed:\n{done.out}{done.err}")


# --- the runner itself ----------------------------------------------------------------------------------------------


def test_every_block_of_python_is_found() -> None:
    """Plain, indented, with a title and hidden ones are found, with their lines; other languages are not."""
    text = textwrap.dedent(
        """\
        # A page
        ```python title="x"
        a = 1
        ```
        - a list

            ```py
            b = 2
            ```
        ```console
        $ ```python
        ```
        ````markdown
        ```python
        not_run
        ```
        ````
        <!-- python
        c = 3
        -->
        """
    )
    assert [(block.line, block.code) for block in blocks_of(ROOT / "x.md", text)] == [
        (3, "a = 1"),
        (8, "b = 2"),
        (19, "c = 3"),
    ]


def test_an_unclosed_block_is_an_error() -> None:
    """A page cannot hide code by leaving its fence open."""
    with pytest.raises(ValueError, match="not closed"):
        list(blocks_of(ROOT / "x.md", "```python\nraise"))


async def test_a_failing_block_fails_at_its_line() -> None:
    """The traceback names the page's own line, also after an ``await`` at the top level."""
    block = Block(ROOT / "x.md", 41, "import asyncio\nawait asyncio.sleep(0)\nassert False")
    with pytest.raises(AssertionError) as caught:
        await run_inline(block, {})
    assert (str(caught.traceback[-1].path), caught.traceback[-1].lineno + 1) == (str(ROOT / "x.md"), 43)


async def test_a_failing_file_fails_with_its_output(tmp_path: Path) -> None:
    """A program that ends with an error is not taken for a success."""
    block = Block(ROOT / "x.md", 2, "# sub/x.py\nraise SystemExit('no luck')")
    with pytest.raises(pytest.fail.Exception, match="no luck"):
        await run_file(block, tmp_path)
