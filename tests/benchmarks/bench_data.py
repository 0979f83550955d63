"""What a prepared dataloader costs: iterating it, the first batch of 10^9 samples, seeded samples, the ledger.

Samples in memory, thread CPU time for ratios, so that other load on the machine counts less; many short rounds.
Run: python tests/benchmarks/bench_data.py
"""

from __future__ import annotations

import contextlib
import io
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from interleaved import ratios
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

from accelerator import Accelerator

SAMPLES, WIDTH, ROUNDS = 4_000, 32, 61


def data(num_ranks: int = 1) -> TensorDataset:
    return TensorDataset(torch.randn(SAMPLES * num_ranks, WIDTH))


def iterating(loader: DataLoader[Any], sampler: Any = None) -> Callable[[], None]:
    epoch = 0

    def run() -> None:
        nonlocal epoch
        if sampler is not None:
            sampler.set_epoch(epoch)
        epoch += 1
        for _ in loader:
            pass

    return run


def on_one_process(batch: int, shuffle: bool) -> None:
    samples = data()
    accelerators: list[Accelerator] = []
    bare = iterating(DataLoader(samples, batch_size=batch, shuffle=shuffle))

    def prepared(**options: Any) -> Callable[[], None]:
        loader = DataLoader(samples, batch_size=batch, shuffle=shuffle)
        accelerators.append(Accelerator("cpu", seed=0, **options))  # a ledger ends with its Accelerator
        return iterating(accelerators[-1].prepare(loader))

    print(f"one process, batches of {batch}, {'shuffled' if shuffle else 'in order'}, {SAMPLES} samples")
    ratios({"bare": bare, "prepared": prepared()}, baseline="bare", rounds=ROUNDS, clock=time.thread_time)
    with tempfile.TemporaryDirectory() as folder:
        ledger = prepared(data_ledger=True, project_dir=folder, timers=False)
        others = {"bare": bare, "with seed_samples": prepared(seed_samples=True), "with data_ledger": ledger}
        ratios(others, baseline="bare", rounds=5, clock=time.thread_time)


def on_two_processes(batch: int) -> None:
    accelerator = Accelerator("ddp", seed=0)
    samples = data(2)
    sampler = DistributedSampler(samples, shuffle=True)
    arms = {
        "bare": iterating(DataLoader(samples, batch_size=batch, sampler=sampler), sampler),
        "prepared": iterating(accelerator.prepare(DataLoader(samples, batch_size=batch, shuffle=True))),
    }
    quiet = contextlib.redirect_stdout(io.StringIO()) if dist.get_rank() else contextlib.nullcontext()
    with quiet:
        print(f"two processes over DistributedSampler, batches of {batch}, shuffled, {SAMPLES} samples each")
        ratios(arms, baseline="bare", rounds=ROUNDS, clock=time.thread_time)


class Indices(Dataset[Tensor]):
    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor(index)


def first_batches() -> None:
    print("10^9 samples, shuffled, batches of 256: the first batch after load_state_dict")
    loader = Accelerator("cpu", seed=0).prepare(DataLoader(Indices(), batch_size=256, shuffle=True))
    next(iter(loader))
    for position in (0, 10, 5 * 10**8):
        times, bytes_added = [], 0
        for measures_memory in (*[False] * 15, True):
            loader.load_state_dict(loader.state_dict() | {"epoch": 0, "position": position})
            if measures_memory:
                tracemalloc.start()
            start = time.perf_counter()
            next(iter(loader))
            times.append(time.perf_counter() - start)
            if measures_memory:
                times.pop()
                bytes_added = tracemalloc.get_traced_memory()[1]
                tracemalloc.stop()
        median, least = statistics.median(times) * 1e3, min(times) * 1e3
        print(f"  at {position}: median {median:.1f} ms, least {least:.1f} ms; {bytes_added / 1e3:.0f} kB")


def main() -> None:
    torch.set_num_threads(1)
    first_batches()
    for batch, shuffle in ((8, True), (64, True), (64, False)):
        on_one_process(batch, shuffle)
    launcher = ["-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([sys.executable, *launcher, str(Path(__file__)), "--worker"], check=True)


if __name__ == "__main__":
    if "--worker" in sys.argv:
        torch.set_num_threads(1)
        for batch in (8, 64):
            on_two_processes(batch)
    else:
        main()
