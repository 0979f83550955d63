"""`accelerator report`: one HTML page about runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from strategies.errors import StateError


def main(argv: Sequence[str]) -> int:
    """Run `accelerator report` with these words after it."""
    parser = argparse.ArgumentParser(prog="accelerator report", description="Write one HTML page about runs.")
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="the project_dir of a run")
    parser.add_argument("-o", "--output", type=Path, help="the file to write (default: report.html in the first RUN)")
    parser.add_argument("--peak-tflops", type=_positive, help="what one device can do, for the model FLOPs utilisation")
    try:
        asked = parser.parse_args(argv)
    except SystemExit as ended:  # argparse has said what was wrong
        return 2 if ended.code else 0

    from accelerator.report import page, read_run

    text = page([read_run(folder) for folder in asked.runs], peak_tflops=asked.peak_tflops)
    output = asked.output or asked.runs[0] / "report.html"
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StateError(f"the report cannot be written: {error}. Give another file with --output.") from error
    print(output)
    return 0


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"peak-tflops is {text!r}; expected a number > 0")
    return value
