"""What DDP's gradients travel as: hooks that compress a bucket before it is averaged."""

# No `from __future__ import annotations` here: DDP checks a hook's annotations as objects, not as text.

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel


def average_in(dtype: torch.dtype, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Average a bucket of gradients in `dtype`. torch's own bfloat16 hook works with nccl alone."""
    gradients = bucket.buffer()
    compressed = gradients.to(dtype).div_(dist.get_world_size())
    work = dist.all_reduce(compressed, async_op=True).get_future()
    averaged: torch.futures.Future[Tensor] = work.then(lambda future: gradients.copy_(future.value()[0]))
    return averaged


def register(wrapped: DistributedDataParallel, hook: str, *, rank: int, start: int) -> None:
    """Register the hook called `hook`: `"none"`, `"fp16"`, `"bf16"`, or `"power_sgd"` of `rank` from step `start`."""
    if hook == "power_sgd":
        from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook

        state: Any = powerSGD_hook.PowerSGDState(
            process_group=None, matrix_approximation_rank=rank, start_powerSGD_iter=start
        )
        wrapped.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    elif hook != "none":
        wrapped.register_comm_hook({"fp16": torch.float16, "bf16": torch.bfloat16}[hook], average_in)
