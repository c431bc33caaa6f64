"""Times on the command line, such as 7d."""

from __future__ import annotations

from datetime import timedelta

import pytest
import typer

from tenancy_orm.cli.runtime import duration


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, None),
        ("90s", timedelta(seconds=90)),
        ("30m", timedelta(minutes=30)),
        (" 12h ", timedelta(hours=12)),
        ("1.5d", timedelta(days=1.5)),
    ],
)
def test_a_duration_is_a_number_and_a_unit(text: str | None, expected: timedelta | None) -> None:
    assert duration(text) == expected


@pytest.mark.parametrize("text", ["", "7", "d", "-1d", "7 days", "0d", "1e3d", "nand", "٣d", "36501d", "9" * 12 + "d"])
def test_what_is_none_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With the forms that there are."""
    with pytest.raises(typer.Exit):
        duration(text)
    assert "write 90s, 30m, 12h or 7d, at most 36500 days" in " ".join(capsys.readouterr().err.split())


def test_the_bound_of_the_option_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """Not a larger one that another check refuses."""
    for text, days, expected in (
        ("8d", 7, "'8d' is too long: write 90s, 30m, 12h or 7d, at most 7 days"),
        ("10", 7, "'10' is not a time: write 90s, 30m, 12h or 7d, at most 7 days"),
        ("2d", 1, "'2d' is too long: write 90s, 30m or 12h, at most 1 day"),
    ):
        with pytest.raises(typer.Exit):
            duration(text, longest=timedelta(days=days))
        assert expected in capsys.readouterr().err
