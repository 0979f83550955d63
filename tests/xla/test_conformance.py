"""The conformance kit on every mode of XLA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from strategies.conformance import RULES

pytestmark = pytest.mark.timeout(1500)


@pytest.mark.parametrize("mode", ["none", "data", "fsdp", "hybrid"])
@pytest.mark.parametrize("rule", list(RULES))
def test_xla_keeps_the_rule(came: Callable[[str, str], Any], mode: str, rule: str) -> None:
    verdict = came(mode, "rules")[rule]
    if RULES[rule].min_processes > 1:
        assert verdict == "not run: needs 2 processes, and there is 1"
    elif rule == "overflow_skips_everywhere":
        assert verdict.startswith("refuses fp16")
    else:
        assert verdict == "ok"


@pytest.mark.parametrize("mode", ["data"])
def test_a_strategy_that_forgets_the_step_boundary_is_named(came: Callable[[str, str], Any], mode: str) -> None:
    verdict = came(mode, "rules")["forgets"]
    assert verdict.startswith("broken: ForgetsTheStep breaks the rule recorded_work_runs: after optimizer step 1, ")
    assert "operations wait to be run. Expected: none" in verdict
