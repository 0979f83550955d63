"""The dataloader that `prepare` returns: this rank's slices of a global order, batch by batch on its device."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from .. import collectives
from ..errors import DataError
from ..sharding import Cut, ShardedBatchSampler
from ..sources import Cursor
from ..tree import num_samples
from .view import View, make_view

if TYPE_CHECKING:
    from ..accumulation import Accumulation


class DataLoaderLink:
    """What a prepared dataloader knows: its cut of the data, and how many passes count as epochs.

    An epoch counts once one of its batches was trained on, or once it ran to its end. Looking at a batch,
    on one rank or on all, leaves the order of the next pass as it was.
    """

    def __init__(self, original: DataLoader[Any], accumulation: Accumulation, sampler: ShardedBatchSampler | None):
        self.original = original
        self.accumulation = accumulation
        self.sampler = sampler
        self._last: Cursor | None = None

    @property
    def epoch(self) -> int:
        """The epoch of the pass that was begun last."""
        return self._last.epoch if self._last is not None else 0

    @property
    def global_batch_size(self) -> int | None:
        """Samples of one full batch over all ranks."""
        return self.sampler.cut.global_batch if self.sampler is not None else self.original.batch_size

    def iterate(self, view: DataLoader[Any], make_iterator: Callable[[], Iterator[Any]]) -> Iterator[Any]:
        """One pass over this rank's batches, keeping the loop's position for the weights of its windows."""
        accumulation, sampler, last = self.accumulation, self.sampler, self._last
        sources, world = accumulation.sources, accumulation.world
        epoch = 0 if last is None else last.epoch + (last.finished or last.num_trained > 0)
        seed = sampler.seed if sampler is not None else 0
        cursor = self._last = Cursor(view, sampler.cut if sampler is not None else None, world, epoch=epoch, seed=seed)
        if sampler is not None:
            sampler.epoch = epoch
            length = len(self.original.dataset)  # type: ignore[arg-type]  # it had one when it was cut
            if length != sampler.cut.length:
                raise DataError(
                    f"{type(self.original.dataset).__name__} had {sampler.cut.length} samples when its loader was "
                    f"prepared and has {length} now. Prepare a new loader over it."
                )
        sources.open(cursor)
        try:
            batches = accumulation.strategy.device_loader(make_iterator(), world)
            if sampler is None:
                yield from self._stream(batches, cursor)
            else:
                advance, final = sources.advance, sampler.cut.num_batches - 1
                for index, batch in enumerate(batches):
                    advance(cursor, index, index == final)
                    yield batch
                    self._run_untrained(cursor)
                self._check_number(cursor, sampler.cut.num_batches)
            cursor.finished = True
        except Exception as error:
            sources.fail(error)
            raise
        finally:
            sources.close(cursor)
        self._check_trained(cursor)

    def _check_number(self, cursor: Cursor, num_batches: int) -> None:
        if cursor.index + 1 != num_batches:
            raise DataError(
                f"the loader gave {cursor.index + 1} instead of {num_batches} batches. Does its class have an "
                "__iter__ of its own? It must yield one batch per element of batch_sampler."
            )

    def _stream(self, batches: Iterator[Any], cursor: Cursor) -> Iterator[Any]:
        """Read one batch ahead, because only the next one tells whether this is the last."""
        advance = self.accumulation.sources.advance
        nothing = object()
        batch = next(batches, nothing)
        while batch is not nothing:
            following = next(batches, nothing)
            cursor.samples_seen = num_samples(batch) or 1
            advance(cursor, cursor.index + 1, following is nothing)
            yield batch
            self._run_untrained(cursor)
            batch = following

    def _run_untrained(self, cursor: Cursor) -> None:
        """Run what was recorded for a batch that no window closes with."""
        if cursor.last_trained != cursor.index:
            self.accumulation.strategy.mark_step(self.accumulation.world)

    def _check_trained(self, cursor: Cursor) -> None:
        missed = cursor.index + 1 - cursor.num_trained
        if cursor.num_trained and missed:
            warnings.warn(
                f"{missed} of the {cursor.index + 1} batches of this epoch were taken but not trained on. If the loop "
                "skipped them, all is well. If something between loader and loop reads ahead, the window closed too "
                "early: iterate the prepared loader itself.",
                stacklevel=3,
            )


class PreparedDataLoader(View):
    """What comes before the user's own methods in a prepared dataloader."""

    __slots__ = ()

    _link: DataLoaderLink

    def __iter__(self) -> Iterator[Any]:
        """One pass: this rank's part of an epoch, on its device. Not a collective."""
        # DataLoader follows in the view
        return self._link.iterate(self, super().__iter__)  # type: ignore[arg-type, misc]

    @property
    def epoch(self) -> int:
        """The epoch of the pass that was begun last; 0 before the first."""
        return self._link.epoch

    @property
    def global_batch_size(self) -> int | None:
        """Samples of one full batch over all ranks; `None` where it is not known."""
        return self._link.global_batch_size


