"""What each process of the examination does: join, tell its facts, run every collective, train one step.

Started by `accelerator doctor` as `python -m accelerator.doctor.worker RESULT SECONDS`. The first process of every node
writes what all of them found to RESULT, as JSON.
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch.nn import Linear, functional
from torch.utils.data import DataLoader, TensorDataset

from accelerator.accelerator import Accelerator
from accelerator.choice import chosen_name
from accelerator.config import resolve_settings
from strategies import collectives

from .machine import facts_here
from .measure import measure
from .topology import link_here

LARGE_BYTES = 16 * 2**20


def examine_here(seconds: float) -> dict[str, object]:
    """Take part in the examination, and return what all ranks found. Collective.

    A process that is not done after `seconds` prints where each of its threads is, and ends with exit code 1.
    """
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        return _examine()
    finally:
        faulthandler.cancel_dump_traceback_later()


def _examine() -> dict[str, object]:
    environ = dict(os.environ)
    resolved = resolve_settings({}, environ=environ, directory=Path.cwd())
    strategy = resolved.strategy_for(chosen_name(resolved, environ))
    world = strategy.setup()
    try:
        facts = facts_here(world.rank, world.device)
        collectives.barrier(world)
        facts = replace(facts, clock=time.time())
        everyone = collectives.all_gather_objects(asdict(facts), world)
        link, link_speed = link_here(world.device, len({one["host"] for one in everyone}))
        return {
            "strategy": type(strategy).__name__,
            "facts": everyone,
            "timings": [asdict(timing) for timing in measure(world, LARGE_BYTES)],
            "link": link,
            "link_bytes_per_second": link_speed,
            "step_seconds": _train_a_step(),
            "writes": world.is_local_main,
        }
    finally:
        strategy.teardown(world)


def _train_a_step() -> float:
    """Seconds of one update of a small model, prepared as a script would; NaN if its loss was not finite."""
    accelerator = Accelerator(gradient_accumulation_steps=1, global_batch_size=None, split_batches=False, seed=0)
    model = Linear(256, 256)
    data = TensorDataset(torch.ones(8 * accelerator.num_processes, 256))
    model, optimizer, loader = accelerator.prepare(
        model, torch.optim.SGD(model.parameters(), 0.1), DataLoader(data, batch_size=8)
    )
    start = time.perf_counter()
    for (batch,) in loader:
        with accelerator.accumulate(model):
            loss = functional.mse_loss(model(batch).float(), batch)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    seconds = time.perf_counter() - start if math.isfinite(loss.item()) else math.nan
    accelerator.end_training()
    return seconds


def main() -> None:
    """Examine, and write the result where the command asked for it."""
    result, seconds = sys.argv[1:]
    found = examine_here(float(seconds))
    if found["writes"]:
        Path(result).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
