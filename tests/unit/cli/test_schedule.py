"""Times on the command line."""

from __future__ import annotations

import re

import pytest

from tenancy_orm.cli.schedule import parse_time
from tenancy_orm.errors import ConfigurationError


@pytest.mark.parametrize("text", ["2027-01-31", "2027-01-31T12:30"])
def test_a_time_without_an_offset_is_refused_with_one_that_works(text: str) -> None:
    """Whoever follows the advice succeeds."""
    with pytest.raises(ConfigurationError, match="has no offset from UTC") as caught:
        parse_time(text)
    advice = re.search(r"write (\S+), for example", str(caught.value))
    assert advice and parse_time(advice[1]) is not None
