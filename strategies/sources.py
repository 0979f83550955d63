"""Which batch of which prepared loader the loop is at: what the weights of a window are computed from."""

from __future__ import annotations

import gc
import weakref
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from . import collectives
from .errors import DataError, StepError
from .process_group import leave_last_words, take_back_last_words
from .sharding import Cut, Plan
from .tree import iterate_tensors
from .world import World


class Cursor:
    """The position of one pass over one prepared loader, moved by the loader as the loop takes batches.

    `index` is the number of the global batch that the loop holds, -1 before the first. `cut` is the plan of the
    pass, `None` for a stream, whose end is not known. `samples_seen` is the size of the batch in hand where the
    plan does not say it; else that of this rank's part of a full one. `sizes` are those of all ranks, for a
    stream on several. `padded_to` is the length of every batch where short ones are filled up with ghosts.
    """

    __slots__ = (
        "_loader",
        "_num_full",
        "_remembered",
        "cut",
        "digest",
        "epoch",
        "finished",
        "global_batch",
        "grad_enabled",
        "had_ghosts",
        "index",
        "is_last",
        "is_look",
        "is_open",
        "is_planned",
        "last_trained",
        "mean_samples",
        "num_trained",
        "padded_to",
        "rank",
        "samples_seen",
        "seed",
        "sizes",
        "verified",
    )  # fmt: skip

    def __init__(
        self,
        loader: DataLoader[Any],
        cut: Plan | None,
        world: World,
        *,
        epoch: int,
        seed: int,
        digest: int = 0,
        global_batch: int | None = None,
    ) -> None:
        self._loader = weakref.ref(loader)  # the loader holds its last cursor
        self.cut = cut
        self.rank = world.rank
        self.epoch = epoch
        self.seed = seed
        self.digest = digest  # of the order of a sampler of the user's own
        self.global_batch = global_batch
        self.is_planned = cut is not None and cut.counts_samples
        self.index = -1
        self.is_last = False
        self.is_open = False
        self.is_look = False  # an evaluation, in the middle of an epoch of training
        self._num_full = cut.num_full if isinstance(cut, Cut) and self.is_planned else 0
        self.samples_seen = cut.local_samples(0, world.rank) if cut is not None and self._num_full else 0
        self.sizes: tuple[int, ...] | None = None
        self.mean_samples = 0.0  # of a batch on one rank where the plan does not say it; the same on all ranks
        self.had_ghosts = cut is not None and cut.has_ghosts
        self.padded_to = cut.padded_size(world.rank) if cut is not None else None
        self.grad_enabled = False
        self.num_trained = 0
        self.last_trained = -1
        self.finished = False
        self._remembered: weakref.ref[Tensor] | None = None
        self.verified = world.size == 1

    @property
    def loader(self) -> DataLoader[Any] | None:
        """The prepared loader, while it exists."""
        return self._loader()

    @property
    def samples(self) -> int:
        """Samples of this rank in the batch that the loop holds; 0 for a ghost."""
        if self.index < self._num_full or not self.is_planned:
            return self.samples_seen
        assert self.cut is not None
        return self.cut.local_samples(self.index, self.rank)

    def size_on(self, rank: int) -> int:
        """How many rows the batch in hand really has on `rank`: one where it is a ghost. -1 if nobody knows."""
        if self.is_planned and self.cut is not None:
            return self.cut.padded_size(rank) or max(1, self.cut.local_samples(self.index, rank))
        if self.sizes is not None:
            return self.sizes[rank] or -1
        return self.samples_seen if self.verified and self.cut is None else -1

    @property
    def is_ghost(self) -> bool:
        """Whether this rank holds a repeated sample only to keep step with the others."""
        return self.samples == 0

    @property
    def counts(self) -> bool:
        """Whether this pass was an epoch, or a part of one, and not only a look at the data."""
        return not self.is_look and (self.finished or self.num_trained > 0)

    @property
    def is_uneven(self) -> bool:
        """Whether batches of this pass differ in size, over the pass or over ranks, or may do so."""
        if self.cut is None or not self.is_planned:
            return True
        number = self.cut.num_batches
        return self.had_ghosts or self.cut.window_samples(0, number) != number * self.cut.window_samples(0, 1)

    def remember(self, batch: Any) -> None:
        """Note a batch before the last, to know later whether the loop keeps what it took."""
        loader = self.loader
        if loader is None or (loader.num_workers == 0 and not loader._auto_collation):
            return  # the batches may be the dataset's own tensors, which it keeps
        tensor = next(iterate_tensors(batch), None)
        self._remembered = None if tensor is None else weakref.ref(tensor)

    @property
    def was_kept(self) -> bool:
        """Whether the loop, after the end of the pass, still holds a batch before the last."""
        if self._remembered is None or self._remembered() is None:
            return False
        gc.collect()  # a cycle of references may hold it, and nobody else
        return self._remembered() is not None

    @property
    def used(self) -> int:
        """Batches of this pass that a loop which left it has used: the one in hand only if it was trained on."""
        return self.index + (self.last_trained == self.index >= 0)

    @property
    def is_over(self) -> bool:
        """Whether nothing of its epoch is left to use."""
        return self.finished or (self.is_last and self.used > self.index)

    def goes_on_from(self, other: Cursor, index: int) -> bool:
        """Whether the batch in hand is what batch `index` of `other`, a pass that was left, would have been."""
        if self.cut is None or other.cut is None or self.index != 0 or self.loader is not other.loader:
            return False
        return self.epoch == other.epoch and self.cut.start == other.cut.position_after(index - 1)

    def agrees_with(self, other: Cursor) -> bool:
        """Whether both describe the same sizes from here to the end, so that either may weigh the window."""
        return self.is_planned and self.cut == other.cut and self.index == other.index


