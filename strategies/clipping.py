"""Clip gradients that are already reduced, rescaled and unscaled.

Where gradients are sharded, torch's own functions run every small operation through the dispatcher of
DTensor, refuse sharded and whole gradients together, and refuse gradients on different meshes. Here each
rank computes on its own parts, and one all-reduce per kind of cut makes the norm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import StepError
from .shards import is_sharded, local, sum_over_shards


def clip_grad_norm(parameters: Sequence[Tensor], max_norm: float, norm_type: float = 2.0) -> Tensor:
    """Scale gradients in place so that their joint norm is at most `max_norm`.

    Every rank calls it. Returns the norm before scaling: a scalar on the gradients' device, the same value
    on every rank. Follows Pascanu et al. 2013, arXiv:1211.5063, section 3.2, as
    `torch.nn.utils.clip_grad_norm_` does.
    """
    _check_bound("max_norm", max_norm)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not any(is_sharded(gradient) for gradient in gradients):
        # The halves of torch's clip_grad_norm_, which torch_xla replaces by one that reads values for norm_type=inf.
        total = torch.nn.utils.get_total_norm(gradients, norm_type)
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, total)
        return total
    total = total_norm(parameters, norm_type)
    torch._foreach_mul_([local(gradient) for gradient in gradients], (max_norm / (total + 1e-6)).clamp(max=1.0))
    return total


def total_norm(parameters: Sequence[Tensor], norm_type: float = 2.0) -> Tensor:
    """The joint norm of the gradients: a scalar on their device, the same on every rank, all of which call it."""
    held = [parameter for parameter in parameters if parameter.grad is not None]
    gradients = [parameter.grad for parameter in held if parameter.grad is not None]
    if not any(is_sharded(gradient) for gradient in gradients):
        dense = [gradient.coalesce().values() if gradient.is_sparse else gradient for gradient in gradients]
        return torch.nn.utils.get_total_norm(dense, norm_type)
    norm_type = float(norm_type)
    parts = [local(gradient) for gradient in gradients]
    norms = torch._foreach_norm([part if part.numel() else part.new_zeros(1) for part in parts], norm_type)
    if math.isinf(norm_type):
        return sum_over_shards(list(zip(held, norms, strict=True)), dist.ReduceOp.MAX)
    powers = torch._foreach_pow(norms, norm_type)
    return sum_over_shards(list(zip(held, powers, strict=True)), dist.ReduceOp.SUM) ** (1.0 / norm_type)


def clip_grad_value(parameters: Sequence[Tensor], clip_value: float) -> None:
    """Clamp every element of the gradients, in place, to [-clip_value, clip_value]."""
    _check_bound("clip_value", clip_value)
    gradients = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
    if gradients:
        torch._foreach_clamp_min_(gradients, -float(clip_value))
        torch._foreach_clamp_max_(gradients, float(clip_value))


def _check_bound(name: str, bound: float) -> None:
    """Raise `StepError` for what would turn gradients around, or clip nothing in silence. A tensor is not looked at."""
    if not isinstance(bound, Tensor) and not (isinstance(bound, Real) and bound >= 0):  # NaN is not >= 0
        raise StepError(f"{name} is {bound!r}; expected a number >= 0. {name}=float('inf') clips nothing.")
