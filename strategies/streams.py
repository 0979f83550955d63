"""Iterable datasets: which samples of a stream belong to which rank and worker, and where each of them stands.

A shard is one worker of one rank (or the rank itself without workers). A dataset that asks torch's
`get_worker_info()` how many workers there are shards itself: it is shown the number of shards in place of theirs.
Of one that does not ask, every shard reads all and keeps the samples whose position is its own; its draws are then
seeded alike on all shards. One of Hugging Face `datasets` is given its part of the ranks by that package.
"""

from __future__ import annotations

import contextlib
import copy
import zlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info
from torch.utils.data import _utils as torch_utils
from torch.utils.data.dataloader import (
    _BaseDataLoaderIter,
    _MultiProcessingDataLoaderIter,
    _SingleProcessDataLoaderIter,
)

from . import hugging_face
from .randomness import derive, seed_all, set_states, states
from .tree import iterate_leaves
from .world import World


@dataclass(frozen=True)
class Place:
    """Where one shard stands: how many samples of the stream it has passed, and how many of those it gave out.

    `passed[k]` counts those that `Layers` left for stage k; `state` is the dataset's own after the last.
    """

    passed: tuple[int, ...] = (0,)
    given: int = 0
    state: Any = None


@dataclass(frozen=True)
class Carried:
    """A batch on its way out of a worker, with the place of its shard after it."""

    batch: Any
    shard: int
    place: Place
    shards_itself: bool
    first: int = 0  # a digest of the first sample that the shard read, where it reads all from the beginning
    asked_id: bool = False  # whether the dataset asked which shard it is

    def pin_memory(self, device: Any = None) -> Carried:
        """The same with the batch in pinned memory, for torch's pinning thread."""
        batch = torch_utils.pin_memory.pin_memory(self.batch, device)
        return replace(self, batch=batch)


class ShardInfo:
    """What `get_worker_info()` gives inside a shard. Notes whether the dataset asked which it is, and of how many."""

    def __init__(self, real: Any, dataset: Any, shard: int, num_shards: int) -> None:
        self.dataset = dataset
        self.was_asked = False
        self.asked_id = False
        self._real = real
        self._shard = shard
        self._num_shards = num_shards

    @property
    def id(self) -> int:
        """The number of the shard, which a dataset may want for a name only."""
        self.asked_id = True
        return self._shard

    @property
    def num_workers(self) -> int:
        """How many shards there are."""
        self.was_asked = True
        return self._num_shards

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


