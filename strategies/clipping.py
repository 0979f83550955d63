"""Clip gradients that are already reduced, rescaled and unscaled."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def clip_grad_norm(parameters: Sequence[Tensor], max_norm: float, norm_type: float = 2.0) -> Tensor:
    """Scale gradients in place so that their joint norm is at most `max_norm`.

    Every rank calls it. Returns the norm before scaling: a scalar on the gradients' device, the same value
    on every rank. Follows Pascanu et al. 2013, arXiv:1211.5063, section 3.2, as
    `torch.nn.utils.clip_grad_norm_` does.
    """
    return torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type)


def clip_grad_value(parameters: Sequence[Tensor], clip_value: float) -> None:
    """Clamp every element of the gradients, in place, to [-clip_value, clip_value]."""
    torch.nn.utils.clip_grad_value_(parameters, clip_value)
