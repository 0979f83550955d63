"""From what a script asks for to trackers: a name, `package.module:Class`, or one it has made itself."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from importlib import metadata

from strategies.errors import ConfigurationError, nearest
from strategies.registry import load_class

from .tracker import Tracker

ENTRY_POINT_GROUP = "accelerator.trackers"

# By name: the class, and the package that its extra installs.
BUILT_IN = {
    "jsonl": ("accelerator.trackers.jsonl:JSONLines", None),
    "tensorboard": ("accelerator.trackers.tensorboard:TensorBoard", "tensorboard"),
    "wandb": ("accelerator.trackers.wandb:WandB", "wandb"),
    "mlflow": ("accelerator.trackers.mlflow:MLflow", "mlflow"),
    "trackio": ("accelerator.trackers.trackio:Trackio", "trackio"),
}


def known_names() -> list[str]:
    """Names that `resolve` accepts, built-in ones first; `package.module:Class` works besides."""
    registered = {entry.name for entry in metadata.entry_points(group=ENTRY_POINT_GROUP)}
    return [*BUILT_IN, *sorted(registered - BUILT_IN.keys())]


def resolve(asked: Sequence[str | Tracker], origin: str) -> list[Tracker]:
    """The trackers behind names; those made already stay as they are. `origin` is shown in errors.

    Raises `ConfigurationError` for an unknown name, for one that is no tracker, and for one whose package is not
    installed, naming the extra.
    """
    found = []
    for item in asked:
        if isinstance(item, Tracker):
            _check_installed(item, origin)
            found.append(item)
        else:
            found.append(_made(item, origin))
    return found


def name_of(tracker: Tracker) -> str:
    """The name under which a tracker is built in, else where its class is."""
    kind = type(tracker)
    path = f"{kind.__module__}:{kind.__qualname__}"
    return next((name for name, (built_in, _) in BUILT_IN.items() if built_in == path), path)


def _made(name: str, origin: str) -> Tracker:
    if name in BUILT_IN:
        path, _ = BUILT_IN[name]
    elif ":" in name:
        path = name
    else:
        entries = {entry.name: entry.value for entry in metadata.entry_points(group=ENTRY_POINT_GROUP)}
        if name not in entries:
            options = known_names()
            raise ConfigurationError(
                f"trackers names {name!r} ({origin}); expected {', '.join(options)} or 'package.module:Class'."
                f"{nearest(name.lower(), options)}"
            )
        path = entries[name]
    kind: type[Tracker] = load_class(path, Tracker, f"trackers names {name!r} ({origin})")  # type: ignore[type-abstract]
    tracker = kind()
    _check_installed(tracker, origin)
    return tracker


def _check_installed(tracker: Tracker, origin: str) -> None:
    name = name_of(tracker)
    _, package = BUILT_IN.get(name, ("", None))
    if package is not None and importlib.util.find_spec(package) is None:
        raise ConfigurationError(
            f"trackers names {name!r} ({origin}), but {package} is not installed. "
            f"Install it: pip install 'torch-accelerator[{package}]'."
        )
