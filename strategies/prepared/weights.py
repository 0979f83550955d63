"""Weights of a prepared model: loaded from a whole state dict, and looked at before they are used."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..deferred_init import EMPTY
from ..errors import listed
from ..shards import copy_whole, is_sharded, local

_log = logging.getLogger("accelerator")


class LoadingWhole(TorchFunctionMode):
    """Inside, a whole value is copied into a sharded tensor as this rank's part of it. Not a collective.

    torch's own `load_state_dict`, with all its hooks, so loads what every rank has whole.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.copy_ and is_sharded(args[0]) and not is_sharded(args[1]):
            copy_whole(args[1], args[0])
            return args[0]
        return func(*args, **(kwargs or {}))


def empty_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Parameters that were built with `init_module(empty=True)`, to be loaded."""
    return {name: parameter for name, parameter in model.named_parameters() if hasattr(parameter, EMPTY)}


def warn_of_empty(model: str, parameters: Mapping[str, Tensor]) -> None:
    """Warn of those that nothing was loaded into."""
    parts = {name: local(parameter.detach()) for name, parameter in parameters.items()}
    unloaded = [name for name, part in parts.items() if part.numel() and bool(part.isnan().all())]
    if unloaded:
        _log.warning(
            "%s was built with init_module(empty=True), and nothing was loaded into %s: they are NaN",
            model,
            listed(unloaded),
        )
