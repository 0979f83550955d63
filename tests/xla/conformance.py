"""Every rule of the conformance kit on a strategy, and what came of each."""

from __future__ import annotations

from typing import Any

from strategies import XLA, ConformanceError
from strategies.conformance import RULES, RuleNotRun, run_rule
from training import ForgetsTheStep


def rules(strategy: XLA) -> Any:
    verdicts = {rule: verdict(rule, strategy) for rule in RULES}
    if strategy.shard == "data":
        verdicts["forgets"] = verdict("recorded_work_runs", ForgetsTheStep())
    return verdicts


def verdict(rule: str, strategy: XLA) -> str:
    try:
        return run_rule(rule, strategy) or "ok"
    except RuleNotRun as reason:
        return f"not run: {reason}"
    except ConformanceError as error:
        return f"broken: {error}"
