"""A loop whose last rank stops halfway until it is killed, which goes on when started again; and its oracle."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch.nn import Linear, functional

NUM_BATCHES, BATCH_SIZE = 8, 6

SCRIPT = """
import time
from pathlib import Path

import torch
from accelerator import Accelerator
from resuming_loop import batches, model_and_optimizer
from torch.nn import functional

accelerator = Accelerator(strategy="ddp", split_batches=True, project_dir="run")
model, optimizer = model_and_optimizer()
data = torch.utils.data.DataLoader(batches().flatten(0, 1), batch_size=batches().shape[1])
model, optimizer, loader = accelerator.prepare(model, optimizer, data)
found = accelerator.resume()
first = int(found.name.rpartition("-")[2]) if found else 0
print(f"rank {accelerator.process_index} of {accelerator.num_processes} begins after step {first}")
for step, batch in enumerate(loader, start=first + 1):
    with accelerator.accumulate(model):
        accelerator.backward(functional.mse_loss(model(batch), batch[:, :1]))
        optimizer.step()
        optimizer.zero_grad()
    accelerator.save_state(keep_last=2)
    if step == 4 and not Path("halfway").exists():
        accelerator.wait_for_everyone()
        Path("halfway").touch()
        if accelerator.process_index == accelerator.num_processes - 1:
            time.sleep(600)  # the others wait for it in the next step
if accelerator.is_main_process:
    torch.save([parameter.detach() for parameter in accelerator.unwrap_model(model).parameters()], "weights")
"""


def batches() -> torch.Tensor:
    """All global batches: (batch, sample, feature)."""
    return torch.linspace(-1, 1, NUM_BATCHES * BATCH_SIZE * 4).reshape(NUM_BATCHES, BATCH_SIZE, 4).sin()


def model_and_optimizer() -> tuple[Linear, torch.optim.Optimizer]:
    """The same weights in every process, and momentum, which a checkpoint must keep."""
    torch.manual_seed(0)
    model = Linear(4, 1)
    return model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)


def weights_of_one_process() -> list[torch.Tensor]:
    """What plain PyTorch ends with in one process that nobody stopped."""
    model, optimizer = model_and_optimizer()
    for batch in batches():
        functional.mse_loss(model(batch), batch[:, :1]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach() for parameter in model.parameters()]


def wait_until(condition: Callable[[], bool], what: Callable[[], object], seconds: float = 100.0) -> None:
    """Poll until `condition` holds. Fails after `seconds` with what `what` returns then."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s: {what()}"
        time.sleep(0.1)
