"""Weights of a prepared model: loaded from a whole state dict, and looked at before they are used."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..deferred_init import EMPTY
from ..errors import StateError
from ..shards import copy_whole, is_sharded, local, whole

_log = logging.getLogger("accelerator")


class IncompatibleKeys(NamedTuple):
    """What `load_state_dict(strict=False)` left out, as torch's does."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def load(model: nn.Module, state: Mapping[str, Any], *, strict: bool) -> IncompatibleKeys:
    """Load whole values, which every rank has, into a model whose parameters may be sharded. Not a collective.

    Values that are sharded as the parameters are may be given instead. Raises `StateError` with every name that
    does not fit, before anything is written.
    """
    targets = model.state_dict()
    missing = [name for name in targets if name not in state]
    unexpected = [name for name in state if name not in targets]
    reshaped = [
        f"{name} is {tuple(state[name].shape)} and should be {tuple(target.shape)}"
        for name, target in targets.items()
        if name in state and isinstance(target, Tensor) and state[name].shape != target.shape
    ]
    kinds = [("other shapes", reshaped)]
    if strict:
        kinds = [("missing", missing), ("unexpected", unexpected), *kinds]
    wrong = [f"{kind} ({len(names)}): {_listed(names)}" for kind, names in kinds if names]
    if wrong:
        raise StateError(
            f"the state dict does not fit {type(model).__name__}, of which nothing was loaded. {'; '.join(wrong)}"
        )
    for name, target in targets.items():
        value = state.get(name)
        if not isinstance(value, Tensor) or not isinstance(target, Tensor):
            continue
        if is_sharded(value) and is_sharded(target) and _cut_alike(value, target):
            local(target).copy_(local(value))
        else:
            copy_whole(whole(value), target)
    return IncompatibleKeys(missing, unexpected)


def empty_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Parameters that were built with `init_module(empty=True)`, to be loaded."""
    return {name: parameter for name, parameter in model.named_parameters() if hasattr(parameter, EMPTY)}


def warn_of_empty(model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
    """Warn of those that nothing was loaded into."""
    parts = {name: local(parameter.detach()) for name, parameter in parameters.items()}
    unloaded = [name for name, part in parts.items() if part.numel() and bool(part.isnan().all())]
    if unloaded:
        _log.warning(
            "%s was built with init_module(empty=True), and nothing was loaded into %s: they are NaN",
            type(model).__name__,
            _listed(unloaded),
        )


def _cut_alike(one: Any, other: Any) -> bool:
    return bool(one.device_mesh == other.device_mesh and one.placements == other.placements)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:20]) + (f", and {len(names) - 20} more" if len(names) > 20 else "")
