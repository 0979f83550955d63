"""`Accelerator.progress`: what is shown where, and that the items come through as they are."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from accelerator import Accelerator, progress
from rank_pool import RankPool
from strategies.errors import ConfigurationError
from torch_version import without_gloo_lines

ROOT = Path(__file__).resolve().parents[2]


def train(style: Any, num_epochs: int = 1, strategy: str = "cpu") -> int:
    accelerator = Accelerator(strategy)
    model = nn.Linear(2, 1)
    loader = DataLoader(TensorDataset(torch.ones(24, 2)), batch_size=4)
    model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), loader)
    count = 0
    for _ in range(num_epochs):
        for (x,) in accelerator.progress(loader, description="training", style=style):
            with accelerator.accumulate(model):
                accelerator.backward(model(x).square().mean())
                optimizer.step()
                optimizer.zero_grad()
            count += 1
    assert len(accelerator._accumulation.observers) == 0
    return count


def test_lines_tell_loss_speed_and_time(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS_OF_LINES", 0.0)
    monkeypatch.setattr(progress._Lines, "seconds", 0.0)
    assert train("lines") == 6
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 7
    assert lines[0].startswith("training  1/6  loss ")
    assert lines[0].endswith("s left")
    assert "samples/s" in lines[5]
    assert lines[6].startswith("training  6/6  ")


def test_a_loop_that_is_left_says_how_far_it_came(capsys: pytest.CaptureFixture[str]) -> None:
    accelerator = Accelerator("cpu")
    for index in accelerator.progress(range(100), style="lines"):
        if index == 41:
            break
    assert capsys.readouterr().err.startswith("41/100")
    assert accelerator._accumulation.observers == []


def test_what_has_no_length_has_no_total(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(Accelerator("cpu").progress(iter("abc"), style="lines")) == ["a", "b", "c"]
    assert capsys.readouterr().err.startswith("3  ")


@pytest.mark.parametrize(("ci", "shown"), [("true", False), (None, True)])
def test_ci_is_quiet(ci: str | None, shown: bool, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    if ci is None:
        monkeypatch.delenv("CI", raising=False)
    else:
        monkeypatch.setenv("CI", ci)
    assert list(Accelerator("cpu").progress([1, 2])) == [1, 2]
    assert bool(capsys.readouterr().err) == shown


def on_ranks() -> int:
    return train("lines", strategy="ddp")


def test_the_main_process_shows_and_all_go_on(ranks: RankPool, capsys: pytest.CaptureFixture[str]) -> None:
    assert ranks(on_ranks) == [3, 3]
    of_main, *of_others = without_gloo_lines(capsys.readouterr().out).split("--- printed by rank 1 ---")
    assert "--- printed by rank 0 ---\ntraining  3/3" in of_main
    assert "".join(of_others).strip() == ""


BAR = """
from accelerator import Accelerator
for _ in Accelerator("cpu").progress(range(3), description="counting"):
    pass
"""


def test_a_terminal_gets_a_bar() -> None:
    terminal, end = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name != "CI"}
    environment |= {"PYTHONPATH": str(ROOT), "TERM": "xterm"}
    finished = subprocess.run([sys.executable, "-c", BAR], env=environment, stderr=end, timeout=100)
    os.close(end)
    drawn = os.read(terminal, 100_000).decode()
    os.close(terminal)
    assert finished.returncode == 0
    assert "counting" in drawn
    assert "3/3" in drawn
    assert "━" in drawn


def test_another_style_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="style is 'dots'; expected 'bar', 'lines', 'none'"):
        Accelerator("cpu").progress([], style="dots")  # type: ignore[arg-type]
