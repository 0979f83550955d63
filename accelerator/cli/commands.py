"""The `accelerator` command: one subcommand per task, each imported only when it is asked for."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from strategies.errors import AcceleratorError, nearest

COMMANDS = {
    "config": "config:main",
    "doctor": "doctor:main",
    "env": "doctor:env",
    "launch": "launch:main",
    "conformance": "conformance:main",
    "estimate": "estimate:main",
    "report": "report:main",
    "checkpoint": "checkpoints:main",
    "export": "checkpoints:export",
}  # the module in this package, and the function in it that takes the words after the command
USAGE = """usage: accelerator COMMAND ...

  config        write accelerator.toml, show what applies here, or convert a file of Accelerate
  doctor        check whether training can start here
  env           print what a bug report needs
  launch        start a training script in several processes
  conformance   check a strategy against the contract
  estimate      what a model takes in memory, for inference and for training
  report        write one HTML page about runs
  checkpoint    list, verify and compare checkpoints
  export        take the weights of a model out of a checkpoint

accelerator COMMAND --help tells more."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (without the program's name) and return its exit code: 2 if it was wrong."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if words else 2
    name, *rest = words
    if name not in COMMANDS:
        print(
            f"accelerator: {name!r} is not a command; expected {' or '.join(COMMANDS)}.{nearest(name, COMMANDS)}",
            file=sys.stderr,
        )
        return 2
    module, function = COMMANDS[name].split(":")
    try:
        return int(getattr(import_module(f"{__package__}.{module}"), function)(rest))
    except AcceleratorError as error:
        print(f"accelerator {name}: {error}", file=sys.stderr)
        return 2
