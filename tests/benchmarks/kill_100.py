"""Kill a worker, or the whole job, at 100 moments of training and saving: each run must end as if nothing happened.

Two processes, DDP and FSDP in turn, run the loop of tests/support/killed_loop.py. A run is killed with SIGKILL again
and again until it ends; its weights and the samples it saw are then compared with those of one that was never killed.
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

import killed_loop
from rank_pool import RankPool, WorkerDied
from strategies import DDP, FSDP

LENGTH = 96


def train(strategy: Any, folder: str, victims: list[int], delay: float) -> tuple[list[Any], list[int], float]:
    start = time.monotonic()
    killer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL))
    try:
        trained = killed_loop.train(strategy, folder, LENGTH, lambda rank: rank in victims and killer.start())
        return *trained, time.monotonic() - start
    finally:
        killer.cancel()


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
                delay = 0.02 + seconds * (((kills + runs) * 0.618) % 1.0) * 0.6  # another one, if it came too late
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
