"""What averaging the weights costs: the update of `EMA` beside that of torch's `AveragedModel`, in turn.

python tests/benchmarks/bench_ema.py
"""

from __future__ import annotations

import time

import torch
from interleaved import ratios
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from accelerator import EMA, Accelerator


def main() -> None:
    """Print the ratios."""
    torch.set_num_threads(1)
    for depth, width, updates in ((50, 32, 200), (12, 512, 40)):
        print(f"{depth} layers of {width}, {updates} updates a run")
        accelerator = Accelerator("cpu")
        net = nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)))
        model, _ = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1))
        ema, link = EMA(accelerator, model), accelerator._accumulation.optimizers[0]
        averaged = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.999))
        arms = {
            "AveragedModel": lambda model=net, to=averaged, n=updates: [to.update_parameters(model) for _ in range(n)],
            "EMA": lambda to=ema, link=link, n=updates: [to.update_ended(link, taken=True) for _ in range(n)],
        }
        ratios(arms, baseline="AveragedModel", rounds=21, clock=time.thread_time)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
