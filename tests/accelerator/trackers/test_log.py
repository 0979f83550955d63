"""`Accelerator.log`: what comes into the log, from which rank, after a resume, and what cannot be logged."""

from __future__ import annotations

import json
import logging
import sys
import threading
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from accelerator import Accelerator
from accelerator.lines import read_lines
from accelerator.trackers import Histogram, Image, JSONLines, Run, Table, Tracker
from fresh_process import FreshProcesses
from rank_pool import RankPool
from strategies.errors import ConfigurationError, StepError


class Notebook(Tracker):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[Any] = []
        self.threads: set[str] = set()

    def begin(self, run: Run) -> None:
        self.lines.append(("begin", run.resumed))

    def log_config(self, config: Mapping[str, Any]) -> None:
        self.lines.append(("config", dict(config)))

    def log(self, values: Mapping[str, Any], step: int, time: float) -> tuple[str, ...]:
        self.threads.add(threading.current_thread().name)
        self.lines.append((step, dict(values)))
        return tuple(name for name, value in values.items() if isinstance(value, Image))

    def resume(self, step: int) -> None:
        self.lines.append(("resume", step))

    def close(self) -> None:
        self.lines.append("close")


class Breaks(Notebook):
    """Fails at every value."""

    def log(self, values: Mapping[str, Any], step: int, time: float) -> tuple[str, ...]:
        raise OSError("the disk is full")


class Exits(Notebook):
    """Fails in several ways, each at several steps."""

    def log(self, values: Mapping[str, Any], step: int, time: float) -> tuple[str, ...]:
        if step % 2:
            sys.exit(f"the service says no at step {step}")
        raise OSError(f"no answer from {object()}")


class NeverBegins(Notebook):
    """Fails before the first."""

    def begin(self, run: Run) -> None:
        raise OSError("no network")


class EveryRank(JSONLines):
    """A file for each rank."""

    all_ranks: ClassVar[bool] = True


def train(accelerator: Accelerator, steps: int, *, resume: bool = False, save_at: int | None = None) -> float:
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    if resume:
        accelerator.resume()
    for step in range(1, steps + 1):
        with accelerator.accumulate(model):
            loss = model(torch.ones(4, 2)).square().mean()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        accelerator.log({"loss": loss})
        if step == save_at:
            accelerator.save_state()
    return loss.item()


def logged(folder: Path, name: str = "log.jsonl") -> list[tuple[int, Any]]:
    return [(line["step"], line["values"]) for line in read_lines(folder / name) if "values" in line]


def test_a_loop_leaves_a_line_for_each_call_and_its_settings(tmp_path: Path) -> None:
    accelerator = Accelerator("cpu", project_dir=tmp_path, seed=3)
    last = train(accelerator, 3)
    accelerator.log({"lr": np.float32(0.5), "note": "over", "right": True}, step=10)
    accelerator.log(config={"width": 2})
    accelerator.end_training()
    found = logged(tmp_path)
    assert [step for step, _ in found] == [1, 2, 3, 10]
    assert found[2][1] == {"loss": last}
    assert found[3][1] == {"lr": 0.5, "note": "over", "right": True}
    configs = [line["config"] for line in read_lines(tmp_path / "log.jsonl") if "config" in line]
    assert configs[0]["seed"] == 3
    assert configs[1] == {"width": 2}


def test_values_are_those_at_the_call_though_they_change_after(tmp_path: Path) -> None:
    notebook = Notebook()
    accelerator = Accelerator("cpu", trackers=[notebook])
    total, pixels = torch.zeros(()), np.zeros((2, 2), np.uint8)
    for _ in range(3):
        total += 1
        pixels += 1
        accelerator.log({"total": total, "all": Histogram(pixels)})
    accelerator.end_training()
    values = [line[1] for line in notebook.lines if isinstance(line[0], int)]
    assert [value["total"] for value in values] == [1, 2, 3]
    assert [value["all"].values.max() for value in values] == [1, 2, 3]
    assert notebook.threads == {"trackers"}
    assert notebook.lines[-1] == "close"


