"""On a GPU: the copy of the next batch runs while the step does, and nothing is lost on the way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, TensorDataset

from accelerator import Accelerator

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device: the copy overlaps there only"
)
LENGTH, WIDTH = 16, 1 << 20


def prepared(samples: Tensor, workers: int) -> Any:
    return Accelerator(strategy="single").prepare(
        DataLoader(TensorDataset(samples), batch_size=2, num_workers=workers, pin_memory=True)
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_arrive_whole_while_the_device_is_busy(workers: int) -> None:
    samples = torch.randn(LENGTH, WIDTH)
    taken = []
    for (batch,) in prepared(samples, workers):
        torch.cuda._sleep(10_000_000)
        taken.append(batch.sum(dim=1))
    assert torch.allclose(torch.cat(taken).cpu(), samples.sum(dim=1), atol=1e-1)


def test_the_copy_of_the_next_batch_overlaps_the_step() -> None:
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in prepared(torch.randn(LENGTH, WIDTH), workers=2):
            torch.cuda._sleep(50_000_000)
        torch.cuda.synchronize()
    events = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    copies = [event.time_range for event in events if "HtoD" in event.name]
    steps = [event.time_range for event in events if "spin" in event.name.lower()]
    assert copies
    assert steps
    overlapping = [copy for copy in copies if any(step.start < copy.start and copy.end < step.end for step in steps)]
    assert len(overlapping) >= LENGTH // 2 - 2  # all but the first two, which no step goes before
