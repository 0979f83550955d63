"""Train on two processes and on one, and compare: `make demo`.

Starts `train_digits.py` twice with the same global batch, prints the largest difference between the two loss curves
and the test accuracies, saves a picture of both curves, and fails unless the difference is below 1e-5 and both
accuracies are at least 97 %. What differs is rounding: two processes sum the halves of a batch in another order. AdamW
blows that up where a gradient is near zero, so the script trains with eps=1e-6; with the default 1e-8 it can be 1e-6.
Expected output, after the lines of the two runs:

    two processes   test accuracy 98.6%   8 s
    one process     test accuracy 98.6%   6 s
    largest difference between the loss curves, over 230 steps: 2.4e-07
    picture: runs/demo/curves.png

`--strategies cpu,xla` compares two strategies instead, one process each; that needs what they need (PJRT_DEVICE).
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

LARGEST_DIFFERENCE, LEAST_ACCURACY = 1e-5, 0.97
SCRIPT = str(Path(__file__).with_name("train_digits.py"))
ROOT = Path(__file__).resolve().parents[1]


def train(name, *start):
    """Run the script in processes of its own; its losses, its test accuracy and the seconds it took."""
    curve = Path("runs/demo") / f"{name.replace(' ', '_')}.json"
    curve.unlink(missing_ok=True)
    print(f"{name}:", flush=True)
    # One thread per process in both runs: what `accelerator launch` sets for two processes on two cores.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    before = time.perf_counter()
    subprocess.run([sys.executable, *start, SCRIPT, "--curve", str(curve)], check=True, env=environment)
    seconds = time.perf_counter() - before
    result = json.loads(curve.read_text())
    return np.array(result["losses"]), result["accuracy"], seconds


def draw(two, one, names, path):
    difference = np.abs(two - one)
    steps = np.arange(1, len(two) + 1)
    figure, (top, bottom) = plt.subplots(2, sharex=True, figsize=(8, 5.5), height_ratios=(3, 2), layout="constrained")
    top.plot(steps, one, color="#f0a030", linewidth=5, alpha=0.6, label=names[1])
    top.plot(steps, two, color="#1f4e8c", linewidth=1.2, label=names[0])
    top.set(ylabel="training loss", yscale="log", title=f"The same script: {names[1]} and {names[0]}")
    top.legend(frameon=False)
    bottom.semilogy(steps, np.maximum(difference, 1e-9), ".", color="#1f4e8c", markersize=4)
    bottom.axhline(LARGEST_DIFFERENCE, color="#b03030", linewidth=1, linestyle="--")
    bottom.annotate(
        "allowed",
        (steps[-1], LARGEST_DIFFERENCE),
        (0, -4),
        textcoords="offset points",
        ha="right",
        va="top",
        color="#b03030",
    )
    bottom.set(xlabel="optimizer step", ylabel="difference\n(none: at $10^{-9}$)", ylim=(5e-10, 4e-5))
    figure.savefig(path, dpi=140)


def main(strategies):
    os.chdir(ROOT)
    Path("runs/demo").mkdir(parents=True, exist_ok=True)
    launch = ("-m", "accelerator", "launch", "--nproc-per-node")
    runs = {"two processes": (*launch, "2"), "one process": ()}
    if strategies:
        runs = {name: (*launch, "1", "--strategy", name) for name in reversed(strategies.split(","))}
    (two, accuracy_two, seconds_two), (one, accuracy_one, seconds_one) = (
        train(name, *start) for name, start in runs.items()
    )
    draw(two, one, list(runs), "runs/demo/curves.png")
    largest = np.abs(two - one).max()
    for name, accuracy, seconds in zip(runs, (accuracy_two, accuracy_one), (seconds_two, seconds_one), strict=True):
        print(f"{name:<13}   test accuracy {accuracy:.1%}   {seconds:.0f} s")
    print(f"largest difference between the loss curves, over {len(two)} steps: {largest:.1e}")
    print("picture: runs/demo/curves.png")
    if not largest < LARGEST_DIFFERENCE:
        sys.exit(f"the loss curves differ by {largest:.1e}; expected less than {LARGEST_DIFFERENCE}")
    if not min(accuracy_two, accuracy_one) >= LEAST_ACCURACY:
        sys.exit(f"the test accuracy is {min(accuracy_two, accuracy_one):.1%}; expected at least {LEAST_ACCURACY:.0%}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--strategies", metavar="NAME,NAME", help="compare these instead of two processes and one")
    main(parser.parse_args().strategies)
