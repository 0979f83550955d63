"""From a raw value (TOML, text, code) to a setting's type, or an error that says what was expected."""

from __future__ import annotations

import json
import os
import re
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

from strategies.errors import ConfigurationError, nearest

NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "text", type(None): "none"}

PLAIN = {bool, int, str, type(None)}
SWITCHES = dict.fromkeys(("true", "1", "yes", "on"), True) | dict.fromkeys(("false", "0", "no", "off"), False)


@dataclass(frozen=True)
class Given:
    """A value as one layer gave it.

    `kind` decides how strict conversion is: a `"text"` (variable, flag) is parsed, a `"file"` value must
    have the right TOML type, a `"code"` value the right Python type. `origin` is shown to people.
    """

    value: object
    origin: str
    kind: Literal["file", "text", "code"]


def describe(hint: object, *, minimum: object = None, maximum: object = None, form: str | None = None) -> str:
    """What a value of the type `hint` looks like, in words; `form` stands for a text of some form."""
    arguments, origin = get_args(hint), get_origin(hint)
    if origin is Literal:
        return "one of " + ", ".join(repr(option) for option in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(part, minimum=minimum, maximum=maximum, form=form) for part in arguments)
    if origin in (tuple, list, set, frozenset):
        inner = " or ".join(describe(part) for part in dict.fromkeys(arguments) if part is not Ellipsis)
        return f"a list of {inner}"
    words = NAMES.get(hint, getattr(hint, "__name__", str(hint))) if isinstance(hint, type) else str(hint)
    if minimum is not None and hint in (int, float):
        return f"{words} >= {minimum}" + (f" and <= {maximum}" if maximum is not None else "")
    return form if form is not None and hint is str else words


def convert(name: str, given: Given, hint: object, metadata: Mapping[str, Any]) -> object:
    """`given` as a value of the type `hint`.

    Raises `ConfigurationError` with the name, the value, its origin and what was expected.
    """
    minimum, maximum, form = metadata.get("minimum"), metadata.get("maximum"), metadata.get("form")
    below = True
    try:
        value = _validate(given, hint)
    except (ValueError, TypeError):  # a TypeError comes from a TOML date, which JSON has not
        valid = False
    else:
        below = maximum is None or not isinstance(value, int) or value <= maximum
        valid = (minimum is None or not isinstance(value, (int, float)) or value >= minimum) and (
            form is None or not isinstance(value, str) or re.fullmatch(form.pattern, value) is not None
        )
    if valid and below:
        return value
    expected = describe(hint, minimum=minimum, maximum=None if below else maximum, form=form.words if form else None)
    choices = [option for option in _literals(hint) if isinstance(option, str)]
    did_you_mean = nearest(given.value, choices) if isinstance(given.value, str) else ""
    raise ConfigurationError(f"{name} is {given.value!r} ({given.origin}); expected {expected}.{did_you_mean}")


def _literals(hint: object) -> list[object]:
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    return [option for part in get_args(hint) for option in _literals(part)]


def _validate(given: Given, hint: Any) -> object:
    value = os.fspath(given.value) if isinstance(given.value, os.PathLike) else given.value
    if set(_leaves(hint)) <= PLAIN:
        return _plain(value, hint, given.kind)
    adapter = _adapter(hint)
    if given.kind == "code":
        return adapter.validate_python(value, strict=True)
    if given.kind == "file":
        # TOML has no tuples: strict JSON knows that an array may be one, strict Python does not.
        return adapter.validate_json(json.dumps(value), strict=True)
    text = str(value)
    if text[:1] in ("[", "{"):
        return adapter.validate_json(text)
    try:
        return adapter.validate_python(text)
    except ValueError:
        if text.lower() != "none":
            raise
        return adapter.validate_python(None)


def _leaves(hint: Any) -> list[Any]:
    """The members of a union, a literal's as its type; anything else is one leaf."""
    if get_origin(hint) in (Union, types.UnionType):
        return [leaf for part in get_args(hint) for leaf in _leaves(part)]
    return [type(option) for option in get_args(hint)] if get_origin(hint) is Literal else [hint]


def _plain(value: object, hint: Any, kind: str) -> object:
    """Convert without pydantic, whose import is a tenth of what starting a job of two processes costs.

    Raises `ValueError` if `value` is none of the types in `hint`.
    """
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for part in sorted(parts, key=lambda part: part is str):  # for any text or nothing, "none" is nothing
        options = get_args(part) or None
        wanted = type(options[0]) if options else part
        found = _parse(value, wanted) if kind == "text" and isinstance(value, str) else value
        if type(found) is wanted and (options is None or found in options):
            return found
    raise ValueError(value)


def _parse(text: str, wanted: type) -> object:
    """`text` as a value of the type `wanted` if it is one, else the text itself."""
    if wanted is int and re.fullmatch(r"\s*[+-]?\d+\s*", text):
        return int(text)
    if wanted is bool:
        return SWITCHES.get(text.strip().lower(), text)
    return None if wanted is type(None) and text.lower() == "none" else text


def _adapter(hint: Any) -> Any:
    from pydantic import ConfigDict, PydanticUserError, TypeAdapter  # costs 0.05 s, which importing us must not

    try:
        return TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
    except PydanticUserError:  # dataclasses and models bring a configuration of their own
        return TypeAdapter(hint)
