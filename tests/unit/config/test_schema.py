"""The JSON Schema of a settings file."""

from __future__ import annotations

import json

from tenancy_orm import TenancyConfig
from tenancy_orm.config.schema import json_schema
from tenancy_orm.config.validation import settings_of


def test_every_setting_has_a_description() -> None:
    """For editors to show; it is the same that the documentation shows."""
    schema = json_schema()
    for path in settings_of(TenancyConfig):
        found = schema["properties"]
        for section in path[:-1]:
            found = schema["$defs"][found[section]["$ref"].rpartition("/")[2]]["properties"]
        assert found[path[-1]].get("description"), path


def test_nothing_is_required_and_nothing_unknown_allowed() -> None:
    """Credentials come from elsewhere; a misspelt key is an error in an editor too."""
    schema = json_schema()
    assert "required" not in schema
    assert schema["additionalProperties"] is False
    assert all(schema["$defs"][name]["additionalProperties"] is False for name in ("PoolConfig", "_TierTable"))


def test_descriptions_are_about_files() -> None:
    """A TOML file has no None, and tables in place of text with separators."""
    text = json.dumps(json_schema())
    assert not any(word in text for word in ("None", "As text:", "``"))