class StreamShard(IterableDataset[Any]):
    """Stands in for an iterable dataset where a loader's iterator is made: in the workers, or in the loop's process.

    `layers` are the earlier stages of the epoch on another number of shards: (number of shards, samples that each
    gave out). Samples they gave out are passed over, and those that are left counted anew.
    """

    def __init__(self, dataset: Any, world: World, num_workers: int, loader: Any, seed: int) -> None:
        self.dataset = dataset
        self.by_node = False
        self.rank, self.world_size = world.rank, world.size
        self.num_workers = max(1, num_workers)
        self.seed = seed
        self.turn = 0  # the worker whose batch comes next
        self.layers: tuple[tuple[int, tuple[int, ...]], ...] = ()
        self.places: dict[int, Place] = {}  # to begin at, by shard
        self.reports: deque[Carried] = deque()
        self._numbers = torch.zeros(1, dtype=torch.int64).share_memory_()  # the epoch, for workers that persist
        self._collate = loader.collate_fn
        self._init = loader.worker_init_fn
        self._info: ShardInfo | None = None
        self._place = Place()
        self._first = 0
        self._source: Any = None
        self._initial: Any = None  # state of the dataset before a pass that has not come to its end
        self._alone = num_workers == 0
        self._begun = False

    def set_epoch(self, epoch: int) -> None:
        """Tell the workers, also those that are kept from one pass to the next."""
        self._numbers[0] = epoch

    @property
    def num_shards(self) -> int:
        """Shards over all ranks."""
        return self.world_size * self.num_workers

    def init_worker(self, worker: int) -> None:
        """Torch calls this in each worker: show what is asked for there the shards, then let the user's own run."""
        self._show(torch_utils.worker._worker_info)
        if self._init is not None:
            assert self._info is not None
            self._init(
                self._info._shard
            )  # as is shown there; not a question: most of them seed by it, and split nothing

    def collate(self, samples: Any) -> Carried:
        """The batch that the user's own function makes, and where this shard stands after it."""
        info = self._info
        assert info is not None
        place = self._place
        if self._source is not None:
            place = Place(place.passed, place.given, self._source.state_dict())
        first = 0 if info.was_asked else self._first
        return Carried(self._collate(samples), self._shard, place, info.was_asked, first, info.asked_id)

    def __iter__(self) -> Iterator[Any]:
        if self._alone or self._info is None:
            self._show(get_worker_info())
        elif self._begun:  # a worker that is kept begins another pass
            self.turn, self.layers, self.places, before = 0, (), {}, self._info
            self._show(before._real)
            self._info.was_asked, self._info.asked_id = before.was_asked, before.asked_id
        self._begun = True
        epoch = int(self._numbers[0])
        if self.cuts_by_position:
            seed_all(derive(self.seed, epoch))  # in a worker; without workers the iterator keeps the loop's generators
        if callable(getattr(self.dataset, "set_epoch", None)):
            self.dataset.set_epoch(epoch)
        return self._samples(self.places.pop(self._shard, Place()), self.layers)

    @property
    def is_stateful(self) -> bool:
        """Whether the dataset itself says where it stands, all of it."""
        return is_stateful(self.dataset) and (not self.by_node or hugging_face.keeps_its_place(self.dataset))

    @property
    def cuts_by_position(self) -> bool:
        """Whether samples may have to be told apart by position, so that all shards must draw alike."""
        return not self.by_node

    @property
    def shares_generators(self) -> bool:
        """Whether the dataset would draw from the loop's own generators, and must not."""
        return self._alone and self.cuts_by_position

    @property
    def _shard(self) -> int:
        info = self._info
        assert info is not None
        return info._shard if not self.by_node else self.rank * self.num_workers + info._shard

    def _show(self, real: Any) -> None:
        worker = ((0 if real is None else real.id) + self.turn) % self.num_workers
        first, number = (0, self.num_workers) if self.by_node else (self.rank * self.num_workers, self.num_shards)
        self._info = ShardInfo(real, self.dataset, first + worker, number)
        if not self._alone:
            torch_utils.worker._worker_info = self._info  # type: ignore[assignment]  # it stands in for torch's

    def _samples(self, place: Place, layers: tuple[tuple[int, tuple[int, ...]], ...]) -> Iterator[Any]:
        dataset, info = self.dataset, self._info
        assert info is not None
        stateful = self.is_stateful
        if stateful and not self.by_node:
            self._go_back()
        if stateful and place.state is not None:
            if self.by_node:
                dataset = hugging_face.begun_at(dataset, place.state)
            else:
                dataset.load_state_dict(place.state)
        source = iter(dataset)
        if not stateful and is_stateful(source):
            stateful, dataset = True, source
            if place.state is not None:
                source.load_state_dict(place.state)
        self._source = dataset if stateful else None
        resumed = stateful and place.state is not None
        passed = list(place.passed) if resumed else [0] * (len(layers) + 1)
        passed += [0] * (len(layers) + 1 - len(passed))
        given, skip = (place.given, 0) if resumed else (0, place.given)
        shard, num_shards = info._shard, info._num_shards
        keeps_all = self.by_node or num_shards == 1
        self._first = 0
        for sample in source:
            if not (self._first or keeps_all or resumed or any(passed)):
                self._first = _digest(sample)
            if _used(passed, layers):
                continue
            number = passed[-1]
            passed[-1] += 1
            if not (keeps_all or info.was_asked or number % num_shards == shard):
                continue
            given += 1
            if given == 1 and info.was_asked and num_shards > 1:  # other samples than on other shards: other draws
                seed_all(derive(self.seed, int(self._numbers[0]), shard))
            if given > skip:
                self._place = Place(tuple(passed), given)
                yield sample
        self._initial = None

    def _go_back(self) -> None:
        """Take the dataset back to where it began, from where a pass that was left in the middle has brought it."""
        if self._initial is not None:
            self.dataset.load_state_dict(copy.deepcopy(self._initial))
            return
        with contextlib.suppress(Exception):  # one that has no state before its first sample begins anew by itself
            self._initial = copy.deepcopy(self.dataset.state_dict())


