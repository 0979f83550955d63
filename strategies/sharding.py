"""How an epoch is cut: the order of its samples, its global batches, and each rank's slice of them.

The order and the cut are pure functions of (length, batch, world, start, seed, epoch): no communication.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Sampler

_ROUNDS = 6
_GOLDEN, _MASK = 0x9E3779B97F4A7C15, 2**64 - 1  # the step of SplitMix64, and its word
_SORTED_SAMPLES = 1 << 17  # epochs up to this length are sorted by random keys
_FIRST_BLOCK, _LAST_BLOCK = 1 << 9, 1 << 13  # indices computed at once: few to start with, then enough for NumPy

Words = npt.NDArray[np.uint64]


def permute(positions: npt.NDArray[np.int64], length: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Where the shuffled order of an epoch has its `positions`: a bijection of range(length).

    A Feistel network over as many bits as hold `length`, walked until it falls inside (Black and Rogaway 2002,
    "Ciphers with Arbitrary Finite Domains", section 4). Any position costs the same time and no memory beyond itself,
    so that a run over 10^9 samples starts and resumes at once.
    An epoch of at most 2^17 samples is sorted by a random key for each instead, in 2 ms at most: that is faster for
    all of them, and over few bits a Feistel network does not reach all orders alike.

    `positions`: any shape, values in [0, length). Returns indices of the same shape.
    """
    keys = _keys(seed, epoch)
    if length <= _SORTED_SAMPLES:
        order: npt.NDArray[np.int64] = _sorted(length, keys[0])[positions]
        return order
    words = np.array(keys, dtype=np.uint64)
    result = _feistel(positions.astype(np.uint64), (length - 1).bit_length(), words)
    outside = np.flatnonzero(result >= length)
    flat = result.reshape(-1)
    while outside.size:
        flat[outside] = _feistel(flat[outside], (length - 1).bit_length(), words)
        outside = outside[flat[outside] >= length]
    return result.astype(np.int64)


