"""Whether an optimizer can step on sharded parameters: asked of itself, before any work is lost."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..errors import PrepareError
from ..shards import is_sharded, local

WORKING = "AdamW, Adam, SGD (without fused), Adagrad, RMSprop, NAdam, RAdam and Adamax"


def refuse_unless_it_steps(optimizer: Optimizer) -> None:
    """Take two steps with the optimizer's settings on small parameters, cut as its own are. Collective.

    Raises `PrepareError` if a step fails. The optimizer and its parameters are not touched.
    """
    trial: Any = object.__new__(type(optimizer))
    trial.__dict__.update(vars(optimizer))
    trial.state = defaultdict(dict)
    trial._optimizer_step_pre_hooks = OrderedDict()  # the user's hooks wait for the real step
    trial._optimizer_step_post_hooks = OrderedDict()
    trial.param_groups = [
        {**group, "params": [_small(parameter) for parameter in _of_each_kind(group["params"])]}
        for group in optimizer.param_groups
    ]
    loss = 0.0
    try:
        for _ in range(2):
            type(optimizer).step(trial, lambda: loss)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise PrepareError(
            f"{type(optimizer).__name__} cannot step on sharded parameters: {reason[:200]}. Of torch, {WORKING} can."
        ) from error


def _of_each_kind(parameters: list[Tensor]) -> list[Tensor]:
    """One parameter for every number of dimensions, dtype and cut."""
    kinds = {(p.ndim, p.dtype, p.requires_grad, is_sharded(p)): p for p in parameters}
    return list(kinds.values())


def _small(parameter: Tensor) -> Tensor:
    """A parameter of ones with a gradient, as many dimensions and the same cut."""
    small = torch.ones([2] * parameter.ndim, dtype=parameter.dtype, device=local(parameter).device)
    if is_sharded(parameter):
        from torch.distributed.tensor import distribute_tensor

        small = distribute_tensor(small, parameter.device_mesh, parameter.placements, src_data_rank=None)
    leaf = torch.nn.Parameter(small, requires_grad=parameter.requires_grad)
    if parameter.requires_grad:
        leaf.grad = torch.ones_like(leaf)
    return leaf