def prepare_dataloader(loader: DataLoader[Any], accumulation: Accumulation, *, split_batches: bool, seed: int) -> Any:
    """`loader` cut into this rank's part, behind a view that is still an instance of its class.

    Everything the user set (workers, collate function, pinning, ...) is carried over; only the batch sampler
    is ours. Raises `DataError` for a loader that cannot be cut so that every sample is seen once.
    """
    world = accumulation.world
    _refuse_sharded(loader)
    sampler: ShardedBatchSampler | None = None
    shuffle = _shuffles(loader)
    if shuffle is None:
        if world.size > 1:
            raise DataError(
                f"{_what(loader)} cannot be cut over {world.size} processes yet: only map-style datasets with the "
                "samplers that DataLoader makes itself (shuffle=True or False, batch_size=n) can. One process works."
            )
    else:
        assert loader.batch_size is not None
        length = _length(loader)
        global_batch = loader.batch_size if split_batches else loader.batch_size * world.size
        cut = Cut(length=length, global_batch=global_batch, world_size=world.size, drop_last=loader.drop_last)
        if split_batches and global_batch < world.size:
            raise DataError(
                f"batch_size is {global_batch} and split_batches=True, fewer than the {world.size} processes. "
                "Give a batch_size of at least the number of processes."
            )
        if cut.num_batches == 0:
            raise DataError(
                f"the dataset has {length} samples, fewer than one global batch of {global_batch}, and drop_last=True "
                "drops them all. Use a smaller batch_size or drop_last=False."
            )
        sampler = ShardedBatchSampler(cut, world.rank, shuffle=shuffle, seed=seed)
    copied = object.__new__(type(loader))
    copied.__dict__.update(loader.__dict__)
    copied.__dict__["_iterator"] = None  # persistent workers belong to one loader
    if sampler is not None:
        copied.__dict__["batch_sampler"] = sampler
    link = DataLoaderLink(loader, accumulation, sampler)
    accumulation.loaders.append(link)
    return make_view(copied, PreparedDataLoader, link)


def loader_seed(loader: DataLoader[Any], seed: int | None, ordinal: int, accumulation: Accumulation) -> int:
    """The seed of a loader's order, the same on all ranks. Collective where there are several.

    Its own `generator` comes first, then the Accelerator's seed, then torch's: nothing is drawn from any of
    them. Loaders that share a seed are told apart by the order in which they were prepared.
    """
    generator = loader.generator or getattr(loader.sampler, "generator", None)
    if generator is not None:
        chosen = generator.initial_seed()
    else:
        chosen = (torch.initial_seed() if seed is None else seed) + 0x9E3779B97F4A7C15 * ordinal
    return collectives.all_gather_integers([chosen], accumulation.world)[0][0]


def _shuffles(loader: DataLoader[Any]) -> bool | None:
    """Whether the loader shuffles; `None` for one whose order is not ours to compute."""
    if isinstance(loader.dataset, IterableDataset) or type(loader.batch_sampler) is not BatchSampler:
        return None
    sampler = loader.sampler
    if type(sampler) is SequentialSampler:
        return False
    if type(sampler) is RandomSampler and not sampler.replacement and sampler._num_samples is None:
        return True
    return None


def _length(loader: DataLoader[Any]) -> int:
    try:
        length = len(loader.dataset)  # type: ignore[arg-type]  # the error below is for those without
    except TypeError:
        raise DataError(
            f"{type(loader.dataset).__name__} has no __len__. Give it one, or make it an IterableDataset."
        ) from None
    if length == 0:
        raise DataError(f"{type(loader.dataset).__name__} is empty: a loader of length zero trains nothing.")
    return length


def _refuse_sharded(loader: DataLoader[Any]) -> None:
    for sampler in (loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None)):
        if isinstance(sampler, DistributedSampler):
            raise DataError(
                f"the loader already has a {type(sampler).__name__}; cutting its part again would lose samples. Give a "
                "plain loader (shuffle=True instead of the sampler): prepare() cuts it."
            )
    if not loader.in_order:
        raise DataError(
            "in_order=False lets workers hand batches over in any order, so that no batch's place in the epoch is "
            "known. Use in_order=True."
        )


def _what(loader: DataLoader[Any]) -> str:
    if isinstance(loader.dataset, IterableDataset):
        return f"the iterable dataset {type(loader.dataset).__name__}"
    if type(loader.batch_sampler) is not BatchSampler:
        return (
            "a loader without automatic batches"
            if loader.batch_sampler is None
            else type(loader.batch_sampler).__name__
        )
    return type(loader.sampler).__name__
