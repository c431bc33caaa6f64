"""What a tenant of the walk owns: values that nobody else has, the ids of its objects, and bodies made of them."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, Final
from uuid import UUID, uuid4

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
_TIME = re.compile(r"\d{4}-\d\d-\d\d([T ]\d\d:\d\d.*)?")
_CALLED_ID = re.compile(r"(^|_)(id|uuid|pk|key|ref)$|Id$")
_SHORTEST_TEXT: Final = 12
_SMALLEST_NUMBER: Final = 100_000
_DEPTH: Final = 6

NAMES_OF_TENANTS: Final = frozenset(
    f"{noun}{end}"
    for noun in (
        *("tenant", "org", "organisation", "organization", "team", "workspace", "account", "customer", "company"),
        *("site", "client", "store", "shop", "project_slug"),
    )
    for end in ("", "_id", "_slug", "_name", "_key", "Id", "Slug")
)
"""What applications call a tenant in paths, queries and bodies."""


def singular(noun: str) -> str:
    """Return what one of ``noun`` is called: ``note`` of ``notes``, ``company`` of ``companies``."""
    text = noun.lower().replace("-", "_")
    if text.endswith("ies"):
        return text[:-3] + "y"
    for end in ("sses", "xes", "ches", "shes"):
        if text.endswith(end):
            return text[:-2]
    return text[:-1] if text.endswith("s") and not text.endswith("ss") else text


class Known:
    """What is known of one tenant's objects, by the names that paths, queries and bodies have for them."""

    def __init__(self) -> None:
        self._values: dict[tuple[str, str], dict[Any, None]] = {}

    def add(self, noun: str, field: str, value: Any) -> None:
        """Keep a value of a field of one kind of object."""
        if isinstance(value, (str, int, UUID)) and not isinstance(value, bool) and value != "":
            found = self._values.setdefault((singular(noun), field), {})
            found.setdefault(value)

    def read(self, document: Any, noun: str) -> None:
        """Keep what an answer has: ``noun`` is what its objects are, as the path says."""
        for kind, field, value in _fields(document, noun):
            self.add(kind, field, value)

    def ids(self) -> dict[str, Any]:
        """Return an id of each kind of object that is known."""
        return {noun: next(iter(values)) for (noun, name), values in self._values.items() if name == "id"}

    def candidates(self, name: str, noun: str | None, *, kind: str = "str", but: Known | None = None) -> list[Any]:
        """Return values for a parameter or a field, the likeliest first.

        Args:
            name: What it is called: ``id``, ``note_id``, ``slug``.
            noun: What it is one of, as the path says.
            kind: The convertor of a parameter in a path.
            but: Values that another tenant has as well come last: they prove nothing.
        """
        stem = singular(re.sub(r"(_id|_uuid|_pk|_slug|_key|Id)$", "", name)) if name not in ("id", "pk") else None
        own = singular(noun) if noun else None
        places = [(stem, "id"), (own, name), (own, "id"), (stem, name)]
        found: dict[Any, None] = {}
        for place in places:
            found |= self._values.get((place[0] or "", place[1]), {})
        if stem is not None:
            for (_, known_field), values in self._values.items():
                if known_field == name:
                    found |= values
        if not found and (_CALLED_ID.search(name) or stem is None):
            for (_, known_field), values in self._values.items():
                if known_field == "id":
                    found |= values
        usable = [value for value in found if _is_of_kind(value, kind)]
        if but is not None:
            shared = set(but.candidates(name, noun, kind=kind))
            usable.sort(key=lambda value: value in shared)
        return usable


