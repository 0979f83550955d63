"""From the name of a strategy in a configuration to its class.

A name is a built-in one, `package.module:Class`, or one that an installed package registers under the
entry-point group `accelerator.strategies`. Classes are imported only when asked for.
"""

from __future__ import annotations

import importlib
from importlib import metadata
from typing import TYPE_CHECKING, TypeVar

from .errors import ConfigurationError, nearest

if TYPE_CHECKING:
    from .base import Strategy

T = TypeVar("T")
ENTRY_POINT_GROUP = "accelerator.strategies"

BUILT_IN = {
    "cpu": "strategies.single:CPU",
    "single": "strategies.single:SingleDevice",
    "ddp": "strategies.ddp:DDP",
    "fsdp": "strategies.fsdp:FSDP",
    "xla": "strategies.xla:XLA",
}


def known_names() -> list[str]:
    """Names that `resolve` accepts, built-in ones first; `package.module:Class` works besides."""
    registered = {entry.name for entry in metadata.entry_points(group=ENTRY_POINT_GROUP)}
    return [*BUILT_IN, *sorted(registered - BUILT_IN.keys())]


def resolve(name: str) -> type[Strategy]:
    """The strategy class behind `name`.

    Raises `ConfigurationError` for an unknown name (naming the nearest), for a module or attribute that
    does not exist, and for something that is not a subclass of `Strategy`.
    """
    if name in BUILT_IN:
        return _load(name, BUILT_IN[name])
    if ":" in name:
        return _load(name, name)
    for entry in metadata.entry_points(group=ENTRY_POINT_GROUP):
        if entry.name == name:
            return _load(name, entry.value)
    options = ["auto", *known_names()]
    raise ConfigurationError(
        f"strategy is {name!r}; expected one of {', '.join(options)}, or 'package.module:Class'."
        f"{nearest(name.lower(), options)}"
    )


def _load(name: str, path: str) -> type[Strategy]:
    from .base import Strategy

    return load_class(path, Strategy, f"strategy is {name!r}")  # type: ignore[type-abstract]  # a class below it


def load_class(path: str, base: type[T], said: str) -> type[T]:
    """The class at `package.module:Class`, below `base`. `said` begins errors: which setting has which value.

    Raises `ConfigurationError` for a module or attribute that does not exist, and for anything else than such a class.
    """
    module_name, _, attribute = path.partition(":")
    if not module_name or not attribute:
        raise ConfigurationError(f"{said}; expected 'package.module:Class' with both parts")
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigurationError(
            f"{said}, but {path!r} cannot be imported: {error}. "
            "Expected 'package.module:Class' of an importable module."
        ) from error
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ConfigurationError(f"{said}, but {path!r} is {found!r}; expected a subclass of {base.__name__}")
    return found
