"""Whose checkpoints a run deletes, and how it notices that a second one writes where it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from accelerator import Accelerator
from strategies import CPU, StateError


class Run:
    def __init__(self, folder: Path | None, *, resume: bool = False) -> None:
        self.accelerator = Accelerator(CPU(), project_dir=folder)
        net = nn.Linear(3, 2)
        self.model, self.optimizer = self.accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1))
        if resume:
            self.accelerator.resume()

    def go(self, steps: int, every: int = 1, place: Path | None = None, **keep: Any) -> None:
        for _ in range(steps):
            self.accelerator.backward(self.model(torch.ones(2, 3)).sum())
            self.optimizer.step()
            self.optimizer.zero_grad()
            step = self.accelerator._checkpoints.step
            if step % every == 0:
                self.accelerator.save_state(None if place is None else place / f"step-{step:09d}", **keep)


def steps_in(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*"))


def test_a_run_started_anew_deletes_nothing_of_the_old_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoints = tmp_path / "checkpoints"
    Run(tmp_path).go(10, keep_last=2, healthy_after=1)
    assert steps_in(checkpoints) == [9, 10]
    anew = Run(tmp_path)
    anew.go(4, keep_last=2, healthy_after=1)
    assert steps_in(checkpoints) == [3, 4, 9, 10]
    assert caplog.text.count("holds checkpoints of another run, which was not gone on with") == 1
    anew.accelerator.load_state(checkpoints / "step-000000010")
    anew.go(3, keep_last=2, healthy_after=1)
    assert steps_in(checkpoints) == [3, 4, 12, 13]


def test_one_that_goes_on_deletes_what_it_went_on_from(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Run(tmp_path).go(3, keep_last=2, healthy_after=1)
    for _ in range(2):
        Run(tmp_path, resume=True).go(3, keep_last=2, healthy_after=1)
    assert steps_in(tmp_path / "checkpoints") == [8, 9]
    assert "another run" not in caplog.text


def test_also_at_places_of_ones_own(tmp_path: Path) -> None:
    Run(None).go(3, place=tmp_path, keep_last=1, healthy_after=1)
    Run(None).go(2, place=tmp_path, keep_last=1, healthy_after=1)
    assert steps_in(tmp_path) == [1, 2, 3]
    again = Run(None)
    again.accelerator.load_state(tmp_path / "step-000000003")
    again.go(2, place=tmp_path, keep_last=1, healthy_after=1)
    assert steps_in(tmp_path) == [1, 2, 4, 5]


@pytest.mark.parametrize("resumes", [False, True])
def test_a_second_job_in_the_folder_is_noticed_by_the_first(tmp_path: Path, resumes: bool) -> None:
    first = Run(tmp_path)
    first.go(2)
    second = Run(tmp_path, resume=resumes)
    second.go(3, every=3)
    with pytest.raises(StateError, match=r"another job has written step-00000000[35] into"):
        first.go(1)
    with pytest.raises(StateError, match="End one of them, or give each its own"):
        first.go(1)
    second.go(1)
    first.accelerator.resume()
    first.go(1)
    with pytest.raises(StateError, match="another job has written"):
        second.go(1)


def test_two_that_begin_together_are_noticed(tmp_path: Path) -> None:
    first, second = Run(tmp_path), Run(tmp_path)
    first.go(1)
    with pytest.raises(StateError, match="another job has written step-000000001"):
        second.go(1)
