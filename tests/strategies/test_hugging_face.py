"""Datasets of Hugging Face `datasets`, the real package, made in memory: map-style and iterable."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import datasets
import pytest
from torch.utils.data import DataLoader

from accelerator import Accelerator
from rank_pool import RankPool
from strategies import DataError
from strategies.hugging_face import keeps_its_place

LENGTH = 22
datasets.disable_progress_bars()


def rows() -> datasets.Dataset:
    return datasets.Dataset.from_dict({"x": list(range(LENGTH))})


def numbers(shards: list[int]) -> Iterator[dict[str, int]]:
    for shard in shards:
        yield from ({"x": number} for number in range(shard, LENGTH, 4))


def generated() -> datasets.IterableDataset:
    return datasets.IterableDataset.from_generator(numbers, gen_kwargs={"shards": [0, 1, 2, 3]})


def twice(batch: dict[str, list[int]]) -> dict[str, list[int]]:
    return {"x": [number for number in batch["x"] for _ in range(2)][::2]}


MAKERS: dict[str, Any] = {
    "map-style": lambda: rows().with_format("torch"),
    "arrow": lambda: rows().to_iterable_dataset(num_shards=4).with_format("torch"),
    "generated": generated,
    "one shard": lambda: rows().to_iterable_dataset(),
    "mapped in batches": lambda: generated().map(twice, batched=True, batch_size=3),
    "chained": lambda: datasets.concatenate_datasets([generated().filter(lambda row: row["x"] % 2 == 0), odd()]),
    "shuffled": lambda: generated().shuffle(seed=5, buffer_size=6),
}
ITERABLE = [kind for kind in MAKERS if kind != "map-style"]


def odd() -> datasets.IterableDataset:
    return rows().to_iterable_dataset(num_shards=4).filter(lambda row: row["x"] % 2 == 1)


def run(
    kind: str, workers: int, state: Any = None, stop: int | None = None, epochs: int = 2, dispatch: bool = False
) -> tuple[list[list[int]], dict[str, Any]]:
    accelerator = Accelerator(strategy="auto", seed=4, dispatch_batches=dispatch)
    context = "fork" if workers else None
    shuffle = kind == "map-style" or None
    loader = accelerator.prepare(
        DataLoader(MAKERS[kind](), 3, shuffle, num_workers=workers, multiprocessing_context=context)
    )
    if state is not None:
        loader.load_state_dict(state)
    taken: list[list[int]] = []
    for _ in range(epochs):
        for batch in loader:
            taken.append(accelerator.gather_for_metrics(batch)["x"].tolist())
            if len(taken) == stop:
                return taken, json.loads(json.dumps(loader.state_dict()))
    return taken, json.loads(json.dumps(loader.state_dict()))


def flat(batches: list[list[int]]) -> list[int]:
    return [sample for batch in batches for sample in batch]


@pytest.mark.parametrize("kind", MAKERS)
def test_resumed_equals_never_stopped(kind: str) -> None:
    whole, _ = run(kind, 0)
    number = len(whole) // 2
    assert sorted(flat(whole[:number])) == sorted(flat(whole[number:])) == list(range(LENGTH))
    for stop in (3, number, number + 2):
        before, state = run(kind, 0, None, stop)
        assert before == whole[:stop]
        assert run(kind, 0, state, None, 2 - state["epoch"])[0] == whole[stop:], stop


@pytest.mark.parametrize(("kind", "nproc", "workers"), [("arrow", 1, 2), ("generated", 2, 2), ("shuffled", 2, 0)])
def test_on_ranks_and_workers(ranks: RankPool, kind: str, nproc: int, workers: int) -> None:
    def on(*arguments: Any) -> Any:
        return ranks(run, kind, workers, *arguments, nproc=nproc)[0] if nproc > 1 else run(kind, workers, *arguments)

    whole, state = on()
    assert sorted(flat(whole)) == sorted([*range(LENGTH), *range(LENGTH)])
    assert state["epoch"] == 2
    before, state = on(None, 2)
    after, _ = on(state, None, 2 - state["epoch"])
    assert (before, sorted(flat(after))) == (whole[:2], sorted(flat(whole[2:])))


@pytest.mark.parametrize("kind", ["map-style", "one shard", "mapped in batches"])
def test_every_sample_once_on_three_ranks(ranks: RankPool, kind: str) -> None:
    assert sorted(flat(ranks(run, kind, 0, None, None, 1, nproc=3)[0][0])) == list(range(LENGTH))


def test_rank_0_may_read_for_all(ranks: RankPool) -> None:
    whole, _ = run("generated", 0, None, None, 1)
    assert flat(ranks(run, "generated", 0, None, None, 1, True)[0][0]) == flat(whole)


def test_the_users_dataset_is_left_as_it_was() -> None:
    """Loading a state into it would make all its later passes over that epoch begin in the middle."""
    data = generated()

    def loader() -> Any:
        return Accelerator(strategy="cpu").prepare(DataLoader(data, batch_size=3))

    first = loader()
    for _ in first:
        state = first.state_dict()
        break
    resumed = loader()
    resumed.load_state_dict(state)
    assert len(list(resumed)) == 7
    assert len(list(loader())) == 8


@pytest.mark.parametrize("kind", ITERABLE)
def test_explain_says_how_it_is_resumed(kind: str) -> None:
    accelerator = Accelerator(strategy="cpu")
    data = MAKERS[kind]()
    accelerator.prepare(DataLoader(data))
    how = "by reading up to where it was" if kind == "shuffled" else "by its own state"
    assert f"resumed {how}" in accelerator.explain()["loader 0"].got
    assert keeps_its_place(data) == (kind != "shuffled")


def test_another_number_of_parts_is_refused(ranks: RankPool) -> None:
    _, state = ranks(run, "generated", 0, None, 2)[0]
    with pytest.raises(DataError, match=r"read in 2 parts \(ranks times workers\), which the dataset makes itself"):
        run("generated", 0, state)


def shuffled_without_seed() -> None:
    Accelerator(strategy="ddp").prepare(DataLoader(generated().shuffle(buffer_size=4)))


def test_shuffling_without_a_seed_is_refused(ranks: RankPool) -> None:
    for error in ranks(shuffled_without_seed, return_exceptions=True):
        assert isinstance(error, DataError), error
        assert "shuffled with another seed on every rank" in str(error)


def test_a_position_of_another_seed_is_refused() -> None:
    def loader(seed: int | None) -> Any:
        return Accelerator(strategy="cpu").prepare(DataLoader(generated().map(twice, batched=True).shuffle(seed=seed)))

    state = loader(1).state_dict()
    loader(1).load_state_dict(state)
    for seed in (2, None):
        with pytest.raises(DataError, match="shuffled with another seed"):
            loader(seed).load_state_dict(state)
