"""`accelerator config`: questions on a real terminal, flags, defaults, refusals, and what is shown."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from accelerator.cli import main
from accelerator.config import resolve_settings
from accelerator.config.settings import catalogue
from accelerator.configure import Machine, ask, render, save
from accelerator.configure.write import literal
from strategies import DDP, ConfigurationError

CPU_ONLY = Machine("cpu", 0, has_xla=False)


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def type_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """Make standard input a pseudo-terminal on which these lines were typed, and run `accelerator config`."""
    opened = []

    def run(answers: list[str], *words: str) -> int:
        terminal, end = os.openpty()
        keyboard = os.fdopen(end)
        opened.extend([keyboard, os.fdopen(terminal, "wb", buffering=0)])
        monkeypatch.setattr(sys, "stdin", keyboard)
        opened[-1].write("".join(f"{answer}\n" for answer in answers).encode())
        code = main(["config", *words])
        opened[-1].write(b"the rest\n")
        assert keyboard.readline() == "the rest\n"  # no line was left over
        return code

    yield run
    for file in opened:
        file.close()


def test_questions_are_asked_again_until_the_answer_can_be(
    type_on_a_terminal: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert type_on_a_terminal(["dddp", "ddp", "two", "2", "1", "bf16", "", "7", "runs/a"]) == 0
    shown = capsys.readouterr().out
    assert "Strategy (auto, cpu, single, ddp" in shown
    assert "Did you mean 'ddp'?" in shown
    assert "nproc_per_node is 'two'" in shown
    resolved = resolve_settings({}, environ={}, directory=tmp_path)
    settings = resolved.settings
    assert (settings.strategy, settings.launch.nproc_per_node, settings.mixed_precision) == ("ddp", 2, "bf16")
    assert (settings.gradient_accumulation_steps, settings.seed, settings.project_dir) == (1, 7, "runs/a")
    assert resolved.strategy_for("ddp") == DDP()


def test_flags_answer_questions_and_a_single_process_is_not_asked_how_many(
    type_on_a_terminal: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--strategy", "cpu", "--global-batch-size=32", "--split-batches")
    assert type_on_a_terminal(["", "none", ""], *flags) == 0
    shown = capsys.readouterr().out
    assert "Processes" not in shown
    assert "Micro-batches" not in shown
    settings = resolve_settings({}, environ={}, directory=tmp_path).settings
    assert (settings.strategy, settings.global_batch_size, settings.split_batches) == ("cpu", 32, True)
    assert settings.launch.nproc_per_node is None


def test_without_a_terminal_the_way_out_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--seed", "1"]) == 2
    message = capfd.readouterr().err
    assert "there is no terminal to ask on. Give --yes" in message
    assert "--strategy, --nproc-per-node" in message
    assert not Path("accelerator.toml").exists()


def test_defaults_are_what_was_found() -> None:
    assert ask({}, CPU_ONLY, take_defaults=True)["launch.nproc_per_node"] == 1
    gpus = ask({}, Machine("cuda", 4, has_xla=False), take_defaults=True)
    assert (gpus["strategy"], gpus["launch.nproc_per_node"]) == ("ddp", 4)
    tpu = ask({}, Machine("cpu", 0, has_xla=True), take_defaults=True)
    assert tpu["strategy"] == "xla"
    assert "launch.nproc_per_node" not in tpu


def test_yes_asks_nothing_and_every_setting_has_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--yes", "--mixed-precision", "bf16", "--max-restarts", "2"]) == 0
    settings = resolve_settings({}, environ={}, directory=Path.cwd()).settings
    assert (settings.mixed_precision, settings.launch.max_restarts) == ("bf16", 2)
    text = Path("accelerator.toml").read_text()
    assert all(f"\n# {item.metadata['help']}\n" in text for item, _ in catalogue().values())
    assert main(["config", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"--{name.rpartition('.')[2].replace('_', '-')}" in shown for name in catalogue())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--strategy", "single", "--nproc-per-node", "2"], "strategy is 'single' (--strategy), which trains in one"),
        (["--strategy", "xla", "--nnodes", "2"], "which trains in one process"),
        (["--global-batch-size", "8", "--gradient-accumulation-steps", "2"], "expected one of the two"),
        (["--nnodes", "3:2"], "expected MIN:MAX with MIN <= MAX"),
        (["--mixed-precision", "bf61"], "Did you mean 'bf16'?"),
        (["--strategy", "nowhere:Class"], "cannot be imported"),
        (["--output", "no/such/folder/a.toml"], "cannot be written: No such file or directory"),
        (["--sede", "3"], "unrecognized arguments: --sede 3"),
    ],
)
def test_answers_that_cannot_be_are_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--yes", *words]) == 2
    assert message in capsys.readouterr().err
    assert not list(Path.cwd().iterdir())


def test_a_file_is_replaced_only_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    Path("accelerator.toml").write_text("seed = 1\n")
    assert main(["config", "--yes"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert Path("accelerator.toml").read_text() == "seed = 1\n"
    assert main(["config", "--yes", "--overwrite", "--seed", "2"]) == 0
    assert resolve_settings({}, environ={}, directory=Path.cwd()).settings.seed == 2


def test_show_prints_values_with_origins(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    Path("accelerator.toml").write_text('strategy = "ddp"\nseed = 1\n[ddp]\nstatic_graph = true\n[fsdp]\nshard = 2\n')
    monkeypatch.setenv("ACCELERATOR_SEED", "5")
    assert main(["config", "show"]) == 0
    rows = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()]
    assert ["seed", "5", "ACCELERATOR_SEED"] in rows
    assert ["strategy", "ddp", "accelerator.toml line 1"] in rows
    assert ["ddp.static_graph", "true", "accelerator.toml line 4"] in rows
    assert ["ddp.timeout_seconds", "1800.0", "default"] in rows
    assert ["fsdp.shard", "2", "accelerator.toml line 6"] in rows
    assert ["launch.rdzv_endpoint", '""', "default"] in rows
    monkeypatch.setenv("ACCELERATOR_DDP__STATIC_GRAHP", "true")
    assert main(["config", "show"]) == 2
    assert "has no such setting" in capsys.readouterr().err


def test_what_is_written_is_read_back_as_it_was(tmp_path: Path) -> None:
    values = {
        "project_dir": 'a "quoted" \\ path\nwith é, \x7f and 😀',
        "strategy": "fsdp",
        "fsdp.transformer_layer_cls": ("A", "B"),
        "fsdp.timeout_seconds": 1.5,
    }
    resolved = save(render(values, ["a note\n[not] = a table"]), tmp_path / "own.toml", overwrite=False)
    assert resolved.settings.project_dir == values["project_dir"]
    built = resolved.strategy_for("fsdp")
    assert (built.transformer_layer_cls, built.timeout_seconds) == (("A", "B"), 1.5)  # type: ignore[attr-defined]
    with pytest.raises(ConfigurationError, match="cannot be written to a file"):
        literal(object())
