"""Which checkpoints stay, and that a save that fails costs none of them."""

from __future__ import annotations

import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from accelerator import Accelerator
from rank_pool import RankPool
from strategies import CPU, DDP, ConfigurationError, StateError

# torch 2.9 warns of its own storages; a thread must not change the filters of warnings, which are those of all threads
pytestmark = pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")


class Run:
    """Takes steps whose loss is what it is told, and saves after each."""

    def __init__(self, folder: Path, strategy: Any = None) -> None:
        self.accelerator = Accelerator(strategy or CPU(), project_dir=folder, timers=False)
        net = nn.Linear(4, 300)
        self.model, self.optimizer = self.accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.0))
        self.folder = folder / "checkpoints"

    def step(self, loss: float = 1.0) -> None:
        with self.accelerator.accumulate(self.model):
            out = self.model(torch.ones(2, 4)).sum()
            self.accelerator.backward(out * 0.0 + loss)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def steps(self, losses: list[float], **options: Any) -> list[int]:
        for loss in losses:
            self.step(loss)
            self.accelerator.save_state(**options)
        return self.left()

    def left(self) -> list[int]:
        return sorted(int(path.name.removeprefix("step-")) for path in self.folder.glob("step-*"))


def test_the_last_and_every_so_many_stay(tmp_path: Path) -> None:
    assert Run(tmp_path).steps([1.0] * 11, keep_last=2, keep_every=4, healthy_after=1) == [4, 8, 10, 11]
    assert Run(tmp_path / "b").steps([1.0] * 3, keep_every=2, healthy_after=1) == [2, 3]
    assert Run(tmp_path / "c").steps([1.0] * 3) == [1, 2, 3]


def test_one_with_a_file_of_the_user_s_stays(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.steps([1.0])
    (run.folder / "step-000000001" / "notes.txt").write_text("the good one")
    assert run.steps([1.0] * 3, keep_last=1, healthy_after=1) == [1, 3, 4]


def test_the_best_stays(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for value in (0.5, 0.2, float("nan"), 0.3, torch.tensor(0.4)):
        run.step()
        run.accelerator.save_state(metrics={"val_loss": value}, keep_best=("val_loss", "min"), healthy_after=1)
    assert run.left() == [2, 4, 5]  # the best, the newest that a finite step followed, the newest
    run.step()
    run.accelerator.save_state(metrics={"val_loss": 9.0}, keep_best=("val_loss", "max"), healthy_after=1)
    assert run.left() == [5, 6]


def test_the_last_that_finite_steps_followed_is_never_deleted(tmp_path: Path) -> None:
    bad = float("nan")
    run = Run(tmp_path)
    assert run.steps([1.0, 1.0, 1.0, 1.0, bad, bad, bad], keep_last=2, healthy_after=2) == [2, 6, 7]
    again = Run(tmp_path)  # it is still known in another process
    again.accelerator.resume()
    assert again.steps([bad, bad], keep_last=1, healthy_after=2) == [2, 9]
    assert again.steps([1.0, 1.0, 1.0, 1.0], keep_last=1, healthy_after=2) == [11, 12, 13]


def test_a_step_written_again_is_not_known_to_be_good(tmp_path: Path) -> None:
    bad = float("nan")
    assert Run(tmp_path).steps([1.0] * 4, keep_last=3, healthy_after=1) == [2, 3, 4]  # 2 and 3 are known to be good
    back = Run(tmp_path)
    back.accelerator.load_state(back.folder / "step-000000002")
    assert back.steps([bad, bad, bad], keep_last=1, healthy_after=1) == [2, 5]  # 3 is now of the bad run


def test_one_saved_after_the_first_bad_step_is_judged_by_what_follows_it(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.steps([1.0], keep_last=1, healthy_after=2)
    run.step(float("nan"))
    run.steps([1.0])
    assert run.steps([1.0, 1.0], keep_last=1, healthy_after=2) == [3, 4, 5]


def test_going_back_is_not_undone_by_resume(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Run(tmp_path).steps([1.0] * 4)
    back = Run(tmp_path)
    back.accelerator.load_state(back.folder / "step-000000001")
    back.steps([1.0])
    again = Run(tmp_path)
    assert again.accelerator.resume() == again.folder.absolute() / "step-000000002"
    assert "taking step-000000002, which was written last, although there is step-000000004" in caplog.text
    assert again.steps([1.0], keep_last=2, healthy_after=1) == [2, 3]  # what was abandoned is older, and goes


def test_broken_ones_are_not_counted(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.steps([1.0, 1.0, 1.0])
    (run.folder / "step-000000003" / "state.json").write_text("{}")
    assert run.steps([1.0], keep_last=2, healthy_after=1) == [2, 3, 4]


def test_bad_input(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with pytest.raises(ConfigurationError, match="keep_last is 0; expected a number >= 1"):
        run.accelerator.save_state(keep_last=0)
    with pytest.raises(ConfigurationError, match="keep_best is"):
        run.accelerator.save_state(keep_best=("val_loss", "least"))  # type: ignore[arg-type]
    with pytest.raises(StateError, match=r"metrics\['a'\] is 'b'; expected a number"):
        run.accelerator.save_state(metrics={"a": "b"})  # type: ignore[dict-item]
    assert run.left() == []


# -- failures --------------------------------------------------------------------------------------------------


def out_of_space(folder: str, async_: bool) -> list[int]:
    """Rank 1 may write no file of more than 2000 bytes, as if its disk were full; afterwards it may."""
    run = Run(Path(folder), DDP())
    run.steps([1.0], keep_last=1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    run.step()
    run.accelerator.wait_for_everyone()
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        if async_:
            run.accelerator.save_state(keep_last=1, async_=True)
        with pytest.raises(StateError, match="failed"):
            run.accelerator.save_state(keep_last=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert run.left() == [1]
    run.accelerator.wait_for_everyone()
    run.accelerator.save_state(keep_last=1, healthy_after=1)
    run.accelerator.load_state()
    return run.left()


@pytest.mark.parametrize("async_", [False, True])
def test_a_full_disk_costs_nothing_that_was_there(ranks: RankPool, tmp_path: Path, async_: bool) -> None:
    assert ranks(out_of_space, str(tmp_path), async_, nproc=2) == [[1, 2], [1, 2]]


def test_a_folder_that_vanished_is_made_again(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.steps([1.0], keep_last=1)
    shutil.rmtree(tmp_path)
    run.steps([1.0], keep_last=1)
    assert run.left() == [2]


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with pytest.raises(StateError, match="/proc"):
        run.accelerator.save_state("/proc/here")
    run.steps([1.0])
    assert run.left() == [1]


def test_what_a_kill_left_is_cleared_up_or_brought_back(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.steps([1.0, 1.0])
    (run.folder / "step-000000002").rename(run.folder / ".old-step-000000002")  # killed between two renames
    (run.folder / ".writing-step-000000003.0").mkdir()
    again = Run(tmp_path)
    assert again.accelerator.resume() == run.folder.absolute() / "step-000000002"
    again.steps([1.0])
    assert again.left() == [1, 2, 3]
    assert not list(run.folder.glob(".writing-*"))
