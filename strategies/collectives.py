"""Collective operations on any nesting of tensors, each checked before it runs.

Every function here is called by every rank, in the same order. On one process they return what the
same call returns on many, so that a loop needs no `if`. Each begins by exchanging 16 bytes that say which call it
is and what it brings: ranks that are in different calls would otherwise take each other's bytes for their own.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import CollectiveError, PeerLostError, ShapeMismatchError
from .process_group import named_failures
from .tree import describe, iterate_leaves, iterate_tensors, map_tensors, move
from .world import World


def meet(call: str, world: World, value: int = 0) -> list[int]:
    """Every rank's `value`, a 64-bit integer, in rank order, once all ranks are in the same `call`.

    Raises `CollectiveError`, on every rank, naming the calls if they differ.
    """
    if world.size == 1:
        return [value]
    rows = all_gather_integers([digest_of(call), value], world)
    if any(row[0] != rows[0][0] for row in rows):
        calls = "; ".join(f"rank {rank}: {named}" for rank, named in enumerate(all_gather_objects(call, world)))
        raise CollectiveError(
            f"ranks are in different calls ({calls}). Does one of them break, continue, skip a batch or branch where "
            "others do not?"
        )
    return [row[1] for row in rows]


def meet_alike(call: str, arguments: str, world: World) -> None:
    """Return once all ranks are in the same `call` with the same `arguments`, which are here as text.

    Raises `CollectiveError`, on every rank, naming the calls or the arguments if they differ.
    """
    try:
        digests = meet(call, world, digest_of(arguments))
    except PeerLostError as error:
        raise PeerLostError(f"{call}(), which every rank must call, was not called by all of them: {error}") from error
    if any(digest != digests[0] for digest in digests):
        brought = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(all_gather_objects(arguments, world)))
        raise CollectiveError(f"ranks gave {call} different arguments ({brought}). Call it alike on all of them.")


def all_gather_integers(values: Sequence[int], world: World) -> list[tuple[int, ...]]:
    """Every rank's `values`, in rank order. All ranks give equally many, each within 64 bits."""
    mine = tuple((value + 2**63) % 2**64 - 2**63 for value in values)
    if world.size == 1:
        return [mine]
    sent = torch.tensor(mine, dtype=torch.int64, device=_control_device(world))
    received = [torch.empty_like(sent) for _ in range(world.size)]
    with named_failures(world):
        dist.all_gather(received, sent)
    return [tuple(tensor.tolist()) for tensor in received]


def all_gather_objects(value: Any, world: World) -> list[Any]:
    """Every rank's `value`, pickled, in rank order."""
    if world.size == 1:
        return [value]
    received: list[Any] = [None] * world.size
    with named_failures(world):
        dist.all_gather_object(received, value)
    return received


