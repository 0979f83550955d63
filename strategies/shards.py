"""Tensors that are cut over ranks (`DTensor`) and those that are whole, handled alike.

`torch.distributed.tensor` takes a second to import, so it is imported only where a sharded tensor was met.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor

from .process_group import named_failures
from .xla_layout import lay_out_like


def is_sharded(tensor: Tensor) -> TypeGuard[Any]:
    """Whether `tensor` is a `DTensor`: each rank holds a part of it, or a copy laid out on a mesh."""
    return type(tensor) is not Tensor and hasattr(tensor, "device_mesh")


def is_quantized(tensor: Tensor) -> bool:
    """Whether the numbers of a tensor are in others, as those of torchao's are."""
    return type(tensor) is not Tensor and type(tensor).__module__.startswith("torchao.")


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of `tensor`, in the same memory; all of it if it is not sharded. Not a collective."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():  # with gradients, it would make a node of the autograd graph
        return tensor.to_local()  # type: ignore[no-any-return]


def part_of(tensor: Tensor) -> int:
    """The number of the part of `tensor` that this rank holds; ranks with the same number hold copies. 0 if whole."""
    number = 0
    if is_sharded(tensor):
        mesh = tensor.device_mesh
        for dim, (place, placement) in enumerate(zip(mesh.get_coordinate(), tensor.placements, strict=True)):
            if not placement.is_replicate():
                number = number * mesh.size(dim) + place
    return number


def whole(tensor: Tensor) -> Tensor:
    """All of `tensor`, detached, on its device. Collective if it is sharded."""
    tensor = tensor.detach()
    if not is_sharded(tensor):
        return tensor
    with named_failures():
        return tensor.full_tensor()  # type: ignore[no-any-return]


def cut_like(full: Tensor, like: Tensor) -> Tensor:
    """`full`, which every rank has, cut as `like` is, over ranks or over devices. Not a collective."""
    if like.device.type == "xla":
        lay_out_like(full, like)
    if not is_sharded(like):
        return full
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)


def copy_whole(full: Tensor, target: Tensor) -> None:
    """Write `full`, which every rank has, into `target`, each rank its own part. Not a collective."""
    with torch.no_grad():
        local(target.detach()).copy_(local(cut_like(full.to(target.device, target.dtype), target.detach())))


def sum_over_shards(parts: Sequence[tuple[Tensor, Tensor]], op: dist.ReduceOp.RedOpType) -> Tensor:
    """Reduce one number per tensor, computed from this rank's part of it, to one number for all of them.

    `parts` are pairs of a parameter, which says how it is cut, and a scalar on its device. Parameters that are cut
    alike share one all-reduce. Collective if any of them is sharded; every rank then gives the same ones. Not their
    gradients: DTensor keeps results of operations by equality, so that a gradient may be on an equal mesh of a model
    that is long gone, on some ranks and not on others.
    """
    by_cut: dict[tuple[Any, ...], list[tuple[Tensor, Tensor]]] = {}
    for tensor, number in parts:
        cut = (tensor.device_mesh, tensor.placements) if is_sharded(tensor) else ()
        by_cut.setdefault(cut, []).append((tensor, number))
    totals = []
    for alike in by_cut.values():
        groups = _groups_of(alike[0][0])
        stacked = torch.stack([number for _, number in alike])
        total = stacked.amax() if op == dist.ReduceOp.MAX else stacked.sum()
        for group in groups:
            with named_failures():
                dist.all_reduce(total, op=op, group=group)
        totals.append(total)
    together = torch.stack(totals)
    return together.amax() if op == dist.ReduceOp.MAX else together.sum()


def _groups_of(tensor: Tensor) -> tuple[Any, ...]:
    """The process groups over which `tensor` is cut; copies of a part on other ranks must not count twice."""
    if not is_sharded(tensor):
        return ()
    mesh = tensor.device_mesh
    return tuple(mesh.get_group(dim) for dim, placement in enumerate(tensor.placements) if not placement.is_replicate())
