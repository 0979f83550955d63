"""Kill one worker, or the whole job, at 100 moments of training and saving: every run must end as if nothing happened.

Two processes, DDP and FSDP in turn, dropout, accumulation 2, a shuffled loader, a checkpoint after every micro-batch,
every other one in the background. A run is killed with SIGKILL again and again until it ends; its weights and the
samples it saw are then compared with those of a run that was never killed.
Run: python tests/benchmarks/kill_100.py [number of kills]
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

from accelerator import Accelerator
from rank_pool import RankPool, WorkerDied
from strategies import DDP, FSDP

LENGTH, BATCH = 96, 4


class Seen:
    def __init__(self) -> None:
        self.samples: list[int] = []

    def state_dict(self) -> dict[str, Any]:
        return {"samples": self.samples}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.samples = state["samples"]


class Numbers(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> Any:
        return torch.full((16,), index / LENGTH).sin(), index


def train(strategy: Any, folder: str, victims: list[int], delay: float) -> tuple[list[Any], list[int], float]:
    accelerator = Accelerator(strategy, project_dir=folder, seed=0, split_batches=True, gradient_accumulation_steps=2)
    net = nn.Sequential(nn.Linear(16, 64), nn.Dropout(0.2), nn.Tanh(), nn.Linear(64, 1))
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    loader = torch.utils.data.DataLoader(Numbers(), BATCH, shuffle=True)
    model, optimizer, loader = accelerator.prepare(net, optimizer, loader)
    seen = Seen()
    accelerator.register_for_checkpointing(seen)
    start = time.monotonic()
    killer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL))
    if accelerator.process_index in victims:
        killer.start()
    try:
        return go_on(accelerator, model, optimizer, loader, seen, Path(folder)), seen.samples, time.monotonic() - start
    finally:
        killer.cancel()


def go_on(accelerator: Accelerator, model: Any, optimizer: Any, loader: Any, seen: Seen, folder: Path) -> list[Any]:
    accelerator.resume()
    while loader.state_dict()["epoch"] < 1:
        for x, index in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(x).square().mean())
                optimizer.step()
                optimizer.zero_grad()
            seen.samples = seen.samples + accelerator.gather_for_metrics(index).tolist()
            place = folder / "checkpoints" / f"step-{len(seen.samples):09d}"
            accelerator.save_state(place, keep_last=2, async_=len(seen.samples) % (2 * BATCH) == 0)
    weights = [value.clone() for value in accelerator.get_state_dict(model).values()]
    accelerator.end_training()
    return weights


def main(number: int) -> None:
    ranks = RankPool()
    ranks.grace_seconds = 20.0
    kills = runs = exact = complete = 0
    with tempfile.TemporaryDirectory() as folder:
        whole = {}
        for strategy in (DDP(), FSDP()):
            whole[strategy] = ranks(train, strategy, f"{folder}/{type(strategy).__name__}", [], 0.0, timeout=200)[0]
        while kills < number:
            strategy = (DDP(), FSDP())[runs % 2]
            expected, samples, seconds = whole[strategy]
            place, attempts = f"{folder}/{runs}", 0
            while True:
                victims = [[0], [1], [0, 1]][kills % 3]
                delay = 0.02 + seconds * ((kills * 0.618) % 1.0) * 0.6
                delay = delay if kills < number and attempts < 12 else 1e6
                results = ranks(
                    train, strategy, place, victims if delay < 1e6 else [], delay, timeout=200, return_exceptions=True
                )
                attempts += 1
                killed = any(isinstance(result, WorkerDied) for result in results)
                kills += killed
                if not killed:
                    break
            if isinstance(results[0], BaseException):
                raise results[0]
            runs += 1
            exact += all(torch.equal(one, two) for one, two in zip(results[0][0], expected, strict=True))
            complete += results[0][1] == samples and sorted(samples) == list(range(LENGTH))
            print(
                f"{kills} kills, {runs} runs: {exact} with the same weights, {complete} with every sample once",
                flush=True,
            )
    ranks.close()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100)
