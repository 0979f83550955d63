"""Every rule of the kit, in the order in which they are best read: each relies on the ones before it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from ..base import Strategy
from ..errors import ConfigurationError, nearest
from .rule import Rule
from .rules.beginnings import exceptions_leave_nothing, init_context_keeps_numbers
from .rules.exchange import communication_at_close, no_communication_in_open_window
from .rules.gradients import (
    clip_norm,
    forward_before_step,
    gradient_full_window,
    gradient_ghost_rank,
    gradient_short_window,
    gradient_uneven_ranks,
    gradient_weighted,
    two_models,
)
from .rules.memory import memory_per_rank
from .rules.parameters import live_parameters, replicas_agree, step_changes_weights, unwrap_returns_the_module
from .rules.precision import autocast_dtype, overflow_skips_everywhere
from .rules.recording import recorded_work_runs
from .rules.surroundings import device_loader_keeps_batches, teardown_and_again, world_is_consistent

_IN_ORDER = (
    world_is_consistent,
    unwrap_returns_the_module,
    live_parameters,
    step_changes_weights,
    device_loader_keeps_batches,
    gradient_full_window,
    gradient_short_window,
    gradient_uneven_ranks,
    gradient_ghost_rank,
    gradient_weighted,
    clip_norm,
    forward_before_step,
    two_models,
    replicas_agree,
    init_context_keeps_numbers,
    exceptions_leave_nothing,
    no_communication_in_open_window,
    communication_at_close,
    memory_per_rank,
    autocast_dtype,
    overflow_skips_everywhere,
    recorded_work_runs,
    teardown_and_again,
)

RULES: Mapping[str, Rule] = MappingProxyType({rule.name: rule for rule in _IN_ORDER})


def run_rule(name: str, strategy: Strategy) -> str | None:
    """Check `strategy` by one rule on the current rank; every rank of the job calls it, with the same arguments.

    The environment says which rank this is, as torchrun sets it; no process group is joined yet. Returns a note
    on how the rule held, where there is one. Raises `ConformanceError` if the rule is broken, `RuleNotRun` if it
    needs more processes than there are.
    """
    return find_rule(name).run(strategy)


def find_rule(name: str) -> Rule:
    """The rule of this name. Raises `ConfigurationError` for an unknown one, naming the nearest."""
    if name in RULES:
        return RULES[name]
    raise ConfigurationError(f"rule is {name!r}; expected one of {', '.join(RULES)}.{nearest(name, RULES)}")
