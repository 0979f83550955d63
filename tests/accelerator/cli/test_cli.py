"""The command line: subcommands, exit codes and messages."""

from __future__ import annotations

import sys
import types

import pytest

from accelerator.cli import main


def test_without_a_command_the_usage_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert main(["--help"]) == 0
    assert capsys.readouterr().out.count("usage: accelerator COMMAND ...") == 2


def test_a_command_with_a_typo(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lunch"]) == 2
    assert capsys.readouterr().err == (
        "accelerator: 'lunch' is not a command; expected config or doctor or env or launch or conformance or estimate "
        "or report or checkpoint or export. "
        "Did you mean 'launch'?\n"
    )


def test_errors_of_a_command_go_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", "--seed"]) == 2
    assert capsys.readouterr().err == (
        "accelerator launch: --seed has no value; expected --seed VALUE before the script.\n"
    )


def test_help_of_launch_lists_its_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", "--help"]) == 0
    assert "--nproc-per-node N" in capsys.readouterr().out


def test_conformance_hands_its_arguments_on(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    kit = types.ModuleType("strategies.conformance")
    kit.run = lambda path, nproc, rules: calls.append((path, nproc, rules)) or 3  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "strategies.conformance", kit)
    assert main(["conformance", "mypkg:Mine"]) == 3
    assert main(["conformance", "mypkg:Mine", "--nproc", "4", "--rule", "a", "--rule", "b"]) == 3
    assert calls == [("mypkg:Mine", None, None), ("mypkg:Mine", 4, ["a", "b"])]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a:B", "--nproc", "0"], "nproc is '0'; expected an integer >= 1"),
        ([], "the following arguments are required: strategy"),
    ],
)
def test_wrong_arguments_of_conformance(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["conformance", *words]) == 2
    assert message in capsys.readouterr().err
