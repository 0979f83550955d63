"""Tensors that every rank holds whole: written once, as rank 0 has them, but for buffers that each rank has its own of.

Running means, say, differ inside an open window, and always where a strategy leaves them to each rank. In the same
place each rank takes its own again; elsewhere all take rank 0's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from strategies.accumulation import Accumulation
from strategies.errors import StateError
from strategies.shards import is_sharded

from .content import Content, Index


def of_other_ranks(content: Content, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What ranks other than 0 write: shards, and what is alike on all. Of anything else there would be a mixture."""
    alike = {
        f"model/{name}/{key}"
        for name, link in content.models.items()
        for key, _ in link.original.named_parameters(remove_duplicate=False)
    }
    return {
        name: tensor
        for name, tensor in tensors.items()
        if is_sharded(tensor) or name in alike or (name.startswith("optimizer/") and "/state/" in name)
    }


def collect(content: Content, accumulation: Accumulation, found: dict[str, Tensor]) -> dict[str, list[str]]:
    """The names of this rank's own buffers by model; the buffers are put into `found`."""
    if accumulation.world.size == 1:
        return {}
    inside = {id(model) for window in accumulation.open_windows() for model in window.models}
    own = {}
    for name, link in content.models.items():
        if id(link) in inside or not accumulation.strategy.buffers_agree:
            buffers = content.buffers(name)
            found.update({_place(accumulation.world.rank, name, key): value for key, value in buffers.items()})
            own[name] = list(buffers)
    return own


def targets(
    own: Sequence[Mapping[str, Sequence[str]]], index: Index, content: Content, accumulation: Accumulation
) -> dict[str, Tensor | None]:
    """Where this rank's own buffers are read to; `None` for those of rank 0 whose place they take."""
    world = accumulation.world
    found: dict[str, Tensor | None] = {}
    if len(own) != world.size:
        return found
    for name, keys in own[world.rank].items():
        buffers = content.buffers(name)
        for key in keys:
            place = _place(world.rank, name, key)
            if place not in index or key not in buffers or index[place] != (buffers[key].shape, buffers[key].dtype):
                raise StateError(f"the checkpoint holds {place} with another shape, or not at all")
            found |= {f"model/{name}/{key}": None, place: buffers[key]}
    return found


def _place(rank: int, model: str, key: str) -> str:
    return f"buffer/{rank}/{model}/{key}"
