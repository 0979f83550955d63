"""Run the kit on a strategy and print what came of every rule."""

from __future__ import annotations

import contextlib
import sys
import textwrap
import time
from collections.abc import Iterator

from .. import registry
from ..errors import ConformanceError
from .catalogue import RULES, find_rule
from .processes import Processes
from .rule import RuleNotRun


def run(path: str, nproc: int | None, rules: list[str] | None = None, *, timeout_seconds: float = 60.0) -> int:
    """Check the strategy at `path` in `nproc` new processes, rule by rule, and print a line for each.

    `nproc` `None` is two processes, or one for a strategy that trains in one.

    `path` is `"package.module:Class"`, found from the working directory too, or a registered name; the strategy
    is built with its defaults. `rules` are names of `RULES`, all by default. A rule that takes longer than
    `timeout_seconds` is broken: some rank hangs.

    Returns 0 if every rule that can be run on `nproc` processes holds, else 1; also 1 if none could be run.
    Raises `ConfigurationError` for an unknown strategy or rule.
    """
    names = list(RULES) if rules is None else [find_rule(name).name for name in rules]
    with _working_directory_importable():
        strategy = registry.resolve(path)
        if nproc is None:
            nproc = 1 if strategy.single_process else 2
        print(f"{path} on {nproc} process{'es' if nproc > 1 else ''}: {len(names)} rules")
        try:
            strategy()
        except Exception as error:
            _print_failure("construction", f"{type(error).__name__}: {error}")
            return 1
        with Processes(nproc, timeout_seconds=timeout_seconds) as processes:
            counts = _run_all(processes, path, names)
    print(", ".join(f"{count} {kind}" for kind, count in counts.items()))
    return 0 if counts["ok"] and not counts["FAILED"] else 1


def _run_all(processes: Processes, path: str, names: list[str]) -> dict[str, int]:
    counts = {"ok": 0, "FAILED": 0, "not run": 0}
    unreliable = ""
    for name in names:
        start = time.monotonic()
        try:
            if unreliable:
                raise RuleNotRun(unreliable)
            note = processes.check(path, name)
        except RuleNotRun as reason:
            counts["not run"] += 1
            _print_line(name, "not run", str(reason))
        except ConformanceError as error:
            counts["FAILED"] += 1
            _print_failure(name, str(error))
            if name == "world_is_consistent":
                unreliable = "world_is_consistent failed, which all others rely on"
        else:
            counts["ok"] += 1
            _print_line(name, "ok", f"{time.monotonic() - start:5.2f} s{f'  ({note})' if note else ''}")
    return counts


def _print_line(name: str, outcome: str, remark: str) -> None:
    print(f"{name:<{max(map(len, RULES))}}  {outcome:<7}  {remark}", flush=True)


def _print_failure(name: str, message: str) -> None:
    print(f"{name:<{max(map(len, RULES))}}  FAILED", flush=True)
    first, _, rest = message.partition("\n")
    print(textwrap.fill(first, 110, initial_indent="    ", subsequent_indent="    ", break_long_words=False))
    if rest:
        print(textwrap.indent(rest, "    "))


@contextlib.contextmanager
def _working_directory_importable() -> Iterator[None]:
    """Find modules of the working directory, as `python -m` does; an installed command would not."""
    before = list(sys.path)
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        yield
    finally:
        sys.path[:] = before
