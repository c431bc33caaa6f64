"""Names in SQL, and in the options of PostgreSQL's programs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tenancy_orm.postgres.programs import Programs
from tenancy_orm.postgres.quoting import quote_pattern, quote_qualified


def test_each_part_of_a_qualified_name_is_quoted() -> None:
    """A schema may be left out."""
    assert quote_qualified("my.schema", 'a"b') == '"my.schema"."a""b"'
    assert quote_qualified(None, "notes") == '"notes"'
    with pytest.raises(ValueError, match="1 to 63 bytes"):
        quote_qualified("public", "")


def test_a_pattern_matches_its_name_alone() -> None:
    """``*``, ``?`` and full stops mean themselves between quotation marks."""
    assert quote_pattern('a*."b') == '"a*.""b"'


def test_a_dump_and_its_restore_have_no_owners_and_rights() -> None:
    """They would name roles of another server."""
    programs = Programs(Path("/bin"), 17)
    assert {"--no-owner", "--no-acl"} <= set(programs.dump_command("--schema=s", snapshot="1"))
    assert programs.dump_command("--schema=s", snapshot="1")[-2:] == ["--snapshot=1", "--schema=s"]
    assert not any(option.startswith("--snapshot") for option in programs.dump_command(snapshot=None))
    assert programs.restore_command("d", exact=True)[1:] == ["--exit-on-error", "--no-owner", "--no-acl", "--dbname=d"]
    assert "--exit-on-error" not in programs.restore_command("d", exact=False)
