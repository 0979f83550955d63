"""Batch normalisation on several ranks: each sees only its own samples, which is not what one process computes."""

from __future__ import annotations

from typing import Literal

import torch.distributed as dist
from torch import nn

from .errors import ConfigurationError, PrepareError
from .world import World

BatchNorm = Literal["error", "sync", "local"]


def with_batch_norm(model: nn.Module, choice: BatchNorm, world: World, strategy: str) -> nn.Module:
    """`model` with its batch normalisation as chosen; see the field `batch_norm` of the strategies.

    Raises `PrepareError` for `"error"` where the model has any, `ConfigurationError` for `"sync"` on a CPU.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    names = [name for name in names if not isinstance(model.get_submodule(name), nn.SyncBatchNorm)]
    if not names or choice == "local" or world.size == 1:
        return model
    if choice == "sync":
        if world.device.type == "cpu":
            raise ConfigurationError(
                "batch_norm is 'sync', but torch.nn.SyncBatchNorm does not run on a CPU. Use batch_norm='local', "
                "or a normalisation that does not look across samples (GroupNorm, LayerNorm)."
            )
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-any-return]
    listed = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    raise PrepareError(
        f"{type(model).__name__} has batch normalisation ({listed}), which on {world.size} processes would "
        "see only each rank's samples: other numbers than on one. Choose "
        f"{strategy}(batch_norm='sync') (accelerators), {strategy}(batch_norm='local') to accept it, or use GroupNorm."
    )


def broadcast_buffers(model: nn.Module) -> None:
    """Have every rank take rank 0's buffers, such as running means. Collective."""
    for buffer in model.buffers():
        dist.broadcast(buffer, src=0)