class Owned:
    """Everything that one tenant of the walk has, and nobody else.

    Args:
        slug: The tenant's slug.
        tenant_id: Its id.
    """

    def __init__(self, slug: str, tenant_id: UUID) -> None:
        self.slug = slug
        self.tenant_id = tenant_id
        self.mark = f"mx{secrets.token_hex(5)}"
        self.known = Known()
        self._labels: dict[str, str] = {slug: "the tenant's slug", str(tenant_id): "the tenant's id"}
        self._learned: dict[str, str] = {}
        self._number = 0

    # --- values to send and to plant ----------------------------------------------------------------------------------

    def text(self, name: str = "text", *, length: int | None = None) -> str:
        """Return a text that nobody else has; of the form that a field of this name has."""
        self._number += 1
        value = f"{self.mark}{self._number:x}"
        lower = name.lower()
        if length is not None and length < len(value):
            # too short to be told from others' texts
            return secrets.token_hex(length)[:length]
        if length is None or length >= len(value) + 20:
            if "email" in lower:
                value += "@example.com"
            elif lower.endswith(("url", "uri", "link", "href", "website")):
                value = f"https://example.com/{value}"
        return value

    def id(self, noun: str) -> Any:
        """Return the id of one of its objects: ``id("notes")``.

        Raises:
            LookupError: none is known.
        """
        found = self.known.ids()
        if singular(noun) not in found:
            raise LookupError(f"no id of {noun!r} is known, only of {', '.join(sorted(found)) or 'nothing'}")
        return found[singular(noun)]

    # --- evidence -----------------------------------------------------------------------------------------------------

    def claim(self, value: Any, label: str) -> None:
        """Count a value that was planted as one that only this tenant has, if it can be told from others'."""
        if isinstance(value, str) and self.mark not in value and not _UUID.fullmatch(value):
            return
        if (text := _distinct(value)) is not None:
            self._labels.setdefault(text, label)

    def learn(self, document: Any, noun: str, *, label: str) -> None:
        """Keep what its own answers have."""
        self.known.read(document, noun)
        for kind, field, value in _fields(document, noun):
            if (text := _distinct(value)) is not None and (not text.isdigit() or _CALLED_ID.search(field)):
                self._learned.setdefault(text, f"{singular(kind)}.{field} of {label}")

    def assign(self, other: Owned) -> None:
        """Count what its answers had as its own as well, but for what another tenant's answers had too."""
        for value in self._labels.keys() & (other._labels.keys() | other._learned.keys()):
            del self._labels[value]
        for value, label in self._learned.items():
            if value not in other._learned and value not in other._labels:
                self._labels.setdefault(value, label)

    def spend(self, text: str) -> None:
        """No longer count what somebody else has written down: it proves nothing where it is read again."""
        for value in [value for value in self._labels if value in text]:
            del self._labels[value]

    def shown_in(self, text: str, *, sent: str = "") -> tuple[str, ...]:
        """Return what of this tenant an answer shows that the caller has not sent, by where it comes from."""
        found = [
            label
            for value, label in self._labels.items()
            if value in text and value not in sent and _whole(value, text)
        ]
        if self.mark in text and self.mark not in sent and not found:
            found.append("a text that only it has")
        return tuple(dict.fromkeys(found))


def _whole(value: str, text: str) -> bool:
    # a number must not be taken for a part of a longer one
    return not value.isdigit() or re.search(rf"(?<![0-9a-zA-Z]){value}(?![0-9a-zA-Z])", text) is not None


def _distinct(value: Any) -> str | None:
    if isinstance(value, UUID):
        return str(value)
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return str(value) if value >= _SMALLEST_NUMBER else None
    if isinstance(value, str) and len(value) >= _SHORTEST_TEXT and not _TIME.fullmatch(value):
        return value
    return None


def _fields(document: Any, noun: str, depth: int = _DEPTH) -> Iterator[tuple[str, str, Any]]:
    """Every field of every object in a document: what the object is, the field, and its value."""
    if not depth:
        return
    if isinstance(document, list):
        for one in document[:200]:
            if isinstance(one, (str, int)):
                yield noun, "value", one
            yield from _fields(one, noun, depth)
    elif isinstance(document, Mapping):
        for name, value in document.items():
            field = str(name)
            if isinstance(value, (Mapping, list)):
                generic = field in ("items", "data", "results", "rows", "objects", "records", "content", "values")
                yield from _fields(value, noun if generic else field, depth - 1)
            elif value is not None:
                yield noun, field, value
                stem = re.sub(r"(_id|Id)$", "", field)
                if stem != field and stem:
                    yield stem, "id", value


def _is_of_kind(value: Any, kind: str) -> bool:
    if kind == "int":
        return isinstance(value, int) or (isinstance(value, str) and value.isdecimal())
    if kind == "uuid":
        return isinstance(value, UUID) or (isinstance(value, str) and _UUID.fullmatch(value) is not None)
    return not (isinstance(value, str) and "/" in value) or kind == "path"


def made_up(value: Any) -> Any:
    """Return a value like this one that nobody has."""
    text = str(value)
    if _UUID.fullmatch(text):
        return str(uuid4())
    if text.isdecimal():
        return 1_900_000_000 + secrets.randbelow(99_000_000)
    return f"nobody{secrets.token_hex(6)}"


# --- bodies -----------------------------------------------------------------------------------------------------------


