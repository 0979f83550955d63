"""Random draws of samples and batches with `seed_samples=True`: functions of seed, epoch and index, whoever reads."""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler, Subset, WeightedRandomSampler, get_worker_info

from accelerator import Accelerator
from datasets_of_numbers import Numbers, Stream
from rank_pool import RankPool
from strategies import DataError
from strategies.randomness import generators_in
from strategies.seeded import sample_seed

Row = tuple[float, ...]


class Noisy(Dataset[Row]):
    """Draws from every generator there is, as many numbers as the index says, and from two of its own."""

    def __init__(self, length: int = 21) -> None:
        self.length = length
        self.own = np.random.default_rng()
        self.transforms = [{"torch's": torch.Generator()}]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Row:
        for _ in range(index % 3):
            random.random(), np.random.rand(), torch.rand(())
        drawn = random.random(), float(np.random.rand()), float(torch.rand(()))
        return index, *drawn, float(self.own.random()), float(torch.rand((), generator=self.transforms[0]["torch's"]))


class AtOnce(Noisy):
    """Reads several samples in one call."""

    def __getitems__(self, indices: list[int]) -> list[Row]:
        return [self[index] for index in indices]


def collate(rows: list[Row]) -> tuple[list[Row], Row]:
    return rows, (random.random(), float(np.random.rand()), float(torch.rand(())))


def epochs(
    make: Any, workers: int, number: int = 2, state: Any = None, stop: int | None = None, **options: Any
) -> tuple[list[list[Row]], list[Row], Any]:
    """The rows of global batches over `number` epochs, the draws of each of this rank's batches, and the position."""
    accelerator = Accelerator(strategy="auto", seed=3, split_batches=True, seed_samples=True)
    if workers:
        options |= {"num_workers": workers, "multiprocessing_context": "fork"}
    loader = accelerator.prepare(DataLoader(make(), batch_size=4, shuffle=True, collate_fn=collate, **options))
    if state is not None:
        loader.load_state_dict(state)
    rows, drawn = [], []
    for _ in range(number):
        for batch, of_batch in loader:
            rows.append(accelerator.gather_for_metrics(batch))
            drawn.append(of_batch)
            if len(rows) == stop:
                return rows, drawn, loader.state_dict()
    return rows, drawn, None


def test_draws_are_the_same_with_any_workers_and_ranks_and_after_a_resume(ranks: RankPool) -> None:
    rows, drawn, _ = epochs(Noisy, 0)
    assert len({draw for batch in rows for row in batch for draw in row[1:]}) == 2 * 21 * 5
    assert len({draw for row in drawn for draw in row}) == 2 * 6 * 3
    assert epochs(AtOnce, 0)[:2] == epochs(Noisy, 2, persistent_workers=True)[:2] == (rows, drawn)
    for of_rank in ranks(epochs, Noisy, 1, nproc=3):
        assert of_rank[0] == rows
    before, _, state = epochs(Noisy, 0, stop=8)
    after, drawn_after, _ = epochs(Noisy, 1, 1, state)
    assert (before + after, drawn_after) == (rows, drawn[8:])


class Compose:
    def __init__(self, *transforms: Any) -> None:
        self.transforms = list(transforms)

    def __call__(self, x: Any) -> Any:
        return functools.reduce(lambda value, transform: transform(value), self.transforms, x)


@dataclass(slots=True)
class Jitter:
    rng: Any

    def __call__(self, x: float) -> float:
        return x + float(self.rng.random())


def jitter_with(rng: random.Random) -> Any:
    return lambda x: x + rng.random()


def drawing(draw: Any) -> Any:
    def default(x: float, draw: Any = draw) -> float:
        return x + float(draw())

    return default


def add(x: float, *, rng: random.Random) -> float:
    return x + rng.random()


class Transformed(Numbers):
    def __init__(self, transform: Any) -> None:
        super().__init__(8)
        self.transform = transform

    def __getitem__(self, index: int) -> float:
        return float(self.transform(float(index)))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Jitter(random.Random()),
        lambda: jitter_with(random.Random()),
        lambda: functools.partial(add, rng=random.Random()),
        lambda: Jitter(np.random.default_rng()).__call__,
        lambda: drawing(random.Random().random),
    ],
)
def test_generators_are_found_however_deep(make: Any) -> None:
    def rows(workers: int) -> list[float]:
        transform = Compose(Compose(make()))
        dataset: Any = Subset(Subset(Subset(Transformed(transform), range(8)), range(8)), range(8))
        options: Any = {"num_workers": workers, "multiprocessing_context": "fork"} if workers else {}
        accelerator = Accelerator(strategy="cpu", seed=0, seed_samples=True)
        loader = accelerator.prepare(DataLoader(dataset, batch_size=4, **options))
        return [value for batch in loader for value in batch.tolist()]

    assert rows(0) == rows(1) == rows(0)


