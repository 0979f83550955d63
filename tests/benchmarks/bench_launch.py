"""Time from the command to the first all-reduce of two processes: `accelerator launch` against `torchrun`.

Run as `python tests/benchmarks/bench_launch.py [PAIRS]`. The two are interleaved, and the order within a pair
alternates, so that a change of the machine's load meets both. Prints every pair and the median of the ratios.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
TARGET = 1.05

SCRIPT = """
import sys, time
import torch, torch.distributed as dist
dist.init_process_group("gloo")
dist.all_reduce(torch.ones(1))
if dist.get_rank() == 0:
    open(sys.argv[1], "w").write(repr(time.time()))
dist.destroy_process_group()
"""

COMMANDS = {
    "accelerator": [sys.executable, "-m", "accelerator", "launch", "--nproc-per-node", "2"],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
}


def seconds_to_first_all_reduce(name: str, folder: Path) -> float:
    """Run one job to its end; the time counts from the start of the command to the end of rank 0's all-reduce."""
    environ = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environ.pop("PYTHONDONTWRITEBYTECODE", None)  # torch came with its bytecode; what is installed has its own, too
    reached = folder / "reached"
    start = time.time()
    words = [*COMMANDS[name], str(folder / "train.py"), str(reached)]
    subprocess.run(words, cwd=folder, env=environ, check=True, stderr=subprocess.DEVNULL)
    return float(reached.read_text()) - start


def main(pairs: int) -> None:
    """Print the time of every run, and the median of the ratios."""
    ratios = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "train.py").write_text(SCRIPT)
        for launcher in COMMANDS:  # once unmeasured, to have all files in the page cache
            seconds_to_first_all_reduce(launcher, folder)
        for pair in range(pairs):
            order = list(COMMANDS) if pair % 2 else list(reversed(COMMANDS))
            took = {launcher: seconds_to_first_all_reduce(launcher, folder) for launcher in order}
            ratios.append(took["accelerator"] / took["torchrun"])
            print(f"accelerator {took['accelerator']:.2f} s, torchrun {took['torchrun']:.2f} s, ratio {ratios[-1]:.3f}")
    low, _, high = statistics.quantiles(ratios, n=4)
    print(
        f"launch: median ratio {statistics.median(ratios):.3f} of {pairs} pairs "
        f"(quartiles {low:.3f} to {high:.3f}, target at most {TARGET})"
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 9)
