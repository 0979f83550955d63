"""What a rule of the kit is, and how it says that a strategy breaks it."""

from __future__ import annotations

import contextlib
import gc
import inspect
import os
import unittest
from collections.abc import Callable
from dataclasses import dataclass

import torch.distributed as dist

from ..base import Strategy
from ..errors import ConformanceError
from ..process_group import read_environment


class Broken(Exception):
    """Raised inside a rule where a promise does not hold; `Rule.run` puts the rule's name before it."""

    def __init__(self, came: str, *, expected: str, advice: str) -> None:
        super().__init__(f"{came}. Expected: {expected}. {advice}")


class RuleNotRun(unittest.SkipTest):
    """The rule cannot be checked here, for the reason given. Test runners count it as skipped, never as passed."""


@dataclass(frozen=True)
class Rule:
    """One promise of the contract and the function that checks it, on every rank at once.

    The function takes the strategy. It raises `Broken`, or returns nothing, or a note on how it held.
    """

    name: str
    function: Callable[[Strategy], str | None]
    min_processes: int = 1

    @property
    def explanation(self) -> str:
        """What the promise is, why it matters and how to keep it."""
        return inspect.getdoc(self.function) or ""

    @property
    def promise(self) -> str:
        """The first line of the explanation."""
        return self.explanation.partition("\n")[0]

    def run(self, strategy: Strategy) -> str | None:
        """Check `strategy` on the current rank. Returns a note on how the rule held, where there is one.

        Collective: every rank runs the same rules in the same order, outside any process group of its own.
        Raises `ConformanceError` if the rule is broken, `RuleNotRun` if it needs more processes than there are.
        """
        num_processes = read_environment(os.environ).size
        if num_processes < self.min_processes:
            raise RuleNotRun(f"needs {self.min_processes} processes, and there is {num_processes}")
        joined_before = dist.is_initialized()
        try:
            return self.function(strategy)
        except Broken as broken:
            raise ConformanceError(f"{type(strategy).__name__} breaks the rule {self.name}: {broken}") from broken
        except Exception as error:
            raise ConformanceError(
                f"{type(strategy).__name__} breaks the rule {self.name}: {type(error).__name__}: {error} "
                f"Expected: no exception. The rule: {self.promise}"
            ) from error
        finally:
            gc.collect()  # a process group is left after the models that use it
            if dist.is_initialized() and not joined_before:  # the next rule is not to suffer for this one
                with contextlib.suppress(Exception):
                    dist.destroy_process_group()


def rule(*, min_processes: int = 1) -> Callable[[Callable[[Strategy], str | None]], Rule]:
    """Make a rule of a function, named as the function is."""

    def make(function: Callable[[Strategy], str | None]) -> Rule:
        return Rule(function.__name__, function, min_processes)

    return make
