"""Tables in a terminal of 80 columns and in a pipe, as a user and a cron job get them."""

from __future__ import annotations

import json
import re
from pathlib import Path

from rich.cells import cell_len

from tests.integration.cli.test_cli import Cli, cli
from tests.support.shell import environment
from tests.support.terminal import run_in_terminal

__all__ = ["cli"]

FRAMES = re.compile(r"[─-╿]")
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
TABLES = (
    ("list",),
    ("keys", "list", "a-customer-with-a-long-slug-of-more-than-thirty"),
    ("audit", "list"),
    ("config", "show"),
    ("migrate", "status"),
    ("migrate", "upgrade"),
    ("show", "a-customer-with-a-long-slug-of-more-than-thirty"),
    ("housekeeping",),
    ("create", "--help"),
    ("create",),
    ("list", "--no-such-option"),
)


async def test_tables_in_a_terminal_and_in_a_pipe(cli: Cli, tmp_path: Path) -> None:
    """In a terminal each line fits, and an id is whole; in a pipe nothing is framed, coloured or shortened."""
    await cli("init")
    slug = TABLES[1][2]
    created = (await cli("create", slug, "--metadata", f"note={'long ' * 40}", "--json")).json

    # the variables of the other commands, without what says how wide they are
    settings = tmp_path / "environment.json"
    (tmp_path / "dump.py").write_text(f"import json, os\njson.dump(dict(os.environ), open({str(settings)!r}, 'w'))\n")
    assert (await cli(program=("dump.py",))).status == 0
    variables = environment(**json.loads(settings.read_text()))
    width, colour = variables.pop("COLUMNS"), variables.pop("NO_COLOR")
    assert (width, colour) == ("200", "1")
    variables["TERM"] = "xterm-256color"

    async def shown(*arguments: str, **changes: str) -> str:
        return await run_in_terminal(
            "-m", "tenancy_orm.cli", *arguments, cwd=tmp_path, env={**variables, **changes}, columns=80
        )

    for arguments in (("list",), ("audit", "list")):
        written = await shown(*arguments)
        lines = ESCAPES.sub("", written).splitlines()
        assert max(map(cell_len, lines)) <= 80, written
        assert not FRAMES.search(written)
        assert "\x1b[" in written
        if arguments == ("list",):
            assert created["id"] in written and slug not in written and f"{slug[:20]}" in written
    template = (await cli("template", "list", "--json")).json[0]["name"]
    written = await shown("template", "list")
    assert template in written and "REVISION" in written
    assert max(map(cell_len, ESCAPES.sub("", written).splitlines())) <= 80, written
    wide = await shown("list", COLUMNS="180", NO_COLOR="1")
    assert slug in wide and created["id"] in wide and "CREATED" in wide
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]", wide)

    for command in TABLES:
        piped = await cli(*command, COLUMNS="20", NO_COLOR="")
        written = piped.out + piped.err
        assert piped.out or piped.status == 2, written
        assert not FRAMES.search(written) and "\x1b" not in written and "…" not in written, written
    assert "━" in await shown("migrate", "upgrade")
    # for awk: the last word of the second line
    assert (await cli("list")).out.splitlines()[1].split()[-1] == created["id"]
