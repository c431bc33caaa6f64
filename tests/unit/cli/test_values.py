"""Values of PostgreSQL in JSON and CSV."""

from __future__ import annotations

from datetime import timedelta
from decimal import Decimal

import pytest

from tenancy_orm.cli.values import csv_lines, distinct, parameter, plain, shown


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (timedelta(0), "PT0S"),
        (timedelta(days=-1, hours=1), "-PT82800S"),
        (timedelta(days=2, microseconds=5), "P2DT0.000005S"),
        (Decimal("0.1"), 0.1),
        (Decimal("-12.500"), -12.5),
        (Decimal("1E+30"), 1e30),
        (Decimal("0.1000000000000000055"), "0.1000000000000000055"),
        (Decimal(9007199254740993), "9007199254740993"),
        (Decimal("Infinity"), "Infinity"),
        (float("nan"), "nan"),
        (memoryview(b"\x00\xff"), "\\x00ff"),
        ([[1, None], [Decimal(2)]], [[1, None], [2]]),
    ],
)
def test_a_value_is_what_json_has(value: object, expected: object) -> None:
    """Exact, or text."""
    assert plain(value) == expected


def test_csv_is_not_calculated() -> None:
    """What begins a formula gets an apostrophe, in headings as well; numbers do not."""
    rows = [["=1+1", "-5", -5, None, "@x", "a,b", 'say "hi"', "\tx", "+49 30", "\r=x"]]
    header, row = csv_lines(["=h", *"bcdefghij"], rows)
    assert header == "'=h,b,c,d,e,f,g,h,i,j\n"
    assert row == '\'=1+1,-5,-5,,\'@x,"a,b","say ""hi""",\'\tx,\'+49 30,"\'\r=x"\n'


def test_names_and_parameters() -> None:
    """Repeated columns keep all their values; a parameter is a number only where JSON says so."""
    assert distinct(["a", "a", "b", "a_2", "a"]) == ["a", "a_2", "b", "a_2_2", "a_3"]
    texts = ("5", "-1.5", "true", "null", "01", "[1]", '"x"', "", "NaN x")
    assert [parameter(text) for text in texts] == [5, -1.5, True, None, "01", "[1]", '"x"', "", "NaN x"]
    assert (shown(None), shown(True), shown(None, 114), shown("[1]", 3802)) == (None, "true", None, "[1]")
