"""Loops left by `break` or by a shorter loader in `zip`: the next one takes what a process that resumes would."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from accelerator import Accelerator
from datasets_of_numbers import Numbers, Stateful
from rank_pool import RankPool
from sampled_loaders import LOADERS, flat
from strategies import DataError


class Uncounted(Stateful):
    state_dict = None  # type: ignore[assignment]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.arange(self.length))


STREAMS: dict[str, Any] = {
    "stateful": lambda n, b, w: DataLoader(
        Stateful(n), b, num_workers=w, multiprocessing_context="fork" if w else None
    ),
    "stream": lambda n, b, w: DataLoader(Uncounted(n), b, num_workers=w, multiprocessing_context="fork" if w else None),
}


class Run:
    """A model trained over one loader, in windows of two batches."""

    def __init__(self, kind: str, workers: int = 0) -> None:
        self.accelerator = Accelerator(strategy="auto", seed=3, gradient_accumulation_steps=2)
        self.model, self.loader = self.accelerator.prepare(nn.Linear(1, 1), (LOADERS | STREAMS)[kind](13, 2, workers))

    def train(self, batch: Any, loader: Any = None) -> list[int]:
        with self.accelerator.accumulate(self.model, loader=loader):
            self.accelerator.backward(self.model(batch.float().reshape(-1, 1)).mean())
        taken: list[int] = self.accelerator.gather_for_metrics(batch.reshape(-1), loader=loader).tolist()
        return taken

    def some(self, number: int, *, leaves_before: bool = False) -> list[int]:
        """The samples of a loop that is left after `number` batches, or before the next one is trained on."""
        taken: list[int] = []
        for index, batch in enumerate(self.loader):
            if leaves_before and index == number:
                break
            taken += self.train(batch)
            if not leaves_before and index + 1 == number:
                break
        return taken


def left_and_entered(kind: str, workers: int, stops: list[int], leaves_before: bool) -> tuple[list[Any], ...]:
    """What loops that are left take in one process, and in one that ends after each and resumes."""
    here = Run(kind, workers)
    taken = [here.some(stop, leaves_before=leaves_before) for stop in stops]
    again, state = [], None
    for stop in stops:
        run = Run(kind, workers)
        if state is not None:
            run.loader.load_state_dict(json.loads(json.dumps(state)))
        again.append(run.some(stop, leaves_before=leaves_before))
        state = run.loader.state_dict()
    assert state == here.loader.state_dict()
    return taken, again


@pytest.mark.parametrize("leaves_before", [False, True])
@pytest.mark.parametrize("kind", ["shuffled", "weighted", "own", "buckets", "items", "stateful", "stream"])
def test_the_next_loop_goes_on_as_a_resumed_one_does(kind: str, leaves_before: bool) -> None:
    here, resumed = left_and_entered(kind, 0, [2, 1, 99, 3, 99], leaves_before)
    assert here == resumed
    whole = Run(kind)
    assert flat(here) == whole.some(99) + whole.some(99)


@pytest.mark.parametrize("kind", ["shuffled", "stateful", "stream"])
def test_workers_change_nothing_about_it(kind: str) -> None:
    here, resumed = left_and_entered(kind, 2, [2, 99, 1], False)
    assert here == resumed
    assert sorted(flat(here[:2])) == list(range(13))


@pytest.mark.parametrize("kind", ["shuffled", "stream"])
def test_on_two_ranks_too(ranks: RankPool, kind: str) -> None:
    for here, resumed in ranks(left_and_entered, kind, 0, [2, 99, 1], True):
        assert here == resumed
        assert sorted(flat(here[:2])) == list(range(13))


def test_a_loop_left_after_the_last_batch_ends_the_epoch() -> None:
    run = Run("shuffled")
    first = run.some(7)
    assert run.loader.state_dict()["epoch"] == 1
    assert run.loader.state_dict()["position"] == 0
    second = run.some(7)
    assert sorted(first) == sorted(second) == list(range(13))
    assert first != second


@pytest.mark.parametrize("kind", ["shuffled", "weighted", "own", "stateful", "stream"])
def test_the_rest_may_be_dropped(kind: str) -> None:
    whole = Run(kind)
    epochs = [whole.some(99) for _ in range(3)]
    run = Run(kind)
    run.loader.drop_rest()  # nothing was begun
    assert flat([run.some(2)]) == epochs[0][:4]
    run.loader.drop_rest()
    run.loader.drop_rest()  # nothing of the next epoch was taken
    state = run.loader.state_dict()
    assert (state["epoch"], run.loader.epoch) == (1, 1)
    assert run.some(99) == epochs[1]
    assert run.some(99) == epochs[2]
    resumed = Run(kind)
    resumed.loader.load_state_dict(state)
    assert resumed.some(99) == epochs[1]


def test_the_rest_of_a_loaded_epoch_may_be_dropped() -> None:
    whole, run = Run("own"), Run("own")
    epochs = [whole.some(99) for _ in range(2)]
    run.some(1)
    resumed = Run("own")
    resumed.loader.load_state_dict(run.loader.state_dict())
    resumed.loader.drop_rest()
    assert resumed.some(99) == epochs[1]


@pytest.mark.parametrize("trains", [False, True])
def test_a_loop_does_not_go_on_after_the_rest_was_dropped(trains: bool) -> None:
    run = Run("shuffled")
    batches = iter(run.loader)
    for batch in batches:
        if trains:
            run.train(batch)
        break
    run.loader.drop_rest()
    with pytest.raises(DataError, match=r"from before drop_rest\(\)"):
        next(batches)
    assert run.loader.epoch == trains


@pytest.mark.parametrize("kind", ["shuffled", "own", "stateful", "stream"])
def test_the_rest_may_be_dropped_while_an_iterator_is_held(kind: str) -> None:
    whole, run = Run(kind), Run(kind)
    epochs = [whole.some(99) for _ in range(2)]
    held = iter(run.loader)
    taken = [run.train(next(held)) for _ in range(2)]
    run.loader.drop_rest()
    assert flat(taken) == epochs[0][: len(flat(taken))]
    assert run.some(99) == epochs[1]
    with pytest.raises(DataError, match="went on after another one had begun"):
        next(held)


@pytest.mark.parametrize("kind", ["shuffled", "stateful", "stream"])
def test_zip_with_a_shorter_loader_loses_nothing(kind: str) -> None:
    """What `zip` takes of the longer one before it finds the shorter one at its end is not trained on."""
    run = Run(kind)
    shorter = run.accelerator.prepare(DataLoader(Numbers(6), 2))
    taken = []
    for _ in range(3):
        for batch, _ in zip(run.loader, shorter, strict=False):
            taken += run.train(batch, run.loader)
    assert taken[:13] == Run(kind).some(99)
    assert len(taken) == 13


@pytest.mark.parametrize("kind", ["shuffled", "own", "items", "stateful"])
def test_a_look_leaves_everything_as_it_was(kind: str) -> None:
    run = Run(kind)
    for _ in range(2):
        next(iter(run.loader))
    assert run.some(99) == Run(kind).some(99)


@pytest.mark.parametrize("kind", ["shuffled", "own", "items", "stateful", "stream"])
def test_an_evaluation_in_the_middle_of_an_epoch_sees_all_of_it(kind: str) -> None:
    run, whole = Run(kind), Run(kind).some(99)
    taken, state = run.some(2), run.loader.state_dict()
    for leaves in (False, True, False):  # gone through to its end, and left itself
        seen = []
        with torch.no_grad():
            for batch in run.loader:
                seen.append(batch.reshape(-1).tolist())
                assert run.loader.state_dict() == state
                if leaves:
                    break
        assert flat(seen) == (whole[: len(flat(seen))] if leaves else whole)
        next(iter(run.loader))  # a look with gradients changes nothing either
    assert run.loader.state_dict() == state
    assert taken + run.some(99) == whole


def trained(stops: list[int]) -> list[float]:
    accelerator = Accelerator(strategy="auto", seed=3, gradient_accumulation_steps=4)
    torch.manual_seed(0)
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.003)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(Numbers(53), 2, shuffle=True))
    for stop in stops:
        for index, batch in enumerate(loader):
            with accelerator.accumulate(model):
                accelerator.backward(model(batch.float().reshape(-1, 1)).square().mean())
                optimizer.step()
                optimizer.zero_grad()
            if index + 1 == stop:
                break
    numbers: list[float] = model.weight.flatten().tolist() + model.bias.tolist()
    return numbers


@pytest.mark.parametrize("world", [1, 2])
def test_a_window_goes_on_over_a_break(ranks: RankPool, world: int) -> None:
    """Left after 3 batches and after 5 more, windows of 4 open both times: bit for bit as if the loop had not been."""
    assert ranks(trained, [3, 5, 99], nproc=world) == ranks(trained, [99], nproc=world)


@pytest.mark.parametrize("leaves_before", [False, True])
def test_such_a_window_keeps_its_plan(leaves_before: bool) -> None:
    """It weighs what it was to weigh, and ranks need not add it up, whether the batch in hand was trained on or not."""
    accelerator = Accelerator(strategy="cpu", gradient_accumulation_steps=4)
    model, loader = accelerator.prepare(nn.Linear(1, 1), DataLoader(Numbers(22), 2))
    for stop in (2, 3, 99):
        for index, batch in enumerate(loader):
            if leaves_before and index == stop:
                break
            with accelerator.accumulate(model) as window:
                accelerator.backward(model(batch.float().reshape(-1, 1)).mean())
                assert not window.weighting.state_dict()["deferred"]
            if not leaves_before and index + 1 == stop:
                break


def two_passes(how: str, kind: str) -> None:
    loader = Run(kind).loader
    if how == "zip":
        list(zip(loader, loader, strict=False))
    elif how == "nested":
        for _ in loader:
            list(loader)
    else:
        first, second = iter(loader), iter(loader)
        next(first), next(second)
        next(first)


@pytest.mark.parametrize("kind", ["shuffled", "items", "stream"])
@pytest.mark.parametrize("how", ["zip", "nested", "kept"])
def test_two_passes_over_one_loader_are_refused(how: str, kind: str) -> None:
    with pytest.raises(DataError, match=r"went on after another one had begun.* prepare a second DataLoader"):
        two_passes(how, kind)


def test_two_passes_of_a_single_batch_are_refused() -> None:
    loader = Accelerator(strategy="cpu").prepare(DataLoader(Numbers(2), 2))
    with pytest.raises(DataError, match="went on after another one had begun"):
        list(zip(loader, loader, strict=False))
