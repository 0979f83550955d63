"""Evaluate on any number of processes and get every sample once, in order: `gather_for_metrics`.

Eleven samples in batches of four do not divide by two processes, nor by three. Expected output of

    accelerator launch --nproc-per-node 3 examples/evaluate_exactly.py

but for the first line the same on any number of processes:

    3 processes, this one saw [[0, 1], [4, 5], [8]]
    gathered [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    right 7 of 11: accuracy 0.6364
"""

import torch
from torch import nn
from torch.utils.data import DataLoader

from accelerator import Accelerator


class IsEven(nn.Module):
    """Says whether numbers are even, and is wrong from 7 on."""

    def forward(self, numbers):
        return torch.where(numbers < 7, numbers % 2 == 0, numbers % 2 == 1)


def main():
    accelerator = Accelerator(split_batches=True)
    model, loader = accelerator.prepare(IsEven(), DataLoader(range(11), batch_size=4))
    seen, gathered, right = [], [], []
    with torch.no_grad():
        for numbers in loader:
            seen.append(numbers.tolist())
            results = {"numbers": numbers, "right": model(numbers) == (numbers % 2 == 0)}
            results = accelerator.gather_for_metrics(results)
            gathered += results["numbers"].tolist()
            right += results["right"].tolist()
    accelerator.print(f"{accelerator.num_processes} processes, this one saw {seen}")
    accelerator.print(f"gathered {gathered}")
    accelerator.print(f"right {sum(right)} of {len(right)}: accuracy {sum(right) / len(right):.4f}")


if __name__ == "__main__":
    main()
