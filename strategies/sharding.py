"""How an epoch is cut: the order of its samples, its global batches, and each rank's slice of them.

Everything here is a pure function of (length, batch, world, seed, epoch): no state, no communication.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

_ROUNDS = 6
_BLOCK_SAMPLES = 1 << 14  # indices computed at once: long enough for NumPy, short enough to start at once


def permute(positions: npt.NDArray[np.int64], length: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Where the shuffled order of an epoch has its `positions`: a bijection of range(length).

    A Feistel network over the smallest even number of bits that holds `length`, walked until it falls
    inside (Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains", section 4). Any position costs
    the same time and no memory beyond itself, so that a run over 10^9 samples starts and resumes at once.
    An epoch of at most 2^14 samples is sorted by a random key for each instead: over few bits a Feistel
    network does not reach all orders alike.

    `positions`: any shape, values in [0, length). Returns indices of the same shape.
    """
    words = np.random.SeedSequence((seed & (2**64 - 1), epoch)).generate_state(_ROUNDS, np.uint64)
    keys = words.astype(np.uint64)
    if length <= _BLOCK_SAMPLES:
        drawn = np.arange(length, dtype=np.uint64)
        for key in keys[:2]:
            drawn = _mix(drawn + key)
        order: npt.NDArray[np.int64] = np.argsort(drawn, kind="stable")[positions]
        return order
    half_bits = ((length - 1).bit_length() + 1) // 2
    result = _feistel(positions.astype(np.uint64), half_bits, keys)
    outside = np.flatnonzero(result >= length)
    flat = result.reshape(-1)
    while outside.size:
        flat[outside] = _feistel(flat[outside], half_bits, keys)
        outside = outside[flat[outside] >= length]
    return result.astype(np.int64)


def _feistel(values: npt.NDArray[np.uint64], half_bits: int, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right + key) & mask)
    joined: npt.NDArray[np.uint64] = (left << shift) | right
    return joined


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): every bit of the result depends on every one given."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: npt.NDArray[np.uint64] = values ^ (values >> np.uint64(31))
    return mixed


@dataclass(frozen=True)
class Cut:
    """How one loader's epoch is cut into global batches, and a global batch into one slice per rank.

    Global batch k holds the positions [k * global_batch, (k + 1) * global_batch) of the epoch's order; the
    last one may be shorter, or is left out with `drop_last`. A batch of m samples is cut into contiguous
    slices, rank by rank, whose lengths differ by at most one: in a tail of fewer samples than ranks the
    last ranks have none.
    """

    length: int
    global_batch: int
    world_size: int
    drop_last: bool

    @property
    def num_batches(self) -> int:
        """Global batches in an epoch, the same on every rank."""
        full, tail = divmod(self.length, self.global_batch)
        return full + (tail > 0 and not self.drop_last)

    def samples(self, batch: int) -> int:
        """Samples in global batch number `batch`, over all ranks."""
        return min(self.global_batch, self.length - batch * self.global_batch)

    def local_samples(self, batch: int, rank: int) -> int:
        """Samples of global batch `batch` that belong to `rank`; 0 where it has nothing left."""
        each, more = divmod(self.samples(batch), self.world_size)
        return each + (rank < more)

    def window_samples(self, first: int, num_batches: int) -> int:
        """Samples in the global batches [first, first + num_batches), as far as the epoch has them."""
        start = first * self.global_batch
        stop = min(first + num_batches, self.num_batches) * self.global_batch
        return min(stop, self.length) - start

    def bounds(self, batch: int, rank: int) -> tuple[int, int]:
        """Positions [start, stop) of the epoch's order that `rank` takes of global batch `batch`."""
        each, more = divmod(self.samples(batch), self.world_size)
        start = batch * self.global_batch + rank * each + min(rank, more)
        return start, start + each + (rank < more)


class ShardedBatchSampler(Sampler[list[int]]):
    """The batches of indices of one rank, for one epoch after another.

    Where the rank has nothing left in the last global batch it yields a ghost: the first sample of that
    global batch again, to be computed with weight zero, so that every rank takes the same number of steps.
    `epoch` is set by the loader that owns this sampler before each pass.
    """

    def __init__(self, cut: Cut, rank: int, *, shuffle: bool, seed: int) -> None:
        self.cut = cut
        self.rank = rank
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return self.cut.num_batches

    def __iter__(self) -> Iterator[list[int]]:
        cut, epoch = self.cut, self.epoch
        num_full = cut.length // cut.global_batch
        start, stop = cut.bounds(0, self.rank) if num_full else (0, 0)
        within = np.arange(start, stop, dtype=np.int64)  # (samples of this rank,) in a full batch
        block = max(1, _BLOCK_SAMPLES // max(1, len(within)))
        for first in range(0, num_full, block):
            batches = np.arange(first, min(first + block, num_full), dtype=np.int64)
            positions = batches[:, None] * cut.global_batch + within  # (batches, samples of this rank)
            yield from self._indices(positions, epoch).tolist()
        if cut.num_batches > num_full:
            start, stop = cut.bounds(num_full, self.rank)
            if start == stop:
                start = num_full * cut.global_batch
                stop = start + 1
            yield self._indices(np.arange(start, stop, dtype=np.int64), epoch).tolist()

    def _indices(self, positions: npt.NDArray[np.int64], epoch: int) -> npt.NDArray[np.int64]:
        return permute(positions, self.cut.length, self.seed, epoch) if self.shuffle else positions