def _sorted(length: int, key: int) -> npt.NDArray[np.int64]:
    """All of range(length), sorted by outputs of SplitMix64, which are all different: any way of sorting does."""
    return np.argsort(_mix(np.arange(length, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(key)))


def _feistel(values: Words, bits: int, keys: Words) -> Words:
    """A bijection of range(2 ** bits): each half in turn is changed by a hash of the other and a key."""
    right_bits, mask = np.uint64(bits // 2), np.uint64((1 << bits // 2) - 1)
    left: Words = values >> right_bits
    right: Words = values & mask
    left_shift, right_shift = np.uint64(64 - bits + bits // 2), np.uint64(64 - bits // 2)
    spare, other = np.empty_like(values), np.empty_like(values)
    for first, second in zip(keys[::2], keys[1::2], strict=True):
        left ^= _hash(right, first, left_shift, spare, other)
        right ^= _hash(left, second, right_shift, spare, other)
    left <<= right_bits
    left |= right
    return left


def _hash(values: Words, key: np.uint64, shift: np.uint64, result: Words, spare: Words) -> Words:
    """The high bits of a product of a product, written into `result`: all bits of `values` reach them."""
    np.add(values, key, out=result)
    np.multiply(result, np.uint64(0x9E3779B97F4A7C15), out=result)
    np.right_shift(result, np.uint64(32), out=spare)
    np.bitwise_xor(result, spare, out=result)
    np.multiply(result, np.uint64(0xBF58476D1CE4E5B9), out=result)
    hashed: Words = np.right_shift(result, shift, out=result)
    return hashed


def _keys(seed: int, epoch: int) -> list[int]:
    """Words of 64 bits that are functions of both: outputs of SplitMix64, in Python, since a pass needs only a few."""
    state, keys = _mixed(_mixed(seed & _MASK) + epoch & _MASK), []
    for _ in range(_ROUNDS):
        state = state + _GOLDEN & _MASK
        keys.append(_mixed(state))
    return keys


def _mixed(value: int) -> int:
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
    return value ^ (value >> 31)


def _mix(values: Words) -> Words:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): every bit of the result depends on every one given."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Words = values ^ (values >> np.uint64(31))
    return mixed


class Plan(ABC):
    """How the rest of one epoch is cut into global batches, and a global batch into one slice per rank.

    Batches are numbered from 0 at the place where the rest begins, the same on every rank.
    """

    start: int  # what the epoch has used before this rest, in samples, items or batches of a batch sampler
    counts_samples: bool  # whether the numbers below are samples; else items, each a batch of unknown size

    @property
    @abstractmethod
    def num_batches(self) -> int:
        """Global batches in the rest of the epoch."""

    @abstractmethod
    def samples(self, batch: int) -> int:
        """Samples in global batch number `batch`, over all ranks."""

    @abstractmethod
    def local_samples(self, batch: int, rank: int) -> int:
        """Samples of global batch `batch` that belong to `rank`; 0 where it has nothing left."""

    @abstractmethod
    def window_samples(self, first: int, num_batches: int) -> int:
        """Samples in the global batches [first, first + num_batches), as far as the epoch has them."""

    @abstractmethod
    def position_after(self, batch: int) -> int:
        """Where the epoch stands once global batch `batch` was used: what a later rest begins at."""

    @property
    @abstractmethod
    def has_ghosts(self) -> bool:
        """Whether some rank has nothing in some global batch."""

    def padded_size(self, rank: int) -> int | None:
        """How long every batch of `rank` is made with ghosts, repeated samples of weight zero; `None`: not at all."""
        return None


@dataclass(frozen=True)
class Cut(Plan):
    """The rest [start, length) of an epoch's order in global batches of one size.

    Global batch k holds the positions from start + k * global_batch on; the last one may be shorter, or is
    left out with `drop_last`. A batch of m samples is cut into contiguous slices, rank by rank, whose lengths
    differ by at most one: in a tail of fewer samples than ranks the last ranks have none.
    `padded`: slices of a short batch are filled up with ghosts.
    """

    length: int
    global_batch: int
    world_size: int
    drop_last: bool
    start: int = 0
    counts_samples: bool = True
    padded: bool = False

    @property
    def num_batches(self) -> int:
        """Global batches in the rest of the epoch, the same on every rank."""
        full, tail = divmod(self.length - self.start, self.global_batch)
        return full + (tail > 0 and not self.drop_last)

    @property
    def num_full(self) -> int:
        """Those of them that are not short."""
        return (self.length - self.start) // self.global_batch

    def samples(self, batch: int) -> int:
        """Samples in global batch number `batch`, over all ranks."""
        return min(self.global_batch, self.length - self.start - batch * self.global_batch)

    def local_samples(self, batch: int, rank: int) -> int:
        """Samples of global batch `batch` that belong to `rank`; 0 where it has nothing left."""
        each, more = divmod(self.samples(batch), self.world_size)
        return each + (rank < more)

    def window_samples(self, first: int, num_batches: int) -> int:
        """Samples in the global batches [first, first + num_batches), as far as the epoch has them."""
        begin = first * self.global_batch
        stop = min(first + num_batches, self.num_batches) * self.global_batch
        return min(stop, self.length - self.start) - begin

    def position_after(self, batch: int) -> int:
        """Samples of the epoch that are used once global batch `batch` is."""
        return min(self.start + (batch + 1) * self.global_batch, self.length)

    @property
    def has_ghosts(self) -> bool:
        """Whether the last global batch has fewer samples than ranks."""
        return self.num_batches > 0 and self.samples(self.num_batches - 1) < self.world_size

    def padded_size(self, rank: int) -> int | None:
        """The size of a full batch on `rank`."""
        each, more = divmod(self.global_batch, self.world_size)
        return each + (rank < more) if self.padded else None

    def bounds(self, batch: int, rank: int) -> tuple[int, int]:
        """Positions [start, stop) of the epoch's order that `rank` takes of global batch `batch`."""
        each, more = divmod(self.samples(batch), self.world_size)
        start = self.start + batch * self.global_batch + rank * each + min(rank, more)
        return start, start + each + (rank < more)


class Order(ABC):
    """The order of the samples, or of the batches, of one epoch after another."""

    seed: int
    length: int
    digest: int = 0  # of what was drawn for the epoch at hand, where that is no function of the seed

    @property
    @abstractmethod
    def kind(self) -> str:
        """What the order is, in a word that a saved position keeps."""

    @abstractmethod
    def begin(self, epoch: int) -> None:
        """Make ready to give indices of `epoch`. Called in the loop's own process before each pass."""

    @abstractmethod
    def indices(self, positions: npt.NDArray[np.int64], epoch: int) -> list[Any]:
        """What is at `positions` of the epoch's order, in lists nested as `positions` is."""

    def whole(self, epoch: int) -> range | memoryview | None:
        """All of the epoch's order, to take slices of, where it costs nothing to have; else `None`."""
        return None

    @abstractmethod
    def state(self, epoch: int) -> dict[str, Any]:
        """What a position in `epoch` of this order needs besides seed and epoch."""

    @abstractmethod
    def restore(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave."""


class ComputedOrder(Order):
    """An order that is a function of (length, seed, epoch): shuffled, or that of the dataset.

    It is not stored, but for a short epoch that is sorted as a whole: 1 MB at most.
    """

    def __init__(self, length: int, seed: int, *, shuffle: bool) -> None:
        self.length = length
        self.seed = seed
        self.shuffle = shuffle
        self._sorted: tuple[int, int, npt.NDArray[np.int64]] | None = None  # seed, epoch, all of its order

    @property
    def kind(self) -> str:
        """`"shuffled"` or `"sequential"`."""
        return "shuffled" if self.shuffle else "sequential"

    def begin(self, epoch: int) -> None:
        """Nothing to do: any epoch can be given."""

    def indices(self, positions: npt.NDArray[np.int64], epoch: int) -> list[Any]:
        """What is at `positions` of the epoch's order."""
        listed: list[Any] = (self._permuted(positions, epoch) if self.shuffle else positions).tolist()
        return listed

    def whole(self, epoch: int) -> range | memoryview | None:
        """All of it, unless it is shuffled and long."""
        if not self.shuffle:
            return range(self.length)
        return self._all(epoch).data if self.length <= _SORTED_SAMPLES else None

    def _permuted(self, positions: npt.NDArray[np.int64], epoch: int) -> npt.NDArray[np.int64]:
        if self.length > _SORTED_SAMPLES:
            return permute(positions, self.length, self.seed, epoch)
        return self._all(epoch)[positions]

    def _all(self, epoch: int) -> npt.NDArray[np.int64]:
        if self._sorted is None or self._sorted[:2] != (self.seed, epoch):
            self._sorted = self.seed, epoch, _sorted(self.length, _keys(self.seed, epoch)[0])
        return self._sorted[2]

    def state(self, epoch: int) -> dict[str, Any]:
        """Nothing: seed and epoch are enough."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Nothing was kept."""


class ShardedBatchSampler(Sampler[list[Any]]):
    """The batches of indices of one rank, for the rest of one epoch after another.

    Where the rank has nothing left in the last global batch it yields a ghost: the first sample of that
    global batch again, to be computed with weight zero, so that every rank takes the same number of steps.
    With `pads` a short batch has its first sample again until it is full, in passes with gradients.
    """

    def __init__(self, cut: Cut, rank: int, order: Order, *, pads: bool = False) -> None:
        self.cut = cut
        self.pads = pads
        self.rank = rank
        self.order = order
        self.epoch = 0

    def __len__(self) -> int:
        """Batches of a whole epoch, wherever the one at hand began."""
        return replace(self.cut, start=0).num_batches

    def begin(self, epoch: int, start: int) -> Cut:
        """Set the epoch of the next pass and the position it begins at. Returns its plan."""
        self.epoch = epoch
        self.cut = replace(self.cut, start=start, padded=self.pads and torch.is_grad_enabled())
        self.order.begin(epoch)
        return self.cut

    def __iter__(self) -> Iterator[list[Any]]:
        return self._batches(self.cut, self.epoch)  # as they are now: a later pass may begin before this one is read

    def _batches(self, cut: Cut, epoch: int) -> Iterator[list[Any]]:
        num_full, whole = cut.num_full, self.order.whole(epoch)
        start, stop = cut.bounds(0, self.rank) if num_full else (0, 0)
        if whole is None:
            yield from self._computed(cut, epoch, np.arange(start, stop, dtype=np.int64))
        else:  # slices cost less than blocks, whose first call of NumPy is slow between the calls of a loop
            for batch_start in range(start, start + num_full * cut.global_batch, cut.global_batch):
                yield list(whole[batch_start : batch_start + stop - start])
        if cut.num_batches > num_full:
            start, stop = cut.bounds(num_full, self.rank)
            if start == stop:
                start = cut.start + num_full * cut.global_batch
                stop = start + 1
            last = self.order.indices(np.arange(start, stop, dtype=np.int64), epoch)
            yield last + last[:1] * ((cut.padded_size(self.rank) or 0) - len(last))

    def _computed(self, cut: Cut, epoch: int, within: npt.NDArray[np.int64]) -> Iterator[list[Any]]:
        """The full batches, computed in blocks; `within` are the positions of this rank in the first: (samples,)."""
        first, block = 0, _FIRST_BLOCK
        while first < cut.num_full:
            size = max(1, block // max(1, len(within)))
            batches = np.arange(first, min(first + size, cut.num_full), dtype=np.int64)
            positions = batches[:, None] * cut.global_batch + within  # (batches, samples of this rank)
            yield from self.order.indices(positions, epoch)
            first, block = first + size, min(2 * block, _LAST_BLOCK)


class ShardedSampler(ShardedBatchSampler):
    """The same for a loader without automatic batches: the index of one item at a time."""

    def _batches(self, cut: Cut, epoch: int) -> Iterator[Any]:
        for (index,) in super()._batches(cut, epoch):
            yield index
