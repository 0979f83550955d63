"""Whether two DDP processes end cleanly: 50 jobs that train and just stop, counted by their exit code.

Run: python tests/benchmarks/bench_exit.py
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

JOBS = 50
SCRIPT = """
import torch
from torch.utils.data import DataLoader, TensorDataset
from accelerator import Accelerator

accelerator = Accelerator("ddp")
model = torch.nn.Linear(8, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
model, optimizer, loader = accelerator.prepare(
    model, optimizer, DataLoader(TensorDataset(torch.randn(37, 8), torch.randn(37, 1)), batch_size=4)
)
for x, y in loader:
    with accelerator.accumulate(model):
        accelerator.backward(torch.nn.functional.mse_loss(model(x), y))
        optimizer.step()
        optimizer.zero_grad()
"""


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "train.py"
        script.write_text(SCRIPT)
        launch = [sys.executable, "-m", "accelerator", "launch", "--nproc-per-node", "2", str(script)]
        codes = [subprocess.run(launch, capture_output=True).returncode for _ in range(JOBS)]
    print(f"  {codes.count(0)} of {JOBS} jobs of two processes ended with exit code 0")