class Sources:
    """The passes over prepared loaders that one Accelerator's loop has open, outermost first."""

    def __init__(self, world: World, steps_taken: Callable[[], Sequence[int]] = tuple) -> None:
        self._world = world
        self._steps_taken = steps_taken  # by each optimizer, the same on all ranks
        self._open: list[Cursor] = []
        self.latest: Cursor | None = None  # the last one that gave a batch, open or not
        self._left_words = False

    def fail(self, error: BaseException, where: str = "") -> None:
        """Tell the other ranks of an error that is about to leave the loop here, and perhaps to end the process."""
        leave_last_words(self._world, error, where)
        self._left_words = True

    def open(self, cursor: Cursor) -> None:
        """Enter a pass. A pass over the same loader that was never closed is over."""
        if self._left_words:
            take_back_last_words(self._world)
            self._left_words = False
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
        self.latest = cursor

    def take(self, loader: DataLoader[Any] | None = None) -> Cursor | None:
        """The pass that `training` finds, its batch noted as trained on. Collective for the first batch of a pass."""
        opened = self._open
        if loader is None and len(opened) == 1 and opened[0].grad_enabled:  # the usual loop, without the search
            usual = opened[0]
            if usual.last_trained != usual.index:
                if not usual.verified:
                    self.verify(usual)
                usual.last_trained = usual.index
                usual.num_trained += 1
            return usual
        cursor = self.training(loader)
        if cursor is not None and cursor.last_trained != cursor.index:
            if not cursor.verified:
                self.verify(cursor)
            for taken in opened if len(opened) > 1 else [cursor]:  # batches of zipped loaders are trained on together
                if taken.grad_enabled and taken.last_trained != taken.index:
                    taken.last_trained = taken.index
                    taken.num_trained += 1
        return cursor

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
        """The pass that values of `num_samples` samples on this rank belong to. Collective: all ranks agree on it.

        The first, of the open passes from the last that gave a batch outwards, whose batch has on every rank as
        many samples as that rank's values. Where none has (values of any length, scalars): the last that gave a
        batch and is open; where none is open, the last of all.
        """
        if loader is not None:
            return self._of(loader)
        latest = self.latest
        if latest is None:
            return None
        inside = [cursor for cursor in reversed(self._open) if cursor.index >= 0]
        if latest in inside:
            inside.remove(latest)
            inside.insert(0, latest)
        if not inside:
            return latest
        if len(inside) > 1:
            sizes = collectives.meet("gather_for_metrics in nested loops", self._world, num_samples or 0)
            for cursor in inside:
                if [cursor.size_on(rank) for rank in range(self._world.size)] == sizes:
                    return cursor
        return inside[0]

    def refuse_kept(self, *, weighed: bool) -> None:
        """Raise `StepError` where the loop trains on batches that it kept from a pass that has ended.

        `weighed`: the loop says what a batch weighs. Which of them were ghosts it cannot say.
        """
        ended = self.latest
        if ended is None or not ended.finished or not ended.grad_enabled or (weighed and not ended.had_ghosts):
            return
        if ended.is_uneven and ended.was_kept:
            what = "ghosts, which must weigh nothing" if ended.had_ghosts else "batches of different sizes"
            raise StepError(
                f"the loop over {_describe(ended)} has ended, and this micro-batch comes from no other: list(loader) "
                f"and itertools.cycle(loader) keep batches. That pass had {what}, and which is which is known inside "
                "the loop only. Loop over the loader itself, for endless data in `while True: for batch in loader:`"
                + ("." if ended.had_ghosts else ", or give backward() a weight=.")
                + " If this is other data, take the loader's batches under torch.no_grad()."
            )

    def is_open(self, cursor: Cursor) -> bool:
        """Whether the loop is still inside this pass."""
        return cursor in self._open

    def verify(self, cursor: Cursor) -> None:
        """Check once per pass that every rank is at the same place of it, and has stepped as often. Collective.

        Raises `DataError` or `StepError`, on every rank.
        """
        if cursor.verified:
            return
        cursor.verified = True
        start = 0 if cursor.cut is None else cursor.cut.start
        place = _Place(cursor.epoch, cursor.index, start, cursor.seed, cursor.digest, tuple(self._steps_taken()))
        brought = zlib.crc32(repr(place).encode()) << 31 | cursor.samples  # both in one exchange
        told = collectives.meet("the first batch of a pass over a loader", self._world, brought)
        cursor.mean_samples = sum(each % 2**31 for each in told) / self._world.size
        if any(each >> 31 != told[0] >> 31 for each in told):
            _refuse_apart(cursor, collectives.all_gather_objects(place, self._world))

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
    size = f" of {cursor.cut.length} samples" if isinstance(cursor.cut, Cut) else ""
    return f"{dataset}{size} (batch {cursor.index})"


