"""What `fully_shard` of torch leaves to its caller: rank 0's weights, settled flags, released parameters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter

from .errors import PrepareError
from .tree import iterate_leaves, map_tensors


def settle(model: nn.Module, blocks: Sequence[nn.Module], *, forward: int, backward: int) -> None:
    """Fix what `fully_shard` would fix in the first forward, while parameters are as the user left them.

    `forward` and `backward` are how many of the `blocks`, in their order, are gathered ahead.
    """
    # Its dtypes would be those of the parameters that are not frozen at that time, as another model's window does.
    model._get_fsdp_state()._lazy_init()  # type: ignore[operator]
    for index, block in enumerate(blocks):
        if forward:
            block.set_modules_to_forward_prefetch(blocks[index + 1 : index + 1 + forward])  # type: ignore[operator]
        if backward > 1:  # 1 is what torch does by itself
            before = blocks[max(0, index - backward) : index][::-1]
            block.set_modules_to_backward_prefetch(before)  # type: ignore[operator]
    model.register_forward_hook(_reshard_without_backward)


def register_forward_methods(model: nn.Module, names: Iterable[str]) -> None:
    """Have further methods of `model` gather its parameters before they run."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    for name in names:
        if not callable(getattr(model, name, None)):
            raise PrepareError(f"forward_methods names {name!r}, but {type(model).__name__} has no such method")
        register_fsdp_forward_method(model, name)


def return_no_views(model: nn.Module, inputs: Any, outputs: Any) -> Any:
    """An operation in place on a view that the model returned would undo the hook that gathers for backward."""

    def is_view(leaf: Any) -> bool:
        return isinstance(leaf, Tensor) and leaf.requires_grad and leaf._is_view()

    if not any(is_view(leaf) for leaf in iterate_leaves(outputs)):
        return outputs
    return map_tensors(lambda tensor: tensor.clone() if is_view(tensor) else tensor, outputs)


def _reshard_without_backward(model: nn.Module, inputs: Any, outputs: Any) -> None:
    """Release what no backward will: else `parameters()` are not those that the optimizer holds."""
    from torch.distributed.fsdp import FSDPModule

    if not (torch.is_grad_enabled() and any(getattr(leaf, "requires_grad", False) for leaf in iterate_leaves(outputs))):
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def take_from_rank_0(parameters: Iterable[Parameter], device: torch.device) -> None:
    """Give real parameters rank 0's values, on the device. Collective."""
    for parameter in parameters:
        if not parameter.is_meta:
            data: Tensor = parameter.data.to(device).contiguous()
            if dist.get_world_size() > 1:
                dist.broadcast(data, src=0)
            parameter.data = data
