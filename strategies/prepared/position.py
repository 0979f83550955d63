"""Where a loop stands in its data: a few numbers, the same on every rank, that a checkpoint keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import DataError
from ..sharding import Cut
from .sampling import PlannedSampler
from .stream import Stream, StreamPosition

VERSION = 1


@dataclass(frozen=True)
class Position:
    """The next pass is in `epoch` and begins after `start` of its samples (items, batches of a batch sampler)."""

    epoch: int = 0
    start: int = 0
    stream: StreamPosition = field(default_factory=StreamPosition)
    is_left: bool = False  # by a loop that was trained in, in this process

    @property
    def is_begun(self) -> bool:
        """Whether anything of the epoch was used before."""
        return self.start > 0 or self.stream.is_begun

    def entered(self, *, trains: bool) -> Position:
        """Where the next pass begins: for an evaluation after training was left, with the first of the epoch."""
        return Position(self.epoch) if self.is_left and not trains else self


def is_at_end(position: Position, source: PlannedSampler | Stream) -> bool:
    """Whether a pass that begins there goes on with an epoch of which no batch is left."""
    if not position.start or isinstance(source, Stream):
        return False
    if isinstance(source.cut, Cut):
        return replace(source.cut, start=position.start).num_batches == 0
    return position.start >= source.order.length


def describe(position: Position, source: PlannedSampler | Stream) -> dict[str, Any]:
    """A position as a dictionary that JSON can hold, if the state of the user's own can. Collective for a stream."""
    if isinstance(source, Stream):
        return describe_stream(position.epoch, source, position.stream)
    order = source.order
    return {
        "version": VERSION,
        "order": order.kind,
        "length": order.length,
        "seed": order.seed,
        "epoch": position.epoch,
        "position": position.start,
    } | order.state(position.epoch)


def read(
    state: Mapping[str, Any], sampler: PlannedSampler, *, needs_seed: bool, dataset: str, dry: bool = False
) -> Position:
    """The position in `state`, which the sampler's order takes up, but not with `dry`.

    Raises `DataError`, changing nothing, where it does not fit the loader.
    """
    check_version(state)
    order = sampler.order
    kind, length, seed = state.get("order"), state.get("length"), state.get("seed")
    if kind != order.kind:
        raise DataError(
            f"the position to load was saved with the order {kind!r}, and the loader over {dataset} has "
            f"{order.kind!r}. Load it into a loader with the same shuffle=, sampler and batch_sampler."
        )
    if length != order.length:
        raise DataError(
            f"the position to load was saved when {dataset} gave {length} samples or batches, and it gives "
            f"{order.length} now. What is left of that epoch is not known for other data: use the same, or start "
            "an epoch without the position."
        )
    if seed != order.seed and needs_seed:
        raise DataError(
            f"the position to load was saved with seed {seed}, and the loader has {order.seed}, other draws. Use "
            "the same Accelerator(seed=...) or generator, and prepare the loaders in the same order."
        )
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise DataError(f"seed in the position to load is {seed!r}; expected an integer, as state_dict() wrote it")
    position = Position(_count(state, "epoch"), _count(state, "position"))
    if position.start > order.length:
        raise DataError(f"the position to load is {position.start}, after the end of an epoch of {order.length}.")
    if not dry:
        order.seed = seed
        order.restore(dict(state))
    return position


def describe_stream(epoch: int, stream: Stream, place: StreamPosition | None) -> dict[str, Any]:
    """A place in a stream, that of the loop with `None`. Collective on several ranks."""
    return {"version": VERSION, "order": "stream", "epoch": epoch} | stream.state(place)


def read_stream(state: Mapping[str, Any], stream: Stream, dataset: str) -> Position:
    """The position in `state`. Raises `DataError`, changing nothing, where it does not fit the loader."""
    check_version(state)
    if state.get("order") != "stream":
        raise DataError(
            f"the position to load was saved with the order {state.get('order')!r}, and {dataset} is an iterable "
            "dataset. Load it into a loader over the dataset it was saved with."
        )
    missing = sorted({"layers", "passed", "given", "states", "turns", "num_shards", "shards_itself"} - set(state))
    if missing:
        raise DataError(f"the position to load lacks {', '.join(missing)}; expected what state_dict() returned")
    return Position(_count(state, "epoch"), stream=stream.read(state))


def check_version(state: Mapping[str, Any]) -> None:
    """Raise `DataError` for what is no position of a prepared loader, or one of a later release."""
    version = state.get("version") if isinstance(state, Mapping) else None
    if not isinstance(version, int):
        raise DataError(
            f"load_state_dict got {type(state).__name__} {state!r:.80}; expected what state_dict() of a prepared "
            "loader returned"
        )
    if version > VERSION:
        raise DataError(f"the position to load has version {version}; this release reads up to {VERSION}. Update it.")


def _count(state: Mapping[str, Any], name: str) -> int:
    value = state.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise DataError(f"{name} in the position to load is {value!r}; expected an integer >= 0")
    return value
