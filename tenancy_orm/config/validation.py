"""How settings are checked: by pydantic, and reported as this package's own error, without a value in it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from ..errors import SettingError

MODEL = ConfigDict(
    frozen=True,
    extra="forbid",
    arbitrary_types_allowed=True,
    # a value may be a secret
    hide_input_in_errors=True,
    allow_inf_nan=False,
)

_UNKNOWN = "there is no such setting"

# pydantic's own words where they say less than these
_REASONS = {
    "extra_forbidden": _UNKNOWN,
    "missing": "is missing",
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than_equal": "must be at most {le}",
    "int_parsing": "must be a whole number",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "model_type": "must be a table of settings",
    "model_attributes_type": "must be a table of settings",
    "dict_type": "must be a table",
}


class Section(BaseModel):
    """A part of the configuration. It is frozen, and checked when it is made.

    Raises:
        SettingError: a setting is malformed, or there is none of that name.
    """

    model_config = MODEL

    if not TYPE_CHECKING:  # type checkers see the arguments that the fields make

        def __init__(self, **values: Any) -> None:
            """Check the values."""
            error = None
            try:
                super().__init__(**values)
            except ValidationError as exc:
                error = setting_error(exc, known=settings_of(type(self)))
            # outside of the handler: pydantic's error holds the values, and would be this one's context
            if error is not None:
                raise error

    def replace(self, **changes: Any) -> Self:
        """Return a copy with ``changes``.

        Raises:
            SettingError: as the constructor.
        """
        return type(self)(**replaced(self, changes))


def replaced(model: BaseModel, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that ``model`` was made of, with ``changes``; a mapping changes a section setting by setting."""
    values = {name: getattr(model, name) for name in type(model).model_fields}
    for name, change in changes.items():
        current = values.get(name)
        values[name] = (
            current.replace(**change) if isinstance(current, Section) and isinstance(change, Mapping) else change
        )
    return values


def settings_of(model: type[BaseModel], above: tuple[str, ...] = ()) -> dict[tuple[str, ...], type[BaseModel]]:
    """Every setting as its path, ``("pool", "max_connections")``, and the model that has it; sections are none."""
    found: dict[tuple[str, ...], type[BaseModel]] = {}
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            found.update(settings_of(field.annotation, (*above, name)))
        else:
            found[(*above, name)] = model
    return found


def sections_of(model: type[BaseModel]) -> frozenset[str]:
    """The dotted names of the sections."""
    return frozenset(".".join(path[:-1]) for path in settings_of(model) if len(path) > 1)


def setting_error(
    error: ValidationError, above: tuple[str, ...] = (), *, known: Iterable[tuple[str, ...]] = ()
) -> SettingError:
    """What pydantic found, with each setting by its dotted name and without any value.

    Args:
        error: What a validation raised.
        above: The path of what was validated.
        known: The paths of all settings, for a suggestion where one does not exist.
    """
    names = [".".join(path) for path in known]
    problems: dict[str, str] = {}
    for found in error.errors(include_url=False, include_input=False):
        for setting, reason in _problems_of(found, above, names):
            problems.setdefault(setting, reason)
    return SettingError(problems)


def _problems_of(found: ErrorDetails, above: tuple[str, ...], names: list[str]) -> Iterator[tuple[str, str]]:
    setting = ".".join((*above, *map(str, found["loc"])))
    raised = found.get("ctx", {}).get("error")
    if isinstance(raised, SettingError):
        for inner, reason in raised.problems.items():
            full = f"{setting}.{inner}".strip(".")
            # a section knows its own settings alone
            yield full, _UNKNOWN + suggestion(full, names) if names and reason.startswith(_UNKNOWN) else reason
    elif isinstance(raised, ValueError):
        yield setting, str(raised)
    else:
        template = _REASONS.get(found["type"])
        reason = template.format(**found.get("ctx", {})) if template else found["msg"]
        if found["type"] == "extra_forbidden":
            reason += suggestion(setting, names)
        yield setting, reason


def suggestion(name: str, names: Iterable[str]) -> str:
    """Return "; did you mean ...?" where one of ``names`` is much like ``name`` or ends as it does; else nothing."""
    names = list(names)
    ends = [known for known in names if known.endswith((f".{name}", f"_{name}"))]
    close = ends or get_close_matches(name, names, n=1, cutoff=0.75)
    return f"; did you mean {close[0]}?" if close else ""
