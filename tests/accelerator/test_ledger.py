"""The account of the data, reconciled with the length of the dataset, over ranks, resumes and looks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from torch.utils.data import DataLoader

from accelerator import Accelerator
from accelerator.ledger import account
from datasets_of_numbers import Numbers, Stream
from rank_pool import RankPool
from strategies import ConfigurationError, DataError


def run(folder: str, batch: int, stop: int | None, state: Any = None, **options: Any) -> dict[str, Any]:
    accelerator = Accelerator(strategy="auto", seed=1, data_ledger=True, project_dir=folder)
    loader = accelerator.prepare(DataLoader(Numbers(23), **{"batch_size": batch, "shuffle": True} | options))
    if state is not None:
        loader.load_state_dict(state)
    saved: Any = None
    for index, _ in enumerate(loader):
        if index == 1:
            saved = loader.state_dict()
        if index == stop:
            return saved  # type: ignore[no-any-return]  # one batch after the position
    return saved  # type: ignore[no-any-return]


def test_an_epoch_over_changing_worlds_adds_up(ranks: RankPool, tmp_path: Path) -> None:
    folder = str(tmp_path)
    state = ranks(run, folder, 3, 2, nproc=2)[0]
    run(folder, 2, None, state)
    (one,) = account(folder)
    assert (one.length, one.samples, one.different, one.dropped, one.resumed) == (23, 23, 23, 0, 1)
    assert one.undone == 6  # the batch that the first run took after its position
    assert set(one.used) == set(range(23))
    assert one.is_whole
    rows = pandas.concat(pandas.read_json(path, lines=True) for path in tmp_path.glob("data_ledger/*.jsonl"))
    assert rows[rows.event == "batch"].explode("indices").groupby("rank").size().sum() == 23 + 6


def test_ghosts_and_drops_are_told(ranks: RankPool, tmp_path: Path) -> None:
    ranks(run, str(tmp_path / "ghosts"), 11, None, nproc=2)
    (one,) = account(tmp_path / "ghosts")
    assert (one.samples, one.ghosts, one.dropped, one.is_whole) == (23, 1, 0, True)
    accelerator = Accelerator(strategy="cpu", data_ledger=True, project_dir=tmp_path / "drops")
    loader = accelerator.prepare(DataLoader(Numbers(23), batch_size=5, drop_last=True))
    next(iter(loader))  # a look, which the pass itself takes back
    list(loader)
    (one,) = account(tmp_path / "drops")
    assert (one.samples, one.dropped, one.undone, one.is_whole) == (20, 3, 5, True)


@pytest.mark.parametrize(
    ("options", "samples", "different", "is_whole"),
    [
        ({"dataset": Stream(7), "batch_size": 2}, 7, 0, False),  # nobody knows how many there are
        ({"dataset": Numbers(9), "batch_sampler": [[0, 1], [1, 2, 3]]}, 5, 4, False),
        ({"dataset": Numbers(9), "batch_sampler": [[0, 1], [2], [3, 4, 5, 6, 7, 8]]}, 9, 9, True),
        ({"dataset": Numbers(3), "batch_size": None}, 3, 3, True),
        ({"dataset": [torch.zeros(3), torch.zeros(5)], "batch_size": None}, 2, 2, True),
    ],
)
def test_other_loaders_have_accounts_too(
    tmp_path: Path, options: Any, samples: int, different: int, is_whole: bool
) -> None:
    accelerator = Accelerator(strategy="cpu", data_ledger=True, project_dir=tmp_path)
    list(accelerator.prepare(DataLoader(**options)))
    (one,) = account(tmp_path)
    assert (one.samples, one.different, one.is_whole) == (samples, different, is_whole)


def part(folder: str, dataset: Any, options: dict[str, Any], state: Any) -> Any:
    """Up to one batch after a position; from it to the end with `state`."""
    accelerator = Accelerator(strategy="auto", seed=1, data_ledger=True, project_dir=folder)
    loader = accelerator.prepare(DataLoader(dataset, **options))
    if state is not None:
        loader.load_state_dict(state)
    for index, _ in enumerate(loader):
        if state is None and index == 1:
            position = loader.state_dict()
        elif state is None and index == 2:
            return position
    return None


@pytest.mark.parametrize(
    ("dataset", "options", "undone", "ghosts"),
    [
        (Numbers(9), {"batch_sampler": [[0, 1], [2], [3, 4, 5], [6, 7, 8]]}, 3, 0),
        ([torch.zeros(size) for size in range(1, 6)], {"batch_size": None}, 1, 1),
    ],
)
def test_they_add_up_over_ranks_and_a_resume(
    ranks: RankPool, tmp_path: Path, dataset: Any, options: Any, undone: int, ghosts: int
) -> None:
    state = part(str(tmp_path), dataset, options, None)
    ranks(part, str(tmp_path), dataset, options, state, nproc=2)
    (one,) = account(tmp_path)
    assert (one.is_whole, one.resumed, one.undone, one.ghosts) == (True, 1, undone, ghosts)


def test_a_ledger_without_a_place_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="data_ledger is true and project_dir is none"):
        Accelerator(strategy="cpu", data_ledger=True)
    with pytest.raises(DataError, match="has no data_ledger"):
        account(tmp_path)


def test_a_batch_says_at_which_optimizer_step_it_was_taken(tmp_path: Path) -> None:
    accelerator = Accelerator(strategy="cpu", data_ledger=True, project_dir=tmp_path, gradient_accumulation_steps=2)
    model = torch.nn.Linear(1, 1)
    model, optimizer, loader = accelerator.prepare(
        model, torch.optim.SGD(model.parameters(), lr=0.0), DataLoader(Numbers(10), batch_size=2)
    )
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(batch.float().reshape(-1, 1)).mean())
            optimizer.step()
            optimizer.zero_grad()
    rows = pandas.read_json(next(tmp_path.glob("data_ledger/*.jsonl")), lines=True)
    assert rows[rows.event == "batch"].step.tolist() == [0, 0, 1, 1, 2]


def test_a_loop_left_by_break_and_entered_again_adds_up(tmp_path: Path) -> None:
    accelerator = Accelerator(strategy="cpu", data_ledger=True, project_dir=tmp_path, seed=0)
    model, loader = accelerator.prepare(torch.nn.Linear(1, 1), DataLoader(Numbers(11), batch_size=2, shuffle=True))
    for limit in (2, 1, 99):
        for index, batch in enumerate(loader):
            if index == limit:
                break  # the batch in hand comes again
            with accelerator.accumulate(model):
                accelerator.backward(model(batch.float().reshape(-1, 1)).mean())
    (one,) = account(tmp_path)
    assert (one.samples, one.different, one.undone, one.resumed, one.is_whole) == (11, 11, 4, 2, True)


def test_an_evaluation_inside_an_epoch_is_none_of_its_account(tmp_path: Path) -> None:
    accelerator = Accelerator(strategy="cpu", data_ledger=True, project_dir=tmp_path)
    model, loader = accelerator.prepare(torch.nn.Linear(1, 1), DataLoader(Numbers(10), batch_size=2))
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(batch.float().reshape(-1, 1)).mean())
        break
    with torch.no_grad():
        list(loader)
    (one,) = account(tmp_path)
    assert (one.samples, one.undone) == (2, 0)
