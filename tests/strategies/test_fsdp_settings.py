"""Settings of FSDP: what they do, and values of the wrong kind."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from accelerator import Accelerator
from blocks_net import make_net
from rank_pool import RankPool
from strategies import FSDP


class Collectives(TorchDispatchMode):
    """Notes when parameters are gathered and gradients reduced."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.seen += "g" * ("allgather" in func._opname) + "r" * ("reduce_scatter" in func._opname)
        return func(*args, **(kwargs or {}))


def in_backward(backward_prefetch: int) -> str:
    accelerator = Accelerator(FSDP(backward_prefetch=backward_prefetch, reshard_after_forward=True))
    model, _ = accelerator.prepare(net := make_net(), torch.optim.SGD(net.parameters()))
    with accelerator.accumulate(model):
        loss = model(torch.ones(2, 5)).sum()
        with Collectives() as collectives:
            accelerator.backward(loss)
    return collectives.seen


def test_blocks_are_gathered_as_far_ahead_as_asked(ranks: RankPool) -> None:
    seen = {number: ranks(in_backward, number, nproc=2)[0] for number in (0, 1, 2)}
    # the rest of the model, then three blocks: each gathered before its own gradients are reduced
    assert seen == {0: "ggrgrgrr", 1: "gggrgrrr", 2: "ggggrrrr"}
