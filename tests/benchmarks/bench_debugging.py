"""What `detect_nonfinite` costs a step: interleaved steps with and without it, on one process and two sizes of model.

python tests/benchmarks/bench_debugging.py
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from interleaved import ratios
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from accelerator import Accelerator


def arm(width: int, *, search: bool) -> Callable[[], None]:
    """Twenty steps of a stack of eight layers of `width`, on batches of 64."""
    accelerator = Accelerator("cpu", detect_nonfinite=search)
    model = nn.Sequential(*(part for _ in range(8) for part in (nn.Linear(width, width), nn.Tanh())))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    loader = DataLoader(TensorDataset(torch.randn(64 * 20, width)), batch_size=64)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    def run() -> None:
        for (x,) in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(x).square().mean())
                optimizer.step()
                optimizer.zero_grad()

    return run


def main() -> None:
    """Print the ratios."""
    torch.set_num_threads(1)
    for width in (32, 512):
        print(f"width {width}")
        ratios({"without": arm(width, search=False), "with": arm(width, search=True)}, baseline="without", rounds=15)


if __name__ == "__main__":
    main()