class _Place(NamedTuple):
    """What ranks must have alike where a pass begins."""

    epoch: int
    batch: int
    start: int
    seed: int
    digest: int
    steps: tuple[int, ...]


def _refuse_apart(cursor: Cursor, places: Sequence[_Place]) -> None:
    """Raise for what ranks differ in."""
    first = places[0]
    if any(place[:4] != first[:4] for place in places):
        told = "; ".join(
            f"rank {rank}: epoch {place.epoch}, batch {place.batch}"
            + (f" after position {place.start}" if place.start else "")
            for rank, place in enumerate(places)
        )
        raise DataError(
            f"ranks are at different places of the loader over {_describe(cursor)} ({told}). It was iterated to "
            "its end, or trained on, by some ranks only, or they loaded different positions: iterate it on every "
            "rank, or on a loader of its own."
        )
    if any(place.digest != first.digest for place in places):
        told = "; ".join(f"rank {rank}: digest {place.digest:08x}" for rank, place in enumerate(places))
        raise DataError(
            f"the sampler of the loader over {_describe(cursor)} gave another order on every rank for epoch "
            f"{cursor.epoch} ({told}), so that samples would come twice or never. A sampler must draw from the "
            "generators of Python, NumPy or torch, or from one that is an attribute of it, and cut nothing by rank."
        )
    told = "; ".join(f"rank {rank}: {', '.join(map(str, place.steps))}" for rank, place in enumerate(places))
    raise StepError(
        f"ranks have taken different numbers of optimizer steps ({told}), so that their weights differ since: one of "
        "them left optimizer.step() out. Call it on every rank; what decides to skip an update must be the same on all "
        "of them, as accelerator.reduce(value) is."
    )
