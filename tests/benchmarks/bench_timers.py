"""What the timers cost: the same loop with and without them, in turn. The aim is below 1.005.

Thread CPU time, batches of 64, AdamW with clipping, on a digits-sized network of about 3 ms a step and on one of 10 ms;
and the bare cost of one micro-batch's events. Run: python tests/benchmarks/bench_timers.py
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from interleaved import ratios
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from accelerator import Accelerator


def loop(folder: Path | None, width: int, num_batches: int) -> Callable[[], None]:
    torch.manual_seed(0)
    accelerator = Accelerator("cpu", project_dir=folder) if folder else Accelerator("cpu")
    model = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    data = TensorDataset(torch.randn(num_batches * 64, 64), torch.randint(0, 10, (num_batches * 64,)))
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(data, batch_size=64))

    def run() -> None:
        for x, y in loader:
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.cross_entropy(model(x), y))
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()

    return run


def events(folder: Path) -> None:
    """The observer alone, without a loop around it."""
    accelerator = Accelerator("cpu", project_dir=folder)
    model = nn.Linear(2, 1)
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    (timers,) = accelerator._accumulation.observers
    window, link = accelerator._accumulation.window((model,)), accelerator._accumulation.optimizers[0]
    loss = torch.zeros(())
    cursor: Any = type("Cursor", (), {"samples": 64})()
    number, start = 20_000, time.thread_time()
    for _ in range(number):
        timers.batch_wanted(None)  # type: ignore[arg-type]
        timers.batch_taken(cursor, None)
        timers.micro_batch_begun(window)
        timers.backward_begun(window, loss)
        timers.backward_ended(window, loss)
        timers.gradients_ready(link)
        timers.gradients_clipped(loss)
        timers.update_begun(link)
        timers.update_ended(link, True)
        timers.micro_batch_ended(window)
    print(f"  all events of one micro-batch: {(time.thread_time() - start) / number * 1e6:.2f} us")


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        events(Path(name) / "events")
        for width, num_batches in ((256, 150), (1024, 30)):
            print(f"MLP of width {width}, batches of 64")
            arms = {
                "without timers": loop(None, width, num_batches),
                "with timers": loop(Path(name) / str(width), width, num_batches),
            }
            ratios(arms, baseline="without timers", rounds=31, clock=time.thread_time)


if __name__ == "__main__":
    main()
