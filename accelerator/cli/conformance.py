"""`accelerator conformance`: run the conformance kit on a strategy."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Run `accelerator conformance` with these words after it."""
    parser = argparse.ArgumentParser(
        prog="accelerator conformance", description="Check a strategy against every rule of the contract."
    )
    parser.add_argument("strategy", help="a strategy's name, or package.module:Class")
    parser.add_argument(
        "--nproc", type=_processes, help="processes to run the rules on (default: 2, or 1 if it trains in one)"
    )
    parser.add_argument("--rule", action="append", dest="rules", help="only this rule; may be given again")
    try:
        asked = parser.parse_args(argv)
    except SystemExit as ended:  # argparse has said what was wrong
        return 2 if ended.code else 0

    from strategies.conformance import run

    return run(asked.strategy, asked.nproc, asked.rules)


def _processes(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"nproc is {text!r}; expected an integer >= 1")
    return int(text)
