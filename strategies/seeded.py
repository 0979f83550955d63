"""Samples whose random draws are functions of (seed, epoch, index): whoever reads them, and after whatever else.

Torch's iterator is made with three stand-ins (`seeded_parts`): a sampler that sends a key along with the indices of
each batch, a dataset that seeds the generators before each sample, and a collate function that seeds them before each
batch. The key travels with the indices, so that workers need not be told anything else, also those that persist.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler, get_worker_info
from torch.utils.data import _utils as torch_utils

from .drawn import Repeat
from .randomness import derive, generators_in, seed_all, set_states, states

_MASK = 2**64 - 1
_BATCH = 0x9E3779B97F4A7C15  # tells the seed of a batch from that of its first sample


@dataclass(frozen=True)
class Request:
    """What a sampler gives for one batch (for one item without batches), and the key of its epoch."""

    key: int
    wanted: Any


class RequestSampler(Sampler[Any]):
    """What `sampler` of a prepared loader gives, with the key of its seed and epoch."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler

    def __iter__(self) -> Iterator[Request]:
        key = derive(self.sampler.order.seed, self.sampler.epoch)
        return (Request(key, wanted) for wanted in self.sampler)


class SeededSamples:
    """Stands in for a dataset, its loader's collate function and its `worker_init_fn`."""

    def __init__(self, loader: Any) -> None:
        self.dataset = loader.dataset
        self._collate = loader.collate_fn
        self._init = loader.worker_init_fn
        self._one_by_one = getattr(loader.dataset, "__getitems__", None) or None
        self._held: list[Any] | None = None
        self._batch_seed = 0
        self._kept: Any = None  # the loop's generators, where it reads for itself

    def __getitems__(self, request: Request) -> list[Any]:
        """The samples of one batch, each drawn with seeds of its own."""
        self._begin(request.key, request.wanted[0])
        try:
            return [self._read(request.key, index) for index in request.wanted]
        except BaseException:
            self._end()
            raise

    def __getitem__(self, request: Request) -> Any:
        """The item of a loader without batches."""
        self._begin(request.key, request.wanted)
        try:
            return self._read(request.key, request.wanted, whole=True)
        except BaseException:
            self._end()
            raise

    def collate(self, samples: Any) -> Any:
        """What the user's function makes of them, its draws those of the batch."""
        try:
            self._seed(self._batch_seed)
            return self._collate(samples)
        finally:
            self._end()

    def init_worker(self, worker: int) -> None:
        """Torch calls this in each worker: show the user's dataset there, then let the user's own function run."""
        object.__setattr__(torch_utils.worker._worker_info, "dataset", self.dataset)  # frozen
        if self._init is not None:
            self._init(worker)

    def _begin(self, key: int, first: Any) -> None:
        if self._held is None:  # here, in the process that reads
            self._held = list(generators_in([self.dataset, self._collate]))
        self._batch_seed = sample_seed(key ^ _BATCH, first)
        self._kept = states() if get_worker_info() is None else None

    def _end(self) -> None:
        if self._kept is not None:
            set_states(self._kept)
            self._kept = None

    def _read(self, key: int, index: Any, *, whole: bool = False) -> Any:
        self._seed(sample_seed(key, index))
        own = index.index if isinstance(index, Repeat) else index
        if self._one_by_one is None or whole:
            return self.dataset[own]
        (sample,) = self._one_by_one([own])
        return sample

    def _seed(self, seed: int) -> None:
        seed_all(seed)
        for number, generator in enumerate(self._held or ()):
            _reseed(generator, (seed + number + 1) & _MASK)


def sample_seed(key: int, index: Any) -> int:
    """The seed of one sample: 63 bits that depend on all bits of `key` and on the index."""
    number = 0
    if isinstance(index, Repeat):
        index, number = index.index, index.number
    if isinstance(index, list | tuple):
        index = zlib.crc32(repr(index).encode())
    elif not isinstance(index, int):
        index = int(index) if isinstance(index, np.integer | torch.Tensor) else zlib.crc32(repr(index).encode())
    value: int = (key + index * 0x9E3779B97F4A7C15 + number * 0xD1B54A32D192ED03) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK  # the finaliser of SplitMix64, as in sharding
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return (value ^ (value >> 31)) >> 1


def _reseed(generator: Any, seed: int) -> None:
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, np.random.Generator):
        bits = generator.bit_generator
        bits.state = type(bits)(seed).state
    else:
        generator.seed(seed & (2**32 - 1))


def make_iterator(loader: Any, sampler: Any, make: Any) -> Any:
    """The iterator that `make` makes of `loader`, with the stand-ins in their places meanwhile."""
    samples = SeededSamples(loader)
    name = "sampler" if loader.batch_sampler is None else "batch_sampler"
    own = {key: loader.__dict__[key] for key in ("dataset", "collate_fn", "worker_init_fn", name)}
    stand_ins = {"dataset": samples, "collate_fn": samples.collate, "worker_init_fn": samples.init_worker}
    loader.__dict__.update(stand_ins | {name: RequestSampler(sampler)})
    try:
        return make()
    finally:
        loader.__dict__.update(own)
