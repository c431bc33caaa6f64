"""How settings are checked: by pydantic, and reported as this package's own error, without a value in it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from difflib import SequenceMatcher, get_close_matches
from typing import TYPE_CHECKING, Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from ..errors import SettingError

MODEL = ConfigDict(
    extra="forbid",
    arbitrary_types_allowed=True,
    # a value may be a secret
    hide_input_in_errors=True,
    allow_inf_nan=False,
)

UNKNOWN = "there is no such setting"
NO_TABLE = "must be a table of settings"

_SLIP = 0.9  # as like as a name with one letter too many or too few
_SAME_LIKENESS = 0.05  # names that are as like a misspelt one as this are all suggested


# pydantic's own words where they say less than these
_REASONS = {
    "extra_forbidden": UNKNOWN,
    "missing": "is missing",
    "greater_than": "must be above {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than_equal": "must be at most {le:g}",
    "finite_number": "must be a finite number",
    "int_parsing": "must be a whole number",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "model_type": NO_TABLE,
    "model_attributes_type": NO_TABLE,
    "dict_type": "must be a table",
}


class _Checked:
    """Has pydantic's errors reported as this package's own, which hold no value; a base before pydantic's."""

    if not TYPE_CHECKING:  # type checkers see the arguments that the fields make

        def __init__(self, **values: Any) -> None:
            """Check the values."""
            error = None
            # pydantic-settings has arguments of its own, which begin so and read from elsewhere
            if unknown := [name for name in values if name.startswith("_")]:
                raise SettingError(dict.fromkeys(unknown, UNKNOWN))
            try:
                super().__init__(**values)
            except ValidationError as exc:
                error = setting_error(exc, known=settings_of(type(self)))
            # outside of the handler: pydantic's error holds the values, and would be this one's context
            if error is not None:
                raise error

        def __setattr__(self, name: str, value: object) -> None:
            """Refuse every change. The message of pydantic's own error has the value in it."""
            raise AttributeError(f"{type(self).__name__} is frozen; use replace({name}=...)")

        def __delattr__(self, name: str) -> None:
            """Refuse every change."""
            raise AttributeError(f"{type(self).__name__} is frozen")


class Section(_Checked, BaseModel, frozen=True):
    """A part of the configuration. It is frozen, and checked when it is made.

    Raises:
        SettingError: a setting is malformed, or there is none of that name.
    """

    model_config = MODEL

    def replace(self, **changes: Any) -> Self:
        """Return a copy with ``changes``.

        Raises:
            SettingError: as the constructor.
        """
        return type(self)(**replaced(self, changes))


def replaced(model: BaseModel, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that ``model`` was made of, with ``changes``; a mapping changes a section setting by setting."""
    values = {name: getattr(model, name) for name in model.model_fields_set}
    for name, change in changes.items():
        current = getattr(model, name, None)
        if isinstance(current, Section) and isinstance(change, Mapping):
            try:
                change = current.replace(**change)
            except SettingError as exc:
                raise SettingError({f"{name}.{inner}": reason for inner, reason in exc.problems.items()}) from None
        values[name] = change
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
    names = sorted({".".join(path[:end]) for path in known for end in range(1, len(path) + 1)})
    problems: dict[str, str] = {}
    cause = None
    for found in error.errors(include_url=False, include_input=False):
        for setting, reason in _problems_of(found, above, names):
            problems.setdefault(setting, reason)
        # what an application's own module raised when it was imported
        cause = cause or getattr(found.get("ctx", {}).get("error"), "__cause__", None)
    result = SettingError(problems)
    result.__cause__ = cause
    return result


def _problems_of(found: ErrorDetails, above: tuple[str, ...], names: list[str]) -> Iterator[tuple[str, str]]:
    setting = ".".join((*above, *map(str, found["loc"])))
    raised = found.get("ctx", {}).get("error")
    if isinstance(raised, SettingError):
        for inner, reason in raised.problems.items():
            full = f"{setting}.{inner}".strip(".")
            # a section knows its own settings alone
            yield full, UNKNOWN + suggestion(full, names) if names and reason.startswith(UNKNOWN) else reason
    elif isinstance(raised, ValueError):
        yield setting, str(raised)
    else:
        template = _REASONS.get(found["type"])
        reason = template.format(**found.get("ctx", {})) if template else found["msg"]
        if found["type"] == "extra_forbidden":
            reason += suggestion(setting, names)
        yield setting, reason


def suggestion(name: str, names: Iterable[str], *, shown_with: str = "") -> str:
    """Return "; did you mean ...?" with the ``names`` that end as ``name`` does or are most like it, or nothing.

    Args:
        name: What was written.
        names: What could have been meant.
        shown_with: What each of them begins with.
    """
    by_name = {known.lower(): known for known in sorted(names)}
    name = name.lower()
    likely = [known for known in by_name if known.endswith((f".{name}", f"_{name}"))]
    close = get_close_matches(name, by_name, n=3, cutoff=_SLIP if likely else 0.75)
    if close:
        best = _likeness(name, close[0])
        likely = [known for known in close if best - _likeness(name, known) < _SAME_LIKENESS] + likely
    return f"; did you mean {' or '.join(shown_with + by_name[known] for known in likely)}?" if likely else ""


def _likeness(one: str, other: str) -> float:
    return SequenceMatcher(None, one, other).ratio()
