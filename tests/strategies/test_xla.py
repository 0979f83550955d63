"""XLA where torch_xla is not needed: what it refuses, how parameters are cut, when it warns. tests/xla has the rest."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from accelerator import Accelerator
from strategies import XLA, ConfigurationError, LaunchError, recompilation
from strategies.recompilation import Recompilations
from strategies.xla_layout import Layout, re_tie, ties_of
from strategies.xla_runtime import refuse_several_hosts


def test_without_torch_xla_it_says_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_xla", None)
    with pytest.raises(LaunchError, match=r"XLA needs torch_xla, and .*expected torch 2.9.0 with torch_xla 2.9.0"):
        Accelerator("xla")


def test_a_torch_xla_of_another_torch_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package, about = tmp_path / "torch_xla", tmp_path / "torch_xla-2.8.1.dist-info"
    package.mkdir()
    about.mkdir()
    (package / "__init__.py").write_text("raise ImportError('_XLAC.so: undefined symbol: _ZN5torch8autograd10')")
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: torch_xla\nVersion: 2.8.1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.partition(".")[0] == "torch_xla"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(LaunchError) as caught:
        Accelerator("xla")
    assert f"torch_xla 2.8.1 is installed beside torch {torch.__version__}; expected torch 2.9.0 with" in str(
        caught.value
    )
    assert "Python said: _XLAC.so: undefined symbol" in str(caught.value)


def test_one_of_several_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(LaunchError, match="XLA drives all devices of a host from one process, but torchrun started 2"):
        XLA().setup()


def test_processes_of_several_hosts_are_refused() -> None:
    refuse_several_hosts("XLA", 1)
    with pytest.raises(LaunchError, match="XLA found 2 processes of torch_xla, as on several hosts; expected one"):
        refuse_several_hosts("XLA", 2)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"shard": "fully"}, "shard is 'fully'; expected 'none', 'data' or 'fsdp'"),
        ({"mesh": (2, 2)}, "mesh is .2, 2. and shard is 'data'; expected shard='fsdp'"),
        ({"shard": "fsdp", "mesh": (0, 4)}, "expected two numbers >= 1"),
        ({"min_sharded_elements": 0}, "min_sharded_elements is 0; expected at least 1"),
    ],
)
def test_a_wrong_setting_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        XLA(**settings)


@pytest.mark.parametrize(
    ("shape", "dim"),
    [
        ((64, 32), 0),  # the longest
        ((62, 32), 1),  # the longest that divides
        ((61, 33), 0),  # the longest, if none divides
        ((2, 3), None),  # none is as long as there are devices
        ((4, 4), None),  # too few elements
    ],
)
def test_the_dimension_that_is_cut(shape: tuple[int, ...], dim: int | None) -> None:
    layout = Layout(copies=1, parts=4, min_elements=17 if shape == (4, 4) else 1)
    assert layout._dim_of(torch.empty(shape)) == dim
    assert layout.is_cut(torch.empty(shape)) == (dim is not None)


def test_what_was_tied_is_tied_again() -> None:
    model = nn.ModuleDict({"one": nn.Linear(3, 3), "two": nn.Linear(3, 3), "three": nn.BatchNorm1d(3)})
    model.two.weight = model.one.weight
    model.three.register_buffer("same", model.three.running_mean)
    ties = ties_of(model)
    assert ties == [["one.weight", "two.weight"], ["three.running_mean", "three.same"]]
    model.two.weight = nn.Parameter(torch.zeros(3, 3))
    model.three.same = torch.zeros(3)
    re_tie(model, ties)
    assert model.two.weight is model.one.weight
    assert model.three.same is model.three.running_mean


class Device:
    """Counts as torch_xla does."""

    compiled = reads = copies = 0


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()
    monkeypatch.setattr(recompilation, "_num_compiled", lambda: device.compiled)
    monkeypatch.setattr(recompilation, "_num_read", lambda: device.reads)
    monkeypatch.setattr(recompilation, "_num_copies", lambda: device.copies + device.reads)
    return device


def step(watch: Recompilations, device: Device, *lengths: int, compiles: int = 0, reads: int = 0) -> None:
    for length in lengths:
        watch.note_batch(torch.zeros(length))
    device.reads += reads
    watch.before_run()
    device.compiled += compiles
    watch.after_run()


def test_the_first_steps_may_compile_and_read(device: Device, caplog: pytest.LogCaptureFixture) -> None:
    watch = Recompilations()
    for _ in range(4):
        step(watch, device, 8, compiles=1, reads=1)
    step(watch, device, 8)
    assert caplog.messages == []


def test_one_more_shape_is_no_reason_to_warn(device: Device, caplog: pytest.LogCaptureFixture) -> None:
    watch = Recompilations()
    for _ in range(6):
        step(watch, device, 8, 8)
    step(watch, device, 8, 3, compiles=1)
    assert caplog.messages == []
    step(watch, device, 5, 8, compiles=1)
    step(watch, device, 6, 8, compiles=1)
    (message,) = caplog.messages  # once, however many follow
    assert "batches of 3 different shapes" in message
    assert "(5,) float32 then (8,) float32 (1 times)" in message


def test_a_shape_that_was_read_ahead_is_no_changing_number(device: Device, caplog: pytest.LogCaptureFixture) -> None:
    watch = Recompilations()
    for _ in range(6):
        step(watch, device, 8)
    step(watch, device, 5)
    step(watch, device, 8, compiles=1)
    assert caplog.messages == []
    for _ in range(2):
        step(watch, device, 8, compiles=1)  # as where a schedule ends
    assert caplog.messages == []
    for _ in range(2):
        step(watch, device, 8, compiles=1)
    (message,) = caplog.messages
    assert "3 of 11 steps were compiled anew" in message
    assert "a Python number that enters the program has changed" in message


def test_evaluation_reads_what_it_likes(device: Device, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    watch = Recompilations()
    for _ in range(6):
        watch.note_batch(torch.zeros(8))
        with torch.no_grad():
            step(watch, device, 5, compiles=1, reads=3)  # in the middle of a window
        step(watch, device, 8)
        with torch.no_grad():
            step(watch, device, 5, reads=3)  # between windows
        device.reads += 1  # of metrics, after a loop
    assert caplog.messages == []
    assert watch.num_steps == 6


def test_copies_that_read_nothing_are_learned(
    device: Device, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recompilation, "ReadingLines", None)  # looking at operations changes the program
    watch = Recompilations()
    for number in range(60):
        device.copies += 3 + min(number // 10, 2)  # of batches to the device; more of them until the 20th window
        step(watch, device, 8)
    assert caplog.messages == []
    assert not watch._counted  # where reads are counted no longer, nobody waits for the count


def test_a_read_in_every_tenth_window_is_found(device: Device, caplog: pytest.LogCaptureFixture) -> None:
    watch = Recompilations()
    for number in range(1, 41):
        step(watch, device, 8, reads=number % 10 == 0)
        assert len(caplog.messages) == (
            number >= 30
        )  # copies more in the 10th, is counted in the 20th, seen in the 30th
    assert "read a value from the device inside a window" in caplog.messages[0]
    assert not watch._counted
    assert not watch._observed


def test_a_loop_that_reads_no_more_is_looked_at_for_a_while_only(
    device: Device, caplog: pytest.LogCaptureFixture
) -> None:
    watch = Recompilations()
    for number in range(1, 140):
        step(watch, device, 8, reads=number in (10, 20))
        assert bool(watch._observed) == (20 <= number < 120)
    assert caplog.messages == []
    step(watch, device, 8)
    assert watch._observer is None


def test_a_save_inside_a_window_is_no_read(device: Device, caplog: pytest.LogCaptureFixture) -> None:
    watch = Recompilations()
    for _ in range(12):
        watch.note_batch(torch.zeros(8))
        watch.leave_window()
        step(watch, device, 8, compiles=2, reads=5)
    assert caplog.messages == []
