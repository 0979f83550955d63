"""The conformance kit on every mode of XLA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from strategies.conformance import RULES

pytestmark = pytest.mark.timeout(600)


@pytest.mark.parametrize("mode", ["none", "data", "fsdp", "hybrid"])
@pytest.mark.parametrize("rule", list(RULES))
def test_xla_keeps_the_rule(run: Callable[..., Any], mode: str, rule: str) -> None:
    verdict = run("conformance.py", mode)[rule]
    if RULES[rule].min_processes > 1:
        assert verdict == "not run: needs 2 processes, and there is 1"
    elif rule == "overflow_skips_everywhere":
        assert verdict.startswith("refuses fp16")
    else:
        assert verdict == "ok"


def test_a_strategy_that_forgets_the_step_boundary_is_named(run: Callable[..., Any]) -> None:
    verdict = run("conformance.py", "forgets", "recorded_work_runs")["recorded_work_runs"]
    assert verdict.startswith("broken: ForgetsTheStep breaks the rule recorded_work_runs: after optimizer step 1, ")
    assert "operations wait to be run. Expected: none" in verdict
