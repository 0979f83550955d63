"""A prepared loader over an iterable dataset: who reads which part, in step on all ranks, and from where."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, IterDataPipe

from .. import collectives, hugging_face
from ..errors import DataError
from ..lockstep import Step, alone, dispatched, together
from ..streams import Place, StreamShard, make_iterator
from ..world import World

Layers = tuple[tuple[int, tuple[int, ...]], ...]


@dataclass(frozen=True)
class StreamPosition:
    """Where every shard of a stream stands: in the epoch at hand, after the earlier stages in `layers`."""

    places: Mapping[int, Place] = field(default_factory=dict)
    turns: tuple[int, ...] = ()  # of each rank: the worker whose batch comes next
    layers: Layers = ()

    @property
    def is_begun(self) -> bool:
        """Whether anything of the epoch was given out before."""
        return bool(self.places or self.layers)


class Stream:
    """The reading of one iterable dataset on this rank.

    `dispatch`: rank 0 reads for all.
    """

    def __init__(self, loader: DataLoader[Any], world: World, seed: int, *, dispatch: bool) -> None:
        self._loader = loader
        self._world = world
        self._dispatch = dispatch and world.size > 1
        readers = replace(world, rank=0, size=1, local_rank=0, local_size=1) if self._dispatch else world
        dataset = loader.dataset
        self._by_node = hugging_face.is_hugging_face(dataset)
        self._draws = hugging_face.draws_of(dataset) if self._by_node else None
        if self._by_node:
            dataset = hugging_face.part_of_rank(dataset, readers)
        self.is_plain = isinstance(dataset, IterDataPipe) or not isinstance(dataset, IterableDataset)
        if self.is_plain and readers.size > 1:
            raise DataError(
                f"{type(loader.dataset).__name__} is a data pipe, which cannot be cut over {world.size} processes. "
                "Make it an IterableDataset, or use dispatch_batches=True: rank 0 then reads for all."
            )
        self._shard = StreamShard(dataset, readers, loader.num_workers, loader, seed)
        self._shard.by_node = self._by_node
        self._taken: dict[int, Place] = {}
        self._turn = 0
        self._before: tuple[dict[int, Place], int] = ({}, 0)  # those two before the batch that the loop holds
        self._layers: Layers = ()
        self._shards_itself = False
        self._first = 0  # of the pass at hand, as its shards read it

    @property
    def num_shards(self) -> int:
        """Parts that are read each by itself."""
        return self._shard.num_shards

    @property
    def is_stateful(self) -> bool:
        """Whether the dataset itself says where it stands; otherwise a resumed run reads up to there again."""
        return self._shard.is_stateful

    def share_of(self, num_batches: int) -> int:
        """Batches of each rank, if all together had so many."""
        return -(-num_batches // self._world.size)

    def describe(self) -> str:
        """How the stream is read, in words."""
        if self._dispatch:
            who = f"rank 0 reads for {self._world.size} processes"
        elif self.num_shards == 1:
            who = "read by one process"
        else:
            who = f"cut into {self.num_shards} parts"
        if self.is_plain:
            return f"{who}, cannot be resumed"
        how = (
            "by its own state" if self.is_stateful else "by reading up to where it was, unless its iterator has a state"
        )
        return f"{who}, resumed {how}"

    def begin(self, epoch: int, position: StreamPosition, view: Any) -> None:
        """Set what the next pass reads."""
        shard = self._shard
        shard.set_epoch(epoch)
        shard.reports.clear()
        shard.places = dict(position.places)
        shard.layers = self._layers = position.layers
        rank = 0 if self._dispatch else self._world.rank
        shard.turn = self._turn = position.turns[rank] if len(position.turns) > rank else 0
        self._taken = dict(position.places)
        self._before = dict(self._taken), self._turn
        self._first = 0
        if position.is_begun:
            view.__dict__["_iterator"] = None  # workers that were kept would begin at the beginning

    def make_iterator(self, view: Any, make: Callable[[], Any]) -> Any:
        """What torch's `_get_iterator` gives, over this rank's part."""
        return make() if self.is_plain else make_iterator(view, self._shard, make)

    def steps(self, make: Callable[[], Iterator[Any]]) -> Iterator[tuple[Any, Step]]:
        """The batches of a pass, in step on all ranks."""
        if self._world.size == 1:
            return alone(make())
        if self._dispatch:
            return dispatched(make() if self._world.is_main else None, self._world)
        return together(make(), self._world, self._compare)

    def _compare(self) -> None:
        """Note where ranks begin with different samples of what each of them should read whole. Collective."""
        reports = self._shard.reports
        mine = reports[0].first << 1 | reports[0].asked_id if reports else 0
        told = collectives.meet("the first sample of an iterable dataset", self._world, mine)
        if len({brought >> 1 for brought in told} - {0}) > 1:
            self._note_apart(asked_id=any(brought & 1 for brought in told))

    def _note_apart(self, *, asked_id: bool) -> None:
        """Raise `DataError` if the dataset seems to split itself by the number of its shard, else warn."""
        if asked_id:
            raise DataError(
                f"the parts (ranks times workers) of {type(self._loader.dataset).__name__} begin with different "
                "samples, and it asked which part it is (get_worker_info().id) but not of how many, so that each would "
                "keep only a share of what it reads. If it splits itself, let it read get_worker_info().num_workers "
                "too, which counts ranks as .id does: it then keeps all it reads. If it does not, let augmentation "
                "draw from the generators of torch, NumPy or Python, seeded alike on all."
            )
        warnings.warn(
            f"the parts (ranks times workers) of {type(self._loader.dataset).__name__} begin with different samples, "
            "and each keeps its share of what it reads. If the dataset splits by rank or worker itself, samples are "
            "lost: let it split by get_worker_info().id and .num_workers, which count ranks too, or not at all. If "
            "only augmentation draws from a generator of its own, all is well.",
            stacklevel=2,
        )

    def take(self, number: int) -> None:
        """Note that the loop was given the next `number` batches that this process read."""
        if self.is_plain or (self._dispatch and not self._world.is_main):
            return
        self._before = dict(self._taken), self._turn
        reports = self._shard.reports
        if number > len(reports):
            raise DataError(
                "the loader gave more batches than its iterator read. Does its class have an __iter__ of its own? It "
                "must yield one batch for each that super().__iter__() yields."
            )
        for _ in range(number):
            report = reports.popleft()
            if self._first and report.first not in (0, self._first):
                self._note_apart(asked_id=report.asked_id)
            self._first = report.first
            self._taken[report.shard] = report.place
            self._turn = (report.shard + 1) % self._shard.num_workers
            self._shards_itself |= report.shards_itself

    def place(self, *, used: bool) -> StreamPosition:
        """Where this rank's shards stand: after the batch that the loop holds if it was used, else before it."""
        taken, turn = (dict(self._taken), self._turn) if used else self._before
        return StreamPosition(taken, (turn,) * self._world.size, self._layers)

    def state(self, position: StreamPosition | None = None) -> dict[str, Any]:
        """Where all shards stand, or stood at `position`. Collective on several ranks."""
        self._check_position()
        mine: tuple[Any, ...] = (self._taken, self._turn, self._layers, self._shards_itself)
        if position is not None:
            rank = 0 if self._dispatch else self._world.rank
            turn = position.turns[rank] if len(position.turns) > rank else 0
            mine = (position.places, turn, position.layers, self._shards_itself)
        everyone = collectives.all_gather_objects(mine, self._world)
        if self._dispatch:
            everyone = everyone[:1]
        own = {shard: place for rank, row in enumerate(everyone) for shard, place in self._own(rank, row[0])}
        places = [own.get(shard, Place()) for shard in range(self.num_shards)]
        return {
            "num_shards": self.num_shards,
            "shards_itself": self._by_node or any(row[3] for row in everyone),
            "draws": self._draws,
            "layers": [[number, list(given)] for number, given in everyone[0][2]],
            "turns": [row[1] for row in everyone],
            "passed": [list(place.passed) for place in places],
            "given": [place.given for place in places],
            "states": [place.state for place in places],
        }

    def read(self, state: Mapping[str, Any]) -> StreamPosition:
        """The position in `state`. Raises `DataError` where the parts it speaks of do not exist here."""
        self._check_position()
        if state.get("draws", self._draws) != self._draws:
            raise DataError(
                f"the position to load is of a {type(self._loader.dataset).__name__} shuffled with another seed, "
                "so that what is left of it is not known. Give it the same seed: dataset.shuffle(seed=...)."
            )
        layers = tuple((number, tuple(given)) for number, given in state["layers"])
        saved = [
            Place(tuple(passed), given, inner)
            for passed, given, inner in zip(state["passed"], state["given"], state["states"], strict=True)
        ]
        if state["num_shards"] == self.num_shards:
            per_rank = len(state["turns"]) == (1 if self._dispatch else self._world.size)
            turns = tuple(state["turns"]) if per_rank else ()
            return StreamPosition({shard: place for shard, place in enumerate(saved) if place.given}, turns, layers)
        if not any(place.given for place in saved):
            return StreamPosition(layers=layers)
        if state["shards_itself"]:
            raise DataError(
                f"the position to load is of {type(self._loader.dataset).__name__} read in {state['num_shards']} parts "
                f"(ranks times workers), which the dataset makes itself, and it is read in {self.num_shards} here. Use "
                "as many ranks and workers as then."
            )
        layers = (*layers, (state["num_shards"], tuple(state["given"])))
        first = min(saved, key=lambda place: place.passed[0])  # all before it was given out
        if first.state is None:
            return StreamPosition(layers=layers)
        again = Place((*first.passed, 0), 0, first.state)
        return StreamPosition(dict.fromkeys(range(self.num_shards), again), layers=layers)

    def _check_position(self) -> None:
        if self.is_plain:
            raise DataError(
                f"the loader over {type(self._loader.dataset).__name__} has no position: it is a data pipe, or has a "
                "sampler without __len__. Give the sampler a length, or make the data an IterableDataset."
            )

    def _own(self, rank: int, places: Mapping[int, Place]) -> Iterator[tuple[int, Place]]:
        workers = self._shard.num_workers
        return ((shard, place) for shard, place in places.items() if shard // workers == rank)

    def stepped(self, batches: Iterator[tuple[Any, Step]], waiting: deque[Step]) -> Iterator[Any]:
        """Only the batches; the step of each is put into `waiting`."""
        for batch, step in batches:
            waiting.append(step)
            yield batch
