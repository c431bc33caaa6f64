"""The program accepts the examples on the page about the command line."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main

from tenancy_orm.cli.app import app

PAGE = Path(__file__).parents[3] / "docs" / "cli.md"
EXAMPLES = [
    line for block in re.findall(r"```sh\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL) for line in block.splitlines()
]


def parse(line: str) -> None:
    """Parse a command line as the program does, without running the command."""
    program, *arguments = shlex.split(line, comments=True)
    assert program == "tenancy"
    command: Any = typer.main.get_command(app)
    while subcommands := getattr(command, "commands", None):
        command = subcommands[arguments.pop(0)]
    command.make_context(command.name, arguments)


@pytest.mark.parametrize("line", EXAMPLES)
def test_the_program_accepts_the_example(line: str) -> None:
    """Its command exists and takes these arguments and options."""
    parse(line)


def test_an_option_that_does_not_exist_is_refused() -> None:
    """So the test above notices a wrong example."""
    with pytest.raises(Exception, match="No such option"):
        parse("tenancy keys issue acme --scopes notes:read")
