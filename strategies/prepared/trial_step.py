"""Whether an optimizer can step on its parameters, sharded or on torch_xla: asked of itself, before any work."""

from __future__ import annotations

import math
from collections import OrderedDict, defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..errors import PrepareError
from ..shards import cut_like, is_sharded, local, whole

WORKING = "AdamW, Adam, SGD (without fused), Adagrad, RMSprop, NAdam, RAdam and Adamax"


def refuse_unless_it_steps(optimizer: Optimizer) -> None:
    """Take two steps with the optimizer's settings on small parameters, cut as its own are and whole. Collective.

    Raises `PrepareError` if a step fails, or gives other numbers on cut parameters than on whole ones. The optimizer
    and its parameters are not touched.
    """
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    has_shards = any(is_sharded(parameter) for parameter in held)
    results = []
    try:
        for sharded in (False, True) if has_shards else (False,):
            trial, parameters = _trial_of(optimizer, sharded=sharded)
            for _ in range(2):
                type(optimizer).step(trial, lambda: 0.0)
            results.append([whole(parameter) for parameter in parameters])
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        where = "sharded parameters" if has_shards else f"parameters on {held[0].device.type}"
        fused = any(group.get("fused") for group in optimizer.param_groups)
        advice = "Leave out fused=True." if fused else f"Of torch, {WORKING} can."
        raise PrepareError(
            f"{type(optimizer).__name__} cannot step on {where}: {reason[:200].rstrip('.')}. {advice}"
        ) from error
    for one, cut in zip(*results, strict=True) if has_shards else ():
        if not torch.allclose(one, cut, rtol=1e-3, atol=1e-5, equal_nan=True):
            raise PrepareError(
                f"{type(optimizer).__name__} gives other numbers on sharded parameters than on whole ones: after two "
                f"trial steps they differ by up to {float((one - cut).abs().max()):.1e}. Of torch, {WORKING} do not."
            )


def _trial_of(optimizer: Optimizer, *, sharded: bool) -> tuple[Any, list[Tensor]]:
    """A copy of `optimizer` that holds small parameters instead, and these."""
    trial: Any = object.__new__(type(optimizer))
    trial.__dict__.update(vars(optimizer))
    trial.state = defaultdict(dict)
    trial._optimizer_step_pre_hooks = OrderedDict()  # the user's hooks wait for the real step
    trial._optimizer_step_post_hooks = OrderedDict()
    trial.param_groups = []
    for group in optimizer.param_groups:
        held = []
        for parameter in _of_each_kind(group["params"]):
            small = _small(parameter, sharded=sharded)
            held.append(small)
            if parameter in optimizer.state:
                trial.state[small] = {
                    name: _small_state(value, parameter, small) for name, value in optimizer.state[parameter].items()
                }
        trial.param_groups.append({**group, "params": held})
    return trial, [parameter for group in trial.param_groups for parameter in group["params"]]


def _of_each_kind(parameters: list[Tensor]) -> list[Tensor]:
    """One parameter for every number of dimensions, dtype and cut."""
    kinds = {(p.ndim, p.dtype, p.requires_grad, is_sharded(p)): p for p in parameters}
    return list(kinds.values())


def _small(parameter: Tensor, *, sharded: bool) -> Tensor:
    """A parameter of a few numbers with a gradient, of as many dimensions, cut alike if `sharded`."""
    size = [4 if parameter.ndim <= 2 else 2] * parameter.ndim
    numbers = torch.linspace(-1.0, 2.0, math.prod(size))
    numbers = numbers.reshape(size).to(local(parameter).device, parameter.dtype)
    leaf = torch.nn.Parameter(_as(numbers, parameter, sharded=sharded), requires_grad=parameter.requires_grad)
    if parameter.requires_grad:
        leaf.grad = _as(numbers * numbers + 0.5, parameter, sharded=sharded)
    return leaf


def _small_state(value: Any, parameter: Tensor, small: Tensor) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.ones_like(small).detach() if value.shape == parameter.shape else value.clone()


def _as(numbers: Tensor, parameter: Tensor, *, sharded: bool) -> Tensor:
    return cut_like(numbers, parameter.detach()) if sharded else numbers
