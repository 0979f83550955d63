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