def test_rows_and_configurations_are_copied_at_the_call(tmp_path: Path) -> None:
    accelerator = Accelerator("cpu", project_dir=tmp_path)
    row, config = [0, torch.zeros(())], {"lr": 0.1, "milestones": [1, 2], "dtype": torch.float32, "at": np.arange(2)}
    accelerator.log(config=config)
    for step in range(3):
        row[0], row[1] = step, row[1] + 1
        accelerator.log({"table": Table(["step", "value"], [row])}, np.int64(step))
    row.clear()
    config["milestones"].append(3)  # type: ignore[attr-defined]
    accelerator.end_training()
    tables = [(step, values["table"]["rows"]) for step, values in logged(tmp_path)]
    assert tables == [(step, [[step, step + 1.0]]) for step in range(3)]
    configs = [line["config"] for line in read_lines(tmp_path / "log.jsonl") if "config" in line]
    assert configs[1] == {"lr": 0.1, "milestones": [1, 2], "dtype": "torch.float32", "at": [0, 1]}


def test_a_device_that_cannot_say_when_it_is_done_is_read_after_the_step() -> None:
    notebook = Notebook()
    accelerator = Accelerator("cpu", trackers=[notebook])
    meta = torch.ones((), device="meta")  # any read of it raises
    accelerator.log({"loss": meta})
    accelerator.log({"host": 1.0})
    held = accelerator._record._log._held
    assert [entry.values.values.keys() for entry in held] == [{"loss"}, {"host"}]  # in order
    held[0].values.values["loss"] = torch.tensor(2.0)
    accelerator.end_training()
    assert [line[1] for line in notebook.lines if isinstance(line[0], int)] == [{"loss": 2.0}, {"host": 1.0}]


def test_a_resumed_run_continues_its_log(tmp_path: Path) -> None:
    first = Accelerator("cpu", project_dir=tmp_path)
    train(first, 5, save_at=3)  # what comes after is lost with the process: the next one computes it again
    first.end_training()
    notebook = Notebook()
    second = Accelerator("cpu", project_dir=tmp_path, trackers=("jsonl", notebook))
    train(second, 3, resume=True)
    second.end_training()
    assert [step for step, _ in logged(tmp_path)] == [1, 2, 3, 4, 5, 6]
    mark = next(line for line in read_lines(tmp_path / "log.jsonl") if line.get("event") == "resumed")
    assert (mark["step"], mark["dropped"]) == (3, 2)
    assert notebook.lines[0] == ("begin", 3)


@pytest.mark.parametrize("tracker", ["jsonl", "tensorboard"])
def test_a_resume_keeps_what_was_logged_in_another_unit(tmp_path: Path, tracker: str) -> None:
    for resume in (False, True):
        accelerator = Accelerator("cpu", project_dir=tmp_path, trackers=(tracker,))
        model = nn.Linear(2, 1)
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        start = 3 if resume and accelerator.resume() else 0
        for step in range(start, start + 3):
            with accelerator.accumulate(model):
                accelerator.backward(model(torch.ones(4, 2)).mean())
                optimizer.step()
                optimizer.zero_grad()
            accelerator.log({"loss": 0.5}, step=8 * (step + 1))
        if not resume:
            accelerator.save_state()
        accelerator.end_training()
    if tracker == "jsonl":
        steps = [step for step, _ in logged(tmp_path)]
    else:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        found = EventAccumulator(str(tmp_path / "tensorboard"))
        found.Reload()
        steps = [event.step for event in found.Scalars("loss")]
    assert steps == [8, 16, 24, 32, 40, 48]


def test_another_script_in_the_same_folder_takes_no_lines_away(tmp_path: Path) -> None:
    training = Accelerator("cpu", project_dir=tmp_path)
    train(training, 6, save_at=2)
    training.end_training()
    before = [line for line in read_lines(tmp_path / "log.jsonl") if "values" in line]
    evaluation = Accelerator("cpu", project_dir=tmp_path)
    model = nn.Linear(2, 1)
    evaluation.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    evaluation.load_state(tmp_path / "checkpoints" / "step-000000002")
    evaluation.log({"accuracy": 0.5})
    evaluation.end_training()
    after = [line for name in ("log.1.jsonl", "log.jsonl") for line in read_lines(tmp_path / name) if "values" in line]
    assert len(before) == 6
    assert all(line in after for line in before)


