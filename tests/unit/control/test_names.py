"""Identifiers are unique, quoted and short, whatever the input."""

from __future__ import annotations

from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenancy_orm.control.names import Names
from tenancy_orm.postgres.quoting import MAX_IDENTIFIER_BYTES, quote_identifier, quote_literal

INSTALLATION = UUID("0e6d1a3c-59a0-4f6c-9d59-0123456789ab")
prefixes = st.from_regex(r"[a-z][a-z0-9]{0,11}", fullmatch=True)


@given(prefix=prefixes, installation=st.uuids(), tenant=st.uuids(), digits=st.text("0123456789abcdef", min_size=16))
def test_every_name_fits_and_is_plain(prefix: str, installation: UUID, tenant: UUID, digits: str) -> None:
    """At most 63 bytes of a-z, 0-9 and underscores: PostgreSQL truncates longer ones, and two could become equal."""
    names = Names(prefix, installation)
    made = [names.owner, names.tenant(tenant), names.template(digits), names.scratch(digits), names.retired(digits)]
    assert len(set(made)) == len(made)
    for name in made:
        assert len(name.encode()) <= MAX_IDENTIFIER_BYTES
        assert name.replace("_", "").isalnum() and name == name.lower() and name.isascii()
        assert quote_identifier(name) == f'"{name}"'


@given(first=st.uuids(), second=st.uuids())
def test_names_of_different_tenants_differ(first: UUID, second: UUID) -> None:
    """Each can be parsed to its tenant's id."""
    names = Names("tenancy", INSTALLATION)
    assert (names.tenant(first) == names.tenant(second)) == (first == second)
    assert names.parse(names.tenant(first)) == first


@given(st.text())
def test_only_names_of_this_installation_are_parsed(name: str) -> None:
    """Another installation's database on the same server is not recognised."""
    names = Names("tenancy", INSTALLATION)
    assert names.parse(name) is None
    assert names.parse(Names("tenancy", UUID(int=7)).tenant(UUID(int=1))) is None
    assert names.parse(names.tenant(UUID(int=1)) + "\n") is None
    assert names.parse(names.template("abcdef123456")) is None
    assert names.parse(names.retired("ab" * 16)) is None


@pytest.mark.parametrize(
    ("name", "quoted"), [("a", '"a"'), ('a"; DROP DATABASE x; --', '"a""; DROP DATABASE x; --"'), ("Ä b", '"Ä b"')]
)
def test_identifiers_are_quoted(name: str, quoted: str) -> None:
    """A quote inside is doubled."""
    assert quote_identifier(name) == quoted


@pytest.mark.parametrize("name", ["", "a\x00b", "a" * 64, "ä" * 32])
def test_what_is_no_identifier_is_refused(name: str) -> None:
    """By length in bytes, not in characters."""
    with pytest.raises(ValueError, match="1 to 63 bytes"):
        quote_identifier(name)


@pytest.mark.parametrize(("text", "quoted"), [("it's", "E'it''s'"), ("\\'", "E'\\\\'''"), ("", "E''")])
def test_literals_are_quoted(text: str, quoted: str) -> None:
    """Backslashes are data, whatever the server's settings."""
    assert quote_literal(text) == quoted


def test_a_nul_cannot_be_a_literal() -> None:
    """PostgreSQL has no such string."""
    with pytest.raises(ValueError, match="NUL"):
        quote_literal("a\x00")
