"""Samplers and batch samplers of the user's own, drawn alike on every rank and cut by position."""

from __future__ import annotations

import copy
import itertools
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Sampler, WeightedRandomSampler

from .errors import DataError
from .randomness import derive, seeded
from .sharding import Order, Plan


@dataclass(frozen=True)
class Repeat:
    """An index that the epoch has had before, and how often: so that its random draws may be others."""

    index: Any
    number: int


class DrawnOrder(Order):
    """What a sampler of the user's own yields, drawn whole at the start of each pass.

    Its draws, from the global generators or from one that it keeps as an attribute, are a function of (seed,
    epoch): ranks agree without communication, and the loop's generators are left as they were. A sampler with
    `set_epoch` is told the epoch; one with `state_dict` and `load_state_dict` takes its state with the position.
    `marks_repeats`: indices that come again stand as `Repeat`; `of_batches`: those within the
    batches that the sampler gives.
    """

    def __init__(
        self,
        sampler: Any,
        length: int,
        seed: int,
        generator: Any = None,
        *,
        marks_repeats: bool = False,
        of_batches: bool = False,
    ) -> None:
        self.sampler = sampler
        self.length = length
        self.seed = seed
        self.drawn: Sequence[Any] | npt.NDArray[np.int64] = ()
        self._generator = generator
        self._marks_repeats = marks_repeats
        self._of_batches = of_batches
        self._epoch: int | None = None
        self.digest = 0
        self._repeats: npt.NDArray[np.int64] | None = None  # how often each of the integers came before
        self._state: dict[str, Any] = {}  # of the sampler, before it drew the epoch at hand
        self._pending: dict[str, Any] | None = None  # what was restored and not begun

    @property
    def kind(self) -> str:
        """The name of the sampler's class."""
        return type(self.sampler).__name__

    def begin(self, epoch: int) -> None:
        """Draw `epoch`, unless it is the one drawn last. Raises `DataError` for another order than expected."""
        if epoch == self._epoch:
            return
        sampler, pending = self.sampler, self._pending or {}
        if "sampler" in pending:
            sampler.load_state_dict(pending["sampler"])
        self._state = _state_of(sampler)
        check_weights(sampler)
        with seeded(derive(self.seed, epoch), sampler, self._generator):
            if callable(getattr(sampler, "set_epoch", None)):
                sampler.set_epoch(epoch)
            length = len(sampler)
            drawn = list(itertools.islice(iter(sampler), length + 1))
        if length != self.length or len(drawn) != length:
            what = f"has length {length}" if length != self.length else f"gave {_how_many(len(drawn), length)}"
            raise DataError(
                f"{self.kind} {what}, and had length {self.length} when its loader was prepared. A sampler must give "
                "as many as its __len__ says, the same in every epoch; prepare a new loader where that changes."
            )
        self.drawn, self.digest = _packed(drawn)
        if pending.get("digest", self.digest) != self.digest:
            raise DataError(
                f"{self.kind} gave another order for epoch {epoch} than in the run whose position was loaded, so what "
                "is left of the epoch cannot be known. Is it over the same data and weights? A sampler must draw from "
                "the generators of Python, NumPy or torch, or have state_dict and load_state_dict."
            )
        if self._marks_repeats and self._of_batches:
            self.drawn = _marked_batches(drawn)
        elif self._marks_repeats and isinstance(self.drawn, np.ndarray):
            self._repeats = _repeats(self.drawn)
        elif self._marks_repeats:
            self.drawn = _marked(drawn, {})
        self._epoch, self._pending = epoch, None

    def indices(self, positions: npt.NDArray[np.int64], epoch: int) -> list[Any]:
        """What is at `positions` of the epoch's order."""
        drawn = self.drawn
        if isinstance(drawn, np.ndarray):
            listed: list[Any] = drawn[positions].tolist()
            if self._repeats is None or not self._repeats[positions].any():
                return listed
            return _with_repeats(listed, self._repeats[positions].tolist())
        if positions.ndim > 1:
            return [self.indices(row, epoch) for row in positions]
        return [drawn[position] for position in positions]

    def state(self, epoch: int) -> dict[str, Any]:
        """The digest of `epoch` if it was drawn, and the sampler's own state before that."""
        if self._pending is not None:
            return self._pending
        return {"digest": self.digest} | self._state if epoch == self._epoch else _state_of(self.sampler)

    def restore(self, state: dict[str, Any]) -> None:
        """Draw the epoch to come as it was drawn when `state` was taken."""
        self._epoch = None
        self._pending = {name: state[name] for name in ("digest", "sampler") if name in state}


