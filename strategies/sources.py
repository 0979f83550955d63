"""Which batch of which prepared loader the loop is at: what the weights of a window are computed from."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader

from . import collectives
from .errors import DataError, StepError
from .sharding import Cut
from .world import World


class Cursor:
    """The position of one pass over one prepared loader, moved by the loader as the loop takes batches.

    `index` is the number of the global batch that the loop holds, -1 before the first. `cut` is `None`
    for a loader whose sizes are not known in advance (one process only). `samples_seen` is then the size of
    the batch that the loop holds; else that of this rank's part of a full one.
    """

    __slots__ = (
        "_num_full",
        "cut",
        "epoch",
        "finished",
        "grad_enabled",
        "index",
        "is_last",
        "last_trained",
        "loader",
        "num_trained",
        "rank",
        "samples_seen",
        "seed",
        "verified",
    )  # fmt: skip

    def __init__(self, loader: DataLoader[Any], cut: Cut | None, world: World, *, epoch: int, seed: int) -> None:
        self.loader = loader
        self.cut = cut
        self.rank = world.rank
        self.epoch = epoch
        self.seed = seed
        self.index = -1
        self.is_last = False
        self._num_full = 0 if cut is None else cut.length // cut.global_batch
        self.samples_seen = cut.local_samples(0, world.rank) if cut is not None else 0
        self.grad_enabled = False
        self.num_trained = 0
        self.last_trained = -1
        self.finished = False
        self.verified = world.size == 1

    @property
    def samples(self) -> int:
        """Samples of this rank in the batch that the loop holds; 0 for a ghost."""
        if self.index < self._num_full or self.cut is None:
            return self.samples_seen
        return self.cut.local_samples(self.index, self.rank)

    @property
    def is_ghost(self) -> bool:
        """Whether this rank holds a repeated sample only to keep step with the others."""
        return self.cut is not None and self.samples == 0

    def agrees_with(self, other: Cursor) -> bool:
        """Whether both describe the same sizes from here to the end, so that either may weigh the window."""
        return self.cut is not None and self.cut == other.cut and self.index == other.index


class Sources:
    """The passes over prepared loaders that one Accelerator's loop has open, outermost first."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._open: list[Cursor] = []
        self._latest: Cursor | None = None  # the last one that gave a batch, open or not

    def open(self, cursor: Cursor) -> None:
        """Enter a pass. A pass over the same loader that was never closed is over."""
        self._open = [other for other in self._open if other.loader is not cursor.loader]
        self._open.append(cursor)

    def close(self, cursor: Cursor) -> None:
        """Leave a pass: at its end, by `break`, or by an exception."""
        if cursor in self._open:
            self._open.remove(cursor)

    def advance(self, cursor: Cursor, index: int, is_last: bool) -> None:
        """Note that the loop now holds batch `index` of a pass."""
        cursor.index = index
        cursor.is_last = is_last
        cursor.grad_enabled = torch.is_grad_enabled()
        self._latest = cursor

    def training(self, loader: DataLoader[Any] | None = None) -> Cursor | None:
        """The pass whose batch the loop is training on; `None` if it comes from no prepared loader.

        It is the outermost pass that is open; one whose batch was taken under `no_grad` does not train.
        Raises `StepError` where two open passes would weigh the window differently.
        """
        if loader is not None:
            return self._of(loader)
        first: Cursor | None = None
        for cursor in self._open:
            if not cursor.grad_enabled or cursor.index < 0:
                continue
            if first is None:
                first = cursor
            elif not first.agrees_with(cursor):
                raise StepError(
                    f"two prepared loaders are open, over {_describe(first)} and over {_describe(cursor)}, and would "
                    "weigh this window differently. Name the one it trains on: accumulate(model, loader=loader); "
                    "take evaluation batches under torch.no_grad()."
                )
        return first

    def measuring(self, num_samples: int | None, loader: DataLoader[Any] | None = None) -> Cursor | None:
        """The pass that a value computed from `num_samples` samples belongs to.

        Of the pass that gave a batch last and the open ones, innermost first, the first that holds a batch of
        that size on this rank. Without one: the last if it is open, else the innermost open one.
        """
        if loader is not None:
            return self._of(loader)
        latest = self._latest
        if latest is None:
            return None
        candidates = [latest, *reversed([cursor for cursor in self._open if cursor.index >= 0])]
        for cursor in candidates:
            if max(1, cursor.samples) == num_samples:
                return cursor
        return candidates[1] if latest not in self._open and len(candidates) > 1 else latest

    def is_open(self, cursor: Cursor) -> bool:
        """Whether the loop is still inside this pass."""
        return cursor in self._open

    def train(self, cursor: Cursor) -> None:
        """Note that the loop trains on the batch that it holds. Collective for the first batch of a pass."""
        if not cursor.verified:
            self.verify(cursor)
        if cursor.last_trained != cursor.index:
            cursor.last_trained = cursor.index
            cursor.num_trained += 1

    def verify(self, cursor: Cursor) -> None:
        """Check once per pass that every rank is at the same place of it. Collective; raises `DataError`."""
        if cursor.verified:
            return
        cursor.verified = True
        mine = (cursor.seed, cursor.epoch, cursor.index)
        everyone = collectives.all_gather_integers(mine, self._world)
        if any(theirs != everyone[0] for theirs in everyone):
            places = "; ".join(
                f"rank {rank}: epoch {epoch}, batch {index}" for rank, (_, epoch, index) in enumerate(everyone)
            )
            raise DataError(
                f"ranks are at different places of the loader over {_describe(cursor)} ({places}). It was iterated to "
                "its end, or trained on, by some ranks only: iterate it on every rank, or on a loader of its own."
            )

    def _of(self, loader: DataLoader[Any]) -> Cursor:
        for cursor in self._open:
            if cursor.loader is loader and cursor.index >= 0:
                return cursor
        raise StepError(
            f"loader={type(loader).__name__} gave no batch that the loop still holds. "
            "Pass the loader that `prepare` returned, inside the loop over it."
        )


def _describe(cursor: Cursor) -> str:
    dataset = type(getattr(cursor.loader, "dataset", None)).__name__
    size = f" of {cursor.cut.length} samples" if cursor.cut else ""
    return f"{dataset}{size} (batch {cursor.index})"
