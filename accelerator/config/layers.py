"""The layers a value can come from: the file, the environment, the launch flags and the code."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from strategies.errors import ConfigurationError, nearest

from .settings import catalogue
from .toml import line_of, read_toml
from .values import Given

PREFIX = "ACCELERATOR_"
CONFIG_VARIABLE = "ACCELERATOR_CONFIG"
FLAGS_VARIABLE = "ACCELERATOR_LAUNCH_FLAGS"
FILE_NAME = "accelerator.toml"

Layer = dict[str, Given]
"""Values by dotted name: `seed`, `launch.nnodes`, `ddp.bucket_cap_mb`, `package.module:Class.size`."""


def strategy_names() -> list[str]:
    """Names that a table or a variable may carry for the options of a strategy."""
    from strategies.registry import known_names

    return known_names()


def file_layer(path: Path, directory: Path) -> Layer:
    """The values of a TOML file, each with its line as origin."""
    shown = os.path.relpath(path, directory)
    shown = str(path) if shown.startswith("..") else shown
    table, text = read_toml(path, shown)
    layer: Layer = {}
    for keys, value in _flatten(table, shown, text):
        number = line_of(text, keys)
        origin = f"{shown} line {number}" if number else shown
        layer[".".join(keys)] = Given(value, origin, "file")
    return layer


def _flatten(table: Mapping[str, object], shown: str, text: str) -> Iterator[tuple[tuple[str, ...], object]]:
    single = [name for name in catalogue() if "." not in name]
    for key, value in table.items():
        where = f"{shown} line {line_of(text, (key,))}"
        if key in single:
            yield (key,), value
            continue
        launch = [name.partition(".")[2] for name in catalogue() if "." in name]
        if key != "launch" and ":" not in key and key not in (strategies := strategy_names()):
            kind = "table" if isinstance(value, dict) else "setting"
            raise ConfigurationError(
                f"{where} has an unknown {kind} {key!r}; expected a setting ({', '.join(single)}), [launch], "
                f"or a table named after a strategy ({', '.join(strategies)}, 'package.module:Class')."
                f"{nearest(key, [*single, 'launch', *strategies])}"
            )
        if not isinstance(value, dict):
            raise ConfigurationError(f"{key} is {value!r} ({where}); expected a table: [{key}] and a line per option.")
        for option, inner in value.items():
            if key == "launch" and option not in launch:
                raise ConfigurationError(
                    f"{shown} line {line_of(text, (key, option))} has an unknown key {option!r} in [launch]; "
                    f"expected one of {', '.join(launch)}.{nearest(option, launch)}"
                )
            yield (key, option), inner


def environment_layer(environ: Mapping[str, str]) -> Layer:
    """The values of the `ACCELERATOR_*` variables. An unknown one is an error: it would be a setting ignored."""
    layer: Layer = {}
    for variable in sorted(environ):
        if variable.startswith(PREFIX) and variable not in (CONFIG_VARIABLE, FLAGS_VARIABLE):
            layer[_dotted(variable)] = Given(environ[variable], variable, "text")
    return layer


def _dotted(variable: str) -> str:
    name = variable.removeprefix(PREFIX).lower().replace("__", ".", 1)
    if name in catalogue():
        return name
    table, _, option = name.partition(".")
    names = strategy_names()
    by_lower_case = {strategy.lower(): strategy for strategy in names}
    if option and table in by_lower_case:
        return f"{by_lower_case[table]}.{option}"
    scope = [variable_of(setting) for setting in catalogue() if ("." in setting) == (table == "launch")]
    candidates = [variable_of(setting) for setting in catalogue()] + [CONFIG_VARIABLE]
    candidates += [f"{PREFIX}{strategy.upper()}__{option.upper()}" for strategy in names if option]
    raise ConfigurationError(
        f"{variable} is set, but no setting has that name; expected one of {', '.join(scope)}, "
        f"{CONFIG_VARIABLE}, or {PREFIX}<TABLE>__<KEY>.{nearest(variable, candidates)} Unset it or correct its name."
    )


def flags_layer(environ: Mapping[str, str]) -> Layer:
    """The flags that `accelerator launch` passed on to this process, as JSON in one variable."""
    text = environ.get(FLAGS_VARIABLE)
    if text is None:
        return {}
    try:
        flags = json.loads(text)
    except json.JSONDecodeError as error:
        flags = error
    if not (isinstance(flags, dict) and flags.keys() <= {*catalogue(), "config"}):
        raise ConfigurationError(
            f"{FLAGS_VARIABLE} is {text!r}; expected what `accelerator launch` writes there. "
            "It is no setting: unset it."
        )
    return {name: Given(value, flag_of(name), "text") for name, value in flags.items()}


def code_layer(code: Mapping[str, object]) -> Layer:
    """The arguments that the script gave. `strategy` may be a class or an instance; the others have settings' types."""
    single = [name for name in catalogue() if "." not in name]
    for name in code:
        if name not in single:
            raise ConfigurationError(
                f"{name} was given in code; expected one of {', '.join(single)}.{nearest(name, single)}"
            )
    return {name: Given(value, "code", "code") for name, value in code.items()}


def variable_of(name: str) -> str:
    """The environment variable of a setting, from its dotted name."""
    return PREFIX + name.replace(".", "__").upper()


def flag_of(name: str) -> str:
    """The launch flag of a setting, from its dotted name."""
    return "--" + name.rpartition(".")[2].replace("_", "-")