def test_going_back_is_told_to_trackers_that_have_begun(tmp_path: Path) -> None:
    notebook = Notebook()
    accelerator = Accelerator("cpu", project_dir=tmp_path, trackers=[notebook])
    train(accelerator, 2)
    accelerator.save_state()
    accelerator.log({"loss": 1.0}, step=3)
    accelerator.load_state()
    accelerator.end_training()
    assert notebook.lines[-2:] == [("resume", 2), "close"]


KILLED = """
import os, signal, sys
from accelerator import Accelerator
accelerator = Accelerator("cpu", project_dir=sys.argv[1])
for step in range(10_000):
    accelerator.log({"loss": 1.0, "filler": "x" * 200}, step=step)
    if step == 3000:
        print("running", flush=True)
"""


def test_a_killed_run_leaves_a_log_that_is_read(fresh: FreshProcesses, tmp_path: Path) -> None:
    job = fresh.start(KILLED, str(tmp_path), warm=True)
    job.wait_for("running")
    job.kill()
    steps = [step for step, _ in logged(tmp_path)]
    assert steps == list(range(len(steps)))


def test_a_failing_tracker_warns_once_and_the_others_go_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    accelerator = Accelerator("cpu", project_dir=tmp_path, trackers=[Breaks(), NeverBegins(), "jsonl"])
    with caplog.at_level(logging.WARNING, logger="accelerator"):
        train(accelerator, 3)
        accelerator.end_training()
    assert [step for step, _ in logged(tmp_path)] == [1, 2, 3]
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2
    assert "OSError: the disk is full" in told[0] or "OSError: the disk is full" in told[1]
    assert all("training goes on" in words for words in told)


def test_an_exit_ends_no_tracker_and_each_cause_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    accelerator = Accelerator("cpu", project_dir=tmp_path, trackers=[Exits(), "jsonl"])
    with caplog.at_level(logging.WARNING, logger="accelerator"):
        for step in range(6):
            accelerator.log({"loss": 0.5}, step)
        accelerator.end_training()
    assert [step for step, _ in logged(tmp_path)] == [*range(6)]
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2
    assert "OSError: no answer from" in told[0]
    assert "SystemExit: the service says no at step 1" in told[1]


def test_logging_after_the_end_is_refused(tmp_path: Path) -> None:
    accelerator = Accelerator("cpu", project_dir=tmp_path)
    accelerator.end_training()
    for given in ({"values": {"loss": 1.0}}, {"config": {"lr": 0.1}}):
        with pytest.raises(StepError, match=r"log\(\) came after end_training\(\)"):
            accelerator.log(**given)


def test_a_kind_that_a_tracker_has_not_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    accelerator = Accelerator("cpu", project_dir=tmp_path)
    with caplog.at_level(logging.WARNING, logger="accelerator"):
        for _ in range(2):
            accelerator.log({"picture": Image(torch.zeros(2, 2)), "rows": Table(["a"], [[1]])})
        accelerator.end_training()
    assert [value for _, value in logged(tmp_path)] == [{"rows": {"columns": ["a"], "rows": [[1]]}}] * 2
    told = [record.getMessage() for record in caplog.records]
    assert told == ["jsonl keeps nothing of the kind Image: 'picture' is not in it"]


def on_ranks(folder: str) -> None:
    accelerator = Accelerator("ddp", project_dir=folder, trackers=("jsonl", EveryRank()))
    accelerator.log({"rank": accelerator.process_index}, step=0)
    accelerator.end_training()


def test_the_main_process_logs_and_every_rank_where_a_tracker_asks(ranks: RankPool, tmp_path: Path) -> None:
    ranks(on_ranks, str(tmp_path), nproc=3)
    assert logged(tmp_path) == [(0, {"rank": 0})]
    for rank in range(3):
        assert logged(tmp_path, f"log-rank{rank}.jsonl") == [(0, {"rank": rank})]


