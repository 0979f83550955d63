"""Whether the fields of a strategy hold what their types say, asked where it is constructed in code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .errors import ConfigurationError

_WORDS = {bool: "True or False", int: "a whole number", float: "a number", str: "a name", NoneType: "None"}


def check_types(settings: Any, owner: type) -> None:
    """Raise `ConfigurationError` for a field of the dataclass `owner` that is not of its type in `settings`.

    A list counts as a tuple, one name as a tuple of it, a class among names as its name, and 1e8 as a whole number.
    """
    hints = get_type_hints(owner)
    for field in fields(owner):
        value, hint = getattr(settings, field.name), hints[field.name]
        if hint == tuple[str, ...]:
            value = (value,) if isinstance(value, str | type) else value
            value = [one.__name__ if isinstance(one, type) else one for one in value] if _many(value) else value
        value = tuple(value) if isinstance(value, list) else value
        if hint is int and isinstance(value, float) and value.is_integer():
            value = int(value)  # 1e8
        if not _fits(value, hint):
            *others, last = _words(hint)
            expected = f"{', '.join(others)} or {last}" if others else last
            raise ConfigurationError(f"{field.name} is {value!r}; expected {expected}")
        object.__setattr__(settings, field.name, value)  # the dataclass is frozen


def _many(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _fits(value: Any, hint: Any) -> bool:
    kind, parts = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if kind is Literal:
        return isinstance(value, str) and value in parts
    if kind is tuple:
        same = parts[:1] * len(value) if isinstance(value, tuple) and Ellipsis in parts else parts
        return isinstance(value, tuple) and len(value) == len(same) and all(map(_fits, value, same))
    if kind is Callable:
        return callable(value)
    if hint in (int, float):
        return isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
    return isinstance(value, hint) if isinstance(hint, type) else True


def _words(hint: Any) -> list[str]:
    """What a value may be, each way in words."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        return [word for part in parts for word in _words(part)]
    if kind is Literal:
        return [repr(part) for part in parts]
    if kind is tuple:
        return ["a tuple of names" if parts[0] is str else f"a tuple of {len(parts)} whole numbers"]
    if kind is Callable:
        return ["a function"]
    return [_WORDS.get(hint, str(hint))]
