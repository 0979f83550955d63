"""`Accelerator.profile`: which steps are in whose trace."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from accelerator import Accelerator
from rank_pool import RankPool
from strategies.errors import ConfigurationError


def train(folder: str, strategy: str, num_windows: int, arguments: dict[str, Any]) -> int:
    accelerator = Accelerator(strategy, project_dir=folder, gradient_accumulation_steps=2, timers=False)
    model = nn.Linear(4, 1)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with accelerator.profile(**arguments):
        for _ in range(2 * num_windows):
            with accelerator.accumulate(model):
                accelerator.backward(model(torch.ones(2, 4)).square().mean())
                optimizer.step()
                optimizer.zero_grad()
    return len(accelerator._accumulation.observers)


def names_in(path: Path) -> list[str]:
    return [event.get("name", "") for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]]


@pytest.mark.parametrize(("strategy", "nproc"), [("cpu", 1), ("ddp", 2)])
def test_each_rank_has_a_trace_of_the_active_steps(ranks: RankPool, strategy: str, nproc: int, tmp_path: Path) -> None:
    assert ranks(train, str(tmp_path), strategy, 6, {"wait": 1, "warmup": 1, "active": 2}, nproc=nproc) == [0] * nproc
    traces = sorted(path.name for path in (tmp_path / "profile").iterdir())
    assert traces == [f"rank{rank}-step4.json.gz" for rank in range(nproc)]
    names = names_in(tmp_path / "profile" / "rank0-step4.json.gz")
    assert sum(name.startswith("ProfilerStep#") for name in names) == 2
    assert sum(name == "aten::linear" for name in names) == 4  # two windows of two micro-batches
    assert sum(name.startswith("Optimizer.step#SGD") for name in names) == 2


def test_rounds_repeat_and_options_go_to_torch(tmp_path: Path) -> None:
    arguments = {"folder": tmp_path / "own", "wait": 0, "warmup": 1, "active": 1, "repeat": 2, "record_shapes": True}
    train(str(tmp_path), "cpu", 6, arguments)
    assert sorted(path.name for path in (tmp_path / "own").iterdir()) == [
        "rank0-step2.json.gz",
        "rank0-step4.json.gz",
    ]


def test_a_block_per_epoch_keeps_every_trace(tmp_path: Path) -> None:
    accelerator = Accelerator("cpu", project_dir=tmp_path, timers=False)
    model = nn.Linear(4, 1)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for epoch in range(3):
        with accelerator.profile(wait=0, warmup=1, active=1):
            for _ in range(2):
                with accelerator.accumulate(model):
                    accelerator.backward(model(torch.ones(2, 4)).mean())
                    if epoch < 2:
                        optimizer.step()
    traces = sorted(path.name for path in (tmp_path / "profile").iterdir())
    assert traces == ["rank0-step2.json.gz", "rank0-step4-2.json.gz", "rank0-step4.json.gz"]


def test_an_exception_goes_on_its_way_and_nothing_stays(tmp_path: Path) -> None:
    accelerator = Accelerator("cpu")
    with pytest.raises(torch.OutOfMemoryError), accelerator.profile(tmp_path):
        raise torch.OutOfMemoryError("as a device says it")
    assert accelerator._accumulation.observers == []
    assert list(tmp_path.iterdir()) == []  # a snapshot of allocations needs a device that keeps them


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"active": 0}, "active is 0; expected an integer >= 1"),
        ({"wait": -1}, "wait is -1; expected an integer >= 0"),
        ({"warmup": True}, "warmup is True; expected an integer >= 0"),
        ({}, r"profile\(\) has no folder to write to: name one"),
    ],
)
def test_what_cannot_be_profiled_is_refused_at_once(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        Accelerator("cpu").profile(**arguments)