@pytest.mark.parametrize(
    ("values", "step", "words"),
    [
        ({"loss": torch.zeros(3)}, None, r"'loss' of shape \(3,\); expected one number"),
        ({"loss": torch.tensor(1 + 2j)}, None, "'loss' of type Tensor; expected a number"),
        ({"loss": [1.0]}, None, "'loss' of type list; expected a number"),
        ({"loss": 10**400}, None, "'loss', an integer of 1329 bits; expected one that a float holds"),
        ([1.0], None, "got list; expected a mapping of names to values"),
        (
            {"i": Image(torch.rand(3, 8, 8))},
            None,
            r"'i' of shape \(3, 8, 8\); expected .*permute\(1, 2, 0\) makes that",
        ),
        ({"i": Image(torch.rand(8))}, None, r"'i' of shape \(8,\); expected \(height, width\)"),
        ({"i": Image(torch.rand(8, 8, 4))}, None, r"'i' of shape \(8, 8, 4\); expected \(height, width\)"),
        ({"h": Histogram([1.0], num_bins=0)}, None, "'h' with num_bins=0; expected at least 1"),
        ({"loss": 1.0}, -1, "step=-1; expected an integer >= 0"),
        ({"loss": 1.0}, 1.5, "step=1.5; expected an integer >= 0"),
    ],
)
def test_what_cannot_be_logged_is_refused(values: Any, step: Any, words: str) -> None:
    with pytest.raises(StepError, match=words):
        Accelerator("cpu", trackers=[Notebook()]).log(values, step)


def test_without_a_folder_logging_says_so_and_nothing_else_does(tmp_path: Path) -> None:
    accelerator = Accelerator("cpu")
    assert accelerator.explain()["trackers"].got == "nothing: no project_dir"
    with pytest.raises(ConfigurationError, match=r"jsonl \(default\), which write into project_dir, and there is none"):
        accelerator.log({"loss": 1.0})
    with pytest.raises(ConfigurationError, match=r"tensorboard \(code\), which write into project_dir"):
        Accelerator("cpu", trackers=("tensorboard",))
    Accelerator("cpu", trackers=()).log({"loss": 1.0})


def test_trackers_are_a_setting_like_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "accelerator.toml").write_text('trackers = ["jsonl", "tensorboard"]\n')
    monkeypatch.chdir(tmp_path)
    row = Accelerator("cpu", project_dir="run").explain()["trackers"]
    assert (row.got, row.origin) == ("jsonl, tensorboard", "accelerator.toml line 1")
    monkeypatch.setenv("ACCELERATOR_TRACKERS", '["jsonl"]')
    row = Accelerator("cpu", project_dir="run").explain()["trackers"]
    assert (row.got, row.origin) == ("jsonl", "ACCELERATOR_TRACKERS")
    assert Accelerator("cpu", trackers=[Notebook()]).explain()["trackers"].got.endswith(":Notebook")
    assert not (tmp_path / "run").exists()  # nothing is opened before the first value


@pytest.mark.parametrize(
    ("trackers", "words"),
    [
        (("tensorbord",), r"trackers names 'tensorbord' \(code\); expected jsonl, .* Did you mean 'tensorboard'\?"),
        (("no_such_package:Tracker",), "'no_such_package:Tracker' cannot be imported: No module named"),
        (("json:dumps",), "expected a subclass of Tracker"),
        ("jsonl", "trackers is 'jsonl' .code.; expected a list of text"),
        ((3,), "expected a list of text"),
    ],
)
def test_wrong_trackers_are_refused_at_construction(trackers: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=words):
        Accelerator("cpu", project_dir=tmp_path, trackers=trackers)


def test_a_tracker_that_is_not_installed_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)  # what an import of a missing module looks like
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"pip install 'torch-accelerator\[wandb\]'"):
        Accelerator("cpu", project_dir=tmp_path, trackers=("wandb",))


def test_an_installed_package_can_register_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = metadata.EntryPoint("mine", f"{__name__}:Notebook", "accelerator.trackers")
    monkeypatch.setattr(metadata, "entry_points", lambda group: [entry] if group == entry.group else [])
    monkeypatch.setitem(__import__("sys").modules, __name__, __import__("sys").modules.get(__name__) or _this())
    accelerator = Accelerator("cpu", trackers=("mine",))
    assert type(accelerator._record._log._trackers[0]).__name__ == "Notebook"


def _this() -> Any:
    import types

    module = types.ModuleType(__name__)
    module.Notebook = Notebook  # type: ignore[attr-defined]
    return module


@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_folder_that_cannot_be_written_is_refused(below: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text(json.dumps({}))
    with pytest.raises(ConfigurationError, match=r"project_dir is .*file.* is no folder"):
        Accelerator("cpu", project_dir=tmp_path / "file" / below)
