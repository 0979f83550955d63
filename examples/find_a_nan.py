"""A model whose second block divides by zero for one sample: `detect_nonfinite` names block, rank and sample.

    python examples/find_a_nan.py
    accelerator launch --nproc-per-node 2 examples/find_a_nan.py

Expected output, the batch depending on the number of processes:

    found: a value that is not finite first appeared on rank 0 in forward: the output of 0 (Normalise) of Sequential,
    whose inputs are finite. Micro-batch 0 of its window. Data: batch 15 of epoch 0, samples [61, 37, 45, 21].
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from accelerator import Accelerator
from strategies import NonfiniteError


class Normalise(nn.Module):
    """Divides each sample by its own sum, which may be zero."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (samples, features). Returns the same shape."""
        return x / x.sum(dim=1, keepdim=True)


def main() -> None:
    """Train until the sample comes, and print what was found."""
    accelerator = Accelerator(detect_nonfinite=True, seed=0)
    data = torch.rand(64, 8)
    data[37] = 0.0
    model = nn.Sequential(Normalise(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(TensorDataset(data), batch_size=4, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    try:
        for (x,) in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(x).square().mean())
                optimizer.step()
                optimizer.zero_grad()
    except NonfiniteError as error:
        accelerator.print(f"found: {error}")


if __name__ == "__main__":
    main()