def test_a_generator_held_in_two_places_is_found_once() -> None:
    held = Jitter(random.Random())
    deep: Any = held
    for _ in range(2000):
        deep = [deep]
    first = random.Random()
    assert list(generators_in([[first], deep, held, {"data": [first] * 65}])) == [first, held.rng]


def states() -> list[Any]:
    return [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]  # type: ignore[index]


class Fails(Noisy):
    def __getitem__(self, index: int) -> Row:
        row = super().__getitem__(index)
        if index == 5:
            raise LookupError("no sample 5")
        return row


def test_the_loops_generators_are_left_alone_also_by_an_exception() -> None:
    accelerator = Accelerator(strategy="cpu", seed=3, seed_samples=True)
    good, bad = accelerator.prepare(DataLoader(Noisy()), DataLoader(Fails(), batch_size=2))
    iterator = iter(good)
    next(iterator)  # torch draws a number when it makes an iterator
    before = states()
    list(iterator)
    assert states() == before
    iterator = iter(bad)
    next(iterator)
    before = states()
    with pytest.raises(LookupError):
        list(iterator)
    assert states() == before


def test_epochs_seeds_and_repeats_draw_differently() -> None:
    def rows(seed: int, number: int, sampler: Any) -> list[list[Row]]:
        accelerator = Accelerator(strategy="cpu", seed=seed, seed_samples=True)
        loader = accelerator.prepare(DataLoader(Noisy(4), batch_size=None, sampler=sampler))
        return [list(loader) for _ in range(number)]

    weighted = WeightedRandomSampler([1.0, 0.0, 0.0, 0.0], 5)
    first, second = rows(0, 2, weighted)
    (other,) = rows(1, 1, weighted)
    assert {row[0] for row in first} == {0}
    assert len({row[1] for row in first + second + other}) == 15  # the same sample again, and drawn anew
    plain = rows(0, 1, None)[0]
    replaced = rows(0, 1, RandomSampler(range(4), replacement=True))[0]
    for row in {row[0]: row for row in reversed(replaced)}.values():  # the first of each: that of its index
        assert row == plain[int(row[0])]


class ShowsInfo(Numbers):
    def __getitem__(self, index: int) -> Any:
        info = get_worker_info()
        assert info is not None
        return type(info.dataset).__name__, self.length


def set_length(worker: int) -> None:
    get_worker_info().dataset.length = 77  # type: ignore[union-attr]  # in a worker


def test_workers_are_shown_the_users_dataset() -> None:
    accelerator = Accelerator(strategy="cpu", seed_samples=True)
    original = ShowsInfo(3)
    loader = accelerator.prepare(
        DataLoader(original, batch_size=None, num_workers=1, worker_init_fn=set_length, multiprocessing_context="fork")
    )
    assert list(loader) == [["ShowsInfo", 77]] * 3
    assert (loader.dataset, original.length) == (original, 3)


def test_indices_of_any_class_have_seeds_of_their_own() -> None:
    seeds = [sample_seed(7, index) for index in [0, 1, 10**18, -1, "a", (1, 2), [1, 2, 3], np.int64(4)]]
    assert len(set(seeds)) == len(seeds)
    assert sample_seed(7, np.int64(4)) == sample_seed(7, torch.tensor(4)) == sample_seed(7, 4) != sample_seed(8, 4)


class Endless:
    def __iter__(self) -> Any:
        return iter(range(10))


@pytest.mark.parametrize("options", [{"dataset": Stream(4)}, {"dataset": Numbers(4), "sampler": Endless()}])
def test_samples_without_an_index_are_refused(options: Any) -> None:
    with pytest.raises(DataError, match=r"seed_samples=True, and the samples of .* have no index"):
        Accelerator(strategy="cpu", seed_samples=True).prepare(DataLoader(**options))


def test_a_position_of_another_seed_is_refused_where_samples_are_seeded() -> None:
    def loader(seed: int) -> Any:
        return Accelerator(strategy="cpu", seed=seed, seed_samples=True).prepare(DataLoader(Numbers(4)))

    with pytest.raises(DataError, match="saved with seed 1, and the loader has 2"):
        loader(2).load_state_dict(loader(1).state_dict())
