"""Timers against a clock that the test turns, and in real loops on every strategy that runs here."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from accelerator import Accelerator
from accelerator.lines import read_lines
from accelerator.timing import Timers, timers
from rank_pool import RankPool
from strategies.errors import ConfigurationError


class Clock:
    """Moves on by what the loop says it takes."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Slow(nn.Linear):
    """Its forward takes 2 s and its backward 3 s of a clock."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(2, 1)
        self.clock = clock

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.clock.now += 2
        out = super().forward(x)
        out.register_hook(lambda gradient: setattr(self.clock, "now", self.clock.now + 3))
        return out


class SlowSGD(torch.optim.SGD):
    """Its step takes 5 s."""

    clock: Clock

    def step(self, closure: Any = None) -> Any:
        self.clock.now += 5
        return super().step(closure)


class SlowData(TensorDataset):
    """A sample takes half a second."""

    clock: Clock

    def __getitem__(self, index: Any) -> Any:
        self.clock.now += 0.5
        return super().__getitem__(index)


def lines_of(folder: Path, rank: int = 0) -> list[dict[str, Any]]:
    return read_lines(folder / "timing" / f"rank{rank}.jsonl")


def test_every_second_is_in_its_phase(tmp_path: Path) -> None:
    clock = Clock()
    accelerator = Accelerator("cpu", gradient_accumulation_steps=2)
    accumulation = accelerator._accumulation
    observer = Timers(
        tmp_path,
        accelerator._world,
        steps_taken=lambda: sum(link.num_steps for link in accumulation.optimizers),
        optimizers=accumulation.optimizers,
        plan=lambda: [("strategy", "auto", "CPU", "default")],
        clock=clock,
    )
    accumulation.observers.append(observer)
    model = Slow(clock)
    optimizer = SlowSGD(model.parameters(), lr=0.1)
    data = SlowData(torch.randn(8, 2))
    SlowSGD.clock = SlowData.clock = clock
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(data, batch_size=2))
    for (x,) in loader:
        clock.now += 0.25  # the user's own code
        with accelerator.accumulate(model):
            loss = model(x).square().mean()
            with accelerator._collective():
                clock.now += 1.5  # in the middle of a forward
            accelerator.backward(loss)
            clip(accelerator, model, clock)
            optimizer.step()
            optimizer.zero_grad()
    observer.saved(7.0, tmp_path)
    clock.now += 7
    for _ in loader:  # an evaluation: its waits are no phase of training
        pass
    observer.close()
    found = [line for line in lines_of(tmp_path) if "phases" in line]
    total: dict[str, float] = {}
    for line in found:
        for name, seconds in line["phases"].items():
            total[name] = total.get(name, 0) + seconds
    assert total == {
        "data": 4.0,
        "forward": 8.0,
        "backward": 6.0,
        "closing_backward": 6.0,
        "reduce": 2.0,
        "optimizer": 10.0,
        "checkpoint": 7.0,
        "collectives": 6.0,
    }
    assert sum(line["seconds"] for line in found) == clock.now
    assert [sum(line[name] for line in found) for name in ("samples", "micro_batches", "windows")] == [8, 4, 2]
    assert found[-1]["step"] == 2
    assert found[0]["lr"] == [0.1]
    assert lines_of(tmp_path)[1]["plan"] == [["strategy", "auto", "CPU", "default"]]


def clip(accelerator: Accelerator, model: nn.Module, clock: Clock) -> None:
    """A second of something else after a closing backward, before the gradients are final."""
    if accelerator.sync_gradients:
        clock.now += 1
        accelerator.clip_grad_value_(model.parameters(), 1.0)


def train(strategy: str, folder: str, precision: str = "no", scale: float = 1.0) -> dict[str, Any]:
    timers.INTERVAL_SECONDS = 0.0  # a line for every window
    accelerator = Accelerator(strategy, project_dir=folder, count_flops=True, mixed_precision=precision)  # type: ignore[arg-type]
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(TensorDataset(torch.ones(24, 8) * scale), batch_size=4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses, norms = [], []
    for (x,) in loader:
        with accelerator.accumulate(model):
            loss = model(x).square().mean()
            accelerator.backward(loss)
            norm = accelerator.clip_grad_norm_(model.parameters(), 1.0) if scale == 1.0 else None
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        accelerator.gather(loss.detach())
        norms.append(float(norm) if norm is not None else None)
    accelerator.save_state()
    accelerator.end_training()
    timers.INTERVAL_SECONDS = 1.0
    return {"losses": losses, "norms": norms}


@pytest.mark.parametrize(("strategy", "nproc"), [("cpu", 1), ("ddp", 2), ("fsdp", 2)])
def test_each_rank_of_each_strategy_leaves_its_lines(
    ranks: RankPool, strategy: str, nproc: int, tmp_path: Path
) -> None:
    results = ranks(train, strategy, str(tmp_path), nproc=nproc)
    for rank, result in enumerate(results):
        lines = lines_of(tmp_path, rank)
        assert lines[0]["run"]["rank"] == rank
        measured = [line for line in lines if "phases" in line]
        assert [line["loss"] for line in measured if "loss" in line] == result["losses"]
        assert [line["grad_norm"] for line in measured if "grad_norm" in line] == pytest.approx(result["norms"])
        assert all({"forward", "closing_backward", "optimizer"} <= line["phases"].keys() for line in measured[1:3])
        assert all(sum(line["phases"].values()) <= line["seconds"] + 1e-4 for line in measured)
        assert all(line["phases"]["collectives"] > 0 for line in measured[1:3])
        exchanges = [tuple(one) for line in measured for one in line["exchanges"] if one is not None]
        assert sorted({number for number, _, _ in exchanges}) == ([1, 2] if strategy == "ddp" else [])
        assert all(0 < hidden <= seconds < 60 for _, seconds, hidden in exchanges)
        assert all(line["memory"]["resident"] > 2**20 for line in measured)
        assert [line["event"] for line in lines if "event" in line] == ["checkpoint"]
        (flops,) = [line["flops"] for line in lines if "flops" in line]
        assert flops["samples"] == 4
        # Forward and two products of backward of each layer, but none for the gradient of the input.
        assert flops["micro_batch"] == 2 * 4 * (8 * 16 * 2 + 16 * 1 * 3)
    assert any("plan" in line for line in lines_of(tmp_path, 0))


def test_skipped_steps_and_warnings_are_events(ranks: RankPool, tmp_path: Path) -> None:
    ranks(train, "cpu", str(tmp_path), "fp16", float("inf"), nproc=1)
    events = [(line["event"], line.get("text")) for line in lines_of(tmp_path) if "event" in line]
    assert events.count(("skipped step", "float16 overflow")) == 6
    assert sum(kind == "warning" and "float16 overflow" in (text or "") for kind, text in events) == 6


def test_an_exception_is_an_event_and_a_restart_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    accelerator = Accelerator("cpu", project_dir=tmp_path)
    model = accelerator.prepare(nn.Linear(2, 1))
    with pytest.raises(KeyError), accelerator.accumulate(model):
        raise KeyError("lost")
    accelerator.end_training()
    assert [(line["event"], line["text"]) for line in lines_of(tmp_path) if "event" in line] == [
        ("restart", "number 2"),
        ("exception", "KeyError: 'lost'"),
    ]


def test_a_folder_that_goes_away_stops_the_timers_and_not_the_loop(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    with caplog.at_level(logging.WARNING, logger="accelerator"):
        accelerator = Accelerator("cpu", project_dir=folder)
        folder.write_text("a file in its place")
        model = accelerator.prepare(nn.Linear(2, 1))
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.ones(1, 2)).sum())
        accelerator.end_training()
    assert [record.getMessage()[:15] for record in caplog.records] == ["the timers stop"]


def test_timers_are_off_without_a_folder_and_asking_for_them_then_is_an_error(tmp_path: Path) -> None:
    assert Accelerator("cpu").explain()["timers"].got == "off: no project_dir"
    assert Accelerator("cpu", project_dir=tmp_path, timers=False).explain()["timers"].got == "off"
    assert Accelerator("cpu", project_dir=tmp_path).explain()["timers"].got == "on"
    with pytest.raises(ConfigurationError, match=r"timers is true \(code\), but there is no project_dir"):
        Accelerator("cpu", timers=True)
    with pytest.raises(ConfigurationError, match=r"count_flops is true \(code\), but there is no timers"):
        Accelerator("cpu", project_dir=tmp_path, timers=False, count_flops=True)


def train_the_second(folder: str) -> None:
    timers.INTERVAL_SECONDS = 0.0
    accelerator = Accelerator("ddp", project_dir=folder)
    _, model = accelerator.prepare(nn.Linear(8, 8), nn.Linear(8, 1))
    optimizer = accelerator.prepare(torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(3):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.ones(2, 8)).square().mean())
            optimizer.step()
            optimizer.zero_grad()
    accelerator.end_training()
    timers.INTERVAL_SECONDS = 1.0


def test_an_exchange_is_told_at_the_place_of_its_model(ranks: RankPool, tmp_path: Path) -> None:
    ranks(train_the_second, str(tmp_path), nproc=2)
    told = [line["exchanges"] for line in lines_of(tmp_path) if "phases" in line]
    assert any(second is not None for _, second in told)
    assert all(first is None for first, _ in told)
