"""`accelerator doctor` and `accelerator env`: whether training can start here, and what a bug report needs."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from strategies.errors import AcceleratorError, LaunchError

USAGE = """usage: accelerator doctor [--nproc N] [--strategy S] [--seconds S] [flags of accelerator launch]

Looks at this machine, starts N processes as `accelerator launch` would, runs every collective of the configured
strategy on a small and a large tensor, trains one step, and prints verdicts with what to do. The exit code is 0 if
training can start and 1 if not. On several nodes, run it on each with the same flags; inside torchrun or srun it
examines that job.

  --nproc N     processes on this node: --nproc-per-node of accelerator launch
  --seconds S   how long the processes may take before they say where they wait (default: 120)"""


def main(argv: Sequence[str]) -> int:
    """Run `accelerator doctor` with these words after it."""
    from accelerator.config import FLAGS_VARIABLE, resolve_settings
    from accelerator.doctor import examine
    from accelerator.launch import parse

    words, seconds = _own(argv)
    request = parse([*words, "-m", "accelerator.doctor.worker"])
    if request.wants_help:
        print(USAGE)
        return 0
    if request.target != "accelerator.doctor.worker":
        raise LaunchError(f"{request.target!r} is no flag; expected flags only: accelerator doctor --help lists them.")
    environ = dict(os.environ)
    flags = {FLAGS_VARIABLE: json.dumps(dict(request.flags))} if request.flags else {}
    resolved = resolve_settings({}, environ=environ | flags, directory=Path.cwd())
    return examine(words, resolved, environ=environ, directory=Path.cwd(), seconds=seconds)


def _own(argv: Sequence[str]) -> tuple[list[str], float]:
    """The flags for the launcher, and the one that is not."""
    words, seconds = [], 120.0
    given = iter(argv)
    for word in given:
        name, equals, value = word.partition("=")
        if name == "--seconds":
            value = value if equals else next(given, "")
            if not value.isdecimal() or int(value) < 1:
                raise LaunchError(f"seconds is {value!r}; expected an integer >= 1")
            seconds = float(value)
        else:
            words.append("--nproc-per-node" + equals + value if name == "--nproc" else word)
    return words, seconds


def env(argv: Sequence[str]) -> int:
    """Run `accelerator env` with these words after it."""
    from accelerator.config import resolve_settings
    from accelerator.configure import table_of
    from accelerator.doctor import environment_report

    if argv:
        print("usage: accelerator env\n\nPrints what a bug report needs: versions, machine, variables, configuration.")
        return 0 if argv[0] in ("-h", "--help") else 2
    try:
        configuration = table_of(resolve_settings({}, environ=dict(os.environ), directory=Path.cwd()))
    except AcceleratorError as error:  # belongs into the report
        configuration = f"{type(error).__name__}: {error}"
    print(environment_report(os.environ, configuration))
    return 0
