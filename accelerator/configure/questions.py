"""The few questions whose answers matter, each with what was found on this machine as its default."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from accelerator.config import FLAGS_VARIABLE, Resolved, resolve_settings
from accelerator.config.layers import flag_of
from strategies.errors import ConfigurationError
from strategies.registry import known_names, resolve


@dataclass(frozen=True)
class Machine:
    """What was found here: `kind` and `num_devices` of accelerators, and whether torch_xla has a device to drive."""

    kind: str
    num_devices: int
    has_xla: bool

    def __str__(self) -> str:
        if self.has_xla:
            return "devices of torch_xla"
        if not self.num_devices:
            return "no accelerator: training runs on the CPU"
        return f"{self.num_devices} {self.kind} device{'s' if self.num_devices > 1 else ''}"


def detect(environ: Mapping[str, str]) -> Machine:
    """Look at this machine, without starting anything on its devices."""
    import torch

    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    has_tpu = any(Path("/dev").glob("accel[0-9]*"))
    return Machine(
        kind=found.type if found else "cpu",
        num_devices=torch.accelerator.device_count() if found else 0,
        has_xla=find_spec("torch_xla") is not None and ("PJRT_DEVICE" in environ or has_tpu),
    )


Answers = dict[str, str]
"""What was answered, as text by dotted name."""


def _always(answers: Answers) -> bool:
    """For a question that is asked whatever was answered before."""
    return True


@dataclass(frozen=True)
class Question:
    """Asks for one setting. `default` and `is_open` see the answers before it; `None` leaves the setting out."""

    name: str
    words: str
    default: Callable[[Machine, Answers], str]
    is_open: Callable[[Answers], bool] = _always


def _strategy(machine: Machine, answers: Answers) -> str:
    if machine.has_xla:
        return "xla"
    return "ddp" if machine.num_devices > 1 else "auto"


def _processes(machine: Machine, answers: Answers) -> str:
    return str(max(1, machine.num_devices))


def _may_be_several(answers: Answers) -> bool:
    name = answers["strategy"]
    return name == "auto" or not resolve(name).single_process


def _no_batch_size(answers: Answers) -> bool:
    return "global_batch_size" not in answers


QUESTIONS = (
    Question("strategy", "Strategy (auto, {names}, or package.module:Class)", _strategy),
    Question("launch.nproc_per_node", "Processes on each machine", _processes, _may_be_several),
    Question("launch.nnodes", "Machines (a number, or MIN:MAX)", lambda machine, answers: "1", _may_be_several),
    Question(
        "launch.rdzv_endpoint",
        "HOST:PORT of the machine where they meet (empty: given at launch)",
        lambda machine, answers: "",
        lambda answers: answers.get("launch.nnodes", "1") != "1",
    ),
    Question("mixed_precision", "Mixed precision (no, bf16, fp16)", lambda machine, answers: "no"),
    Question("gradient_accumulation_steps", "Micro-batches per optimizer step", lambda m, a: "1", _no_batch_size),
    Question("seed", "Seed (none: another one each run)", lambda machine, answers: "none"),
    Question("project_dir", "Folder of the run's checkpoints and logs (none: no folder)", lambda m, a: "none"),
)


def ask(given: Mapping[str, str], machine: Machine, *, take_defaults: bool) -> dict[str, object]:
    """The settings to write, by dotted name: `given` ones as they are, the others asked for on the terminal.

    With `take_defaults` nothing is asked. Raises `ConfigurationError` for an answer that cannot be, for answers
    that contradict each other, and where there is no terminal to ask on.
    """
    answers: Answers = {}
    for name, text in given.items():
        answers[name] = text
        _read({name: text})
    # The strategy decides which of the others are asked.
    questions = [question for question in QUESTIONS if question.name not in answers]
    if questions and not take_defaults:
        _need_terminal(questions)
        print(f"Found {machine}. Enter takes what stands in brackets.")
    for question in questions:
        if question.is_open(answers):
            default = question.default(machine, answers)
            answers[question.name] = default if take_defaults else _answer(question, default)
    answers = {name: text for name, text in answers.items() if text or name in given}
    resolved = _read(answers)
    refuse_contradictions(resolved)
    return {name: _value(resolved, name) for name in answers}


def _need_terminal(questions: list[Question]) -> None:
    if sys.stdin.isatty():
        return
    flags = ", ".join(flag_of(question.name) for question in questions)
    raise ConfigurationError(
        f"there is no terminal to ask on. Give --yes to take what was detected, or a flag for each: {flags}."
    )


def _answer(question: Question, default: str) -> str:
    while True:
        words = question.words.format(names=", ".join(known_names()))
        try:
            text = input(f"{words} [{default}]: ").strip() or default
        except EOFError:
            raise ConfigurationError("the terminal was closed before the last question; nothing was written.") from None
        if not text:
            return text
        try:
            _read({question.name: text})
        except ConfigurationError as error:
            print(f"  {error}")
            continue
        return text


def _read(answers: Mapping[str, str]) -> Resolved:
    """The answers as settings, alone: without the file and the variables that are here."""
    environ = {FLAGS_VARIABLE: json.dumps(dict(answers))}
    with tempfile.NamedTemporaryFile(suffix=".toml") as empty:
        resolved = resolve_settings({}, config=empty.name, environ=environ, directory=Path())
    if ":" in resolved.settings.strategy:
        resolve(resolved.settings.strategy)
    return resolved


def _value(resolved: Resolved, name: str) -> object:
    table, _, key = name.rpartition(".")
    return getattr(resolved.settings.launch if table else resolved.settings, key)


def refuse_contradictions(resolved: Resolved) -> None:
    """Raise `ConfigurationError` where two settings cannot both be, which a launch would find out only later."""
    settings, origins = resolved.settings, resolved.origins
    launch, name = settings.launch, settings.strategy
    least, _, most = launch.nnodes.partition(":")
    if int(least) > int(most or least):
        raise ConfigurationError(
            f"nnodes is {launch.nnodes!r} ({origins['launch.nnodes']}); expected MIN:MAX with MIN <= MAX."
        )
    several = (launch.nproc_per_node or 1) > 1 or int(most or least) > 1
    if several and name != "auto" and resolve(name).single_process:
        raise ConfigurationError(
            f"strategy is {name!r} ({origins['strategy']}), which trains in one process, and nproc_per_node is "
            f"{launch.nproc_per_node or 1} ({origins['launch.nproc_per_node']}) on {launch.nnodes} machine(s). "
            "Give one process on one machine, or another strategy."
        )
