"""Whose checkpoints a run deletes, and how it notices that a second one writes where it does."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from accelerator import Accelerator
from accelerator.checkpoint import folder as folders
from fresh_process import FreshProcesses
from strategies import CPU, StateError


class Run:
    def __init__(self, folder: Path | None, *, resume: bool = False) -> None:
        self.accelerator = Accelerator(CPU(), project_dir=folder)
        net = nn.Linear(3, 2)
        self.model, self.optimizer = self.accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1))
        if resume:
            self.accelerator.resume()

    @staticmethod
    def of_another_job(folder: Path, patch: pytest.MonkeyPatch, *, resume: bool = False) -> Run:
        """One that has the id of another process."""
        with patch.context() as context:
            context.setattr(os, "getpid", lambda: 1)
            return Run(folder, resume=resume)

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
    assert steps_in(checkpoints) == [12, 13]  # its own of before, too


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
def test_a_second_job_in_the_folder_is_noticed_by_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resumes: bool
) -> None:
    first = Run(tmp_path)
    first.go(2)
    second = Run.of_another_job(tmp_path, monkeypatch, resume=resumes)
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


SECOND = """
import sys, torch
from accelerator import Accelerator
accelerator = Accelerator("cpu", project_dir=sys.argv[1])
accelerator.prepare(torch.nn.Linear(3, 2))
accelerator.save_state()
"""


def test_a_job_of_another_process_is_noticed(fresh: FreshProcesses, tmp_path: Path) -> None:
    first = Run(tmp_path)
    (finished,) = fresh(SECOND, str(tmp_path), warm=True)
    assert finished.returncode == 0, finished.stderr
    with pytest.raises(StateError, match="another job has written step-000000000"):
        first.go(1)


def test_two_of_one_process_may_share_a_folder(tmp_path: Path) -> None:
    first, second = Run(tmp_path), Run(tmp_path)
    for _ in range(2):
        first.go(1)
        second.go(1)


def test_one_that_was_copied_back_is_not_of_another_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Run.of_another_job(tmp_path, monkeypatch).go(2)
    run = Run(tmp_path, resume=True)
    saved = tmp_path / "checkpoints" / "step-000000001"
    shutil.copytree(saved, tmp_path / "copy", copy_function=shutil.copyfile)
    shutil.rmtree(saved)
    (tmp_path / "copy").rename(saved)
    run.go(1)
    assert steps_in(tmp_path / "checkpoints") == [1, 2, 3]


def linked(first: Run, folder: Path) -> Path:
    (folder / "latest").symlink_to(folder / "checkpoints" / "step-000000003")
    return folder / "latest"


def beside(first: Run, folder: Path) -> Path:
    return first.accelerator.save_state(folder / "best")


@pytest.mark.parametrize("place", [linked, beside])
def test_it_goes_on_from_the_run_and_not_from_the_folder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, place: Any
) -> None:
    first = Run(tmp_path)
    first.go(3)
    run = Run(tmp_path)
    run.accelerator.load_state(place(first, tmp_path))
    run.go(2, keep_last=1, healthy_after=1)
    assert steps_in(tmp_path / "checkpoints") == [4, 5]
    assert "another run" not in caplog.text


def test_two_that_went_on_from_one_delete_nothing_of_each_other(tmp_path: Path) -> None:
    base = Run(None)
    base.go(1, place=tmp_path / "base")
    for _ in range(2):
        run = Run(tmp_path)
        run.accelerator.load_state(tmp_path / "base" / "step-000000001")
        run.go(4 if not steps_in(tmp_path / "checkpoints") else 2, keep_last=1, healthy_after=1)
    assert steps_in(tmp_path / "checkpoints") == [2, 3, 4, 5]


def test_those_of_a_release_that_noted_no_runs_are_of_the_run_that_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Run(tmp_path).go(3)
    for path in (tmp_path / "checkpoints").glob("step-*"):
        body = {key: value for key, value in folders.read_manifest(path).items() if key not in ("run", "lineage")}
        (path / "manifest.json").write_text(json.dumps({**body, "digest": folders.digest_of(body)}))
    Run(tmp_path, resume=True).go(2, keep_last=2, healthy_after=1)
    assert steps_in(tmp_path / "checkpoints") == [4, 5]
    Run(tmp_path, resume=True).go(2, keep_last=1, healthy_after=1)
    assert steps_in(tmp_path / "checkpoints") == [6, 7]
    assert "another run" not in caplog.text


LOCKED = """
import os, shutil, sys, tempfile, torch
from pathlib import Path
from accelerator import Accelerator
accelerator = Accelerator("cpu")
accelerator.prepare(torch.nn.Linear(3, 2))
folder = Path(tempfile.mkdtemp())
try:
    accelerator.save_state(folder / "saved")
    folder.chmod(0o311)
    if os.geteuid() == 0:  # who may list everything
        os.seteuid(65534)
    accelerator.load_state(folder / "saved")
finally:
    os.seteuid(os.getuid())
    folder.chmod(0o700)
    shutil.rmtree(folder)
"""


def test_it_loads_from_below_a_folder_that_may_not_be_listed(fresh: FreshProcesses) -> None:
    (finished,) = fresh(LOCKED, warm=True)
    assert finished.returncode == 0, finished.stderr
