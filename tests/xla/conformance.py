"""Every rule of the conformance kit on one mode of XLA, as a script: prints what came of each as JSON."""

from __future__ import annotations

import json
import sys

from strategies import ConformanceError
from strategies.conformance import RULES, RuleNotRun, run_rule
from training import CONFORMING


def verdict(rule: str, mode: str) -> str:
    try:
        return run_rule(rule, CONFORMING[mode]) or "ok"
    except RuleNotRun as reason:
        return f"not run: {reason}"
    except ConformanceError as error:
        return f"broken: {error}"


if __name__ == "__main__":
    print(json.dumps({rule: verdict(rule, sys.argv[1]) for rule in sys.argv[2:] or RULES}))
