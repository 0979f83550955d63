"""`accelerator estimate`: what a model takes in memory."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Run `accelerator estimate` with these words after it."""
    from accelerator.bigmodel import estimate

    parser = argparse.ArgumentParser(
        prog="accelerator estimate",
        description="What a model takes in memory. Nothing is loaded, and no weight is made.",
    )
    parser.add_argument(
        "model", metavar="MODEL", help="a checkpoint (file or folder), or module:function that builds it"
    )
    parser.add_argument("--optimizer", choices=list(estimate.OPTIMIZERS), default="adamw")
    parser.add_argument("--precision", choices=estimate.PRECISIONS, default="bf16")
    parser.add_argument("--ranks", type=_ranks, nargs="+", default=[2, 8], help="numbers of processes (default: 2 8)")
    try:
        asked = parser.parse_args(argv)
    except SystemExit as ended:  # argparse has said what was wrong
        return 2 if ended.code else 0
    print(estimate.report(estimate.size_of_model(asked.model), asked.optimizer, asked.precision, asked.ranks))
    return 0


def _ranks(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"ranks is {text!r}; expected an integer >= 1")
    return int(text)
