"""The gradient of a window that was opened by other processes, or over other batches: that of the mean over it all."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from accelerator import Accelerator
from rank_pool import RankPool
from strategies import CPU, DDP

OWN_BATCHES = [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11], [12, 13], [14, 15]]


def slope(loss_of: Any, samples: Any) -> Any:
    """The loss whose gradient is the mean of `samples`."""
    return loss_of(torch.as_tensor(samples, dtype=torch.float32).reshape(-1, 1)).mean()


def window(
    folder: str, batch: Any, stop: bool, steps: int = 4, split: bool = False, drop_last: bool = True, length: int = 11
) -> Any:
    """The samples of this rank up to the end of the first window, and its gradient; or save after one micro-batch."""
    accelerator = Accelerator("auto", seed=0, split_batches=split, gradient_accumulation_steps=steps)
    net = nn.Linear(1, 1, bias=False)
    cut: dict[str, Any] = {"batch_sampler": batch} if isinstance(batch, list) else {"batch_size": batch}
    if not isinstance(batch, list):
        cut["drop_last"] = drop_last
    loader = DataLoader(torch.arange(1.0, length + 1), **cut)
    model, _, loader = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=1.0), loader)
    path = Path(folder) / "saved"
    if path.exists():
        accelerator.load_state(path)
    taken: list[float] = []
    for x in loader:
        with accelerator.accumulate(model):
            accelerator.backward(slope(model, x))
            norm = accelerator.clip_grad_norm_(model.parameters(), 1e9)
        taken += x.tolist()
        if stop:
            accelerator.save_state(path)
            return taken, None
        if norm is not None:
            return taken, float(norm)
    raise AssertionError("the window did not close")


@pytest.mark.parametrize(
    ("first", "then", "options"),
    [
        ((1, 4), (1, 3), {"split": True}),  # what drop_last leaves out is different
        ((2, 2), (1, 2), {}),
        ((1, 2), (2, 2), {"length": 9}),
        ((2, 2), (1, 2), {"drop_last": False}),
        ((2, OWN_BATCHES), (1, OWN_BATCHES), {"split": True, "length": 16}),
        ((1, OWN_BATCHES), (2, OWN_BATCHES), {"split": True, "length": 16}),
        ((2, OWN_BATCHES), (1, OWN_BATCHES), {"steps": 2, "length": 16}),
    ],
)
def test_it_is_the_mean_over_the_samples_it_took(
    ranks: RankPool, tmp_path: Path, first: tuple[int, Any], then: tuple[int, Any], options: dict[str, Any]
) -> None:
    arguments = {"steps": 4, "split": False, "drop_last": True, "length": 11} | options
    before = ranks(window, str(tmp_path), first[1], True, *arguments.values(), nproc=first[0])
    after = ranks(window, str(tmp_path), then[1], False, *arguments.values(), nproc=then[0])
    taken = list(itertools.chain(*(samples for samples, _ in [*before, *after])))
    assert len(set(taken)) == len(taken)
    for _, gradient in after:
        assert gradient == pytest.approx(sum(taken) / len(taken), rel=1e-6)
    if isinstance(first[1], list):  # a window is as many batches of the sampler wherever it is gone on with
        together = 1 if arguments["split"] else first[0]
        assert len(taken) == 2 * arguments["steps"] * together


def test_drop_last_may_have_come_since(tmp_path: Path) -> None:
    before, _ = window(str(tmp_path), 2, True, 4, False, False, 7)
    after, gradient = window(str(tmp_path), 2, False, 4, False, True, 7)
    assert before + after == [1, 2, 3, 4, 5, 6]
    assert gradient == pytest.approx(3.5)


def weigh(folder: str, values: list[list[float]], stop: bool) -> float | None:
    """A micro-batch of this rank's `values` in a window of two, no loader prepared, weighed by how many they are."""
    accelerator = Accelerator("auto", seed=0, gradient_accumulation_steps=2)
    net = nn.Linear(1, 1, bias=False)
    model, _ = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=1.0))
    path = Path(folder) / "saved"
    if path.exists():
        accelerator.load_state(path)
    mine = values[accelerator.process_index]
    with accelerator.accumulate(model):
        accelerator.backward(slope(model, mine), weight=len(mine))
        norm = accelerator.clip_grad_norm_(model.parameters(), 1e9)
    if stop:
        accelerator.save_state(path)
    return None if norm is None else float(norm)


@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_counts_stay_counts_without_a_loader(ranks: RankPool, tmp_path: Path, first: int, then: int) -> None:
    before, after = [[1.0] * 10, [2.0] * 6][:first], [[4.0] * 10, [7.0] * 3][:then]
    ranks(weigh, str(tmp_path), before, True, nproc=first)
    gradients = ranks(weigh, str(tmp_path), after, False, nproc=then)
    everything = list(itertools.chain(*before, *after))
    assert gradients == [pytest.approx(sum(everything) / len(everything), rel=1e-6)] * then


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(1, 1, bias=False)
        self.heads = nn.ModuleList([nn.Linear(1, 1, bias=False) for _ in range(3)])
        for parameter in self.parameters():
            nn.init.ones_(parameter)

    def forward(self, x: torch.Tensor, head: int) -> Any:
        return self.heads[head](self.base(x))


def turns(folder: str, stop: bool) -> Any:
    """A window of two micro-batches, each through a head of its own; one head is never used."""
    strategy = CPU() if folder == "" else DDP(find_unused_parameters=True)
    accelerator = Accelerator(strategy, seed=0, split_batches=True, gradient_accumulation_steps=2)
    net = TwoHeads()
    loader = DataLoader(torch.arange(1.0, 17.0).reshape(-1, 1) / 7, 4)
    model, optimizer, loader = accelerator.prepare(net, torch.optim.AdamW(net.parameters(), lr=0.1), loader)
    path = Path(folder) / "saved"
    if path.exists():
        accelerator.load_state(path)
    for x in loader:
        head = loader.state_dict()["position"] // 4 % 2
        with accelerator.accumulate(model):
            accelerator.backward(model(x, head).mean())
            optimizer.step()
            optimizer.zero_grad()
        if stop:
            accelerator.save_state(path)
            return None
    return {name: value.detach().clone() for name, value in net.named_parameters()}


def test_parameters_of_earlier_micro_batches_only_are_averaged(ranks: RankPool, tmp_path: Path) -> None:
    """DDP keeps which parameters a window has used in memory of its own."""
    expected = turns("", False)
    whole = ranks(turns, str(tmp_path), False, nproc=2)
    for nproc, atol in ((2, 0.0), (3, 1e-6)):
        folder = str(tmp_path / str(nproc))
        ranks(turns, folder, True, nproc=2)
        for weights in ranks(turns, folder, False, nproc=nproc):
            for name, value in weights.items():
                torch.testing.assert_close(value, whole[0][name], atol=atol, rtol=0)
                torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=0)
