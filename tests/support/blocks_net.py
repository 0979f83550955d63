"""A small network of blocks, for strategies that treat blocks one by one, and the plain training it must equal."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from accelerator import Accelerator

WINDOWS, STEPS = 12, 2


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    """Blocks in a list, something before and after them, a scalar, a buffer that changes and one that is not saved."""

    def __init__(self, width: int = 8, depth: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(5, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, 1)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("shift", torch.full((width,), 0.25), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += 1
        x = self.first(x) + self.shift
        for layer in self.layers:
            x = layer(x)
        return (self.head(x) * self.scale).squeeze(1)

    def without_blocks(self, x: Tensor) -> Tensor:
        return self.head(self.first(x)).sum(1)


def make_net(seed: int = 3) -> Net:
    torch.manual_seed(seed)
    return Net()


def make_data(world: int) -> TensorDataset:
    """Twelve windows, the last of them short and uneven over ranks."""
    generator = torch.Generator().manual_seed(5)
    length = 2 * world * STEPS * (WINDOWS - 1) + world + 1
    x = torch.randn(length, 5, generator=generator)
    return TensorDataset(x, x.sum(1).sin())


def losses_of(prediction: Tensor, target: Tensor) -> Tensor:
    return (prediction - target) ** 2


def train_plain(world: int, clip: float | None = None, unit: float = 1.0) -> tuple[Any, ...]:
    """The oracle: one process, the global batch; losses and norms of every window, and the weights at the end."""
    net, (x, y) = make_net(), make_data(world).tensors
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1 / unit, momentum=0.9)
    losses, norms = [], []
    for first in range(0, len(x), 2 * world * STEPS):
        window = slice(first, first + 2 * world * STEPS)
        loss = losses_of(net(x[window]), y[window]).mean() * unit
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), clip if clip is not None else 1e9)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        norms.append(norm.item())
    return losses, norms, {name: parameter.detach().clone() for name, parameter in net.named_parameters()}


def train(strategy: Any, clip: float | None = None, precision: Any = "no", unit: float = 1.0) -> tuple[Any, ...]:
    """The same through a strategy: what the samples of each window lose, norms, weights on rank 0, and `seen`.

    Losses are counted in `unit`: a small one keeps float16 from overflowing at the first loss scale.
    """
    accelerator = Accelerator(strategy, gradient_accumulation_steps=STEPS, mixed_precision=precision)
    net = make_net(3 + accelerator.process_index)  # rank 0's weights are those that count
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1 / unit, momentum=0.9)
    data = make_data(accelerator.num_processes)
    model, optimizer, loader = accelerator.prepare(net, optimizer, DataLoader(data, batch_size=2))
    losses, norms, held = [], [], []
    for x, y in loader:
        with accelerator.accumulate(model):
            each = losses_of(model(x), y) * unit
            held.append(accelerator.gather_for_metrics(each.detach().float()))
            accelerator.backward(each.mean())
            norm = accelerator.clip_grad_norm_(model.parameters(), clip if clip is not None else 1e9)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            losses.append(torch.cat(held).mean().item())
            norms.append(norm.item())
            held.clear()
    state = accelerator.get_state_dict(model)
    seen = float(accelerator.unwrap_model(model).seen)
    accelerator.end_training()
    return losses, norms, {name: value for name, value in state.items() if name != "seen"}, seen


def assert_equal(got: tuple[Any, ...], expected: tuple[Any, ...], tolerance: float = 1e-6) -> None:
    """That losses, norms and weights agree."""
    assert len(got[0]) == len(expected[0])
    for index in range(2):
        torch.testing.assert_close(
            torch.tensor(got[index]), torch.tensor(expected[index]), atol=tolerance, rtol=tolerance
        )
    for name, weight in expected[2].items():
        torch.testing.assert_close(got[2][name], weight, atol=tolerance, rtol=tolerance)
