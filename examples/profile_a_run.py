"""Record three optimizer steps with torch's profiler, and say what took longest.

Two micro-batches make a step, so that each operation of the model is called six times. The trace, one per rank, can be
opened in Perfetto (https://ui.perfetto.dev). Expected output:

    steps 3, forward passes 6, optimizer steps 3
    trace rank0-step5.json.gz
"""

import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from accelerator import Accelerator


def main():
    accelerator = Accelerator(gradient_accumulation_steps=2, seed=0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(TensorDataset(torch.randn(160, 64), torch.randn(160, 1)), batch_size=8)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    with tempfile.TemporaryDirectory() as folder:
        with accelerator.profile(folder, wait=1, warmup=1, active=3) as profiler:
            for x, y in loader:
                with accelerator.accumulate(model):
                    accelerator.backward(mse_loss(model(x), y))
                    optimizer.step()
                    optimizer.zero_grad()
        calls = {row.key: row.count for row in profiler.key_averages()}
        steps, updates = (
            sum(count for name, count in calls.items() if name.startswith(start))
            for start in ("ProfilerStep", "Optimizer.step")
        )
        accelerator.print(f"steps {steps}, forward passes {calls['aten::mse_loss']}, optimizer steps {updates}")
        for trace in sorted(Path(folder).iterdir()):
            accelerator.print("trace", trace.name)


if __name__ == "__main__":
    main()
