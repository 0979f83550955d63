"""Whether the tensors of a checkpoint are those that a model waits for: their kind, their range, and their ties."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_AT_ONCE = 2**20  # numbers that are looked at together
_LARGE = 1e30  # below what float32 and bfloat16 can hold


def misfit(
    name: str, found: Any, target: Tensor, dtype: torch.dtype, read: Callable[[str], Tensor] | None = None
) -> str | None:
    """Why `found` cannot become the model's `target`, in `dtype`; `None` if it can.

    Reads its numbers only where the cast could change what they are: integers to others, and to floats of small range.
    `read` gives the tensor of a name, where `found` has but its shape and dtype.
    """
    should = f"should be {_words(target)}"
    if not isinstance(found, Tensor):
        return f"{name} is a {type(found).__name__} and should be a tensor"
    if found.is_meta:
        return f"{name} is on the meta device, and has no numbers"
    if found.layout is not torch.strided:
        return f"{name} is {str(found.layout).removeprefix('torch.')} and should be a dense tensor"
    if found.shape != target.shape:
        return f"{name} is {_shape(found)} and should be {_shape(target)}"
    if _kind(found) != _kind(target):
        return f"{name} is {_words(found)} and {should}"
    if _may_change(found, dtype) and not _can_be(found if read is None else read(name), dtype):
        return f"{name} is {_words(found)} with numbers that {str(dtype).removeprefix('torch.')} cannot hold"
    return None


def differing_ties(names: Sequence[str], found: Mapping[str, Tensor]) -> str | None:
    """Two of the names of one tensor of a model under which a checkpoint holds different ones, as words."""
    there = [name for name in names if name in found]
    for name in there[1:]:
        if not _are_equal(found[there[0]], found[name]):
            return f"{there[0]} and {name} are one tensor of the model, and two that differ in the checkpoint"
    return None


def _kind(tensor: Tensor) -> str:
    return "floating" if tensor.is_floating_point() else "complex" if tensor.is_complex() else "integer"


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a scalar"


def _words(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _may_change(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether it takes a look at the numbers to know what a cast does to them."""
    return tensor.dtype != dtype and not (
        tensor.is_complex() or (tensor.is_floating_point() and torch.finfo(dtype).max > _LARGE)
    )


def _can_be(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether a cast keeps integers as they are, and finite numbers finite."""
    for piece in tensor.detach().reshape(-1).split(_AT_ONCE):
        cast = piece.to(dtype)
        if not tensor.is_floating_point():
            kept = torch.equal(cast.to(piece.dtype), piece)
        else:
            kept = not bool((piece.float().isfinite() & ~cast.float().isfinite()).any())
        if not kept:
            return False
    return True


def _are_equal(one: Tensor, two: Tensor) -> bool:
    """Bit for bit, so that a NaN equals itself."""
    if one.dtype != two.dtype or one.shape != two.shape:
        return False
    if one.device == two.device and one.data_ptr() == two.data_ptr() and one.stride() == two.stride():
        return True
    pieces = (tensor.detach().cpu().reshape(-1).split(_AT_ONCE) for tensor in (one, two))
    return all(
        torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))
        for first, second in zip(*pieces, strict=True)
    )
