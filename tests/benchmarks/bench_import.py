"""What `import accelerator` adds to `import torch`: seconds, over alternating fresh interpreters.

Run: python tests/benchmarks/bench_import.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys

ROUNDS = 9
PROBE = "import time, torch; start = time.perf_counter(); import {module}; print(time.perf_counter() - start)"


def seconds(module: str) -> float:
    """How long importing `module` takes in a fresh interpreter that has torch already."""
    command = [sys.executable, "-W", "ignore", "-c", PROBE.format(module=module)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    for module in ("accelerator", "accelerate", "lightning_fabric"):
        seconds(module)
        times = [seconds(module) for _ in range(ROUNDS)]
        print(f"  import {module} after torch: median {statistics.median(times):.3f} s, least {min(times):.3f} s")
