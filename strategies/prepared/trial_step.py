"""Whether an optimizer can step on its parameters, sharded or on torch_xla: asked of itself, before any work."""

from __future__ import annotations

import copy
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
            before = [whole(parameter).clone() for parameter in parameters]
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                for _ in range(2):
                    type(optimizer).step(trial, lambda: 0.0)
            results.append([whole(after) - old for after, old in zip(parameters, before, strict=True)])
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        reason = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
        where = "sharded parameters" if has_shards else f"parameters on {held[0].device.type}"
        fused = any(group.get("fused") for group in optimizer.param_groups)
        advice = "Leave out fused=True." if fused else f"Of torch, {WORKING} can."
        raise PrepareError(
            f"{type(optimizer).__name__} cannot step on {where}: {reason[:200].rstrip('.')}. {advice}"
        ) from error
    for one, cut in zip(*results, strict=True) if has_shards else ():
        if not torch.allclose(one, cut, rtol=1e-3, atol=1e-3 * float(one.abs().max()), equal_nan=True):
            raise PrepareError(
                f"{type(optimizer).__name__} gives other numbers on sharded parameters than on whole ones: after two "
                f"trial steps they differ by up to {float((one - cut).abs().max()):.1e}. Of torch, {WORKING} do not."
            )


def _trial_of(optimizer: Optimizer, *, sharded: bool) -> tuple[Any, list[Tensor]]:
    """A copy of `optimizer` that holds small parameters instead, and these."""
    groups: list[dict[str, Any]] = []
    state: dict[Tensor, Any] = defaultdict(dict)
    memo: dict[int, Any] = {}
    for group in optimizer.param_groups:
        held = []
        for parameter in group["params"]:
            memo[id(parameter)] = torch.zeros(())  # wherever else the optimizer keeps it
        for parameter in _of_each_kind(group["params"]):
            small = memo[id(parameter)] = _small(parameter, sharded=sharded)
            held.append(small)
            if parameter in optimizer.state:
                state[small] = {
                    name: _small_state(value, parameter, small) for name, value in optimizer.state[parameter].items()
                }
        rate = {"lr": torch.tensor(0.1) if isinstance(group.get("lr"), Tensor) else 0.1} if "lr" in group else {}
        groups.append({**group, **rate, "params": held})  # a schedule may begin at 0
    trial: Any = object.__new__(type(optimizer))
    for name, value in vars(optimizer).items():
        if name not in ("state", "param_groups") and not name.startswith("_optimizer_"):  # hooks wait for real steps
            trial.__dict__[name] = _copied(value, memo)
    trial.state, trial.param_groups = state, groups
    trial._optimizer_step_pre_hooks, trial._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
    return trial, [parameter for group in groups for parameter in group["params"]]


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """A deep copy, so that nothing of the user's is changed; the thing itself where it cannot be copied."""
    try:
        return copy.deepcopy(value, memo)
    except Exception:
        return value


def _of_each_kind(parameters: list[Tensor]) -> list[Tensor]:
    """One parameter for every number of dimensions, dtype and cut, and for every length that leaves ranks without."""
    kinds = {(p.ndim, p.dtype, p.requires_grad, is_sharded(p), _short_length(p)): p for p in parameters}
    return list(kinds.values())


def _short_length(parameter: Tensor) -> int | None:
    """The length of a parameter that is shorter than the number of ranks it is cut over: some hold nothing of it."""
    if not is_sharded(parameter) or parameter.ndim == 0:
        return None
    cut = [size for size, how in zip(parameter.device_mesh.shape, parameter.placements, strict=True) if how.is_shard()]
    return parameter.shape[0] if parameter.shape[0] < math.prod(cut) else None


def _small(parameter: Tensor, *, sharded: bool) -> Tensor:
    """A parameter of a few numbers with a gradient, of as many dimensions, cut alike if `sharded`."""
    size = [4 if parameter.ndim <= 2 else 2] * parameter.ndim
    short = _short_length(parameter)
    size = size if short is None else [short, *size[1:]]
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
