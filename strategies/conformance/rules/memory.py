"""A rule on memory: what a rank holds between steps."""

from __future__ import annotations

import gc

import torch
from torch import Tensor, nn

from ... import shards
from ...base import Strategy
from ..loop import Loop
from ..rule import Broken, rule

WIDTH, LAYERS, WINDOWS = 64, 4, 4


@rule()
def memory_per_rank(strategy: Strategy) -> None:
    """Between steps, a rank holds its part of parameters and optimizer state, buffers for gradients, and nothing else.

    A whole model that stays behind where parameters are sharded, or a copy that is kept at every step, changes no
    number and ends a run for want of memory. The tensors that Python knows are counted, by their storage.
    """
    with Loop(strategy) as loop:
        before = _bytes_of(_tensors())
        net = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, dtype=loop.dtype) for _ in range(LAYERS)))
        model, optimizer = loop.prepare(net, torch.optim.AdamW(net.parameters(), lr=1e-3))
        for _ in range(WINDOWS):
            with loop.accumulate(model):
                loop.backward(model(torch.ones(2, WIDTH, dtype=loop.dtype, device=loop.world.device)).square().mean())
                optimizer.step()
                optimizer.zero_grad()
        parameters = list(model.parameters())
        state = [value for values in optimizer.state.values() for value in values.values()]
        mine = _bytes_of([shards.local(one) for one in (*parameters, *state) if isinstance(one, Tensor)])
        mine += _bytes_of([shards.local(one) for one in parameters])  # buckets of gradients, say
        gc.collect()
        held = _bytes_of(_tensors()) - before
        if held > 1.05 * mine:
            raise Broken(
                f"after {WINDOWS} steps, rank {loop.world.rank} holds {held} bytes of tensors",
                expected=f"at most the {mine} bytes of its parameters, their gradients and optimizer state",
                advice="Let go of what was gathered for a forward, and of copies, once a window is closed.",
            )


def _tensors() -> list[Tensor]:
    return [one for one in gc.get_objects() if issubclass(type(one), Tensor) and not shards.is_sharded(one)]


def _bytes_of(tensors: list[Tensor]) -> int:
    """Bytes of the storages of `tensors`, each counted once; of the tensors where a device has no storages."""
    found = {}
    for tensor in tensors:
        if tensor.device.type == "meta" or type(tensor).__name__ == "FakeTensor":  # which torch.compile leaves behind
            continue
        try:
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        except (NotImplementedError, RuntimeError):
            found[id(tensor)] = tensor.nbytes
    return sum(found.values())
