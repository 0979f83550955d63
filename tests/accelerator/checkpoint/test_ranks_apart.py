"""Ranks in other calls, with other arguments or on other disks: one clear error on all, at once."""

from __future__ import annotations

import fcntl
import os
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from accelerator import Accelerator
from accelerator.checkpoint import tensors
from rank_pool import RankPool
from strategies import CPU, DDP, AcceleratorError, StateError


def apart(case: str, folder: str) -> str:
    """What this rank's error says."""
    own = f"{folder}/rank{os.environ['RANK']}"
    accelerator = Accelerator(DDP(), project_dir=own if case.startswith("project") else folder)
    net = nn.Linear(2, 2)
    accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1))
    main = accelerator.is_main_process
    said = ""
    try:
        if case == "other call":
            accelerator.save_state() if main else accelerator.gather(torch.ones(1))
        elif case == "due":
            accelerator.checkpoint_due(every_minutes=1) if main else accelerator.wait_for_everyone()
        elif case == "load":
            accelerator.resume() if main else accelerator.save_state()
        elif case == "background":
            accelerator.save_state(async_=main)
        elif case == "keep":
            accelerator.save_state(keep_last=1 if main else None)
        elif case == "path":
            accelerator.save_state(own)
        elif case == "project":
            accelerator.save_state()
    except AcceleratorError as error:
        said = str(error)
    accelerator.wait_for_everyone()
    assert not list(Path(folder).rglob("manifest.json"))
    accelerator.end_training()
    return said


SAID = {
    "other call": r"different calls \(rank 0: save_state; rank 1: gather\)",
    "due": r"different calls \(rank 0: checkpoint_due; rank 1: wait_for_everyone\)",
    "load": r"different calls \(rank 0: resume; rank 1: save_state\)",
    "background": r"gave save_state different arguments \(rank 0: .*async_=True",
    "keep": r"gave save_state different arguments .*last=1.*last=None",
    "path": r"gave save_state different arguments \(rank 0: .*/rank0 .*; rank 1: .*/rank1 ",
    "project": r"gave save_state different arguments \(rank 0: .*/rank0 .*; rank 1: .*/rank1 ",
}


@pytest.mark.parametrize("case", list(SAID))
def test_one_error_on_all(ranks: RankPool, tmp_path: Path, case: str) -> None:
    said = ranks(apart, case, str(tmp_path), nproc=2)
    assert said[0] == said[1]
    assert re.search(SAID[case], said[0]), said[0]


def each_its_disk(folder: str) -> list[str]:
    """One path that leads each rank to a folder of its own, as /local does on two machines."""
    accelerator = Accelerator(DDP())
    accelerator.prepare(nn.Linear(2, 2))
    rank = accelerator.process_index
    Path(f"{folder}/disk{rank}").mkdir()
    said = []
    before = os.getcwd()
    try:
        os.chdir(f"{folder}/disk{rank}")
        place = Path("/proc/self/cwd/checkpoint")
        with pytest.raises(StateError) as caught:
            accelerator.save_state(place)
        said.append(str(caught.value))
        if not accelerator.is_main_process:
            os.chdir(f"{folder}/disk0")
        accelerator.save_state(place)
        if not accelerator.is_main_process:
            os.chdir(f"{folder}/disk1")
        with pytest.raises(StateError) as caught:
            accelerator.load_state(place)
        said.append(str(caught.value))
    finally:
        os.chdir(before)
    return said


def test_a_disk_for_each_machine_is_refused(ranks: RankPool, tmp_path: Path) -> None:
    for saving, loading in ranks(each_its_disk, str(tmp_path), nproc=2):
        assert saving.startswith("rank 1: the folder in which rank 0 writes '/proc/self/cwd/checkpoint' is not there")
        assert loading.startswith("rank 1: ")
    assert not (tmp_path / "disk1").exists() or not list((tmp_path / "disk1").iterdir())


def test_every_file_of_the_index_is_in_the_manifest(tmp_path: Path) -> None:
    accelerator = Accelerator(CPU())
    accelerator.prepare(nn.Linear(2, 2))
    saved = accelerator.save_state(tmp_path / "a")
    assert tensors.files_of(saved / "tensors") == {path.name for path in (saved / "tensors").glob("*.distcp")}


def test_two_jobs_may_write_beside_each_other_at_places_they_named(tmp_path: Path) -> None:
    accelerator = Accelerator(CPU())
    accelerator.prepare(nn.Linear(2, 2))
    with (tmp_path / ".lock-a").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        (tmp_path / ".writing-a.0").mkdir()
        accelerator.save_state(tmp_path / "b")
        with pytest.raises(StateError, match=r"another job is writing a checkpoint to '.*a'"):
            accelerator.save_state(tmp_path / "a")
        assert (tmp_path / ".writing-a.0").exists()
    accelerator.save_state(tmp_path / "a")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