def digest_of(text: str) -> int:
    """64 bits of `text`, as a number to compare ranks by."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)


def gather(tree: Any, world: World) -> Any:
    """Every tensor of `tree` concatenated over ranks along dimension 0, in rank order; scalars become (world,).

    Raises `ShapeMismatchError`, on every rank, if structure, shapes or dtypes differ between ranks.
    The results carry no gradient.
    """
    _check_alike("gather", tree, world)
    return map_tensors(lambda tensor: torch.cat(_all_gather(_at_least_1d(tensor), world)), tree)


def gather_uneven(tree: Any, world: World, *, keep: bool, as_objects: bool = False) -> Any:
    """Like `gather`, with a first dimension of any length on each rank, and nothing of ranks with `keep=False`.

    Objects that are no tensors are gathered too, and with `as_objects` tensors in the same way: a list is
    concatenated, anything else becomes a list with one element per rank that keeps.
    """
    _check_alike("gather_for_metrics", [] if as_objects else tree, world, any_length_of=0, objects=True)
    if as_objects or not any(True for _ in iterate_tensors(tree)):
        sent = map_tensors(lambda tensor: tensor.detach().cpu(), tree) if as_objects else tree
        kept = [value for value, keeps in all_gather_objects((sent, keep), world) if keeps]
        kept = move(kept, world.device) if as_objects else kept
        return [item for value in kept for item in value] if isinstance(tree, list) else kept
    leaves = [_at_least_1d(tensor) for tensor in iterate_tensors(tree)]
    lengths = all_gather_integers([len(leaf) if keep else 0 for leaf in leaves], world)
    gathered = iter([_gather_lengths(leaf, [row[i] for row in lengths], world) for i, leaf in enumerate(leaves)])
    return map_tensors(lambda _: next(gathered), tree)


def reduce(tree: Any, world: World, *, reduction: Literal["sum", "mean"] = "sum", scale: float = 1.0) -> Any:
    """Every tensor of `tree` summed or averaged over ranks, times `scale`. The inputs are not changed.

    Raises `ShapeMismatchError`, on every rank, if structure, shapes or dtypes differ between ranks.
    """
    if reduction not in ("sum", "mean"):
        raise CollectiveError(f"reduction is {reduction!r}; expected 'sum' or 'mean'")
    _check_alike("reduce", tree, world)

    def one(tensor: Tensor) -> Tensor:
        result = tensor.detach().clone(memory_format=torch.contiguous_format)  # gloo sums memory, not elements
        if result.dtype is torch.bool:
            result = result.long()  # as torch.sum does
        if world.size > 1:
            with named_failures(world):
                dist.all_reduce(result)
        if reduction == "mean":
            result = result / world.size
        return result * scale if scale != 1.0 else result

    return map_tensors(one, tree)


def broadcast(tree: Any, world: World) -> Any:
    """Rank 0's `tree`, on every rank: tensors on this rank's device, all else pickled."""
    if world.size == 1:
        return tree
    meet("broadcast", world)
    leaves = [_plain(tensor) for tensor in iterate_tensors(tree)] if world.is_main else []
    slots = iter([_Slot(index, leaf.shape, leaf.dtype) for index, leaf in enumerate(leaves)])
    skeleton = map_tensors(lambda _: next(slots), tree) if world.is_main else None
    carrier = [skeleton]
    with named_failures(world):
        dist.broadcast_object_list(carrier, src=0)

    def one(slot: _Slot) -> Tensor:
        if world.is_main:
            tensor = leaves[slot.index].to(world.device, copy=True)
        else:
            tensor = torch.empty(slot.shape, dtype=slot.dtype, device=world.device)
        with named_failures(world):
            dist.broadcast(tensor.view(-1).view(torch.uint8), src=0)
        return tensor

    return map_tensors(one, carrier[0], _Slot)


def pad_across_processes(
    tree: Any, world: World, *, dim: int = 0, pad_index: float = 0, pad_first: bool = False
) -> Any:
    """Every tensor of `tree` padded with `pad_index` along `dim` to the longest of all ranks."""

    def one(tensor: Tensor) -> Tensor:
        length = tensor.shape[dim]
        longest = max(row[0] for row in all_gather_integers([length], world))
        if longest == length:
            return tensor
        shape = list(tensor.shape)
        shape[dim] = longest - length
        padding = tensor.new_full(shape, pad_index)
        return torch.cat([padding, tensor] if pad_first else [tensor, padding], dim=dim)

    _check_alike("pad_across_processes", tree, world, any_length_of="all")
    for tensor in iterate_tensors(tree):
        if not -tensor.ndim <= dim < tensor.ndim:
            raise CollectiveError(f"dim is {dim}, but a tensor to pad has {tensor.ndim} dimensions")
    return map_tensors(one, tree)


def sum_scalar(value: float | Tensor, world: World, call: str) -> Tensor:
    """The sum of a number over ranks: a float64 scalar (float32 where the device has no float64) on the device.

    `call` says to ranks that are elsewhere what this one is doing. A number that is on a device stays there.
    """
    dtype = torch.float32 if world.device.type == "mps" else torch.float64
    if world.size > 1 and not (isinstance(value, Tensor) and value.device.type != "cpu"):
        brought = meet(call, world, _bits(float(value)))
        return torch.tensor(sum(map(_number, brought)), dtype=dtype, device=world.device)
    held = value.detach() if isinstance(value, Tensor) else torch.tensor(value, dtype=dtype)
    total = held.to(device=world.device, dtype=dtype, copy=True)
    if world.size > 1:
        meet(call, world)
        with named_failures(world):
            dist.all_reduce(total)
    return total


def any_true(flag: bool, world: World) -> bool:
    """Whether `flag` is set on any rank."""
    return any(meet("check_trigger", world, int(flag)))


def barrier(world: World) -> None:
    """Return when every rank has called it."""
    meet("wait_for_everyone", world)


@dataclass(frozen=True)
class _Slot:
    """Stands for a tensor in a tree whose tensors travel by themselves."""

    index: int
    shape: torch.Size
    dtype: torch.dtype


def _check_alike(
    call: str, tree: Any, world: World, *, any_length_of: int | Literal["all"] | None = None, objects: bool = False
) -> None:
    """Compare what the ranks brought by one 8-byte digest; only where it differs is everything compared.

    `objects` is whether other leaves than tensors are allowed, in a tree that has no tensors at all.
    """
    leaves = list(iterate_leaves(tree))
    has_tensors = any(isinstance(leaf, Tensor) for leaf in leaves)
    if has_tensors or not objects:
        for leaf in leaves:
            if leaf is not None and not isinstance(leaf, Tensor):
                raise CollectiveError(
                    f"a collective got {type(leaf).__name__} {leaf!r:.80}; expected tensors in any nesting. Gather "
                    "objects by themselves with gather_for_metrics, and give numbers as torch.tensor(number)."
                )
    if world.size == 1:
        return
    brought = describe(tree, any_length_of) if has_tensors or not objects else "objects"
    digests = meet(call, world, digest_of(brought))
    if all(digest == digests[0] for digest in digests):
        return
    everyone = all_gather_objects(describe(tree), world)
    listed = "; ".join(f"rank {rank}: {described}" for rank, described in enumerate(everyone))
    advice = (
        "Use gather_for_metrics for batches of different length, or pad_across_processes first."
        if any_length_of is None
        else "Ranks must bring the same nesting, dtypes and other dimensions."
    )
    raise ShapeMismatchError(f"ranks brought different tensors to one collective ({listed}). {advice}")


def _bits(number: float) -> int:
    return int(struct.unpack("<q", struct.pack("<d", number))[0])


def _number(bits: int) -> float:
    return float(struct.unpack("<d", struct.pack("<q", bits))[0])


def _all_gather(tensor: Tensor, world: World) -> list[Tensor]:
    """Equally shaped tensors of all ranks. Sent as bytes: every dtype travels, on every backend."""
    tensor = _plain(tensor)
    if world.size == 1:
        return [tensor]
    sent = tensor.reshape(-1).view(torch.uint8)
    received = [torch.empty_like(sent) for _ in range(world.size)]
    with named_failures(world):
        dist.all_gather(received, sent)
    return [part.view(tensor.dtype).reshape(tensor.shape) for part in received]


def _gather_lengths(tensor: Tensor, lengths: Sequence[int], world: World) -> Tensor:
    longest = max(lengths)
    padded = tensor.new_zeros((longest, *tensor.shape[1:]))
    mine = lengths[world.rank]
    padded[:mine] = tensor.detach()[:mine]
    return torch.cat([part[:length] for part, length in zip(_all_gather(padded, world), lengths, strict=True)])


def _plain(tensor: Tensor) -> Tensor:
    """The same values in memory order, with nothing left to be conjugated or negated on reading."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    if plain.numel() == 1:  # contiguous() keeps its stride, with which view() does not read it as bytes
        return plain.clone(memory_format=torch.contiguous_format)
    return plain.contiguous()


def _at_least_1d(tensor: Tensor) -> Tensor:
    return tensor.reshape(1) if tensor.ndim == 0 else tensor


def _control_device(world: World) -> torch.device:
    """Where small integers travel: the CPU where gloo is beside the device's own backend."""
    return torch.device("cpu") if "gloo" in (world.backend or "") else world.device
