"""The conformance kit: every promise of the contract as a rule, for authors of strategies and for our own tests.

From the command line:

    accelerator conformance mypkg.fast:FastStrategy --nproc 2

With pytest, keeping the processes for all rules:

    @pytest.fixture(scope="module")
    def processes():
        with Processes(2) as processes:
            yield processes

    @pytest.mark.parametrize("rule", list(RULES))
    def test_contract(processes, rule):
        processes.check("mypkg.fast:FastStrategy", rule)

A rule that needs more processes than there are is skipped there, and listed as not run by the command.
Whoever starts processes already calls `run_rule(name, strategy)` on each of them.
"""

from .catalogue import RULES, run_rule
from .processes import Processes, check
from .report import run
from .rule import Rule, RuleNotRun

__all__ = ["RULES", "Processes", "Rule", "RuleNotRun", "check", "run", "run_rule"]