def _used(passed: list[int], layers: tuple[tuple[int, tuple[int, ...]], ...]) -> bool:
    """Whether an earlier stage gave the next sample out; counts it for every stage that it was left to."""
    for stage, (num_shards, given) in enumerate(layers):
        turn, shard = divmod(passed[stage], num_shards)
        passed[stage] += 1
        if turn < given[shard]:
            return True
    return False


def _digest(sample: Any) -> int:
    """A number that tells samples apart by what tensors, arrays, numbers and texts are in them, never 0."""
    digest = 0
    for leaf in iterate_leaves(sample):
        part = repr(leaf).encode() if isinstance(leaf, str | bytes | int | float) else type(leaf).__name__.encode()
        if isinstance(leaf, np.ndarray) and leaf.dtype != object:
            part = leaf.tobytes()
        elif type(leaf) is torch.Tensor and leaf.layout is torch.strided and leaf.device.type == "cpu":
            part = leaf.detach().resolve_conj().resolve_neg().reshape(-1).view(torch.uint8).numpy().tobytes()
        digest = zlib.crc32(part, digest)
    return digest | 1 << 32


def is_stateful(source: Any) -> bool:
    """Whether a dataset, or its iterator, can say where it stands and go on from there."""
    return callable(getattr(source, "state_dict", None)) and callable(getattr(source, "load_state_dict", None))


class _Unpacking:
    """Takes batches out of what carries them, before anything of the user's sees them."""

    _shard: StreamShard

    def _next_data(self) -> Any:
        shard = self._shard
        if not shard.shares_generators:
            carried = super()._next_data()  # type: ignore[misc]  # torch's iterator follows
            shard.reports.append(carried)
            return carried.batch
        # In the loop's process: the draws of the dataset are its own, and it may ask which shard it is.
        kept, info = states(), torch_utils.worker._worker_info
        set_states(self._states)  # type: ignore[has-type]  # set below, and where the iterator is made
        if shard.num_shards > 1:
            torch_utils.worker._worker_info = shard._info  # type: ignore[assignment]
        try:
            carried = super()._next_data()  # type: ignore[misc]
        finally:
            self._states = states()
            torch_utils.worker._worker_info = info
            set_states(kept)
        shard.reports.append(carried)
        return carried.batch


class _Single(_Unpacking, _SingleProcessDataLoaderIter):
    """In the loop's own process."""


class _Several(_Unpacking, _MultiProcessingDataLoaderIter):
    """Over worker processes."""


def make_iterator(loader: Any, shard: StreamShard, make: Any) -> _BaseDataLoaderIter:
    """The iterator that `make` makes of `loader`, with `shard` in place of its dataset meanwhile."""
    own = {name: loader.__dict__[name] for name in ("dataset", "collate_fn", "worker_init_fn")}
    own_states = states()
    loader.__dict__.update(dataset=shard, collate_fn=shard.collate, worker_init_fn=shard.init_worker)
    try:
        made = make()
        made.__class__ = _Single if isinstance(made, _SingleProcessDataLoaderIter) else _Several
        made._shard = shard
        if shard.shares_generators:
            made._states = states()  # as iter(shard) has seeded them
    finally:
        loader.__dict__.update(own)
        if shard.shares_generators:
            set_states(own_states)
    return made  # type: ignore[no-any-return]
