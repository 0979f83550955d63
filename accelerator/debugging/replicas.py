"""Copies of a model on several ranks: whether they are still the same, bit for bit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from strategies import collectives
from strategies.accumulation import Accumulation
from strategies.errors import ReplicasDifferError
from strategies.observer import Observer
from strategies.prepared.model import ModelLink
from strategies.prepared.optimizer import OptimizerLink
from strategies.shards import local, part_of

_CHUNK = 1 << 22  # elements whose bits are widened to 64 at once
_MULTIPLIER = 2654435761  # of positions (Knuth's multiplicative hash), so that exchanged elements are seen too
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class ReplicaCheck(Observer):
    """Compares the models of an optimizer after each of its steps that `every` divides."""

    def __init__(self, accumulation: Accumulation, every: int) -> None:
        self._accumulation = accumulation
        self._every = every

    def update_ended(self, optimizer: OptimizerLink, taken: bool) -> None:
        """Compare, where it is time."""
        if taken and optimizer.num_steps % self._every == 0:
            verify(self._accumulation, optimizer.models)


def verify(accumulation: Accumulation, models: Sequence[ModelLink]) -> None:
    """Raise `ReplicasDifferError`, on every rank, if ranks that hold copies of a tensor hold other bits. Collective.

    Of a sharded tensor those ranks are compared that hold the same part. Buffers are compared where the strategy keeps
    them alike.
    """
    world = accumulation.world
    if world.size == 1:
        return
    for link in models:
        parameters = link.sharded_parameters or dict(link.original.named_parameters())
        tensors: dict[str, Tensor] = {f"parameter {name}": value for name, value in parameters.items()}
        if accumulation.strategy.buffers_agree:
            tensors.update({f"buffer {name}": value for name, value in link.original.named_buffers()})
        if not tensors:
            continue
        prints = torch.stack([fingerprint(local(value.detach())) for value in tensors.values()]).flatten().tolist()
        parts = [part_of(value) for value in tensors.values()]
        rows = collectives.all_gather_integers([*prints, *parts], world)
        for index, name in enumerate(tensors):
            _compare(name, link.name, [(row[len(prints) + index], row[2 * index : 2 * index + 2]) for row in rows])


def fingerprint(tensor: Tensor) -> Tensor:
    """Two 64-bit sums over the bits of `tensor`, one weighted by position: any one changed element changes both."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    bits = tensor.contiguous().view(-1).view(_BITS[tensor.itemsize])
    total = torch.zeros(2, dtype=torch.int64, device=tensor.device)
    for start in range(0, bits.numel(), _CHUNK):
        chunk = bits[start : start + _CHUNK].long()
        weights = torch.arange(start, start + chunk.numel(), device=tensor.device) * _MULTIPLIER + 1
        total += torch.stack([chunk.sum(), (chunk * weights).sum()])
    return total


def _compare(name: str, model: str, held: Sequence[tuple[int, tuple[int, ...]]]) -> None:
    """`held` is the part and the fingerprint of each rank. Raises `ReplicasDifferError` at the first difference."""
    for part in sorted({part for part, _ in held}):
        ranks = [rank for rank, (own, _) in enumerate(held) if own == part]
        counts = Counter(held[rank][1] for rank in ranks)
        if len(counts) > 1:
            usual = counts.most_common(1)[0][0]
            alike = [rank for rank in ranks if held[rank][1] == usual]
            others = [rank for rank in ranks if rank not in alike]
            raise ReplicasDifferError(
                f"{name} of {model} differs on {_listed(others)} from {_listed(alike)}. Was it changed on some "
                "ranks only, outside the step? If not, suspect the hardware of those ranks."
            )


def _listed(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