def body_of(schema: Mapping[str, Any], ids: Owned, texts: Owned, *, all_fields: bool, noun: str | None) -> Any:
    """Return a value that a JSON schema admits.

    Args:
        schema: With its references resolved.
        ids: The tenants that own the objects named in it.
        texts: Who says so: texts are of this tenant.
        all_fields: Whether optional fields have a value as well.
        noun: What the path says that it is about.
    """
    return _Maker(ids, texts, all_fields).make(schema, noun or "text", noun, _DEPTH)


class _Maker:
    def __init__(self, ids: Owned, texts: Owned, all_fields: bool) -> None:
        self._ids = ids
        self._texts = texts
        self._all_fields = all_fields

    def make(self, schema: Mapping[str, Any], name: str, noun: str | None, depth: int) -> Any:
        schema = _chosen(schema)
        if "const" in schema:
            return schema["const"]
        if schema.get("enum"):
            return schema["enum"][0]
        kind = schema.get("type")
        kind = next((one for one in kind if one != "null"), "null") if isinstance(kind, list) else kind
        if kind == "object" or "properties" in schema:
            return self._object(schema, noun, depth)
        if kind == "array":
            count = max(1, schema.get("minItems", 1)) if depth else schema.get("minItems", 0)
            return [self.make(schema.get("items", {}), singular(name), noun, depth - 1) for _ in range(count)]
        if kind == "boolean":
            return schema.get("default", True)
        if kind in ("integer", "number"):
            return self._number(schema, name, noun, integer=kind == "integer")
        if kind == "null":
            return None
        return self._text(schema, name, noun)

    def _object(self, schema: Mapping[str, Any], noun: str | None, depth: int) -> dict[str, Any]:
        required = set(schema.get("required", ()))
        made = {
            name: self.make(inner, name, noun, depth - 1)
            for name, inner in schema.get("properties", {}).items()
            if (name in required or (self._all_fields and depth > _DEPTH - 3)) and not inner.get("readOnly")
        }
        if not schema.get("properties") and schema.get("additionalProperties", True):
            made["text"] = self._texts.text()
        return made

    def _candidates(self, name: str, noun: str | None, kind: str) -> list[Any]:
        if name in NAMES_OF_TENANTS:
            wanted = self._ids.tenant_id if name.lower().endswith("id") else self._ids.slug
            return [wanted] if _is_of_kind(wanted, kind) else []
        if not _CALLED_ID.search(name):
            return []
        return self._ids.known.candidates(name, noun, kind=kind)

    def _number(self, schema: Mapping[str, Any], name: str, noun: str | None, *, integer: bool) -> int | float:
        found = self._candidates(name, noun, "int") if integer else []
        if found:
            return int(found[0])
        least = schema.get("minimum", schema.get("exclusiveMinimum", 0) + 1 if "exclusiveMinimum" in schema else 1)
        most = schema.get("maximum", schema.get("exclusiveMaximum", least))
        value = min(max(least, 1), most) if most >= least else least
        return int(value) if integer else float(value)

    def _text(self, schema: Mapping[str, Any], name: str, noun: str | None) -> Any:
        form = schema.get("format")
        found = self._candidates(name, noun, "uuid" if form == "uuid" else "str")
        if found and form in (None, "uuid"):
            return str(found[0])
        now = datetime.now(UTC)
        formats: dict[Any, Callable[[], str]] = {
            "uuid": lambda: str(uuid4()),
            "date-time": now.isoformat,
            "date": lambda: now.date().isoformat(),
            "time": lambda: now.time().isoformat(),
            "email": lambda: self._texts.text("email"),
            "uri": lambda: self._texts.text("url"),
            "url": lambda: self._texts.text("url"),
            "duration": lambda: "PT1H",
            "ipv4": lambda: "192.0.2.1",
        }
        if form in formats:
            return formats[form]()
        if schema.get("pattern") and "default" in schema:
            return schema["default"]
        text = self._texts.text(name, length=schema.get("maxLength"))
        return text.ljust(schema.get("minLength", 0), "x")


def _chosen(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return one of the alternatives of a schema, and all of its parts in one."""
    for name in ("anyOf", "oneOf"):
        options: Iterable[Mapping[str, Any]] = schema.get(name, ())
        if usable := [one for one in options if one.get("type") != "null"]:
            return _chosen({**schema, **usable[0], name: ()})
    if schema.get("allOf"):
        merged: dict[str, Any] = {}
        for part in schema["allOf"]:
            chosen = _chosen(part)
            properties = {**merged.get("properties", {}), **chosen.get("properties", {})}
            required = [*merged.get("required", ()), *chosen.get("required", ())]
            merged = {**merged, **chosen, "properties": properties, "required": required}
        return merged
    return schema