@dataclass(frozen=True)
class ListedCut(Plan):
    """The rest of an epoch whose batches a batch sampler made, each of its own size.

    Each rank takes a whole one in turn; with `split`, each is that of all ranks together, and is cut.
    """

    sizes: tuple[int, ...]  # of the batches that are left
    world_size: int
    split: bool
    start: int  # batches of the epoch before them
    counts_samples: bool = True

    @property
    def together(self) -> int:
        """Batches of the sampler in one global batch."""
        return 1 if self.split else self.world_size

    @property
    def num_batches(self) -> int:
        """Global batches in the rest of the epoch, the same on every rank."""
        return -(-len(self.sizes) // self.together)

    def samples(self, batch: int) -> int:
        """Samples in global batch number `batch`, over all ranks."""
        return self.window_samples(batch, 1)

    def local_samples(self, batch: int, rank: int) -> int:
        """Samples of global batch `batch` that belong to `rank`; 0 where it has nothing left."""
        if self.split:
            each, more = divmod(self.sizes[batch], self.world_size)
            return each + (rank < more)
        place = batch * self.world_size + rank
        return self.sizes[place] if place < len(self.sizes) else 0

    def window_samples(self, first: int, num_batches: int) -> int:
        """Samples in the global batches [first, first + num_batches), as far as the epoch has them."""
        return sum(self.sizes[first * self.together : (first + num_batches) * self.together])

    def position_after(self, batch: int) -> int:
        """Batches of the epoch that are used once global batch `batch` is."""
        return self.start + min((batch + 1) * self.together, len(self.sizes))

    @property
    def has_ghosts(self) -> bool:
        """Whether some rank has nothing in some global batch."""
        if self.split:
            return any(size < self.world_size for size in self.sizes)
        return len(self.sizes) % self.world_size > 0


class ListedBatchSampler(Sampler[list[Any]]):
    """One rank's batches of a batch sampler of the user's own, for the rest of one epoch after another.

    A rank with nothing in a global batch gets a ghost: the first sample of it again, to weigh nothing.
    """

    def __init__(self, order: DrawnOrder, rank: int, world_size: int, *, split: bool) -> None:
        self.order = order
        self.rank = rank
        self.epoch = 0
        self.cut = ListedCut(sizes=(), world_size=world_size, split=split, start=0)
        self._batches: list[list[Any]] = []

    def __len__(self) -> int:
        """Global batches of a whole epoch, wherever the one at hand began."""
        return -(-self.order.length // self.cut.together)

    def begin(self, epoch: int, start: int) -> ListedCut:
        """Draw the batches of the next pass. Returns its plan."""
        self.order.begin(epoch)
        self.epoch = epoch
        self._batches = [list(batch) for batch in self.order.drawn[start:]]
        sizes = tuple(map(len, self._batches))
        if 0 in sizes:
            raise DataError(
                f"{self.order.kind} gave an empty batch, number {start + sizes.index(0)} of epoch {epoch}. "
                "Leave empty batches out."
            )
        self.cut = ListedCut(sizes, self.cut.world_size, self.cut.split, start)
        return self.cut

    def batch(self, number: int) -> list[Any]:
        """What this rank has of global batch `number` of the pass at hand; nothing for a ghost."""
        cut, rank = self.cut, self.rank
        if not cut.split:
            place = number * cut.world_size + rank
            return self._batches[place] if place < len(self._batches) else []
        batch = self._batches[number]
        each, more = divmod(len(batch), cut.world_size)
        begin = rank * each + min(rank, more)
        return batch[begin : begin + each + (rank < more)]

    def __iter__(self) -> Iterator[list[Any]]:
        for number in range(self.cut.num_batches):
            yield self.batch(number) or self._batches[number * self.cut.together][:1]


def check_weights(sampler: Any) -> None:
    """Raise `DataError` for weights that no order can be drawn by, of a sampler or of the one in a batch sampler."""
    for drawn in (sampler, getattr(sampler, "sampler", None)):
        if not isinstance(drawn, WeightedRandomSampler):
            continue
        weights = torch.as_tensor(drawn.weights, dtype=torch.double)
        wrong = torch.nonzero(~torch.isfinite(weights) | (weights < 0)).flatten().tolist()
        if wrong or not weights.any():
            which = f"weight {wrong[0]} is {weights[wrong[0]].item()}" if wrong else "all weights are 0"
            raise DataError(
                f"{type(drawn).__name__}: {which}"
                + (f", and {len(wrong) - 1} others are wrong too" if len(wrong) > 1 else "")
                + ". Weights must be finite and >= 0, and some above 0."
            )


def _state_of(sampler: Any) -> dict[str, Any]:
    if callable(getattr(sampler, "state_dict", None)) and callable(getattr(sampler, "load_state_dict", None)):
        return {"sampler": copy.deepcopy(sampler.state_dict())}
    return {}


def _packed(drawn: list[Any]) -> tuple[Sequence[Any] | npt.NDArray[np.int64], int]:
    """Indices as an array where they are integers, and a digest of them."""
    if all(isinstance(index, int | np.integer) and not isinstance(index, bool) for index in drawn):
        array = np.array(drawn, dtype=np.int64)
        return array, zlib.crc32(array.tobytes())
    return drawn, zlib.crc32(_text(drawn).encode())


def _text(index: Any) -> str:
    """`index` as text that is the same on all ranks where it is: no address, no order of a set."""
    if isinstance(index, set | frozenset):
        return f"{{{', '.join(sorted(map(_text, index)))}}}"
    if type(index) in (list, tuple):
        return f"({', '.join(map(_text, index))})"
    if type(index) is dict:
        return f"{{{', '.join(f'{_text(key)}: {_text(value)}' for key, value in index.items())}}}"
    return re.sub(r" at 0x[0-9a-f]+>", ">", repr(index))


def _repeats(drawn: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """How often each of `drawn` came before in it: (samples,)."""
    order = np.argsort(drawn, kind="stable")
    places = np.arange(len(drawn))
    is_first = np.ones(len(drawn), dtype=bool)
    is_first[1:] = np.diff(drawn[order]) != 0
    numbers = np.empty(len(drawn), dtype=np.int64)
    numbers[order] = places - np.maximum.accumulate(np.where(is_first, places, 0))
    return numbers


def _with_repeats(indices: list[Any], numbers: list[Any]) -> list[Any]:
    """`indices` with `Repeat` where a number is not 0; both may be nested alike."""
    return [
        _with_repeats(index, number) if isinstance(index, list) else Repeat(index, number) if number else index
        for index, number in zip(indices, numbers, strict=True)
    ]


def _marked_batches(drawn: list[Any]) -> list[Any]:
    batches = [list(batch) for batch in drawn]
    flat, _ = _packed(list(itertools.chain.from_iterable(batches)))
    if not isinstance(flat, np.ndarray):
        counts: dict[Any, int] = {}
        return [_marked(batch, counts) for batch in batches]
    numbers = iter(_repeats(flat).tolist())
    return [_with_repeats(batch, list(itertools.islice(numbers, len(batch)))) for batch in batches]


def _marked(drawn: Sequence[Any], counts: dict[Any, int]) -> list[Any]:
    """`drawn` with `Repeat` for indices that came before, by `counts`, which is brought up to date."""
    marked: list[Any] = []
    for index in drawn:
        own = index if isinstance(index, int) else _text(index)
        number = counts[own] = counts.get(own, -1) + 1
        marked.append(Repeat(index, number) if number else index)
    return marked


def _how_many(number: int, length: int) -> str:
    return f"more than {length}" if number > length else f"{number}"
