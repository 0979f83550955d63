"""Iterable datasets of Hugging Face `datasets`: cut over ranks by that package, and when their own state can be used.

Their `state_dict` is exact but for shuffle buffers, whose content is not in it: what was in the buffer would be lost. A
dataset with one is read again up to where it was, in the order of its seed.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from . import collectives
from .errors import DataError
from .world import World


def is_hugging_face(dataset: Any) -> bool:
    """Whether this is an iterable dataset of that package."""
    return type(dataset).__module__.partition(".")[0] == "datasets" and hasattr(dataset, "num_shards")


def part_of_rank(dataset: Any, world: World) -> Any:
    """What this rank reads of the dataset. Collective; raises `DataError` where ranks would not shuffle alike."""
    if world.size == 1:
        return dataset
    if getattr(dataset, "_distributed", None) is not None:
        raise DataError(
            f"{type(dataset).__name__} is already cut by split_dataset_by_node, and cutting its part again would lose "
            "samples. Give prepare() the whole dataset."
        )
    if len(set(collectives.all_gather_objects(draws_of(dataset), world))) > 1:
        raise DataError(
            f"{type(dataset).__name__} is shuffled with another seed on every rank, so that samples come twice or "
            "never. Give the seed: dataset.shuffle(seed=...)."
        )
    from datasets.distributed import split_dataset_by_node

    return split_dataset_by_node(dataset, rank=world.rank, world_size=world.size)


def version_of(dataset: Any) -> str:
    """What that package calls the content of a map-style dataset; nothing for others."""
    known = type(dataset).__module__.partition(".")[0] == "datasets" and not is_hugging_face(dataset)
    return str(getattr(dataset, "_fingerprint", "")) if known else ""


def indices_of(dataset: Any) -> Any:
    """The rows that a map-style dataset was shuffled or selected to, in a numpy array: (rows,). `None` if all."""
    chosen = getattr(dataset, "_indices", None) if version_of(dataset) else None
    return None if chosen is None else chosen.column(0).to_numpy()


def begun_at(dataset: Any, state: Any) -> Any:
    """A copy that begins at `state`. The user's own would begin there in all its later passes over that epoch."""
    copied = object.__new__(type(dataset))  # copy.copy would share its __dict__, by its __getstate__
    copied.__dict__.update(dataset.__dict__)
    copied.load_state_dict(state)
    return copied


def keeps_its_place(dataset: Any) -> bool:
    """Whether the state of the dataset is all that is needed to go on from there."""
    names = [type(step).__name__ for step in _steps(getattr(dataset, "_ex_iterable", None))]
    return bool(names) and not any(name.startswith("BufferShuffled") for name in names)


def draws_of(dataset: Any) -> int:
    """A digest of the generators that the dataset shuffles with: the same where the order is."""
    held = [value for step in _steps(getattr(dataset, "_ex_iterable", None)) for value in vars(step).values()]
    return zlib.crc32(repr([one.bit_generator.state for one in held if isinstance(one, np.random.Generator)]).encode())


def _steps(step: Any) -> Iterator[Any]:
    """The steps of a pipeline, from its end to its sources."""
    if step is not None:
        yield step
        for source in [getattr(step, "ex_iterable", None), *(getattr(step, "ex_iterables", None) or ())]:
            yield from _steps(source)
