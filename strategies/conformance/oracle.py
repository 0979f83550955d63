"""What every rule compares with: a tiny model, its data, and its gradient in plain PyTorch with the global batch.

Nothing here knows of strategies, ranks or windows: one process, float64, CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from .rule import Broken

Weights: TypeAlias = dict[str, Tensor]

LEARNING_RATE = 0.5


class Net(nn.Module):
    """Two linear layers: x of shape (batch, 4) to (batch, 4). Small, with sizes that divide by 2 and 4."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.inner = nn.Linear(4, 8)
            self.outer = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        """The output for each sample."""
        output: Tensor = self.outer(torch.tanh(self.inner(x)))
        return output


class Samples(Dataset[dict[str, Tensor]]):
    """`length` samples of random numbers, the same on every rank, each with a number of tokens from 1 to 300."""

    def __init__(self, length: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(length)
        self.x = torch.randn(length, 4, generator=generator, dtype=torch.float64).to(dtype)
        self.y = torch.randn(length, 4, generator=generator, dtype=torch.float64).to(dtype)
        self.tokens = torch.randint(1, 301, (length,), generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.x[index], "y": self.y[index], "tokens": self.tokens[index]}

    def batch(self, indices: Sequence[int]) -> Any:
        """These samples as one batch, in float64."""
        batch = default_collate([self[index] for index in indices])
        return {name: tensor.double() if name != "tokens" else tensor for name, tensor in batch.items()}


def mean_loss(output: Tensor, batch: Any, *, by_tokens: bool = False) -> Tensor:
    """The mean squared error over the samples of `batch`, or over their tokens."""
    of_samples: Tensor = (output.to(batch["y"].dtype) - batch["y"]).square().mean(dim=1)  # (batch,)
    if not by_tokens:
        return of_samples.mean()
    tokens: Tensor = batch["tokens"]
    return (of_samples * tokens).sum() / tokens.sum()


def gradient_of(weights: Weights, samples: Samples, indices: Sequence[int], *, by_tokens: bool = False) -> Weights:
    """The gradient, at `weights`, of the mean loss over these samples."""
    net = net_with(weights)
    batch = samples.batch(indices)
    mean_loss(net(batch["x"]), batch, by_tokens=by_tokens).backward()
    return {name: parameter.grad for name, parameter in net.named_parameters() if parameter.grad is not None}


def net_with(weights: Weights) -> Net:
    """The network with these weights, in float64."""
    net = Net(0).double()
    net.load_state_dict(weights)
    return net


def norm_of(gradient: Weights) -> float:
    """The joint L2 norm of all parameters' gradients."""
    return float(_flat(gradient).norm())


def compare(came: Weights, expected: Weights, *, tolerance: float, where: str, num_ranks: int) -> None:
    """Raise `Broken`, with the likeliest reason, if a gradient is further from the oracle's than `tolerance`."""
    came_flat, expected_flat = _flat(came), _flat({name: expected[name] for name in came})
    distance = float((came_flat - expected_flat).norm() / expected_flat.norm())
    if distance <= tolerance:
        return
    factor = float(came_flat @ expected_flat / expected_flat.square().sum())
    apart = float((came_flat - factor * expected_flat).norm() / expected_flat.norm())
    is_multiple = apart <= max(tolerance, 1e-6) and abs(factor - 1) > 10 * apart
    raise Broken(
        f"{where}, the gradient that the optimizer used is "
        + (f"{factor:.4g} times" if is_multiple else f"{distance:.2g} (relative) away from")
        + " that of the mean loss over all samples of the window and all ranks",
        expected=f"equal to that of plain PyTorch with the global batch, within {tolerance:g}",
        advice=_advice(factor, is_multiple, num_ranks),
    )


def _advice(factor: float, is_multiple: bool, num_ranks: int) -> str:
    if not is_multiple:
        return (
            "Some samples are missing, counted twice, or weigh too much: reduce the gradients of every window once, "
            "over all ranks with equal weights (also of ranks whose gradient is zero), and hand on batches as they "
            "came: the loop has weighted each micro-batch already."
        )
    if abs(factor) < 1e-6:
        return (
            "Nothing reached the optimizer: unwrap() must return the module whose parameters forward and backward use."
        )
    if num_ranks > 1 and abs(factor - num_ranks) < 1e-3 * num_ranks:
        return "It is summed over ranks, or averaged over fewer than all: divide the sum by world.size."
    if num_ranks > 1 and abs(factor * num_ranks - 1) < 1e-3:
        return "It is divided by the number of ranks twice: average once, in backward or in reduce_gradients."
    return "Nothing but the mean over ranks may scale gradients: the loop has weighted each micro-batch already."


def _flat(weights: Weights) -> Tensor:
    return torch.cat([weights[name].double().reshape(-1) for name in sorted(weights)])
