"""What the timers cost: steps with and without them, in turn. The aim is below 1.005.

One loop, whose timers are taken off and put back from step to step, so that both arms have the same memory and the
same load; thread CPU time of each step; low quantiles of many steps, because load only adds. Batches of 64, AdamW with
clipping, steps of about 2 and 15 ms; and the bare cost of one micro-batch's events.

python tests/benchmarks/bench_timers.py
"""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from accelerator import Accelerator
from accelerator.timing import Timers


def steps(folder: Path, width: int, number: int) -> dict[bool, list[float]]:
    """Seconds of each step, by whether timers were on. Pairs begin with either in turn."""
    torch.manual_seed(0)
    accelerator = Accelerator("cpu", project_dir=folder)
    model = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    data = TensorDataset(torch.randn(number * 64, 64), torch.randint(0, 10, (number * 64,)))
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(data, batch_size=64))
    observers = accelerator._accumulation.observers
    (timers,) = (observer for observer in observers if isinstance(observer, Timers))
    others = [observer for observer in observers if observer is not timers]
    seconds: dict[bool, list[float]] = {False: [], True: []}
    batches = iter(loader)
    gc.disable()
    for index in range(number):
        with_timers = index % 4 in (1, 2)
        observers[:] = [*others, timers] if with_timers else others
        start = time.thread_time()
        x, y = next(batches)
        with accelerator.accumulate(model):
            accelerator.backward(nn.functional.cross_entropy(model(x), y))
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        seconds[with_timers].append(time.thread_time() - start)
    gc.enable()
    return seconds


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
        for width, number in ((256, 2000), (1024, 1000)):
            seconds = steps(Path(name) / str(width), width, number)
            low = {which: statistics.quantiles(of_steps, n=20) for which, of_steps in seconds.items()}
            ratios = ", ".join(f"{low[True][at] / low[False][at]:.4f}" for at in (0, 4, 9))  # 5th, 25th, 50th per cent
            print(
                f"width {width}: {low[False][9] * 1e3:.2f} ms a step without, {number} steps; with / without: {ratios}"
            )


if __name__ == "__main__":
    main()
