"""A run that stops and goes on equals the run that never stopped: bit for bit in the same place, nearly in others."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from accelerator import Accelerator
from blocks_net import Net, losses_of
from rank_pool import RankPool
from strategies import CPU, DDP, FSDP

PLACES: dict[str, tuple[Any, int]] = {
    "cpu": (CPU(), 1),
    "ddp 2": (DDP(), 2),
    "fsdp 2": (FSDP(), 2),
    "fsdp 4": (FSDP(), 4),
    "hsdp": (FSDP(replicate=2), 4),
}
STEPS, WINDOWS, BATCH = 2, 6, 4
PER_EPOCH = 8  # batches: one and a half epochs in all, and the second begins between two windows
GENERATORS: tuple[Callable[[], float], ...] = (random.random, np.random.rand, lambda: float(torch.rand(())))


class Counter:
    def __init__(self) -> None:
        self.seen: dict[Any, Any] = {"batches": 0, ("a", 1): {2, 3}, "mean": torch.zeros(3)}

    def state_dict(self) -> dict[Any, Any]:
        return self.seen

    def load_state_dict(self, state: dict[Any, Any]) -> None:
        self.seen = state


def parts() -> tuple[nn.Module, torch.optim.Optimizer, Any, torch.utils.data.DataLoader[Any]]:
    """A model, an optimizer of two groups, a scheduler and a shuffled loader."""
    net = nn.Sequential(Net(), nn.Identity())
    groups = [
        {"params": [p for p in net.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in net.parameters() if p.ndim <= 1]},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.02, eps=1e-3)
    rows = torch.randn(PER_EPOCH * BATCH, 5, generator=torch.Generator().manual_seed(1))
    data = torch.utils.data.TensorDataset(rows, torch.arange(len(rows)))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, WINDOWS)
    return net, optimizer, scheduler, torch.utils.data.DataLoader(data, BATCH, shuffle=True)


def run(
    strategy: Any,
    folder: str,
    first: int,
    last: int,
    *,
    precision: Any = "no",
    dropout: float = 0.0,
    save: bool = True,
    weighted: bool = False,
) -> dict[str, Any]:
    """Windows `first` to `last` of a training on shuffled data, resumed from `folder` if there is anything."""
    accelerator = Accelerator(
        strategy,
        gradient_accumulation_steps=STEPS,
        mixed_precision=precision,
        project_dir=folder,
        seed=5,
        split_batches=True,
    )
    torch.manual_seed(0 if first == 0 else 99)
    model, optimizer, scheduler, loader = accelerator.prepare(*parts())
    drop, counter = nn.Dropout(dropout), Counter()
    accelerator.register_for_checkpointing(counter)
    if first:
        assert accelerator.resume() == Path(folder) / "checkpoints" / f"step-{first:09d}"
    losses: list[float] = []
    samples: list[int] = []
    draws: list[list[float]] = []  # more on the later ranks, so that each is at another place
    while len(losses) < (last - first) * STEPS:
        for mine, index in loader:
            with accelerator.accumulate(model):
                loss = losses_of(model(drop(mine)).float(), torch.ones(len(mine))).mean() / 64
                accelerator.backward(loss, weight=1.0 + accelerator.process_index if weighted else None)
                accelerator.clip_grad_norm_(model.parameters(), 0.01)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            losses.append(float(accelerator.reduce(loss.detach(), "mean")))
            samples += accelerator.gather_for_metrics(index).tolist()
            draws.append([draw() for draw in GENERATORS * (accelerator.process_index + 1)])
            counter.seen["batches"] += 1
            counter.seen["mean"] += 1
            if len(losses) == (last - first) * STEPS:
                if save:
                    accelerator.save_state()
                break
    weights = accelerator.get_state_dict(model)
    result = {
        "losses": losses,
        "samples": samples,
        "weights": weights,
        "rate": optimizer.param_groups[0]["lr"],
        "counter": counter.seen,
        "draws": draws,
        "epoch": scheduler.last_epoch,
    }
    accelerator.end_training()
    return result


def through(ranks: RankPool, folder: Path, places: list[str], **options: Any) -> list[dict[str, Any]]:
    """One window range after another, each at its place."""
    each = WINDOWS // len(places)
    results = []
    for index, name in enumerate(places):
        strategy, nproc = PLACES[name]
        of_ranks = ranks(call, strategy, str(folder), index * each, (index + 1) * each, options, nproc=nproc)
        results.append({**of_ranks[0], "draws": list(zip(*(one["draws"] for one in of_ranks), strict=True))})
    return results


def call(strategy: Any, folder: str, first: int, last: int, options: dict[str, Any]) -> dict[str, Any]:
    return run(strategy, folder, first, last, **options)


@pytest.mark.parametrize("place", list(PLACES))
@pytest.mark.parametrize("options", [{"dropout": 0.3}, {"precision": "fp16"}], ids=["dropout", "fp16"])
def test_going_on_at_the_same_place_is_exact(
    ranks: RankPool, tmp_path: Path, place: str, options: dict[str, Any]
) -> None:
    (whole,) = through(ranks, tmp_path / "whole", [place], **options)
    parts = through(ranks, tmp_path / "parts", [place, place, place], **options)
    for key in ("losses", "samples", "draws"):
        assert [one for part in parts for one in part[key]] == whole[key]
    for key, value in whole["weights"].items():
        assert torch.equal(parts[-1]["weights"][key], value), key
    assert (parts[-1]["rate"], parts[-1]["epoch"]) == (whole["rate"], whole["epoch"])
    assert parts[-1]["counter"]["batches"] == whole["counter"]["batches"] == WINDOWS * STEPS
    assert parts[-1]["counter"][("a", 1)] == {2, 3}
    assert torch.equal(parts[-1]["counter"]["mean"], whole["counter"]["mean"])


def test_mean_weights_of_windows_go_on(ranks: RankPool, tmp_path: Path) -> None:
    (whole,) = through(ranks, tmp_path / "whole", ["ddp 2"], weighted=True)
    parts = through(ranks, tmp_path / "parts", ["ddp 2", "ddp 2"], weighted=True)
    for key, value in whole["weights"].items():
        assert torch.equal(parts[-1]["weights"][key], value), key


@pytest.mark.parametrize("writer", list(PLACES))
def test_every_place_goes_on_from_every_other(ranks: RankPool, tmp_path: Path, writer: str) -> None:
    (whole,) = through(ranks, tmp_path / "whole", ["cpu"])
    strategy, nproc = PLACES[writer]
    (first,) = ranks(call, strategy, str(tmp_path), 0, 3, {}, nproc=nproc)[:1]
    assert first["losses"] == pytest.approx(whole["losses"][:6], abs=1e-6)
    assert first["samples"] == whole["samples"][: 6 * BATCH]
    for reader in PLACES:
        strategy, nproc = PLACES[reader]
        second = ranks(call, strategy, str(tmp_path), 3, 6, {"save": False}, nproc=nproc)[0]
        assert second["losses"] == pytest.approx(whole["losses"][6:], abs=1e-6), reader
        assert second["samples"] == whole["samples"][6 * BATCH :], reader
        assert second["rate"] == pytest.approx(whole["rate"])
        for key, value in whole["weights"].items():
            torch.testing.assert_close(second["weights"][key], value, atol=1e-5, rtol=1e-4)


class Numbers(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 26

    def __getitem__(self, index: int) -> Any:
        return torch.full((5,), index / 26), index


def run_epochs(strategy: Any, folder: str, stop_at: int | None) -> tuple[list[list[int]], dict[str, Any]]:
    """Two epochs over shuffled data, saved at every step and stopped after one of them; the samples of each step."""
    accelerator = Accelerator(strategy, gradient_accumulation_steps=2, project_dir=folder, seed=5, split_batches=True)
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.02, eps=1e-3)
    loader = torch.utils.data.DataLoader(Numbers(), batch_size=4, shuffle=True)
    model, optimizer, loader = accelerator.prepare(net, optimizer, loader)
    accelerator.resume()
    steps: list[list[int]] = []
    held: list[int] = []
    while loader.state_dict()["epoch"] < 2:
        for x, index in loader:
            with accelerator.accumulate(model):
                accelerator.backward(losses_of(model(x), torch.ones(len(x))).mean())
                held += accelerator.gather_for_metrics(index).tolist()
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                steps.append(held)
                held = []
                accelerator.save_state(keep_last=2)
                if len(steps) == stop_at:
                    return steps, {}
    return steps, accelerator.get_state_dict(model)


def run_at(place: str, folder: str, stop_at: int | None) -> Any:
    return run_epochs(PLACES[place][0], folder, stop_at)


@pytest.mark.parametrize("places", [["cpu"] * 4, ["ddp 2"] * 4, ["cpu", "ddp 2", "fsdp 2", "cpu"]], ids=str)
def test_every_sample_once_over_stops_and_places(ranks: RankPool, tmp_path: Path, places: list[str]) -> None:
    whole, weights = ranks(run_at, "cpu", str(tmp_path / "whole"), None, nproc=1)[0]
    assert len(whole) == 8
    parts: list[list[int]] = []
    for place, stop_at in zip(places, (1, 2, 3, None), strict=True):
        steps, last = ranks(run_at, place, str(tmp_path / "parts"), stop_at, nproc=PLACES[place][1])[0]
        parts += steps
    assert parts == whole
    assert sorted(index for step in parts[:4] for index in step) == list(range(26))
    for key, value in weights.items():
        torch.testing.assert_close(last[key], value, atol=1e-6, rtol=1e-5)


def written_by(strategy: Any, folder: str) -> dict[str, Any]:
    accelerator = Accelerator(strategy, gradient_accumulation_steps=3, seed=4)
    accelerator.prepare(Net())
    return json.loads((accelerator.save_state(folder) / "manifest.json").read_text())


def test_a_checkpoint_says_what_wrote_it(ranks: RankPool, tmp_path: Path) -> None:
    body = ranks(written_by, FSDP(replicate=2), str(tmp_path / "saved"), nproc=4)[0]
    assert body["world"] == {"size": 4, "local_size": 4, "device": "cpu", "mesh": {"replicate": 2, "shard": 2}}
    assert (body["configuration"]["gradient_accumulation_steps"], body["configuration"]["seed"]) == (3, 4)
    assert "replicate=2" in body["configuration"]["strategy"]
    assert body["versions"]["torch"] == torch.__version__


class Highest(torch.optim.SGD):
    """Keeps the last gradient and the highest of all; both begin as one tensor."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, lr)
        for parameter in self.param_groups[0]["params"]:
            nothing = torch.zeros_like(parameter)
            self.state[parameter] = {"last": nothing, "highest": nothing, "none": torch.zeros(()).expand_as(parameter)}

    def step(self, closure: Any = None) -> Any:
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            state["last"] = parameter.grad.clone()
            state["highest"] = torch.maximum(state["highest"], parameter.grad)
        return super().step(closure)


