"""What `import accelerator` adds to `import torch`: seconds, over alternating fresh interpreters.

Run: python tests/benchmarks/bench_import.py
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile

ROUNDS = 9
PROBE = "import time, torch; start = time.perf_counter(); import {module}; print(time.perf_counter() - start)"


def seconds(module: str, compiled: str) -> float:
    """How long importing `module` takes in a fresh interpreter that has torch already; bytecode is in `compiled`."""
    command = [sys.executable, "-W", "ignore", "-c", PROBE.format(module=module)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = compiled
    return float(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as compiled:
        for module in ("accelerator", "accelerate", "lightning_fabric"):
            seconds(module, compiled)
            times = [seconds(module, compiled) for _ in range(ROUNDS)]
            print(f"  import {module} after torch: median {statistics.median(times):.3f} s, least {min(times):.3f} s")
