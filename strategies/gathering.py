"""Values of the samples of a batch, gathered from all ranks without those of ghosts."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from . import collectives
from .errors import DataError
from .sources import Cursor, Sources
from .tree import iterate_tensors, map_tensors, num_samples
from .world import World


def gather_samples(
    tree: Any, sources: Sources, world: World, loader: DataLoader[Any] | None = None, *, as_objects: bool = False
) -> Any:
    """`tree`, with values of the batch that the loop holds, from all ranks: see `Accelerator.gather_for_metrics`."""
    size = None if as_objects else num_samples(tree)
    if size is None and isinstance(tree, list):
        size = len(tree)
    cursor = sources.measuring(size, loader)
    if cursor is None:
        return collectives.gather_uneven(tree, world, keep=True, as_objects=as_objects)
    sources.verify(cursor)
    may_have_ghosts = cursor.had_ghosts or cursor.padded_to is not None
    if not sources.is_open(cursor) and cursor.finished and may_have_ghosts:
        raise DataError(
            "gather_for_metrics was called after the loop over its loader had ended, where values of repeated "
            "samples can no longer be told from others. Call it inside the loop, for each batch; "
            "for a value of your own, such as a count, use reduce or gather."
        )
    if cursor.padded_to is not None:
        tree = _of_samples(tree, cursor, cursor.padded_to, as_objects=as_objects)
    return collectives.gather_uneven(tree, world, keep=not cursor.is_ghost, as_objects=as_objects)


def _of_samples(tree: Any, cursor: Cursor, rows: int, *, as_objects: bool) -> Any:
    """`tree` without the rows of ghosts. Raises `DataError` for a value that is not one row per sample."""
    is_list = isinstance(tree, list)
    tensors = [] if as_objects and is_list else list(iterate_tensors(tree))
    if is_list and not tensors and len(tree) == rows:
        return tree[: cursor.samples]
    wrong = next((tuple(tensor.shape) for tensor in tensors if tensor.ndim == 0 or len(tensor) != rows), None)
    if wrong is not None or not tensors:
        what = type(tree).__name__ if wrong is None else f"a tensor of shape {wrong}"
        raise DataError(
            f"gather_for_metrics got {what} in a loop whose short batches are filled up with ghosts "
            f"(pad_batches=True); expected {rows} rows, one for each sample, of which it leaves ghosts out. For a "
            "value of your own, such as a count, use reduce or gather."
        )

    def one(tensor: Tensor) -> Tensor:
        return tensor[: cursor.samples]

    return tree if cursor.samples == rows else map_tensors(one, tree)