def test_state_that_shares_memory_is_not_read_over_itself(tmp_path: Path) -> None:
    def made() -> Any:
        accelerator = Accelerator(CPU(), project_dir=tmp_path)
        net = nn.Linear(2, 1)
        return accelerator, *accelerator.prepare(net, Highest(net.parameters(), lr=0.1))

    accelerator, model, optimizer = made()
    for scale in (2.0, 1.0):
        optimizer.zero_grad()
        accelerator.backward(model(torch.ones(1, 2)).sum() * scale)
        optimizer.step()
    folder = accelerator.save_state()
    accelerator, model, optimizer = made()
    accelerator.load_state(folder)
    for state in optimizer.state.values():
        assert (state["last"].max(), state["highest"].max(), state["none"].max()) == (1.0, 2.0, 0.0)


class Lefts(list[int]):
    pass


class Rights(list[int]):
    pass


class Batches(torch.utils.data.BatchSampler):
    pass


def zipped(folder: Path, stop: int | None, batch_sampler: bool, drop_last: bool) -> list[Any]:
    """The batches of two loaders side by side, each with a random number, up to the stop."""
    accelerator = Accelerator(CPU(), project_dir=folder, seed=0)
    net = nn.Linear(1, 1)
    loaders = [
        torch.utils.data.DataLoader(
            data,
            batch_sampler=Batches(torch.utils.data.RandomSampler(data), 4, drop_last=drop_last),
        )
        if batch_sampler
        else torch.utils.data.DataLoader(data, 4, shuffle=True, drop_last=drop_last)
        for data in (Lefts(range(10)), Rights(range(10)))
    ]
    model, optimizer, left, right = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1), *loaders)
    accelerator.resume()
    seen: list[Any] = []
    while left.state_dict()["epoch"] < 2:
        for x, z in zip(left, right, strict=False):
            with accelerator.accumulate(model):
                accelerator.backward(model(torch.ones(1, 1)).sum())
                optimizer.step()
            seen.append((x.tolist(), z.tolist(), torch.rand(1).item()))
            if len(seen) == stop:
                accelerator.save_state()
                return seen
    return seen


@pytest.mark.parametrize(("batch_sampler", "drop_last"), [(False, False), (False, True), (True, False)])
def test_zipped_loaders_go_on_after_the_last_batch_of_an_epoch(
    tmp_path: Path, batch_sampler: bool, drop_last: bool
) -> None:
    options = batch_sampler, drop_last
    whole = zipped(tmp_path / "whole", None, *options)
    for stop in range(1, len(whole)):
        folder = tmp_path / str(stop)
        assert zipped(folder, stop, *options) + zipped(folder, None, *options) == whole
