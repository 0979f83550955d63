"""Blocks of a model whose activations are computed again in backward, instead of being kept until then.

torch's own checkpointing does not know torch_xla's devices, and a compiler that sees the same operations twice
computes them once; torch_xla's puts barriers in between. It sees only positional tensors, which is made good here.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from .errors import PrepareError, StepError
from .tree import iterate_tensors


def recompute_in_backward(model: nn.Module, chosen: Sequence[tuple[str, nn.Module]]) -> None:
    """Have the chosen modules of `model`, name and module, keep their inputs alone.

    Raises `PrepareError` if there are none, and for normalisation with running statistics in them, which would count
    batches twice.
    """
    if not chosen:
        raise PrepareError(
            f"activation_checkpointing found no repeated blocks in {type(model).__name__}. Name their classes in "
            "transformer_layer_cls, or give min_num_params."
        )
    for name, block in chosen:
        for inner, module in block.named_modules():
            if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
                raise PrepareError(
                    f"{name}.{inner} is {type(module).__name__}, and activation_checkpointing would count its batches "
                    "twice. Choose other blocks in transformer_layer_cls, or use GroupNorm or LayerNorm."
                )
    for _, block in chosen:
        if "_forward_once" not in vars(block):
            vars(block)["_forward_once"] = block.forward
            vars(block)["forward"] = MethodType(forward, block)  # a copy of the block gets one of its own


def forward(block: Any, *args: Any, **kwargs: Any) -> Any:
    """The block's forward, computed again in backward. (Named so that pickle puts the class's own in its place.)"""
    leaves, spec = tree_flatten((args, kwargs))
    on_device = next((leaf.device for leaf in leaves if isinstance(leaf, Tensor) and leaf.device.type == "xla"), None)
    if on_device is None or not torch.is_grad_enabled():
        return block._forward_once(*args, **kwargs)
    from torch_xla.utils.checkpoint import checkpoint

    _refuse_hidden(block, leaves, "takes")
    returned: list[TreeSpec] = []

    def again(block: Any, anchor: Tensor, *leaves: Any) -> tuple[Any, ...]:
        args, kwargs = tree_unflatten(list(leaves), spec)
        found, made = tree_flatten(block._forward_once(*args, **kwargs))
        _refuse_hidden(block, found, "returns")
        returned.append(made)
        return tuple(found)

    # Without an input that needs a gradient, the block's parameters would get none: the anchor is one.
    anchor = torch.zeros((), device=on_device, requires_grad=True)
    found = checkpoint(MethodType(again, block), anchor, *leaves)  # a method: its parameters get barriers too
    return tree_unflatten(list(found), returned[0])


def _refuse_hidden(block: Any, leaves: Sequence[Any], verb: str) -> None:
    for leaf in leaves:
        if not isinstance(leaf, Tensor) and next(iterate_tensors(leaf), None) is not None:
            raise StepError(
                f"{type(block).__name__} {verb} a {type(leaf).__name__} with tensors in it, whose gradients "
                "activation_checkpointing would lose. Use tensors, tuples, lists and dicts, or other blocks."
            )
