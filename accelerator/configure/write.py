"""Writing `accelerator.toml`: the values that were given, beside a comment on every setting."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path

from accelerator.config import Resolved, resolve_settings
from accelerator.config.settings import catalogue
from strategies.errors import ConfigurationError

WIDTH = 110


def render(values: Mapping[str, object], notes: Sequence[str] = ()) -> str:
    """The text of a file with these values by dotted name; settings that are not given stand there as comments."""
    lines = [
        "# Settings of torch-accelerator. Variables, launch flags and code come before this file; "
        "`accelerator config show`",
        "# prints every value with its origin. A line that begins with # holds a default.",
    ]
    lines += [line for name in catalogue() if "." not in name for line in _setting(name, values)]
    lines += ["", "[launch]  # read by `accelerator launch`"]
    lines += [line for name in catalogue() if name.startswith("launch.") for line in _setting(name, values)]
    for strategy in _strategies(values):
        lines += ["", f"[{_key(strategy)}]", *_options(strategy, values)]
    if notes:
        lines += ["", *(f"# {line}" for note in notes for line in note.splitlines())]
    return "\n".join(lines) + "\n"


def _strategies(values: Mapping[str, object]) -> list[str]:
    """Those with options, and the one that is chosen."""
    chosen = values.get("strategy", "auto")
    named = dict.fromkeys(name.rpartition(".")[0] for name in values if name not in catalogue() and "." in name)
    return list(dict.fromkeys([*named, *([str(chosen)] if chosen != "auto" else [])]))


def _setting(name: str, values: Mapping[str, object]) -> Iterator[str]:
    item, _ = catalogue()[name]
    yield ""
    yield f"# {item.metadata['help']}"
    key = name.rpartition(".")[2]
    if name in values and values[name] is not None:
        yield f"{key} = {literal(values[name])}"
    else:
        yield f"# {key} = {literal(item.default)}" if item.default is not None else f"# {key} ="


def _options(strategy: str, values: Mapping[str, object]) -> Iterator[str]:
    """The fields of the strategy: what they mean is in its docstring."""
    from strategies.registry import resolve

    kind = resolve(strategy)
    yield f"# options of {kind.__name__} ({kind.__module__}); help({kind.__name__}) says what they mean"
    for item in fields(kind):
        name = f"{strategy}.{item.name}"
        if values.get(name) is not None:
            yield f"{item.name} = {literal(values[name])}"
        else:
            yield f"# {item.name} = {literal(item.default)}" if _has_literal(item.default) else f"# {item.name} ="


def _has_literal(value: object) -> bool:
    return isinstance(value, (bool, int, float, str, tuple, list))


def literal(value: object) -> str:
    """A TOML literal. JSON's are the same for these types, once no character is escaped as a surrogate pair."""
    if not _has_literal(value):
        raise ConfigurationError(f"{value!r} cannot be written to a file; expected text, numbers, switches or lists")
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _key(name: str) -> str:
    return name if name.replace("_", "").isalnum() else json.dumps(name)


def save(text: str, path: Path, *, overwrite: bool) -> Resolved:
    """Write a configuration as a whole or not at all, after reading it back; what it resolves to.

    Raises `ConfigurationError` if the file is there already, cannot be written, or does not resolve: a strategy
    that is named is built.
    """
    if path.exists() and not overwrite:
        raise ConfigurationError(f"{path} is there already. Give --overwrite to replace it, or --output for another.")
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be written: {error.strerror}. Give --output PATH.") from error
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        resolved = resolve_settings({}, config=temporary, environ={}, directory=path.parent)
        if resolved.settings.strategy != "auto":
            resolved.strategy_for(resolved.settings.strategy)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        os.unlink(temporary)
        raise ConfigurationError(f"{path} cannot be written: {error.strerror}. Give --output PATH.") from error
    except BaseException:
        os.unlink(temporary)
        raise
    return resolved
