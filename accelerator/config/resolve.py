"""Laying the layers over each other: one value and one origin per setting."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, get_type_hints

from strategies.errors import ConfigurationError, nearest

from .layers import (
    CONFIG_VARIABLE,
    FILE_NAME,
    Layer,
    code_layer,
    environment_layer,
    file_layer,
    flags_layer,
    strategy_names,
)
from .settings import LaunchSettings, Settings, catalogue
from .values import Given, convert

if TYPE_CHECKING:
    from strategies.base import Strategy


@dataclass(frozen=True)
class Resolved:
    """Settings, and where each came from.

    `origins` maps every dotted name (`seed`, `launch.nnodes`, `ddp.bucket_cap_mb`) to `"default"`,
    `"accelerator.toml line 3"`, `"ACCELERATOR_SEED"`, `"--seed"` or `"code"`. Options of a strategy that
    nobody gave are not in it.
    """

    settings: Settings
    origins: Mapping[str, str]
    options: Mapping[str, Mapping[str, Given]] = field(repr=False)
    strategy_in_code: Strategy | type[Strategy] | None = field(default=None, repr=False)

    def strategy_for(self, name: str) -> Strategy:
        """The strategy called `name`, built from its options in all layers.

        `name` is `settings.strategy`, or what `auto` came to. An instance given in code is returned as it is.
        Raises `ConfigurationError` for an unknown option or one of the wrong type.
        """
        from strategies.base import Strategy
        from strategies.registry import resolve

        asked = self.strategy_in_code if name == self.settings.strategy else None
        if isinstance(asked, Strategy):
            return asked
        return _build(name, asked or resolve(name), self.options.get(name, {}))


def resolve_settings(
    code: Mapping[str, object],
    *,
    config: str | os.PathLike[str] | None = None,
    environ: Mapping[str, str],
    directory: Path,
) -> Resolved:
    """Merge defaults, file, environment, launch flags and code, in this order; the last one given wins.

    `code` holds the arguments that a script really gave. `config` names the file in code; without it,
    `--config`, then `ACCELERATOR_CONFIG`, then `accelerator.toml` in the project directory and in
    `directory` are tried. Raises `ConfigurationError` for anything unknown, ill-typed or contradictory.
    """
    code, asked, in_code = _strategy_in_code(code)
    above = environment_layer(environ) | flags_layer(environ) | code_layer(code)
    flag = above.pop("config", None)
    path = _config_path(config, flag, above.get("project_dir"), environ, directory)
    layer = (file_layer(path, directory) if path else {}) | above
    if in_code and not isinstance(asked, type):
        layer = {name: given for name, given in layer.items() if name.rpartition(".")[0] != in_code}

    values = {
        name: convert(name, layer[name], hint, item.metadata)
        for name, (item, hint) in catalogue().items()
        if name in layer
    }
    options: dict[str, dict[str, Given]] = {}
    for name in layer.keys() - catalogue().keys():
        strategy, _, option = name.rpartition(".")
        options.setdefault(strategy, {})[option] = layer[name]
    settings = _settings(values, options)
    _check(settings, layer, asked)
    origins = dict.fromkeys(catalogue(), "default") | {name: given.origin for name, given in layer.items()}
    return Resolved(settings, MappingProxyType(origins), MappingProxyType(options), asked)


def _strategy_in_code(
    code: Mapping[str, object],
) -> tuple[Mapping[str, object], Strategy | type[Strategy] | None, str | None]:
    """`code` with a strategy class or instance replaced by its name, that object, and its name."""
    asked = code.get("strategy", "auto")
    if isinstance(asked, str):
        return code, None, None
    from strategies.base import Strategy
    from strategies.registry import BUILT_IN

    kind: Any = asked if isinstance(asked, type) else type(asked)
    if not issubclass(kind, Strategy):
        raise ConfigurationError(
            f"strategy is {asked!r} (code); expected a name, a subclass of Strategy or an instance of one."
        )
    path = f"{kind.__module__}:{kind.__qualname__}"
    name = next((name for name, target in BUILT_IN.items() if target == path), path)
    return {**code, "strategy": name}, asked, name  # type: ignore[return-value]  # issubclass above, through Any


def _config_path(
    code: str | os.PathLike[str] | None,
    flag: Given | None,
    project_dir: Given | None,
    environ: Mapping[str, str],
    directory: Path,
) -> Path | None:
    explicit = (
        (code, "config="),
        (flag.value if flag else None, "--config"),
        (environ.get(CONFIG_VARIABLE) or None, CONFIG_VARIABLE),
    )
    for value, origin in explicit:
        if value is None:
            continue
        path = directory / str(os.fspath(value))  # type: ignore[call-overload]  # a flag's value is a str
        if not path.is_file():
            raise ConfigurationError(f"config is {str(value)!r} ({origin}); expected the path of a TOML file.")
        return path
    project = Path(str(project_dir.value)) if project_dir and project_dir.value else Path()
    for folder in (directory / project, directory):
        if (folder / FILE_NAME).is_file():
            return folder / FILE_NAME
    return None


def _settings(values: Mapping[str, Any], options: Mapping[str, Mapping[str, Given]]) -> Settings:
    launch = {name.partition(".")[2]: value for name, value in values.items() if "." in name}
    own = {name: value for name, value in values.items() if "." not in name}
    written = {
        strategy: MappingProxyType({option: given.value for option, given in table.items()})
        for strategy, table in options.items()
    }
    return Settings(**own, launch=LaunchSettings(**launch), strategy_options=MappingProxyType(written))


def _check(settings: Settings, layer: Layer, asked: object) -> None:
    steps, batch = layer.get("gradient_accumulation_steps"), layer.get("global_batch_size")
    if steps and batch and settings.global_batch_size is not None:
        raise ConfigurationError(
            f"gradient_accumulation_steps is {steps.value!r} ({steps.origin}) and global_batch_size is "
            f"{batch.value!r} ({batch.origin}); expected one of the two, since each gives the other. Remove one."
        )
    if settings.first_step_timeout is not None and settings.hang_timeout is None:
        raise ConfigurationError(
            f"first_step_timeout is {settings.first_step_timeout} ({layer['first_step_timeout'].origin}) and "
            "hang_timeout is None; expected both, or hang_timeout alone"
        )
    from strategies.registry import BUILT_IN

    name = settings.strategy
    if asked is not None or ":" in name or name == "auto" or name in BUILT_IN:
        return  # before the metadata of every installed package is read
    names = ["auto", *strategy_names()]
    if name not in names:
        raise ConfigurationError(
            f"strategy is {name!r} ({layer['strategy'].origin}); expected one of {', '.join(names)}, or "
            f"'package.module:Class'.{nearest(name.lower(), names)}"
        )


def _build(name: str, kind: type[Strategy], options: Mapping[str, Given]) -> Strategy:
    known = {item.name: item for item in fields(kind) if item.init}
    hints = get_type_hints(kind) if options else {}
    values: dict[str, Any] = {}
    for option, given in options.items():
        if option not in known:
            raise ConfigurationError(
                f"{name}.{option} is set ({given.origin}), but {kind.__name__} has no such setting; "
                f"expected one of {', '.join(known) or 'none: it has no settings'}.{nearest(option, known)}"
            )
        values[option] = convert(f"{name}.{option}", given, hints[option], known[option].metadata)
    try:
        return kind(**values)
    except (ConfigurationError, TypeError) as error:
        origins = ", ".join(f"{option} from {given.origin}" for option, given in options.items()) or "no options given"
        raise ConfigurationError(f"strategy {name!r} cannot be built ({origins}): {error}") from error
