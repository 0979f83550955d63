"""What the scripts of these tests share: a model, its data, a plain loop, and the same loop through the library."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from accelerator import Accelerator
from strategies import XLA, Strategy, World


@dataclass(frozen=True)
class ForgetsTheStep(XLA):
    """Never runs what is recorded."""

    def mark_step(self, world: World) -> None:
        pass


MODES = {
    "none": XLA(shard="none"),
    "data": XLA(),
    "fsdp": XLA(shard="fsdp", min_sharded_elements=64),
    "hybrid": XLA(shard="fsdp", mesh=(2, 2), min_sharded_elements=64),
}
CONFORMING = {  # the kit's model is smaller than any that is cut by default
    **MODES,
    "fsdp": XLA(shard="fsdp", min_sharded_elements=1),
    "hybrid": XLA(shard="fsdp", mesh=(2, 2), min_sharded_elements=1),
}

STEPS, BATCH, LENGTH = 3, 8, 8 * 3 * 5 + 8 + 3  # five full windows, and a short one whose last batch is uneven


class Net(nn.Module):
    """Two layers that share a weight, a normalisation, a buffer, and dimensions that four devices divide."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)
        self.again = nn.Linear(64, 32, bias=False)
        self.again.weight = self.down.weight
        self.register_buffer("shift", torch.full((32,), 0.25))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.up(self.norm(x) + self.shift))
        return self.down(hidden) + 0.5 * self.again(hidden)


def make_net(kind: Callable[[], nn.Module] = Net) -> nn.Module:
    torch.manual_seed(3)
    return kind()


def make_data(length: int = LENGTH) -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(length, 32, generator=generator)
    return TensorDataset(x, x.flip(1).sin(), torch.randint(1, 50, (length,), generator=generator))


def make_sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)


def make_schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)


def each_loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (net(x).float() - y).square().mean(1)  # (batch,)


def plain(
    make_optimizer: Any = make_sgd, *, epochs: int = 2, clip: float = 0.5, tokens: bool = False, num_steps: int = STEPS
) -> Any:
    """The oracle: one process on the CPU, each window in one piece."""
    net, (x, y, n) = make_net(), make_data().tensors
    optimizer = make_optimizer(net)
    schedule = make_schedule(optimizer)
    losses, norms = [], []
    for _ in range(epochs):
        for first in range(0, LENGTH, BATCH * num_steps):
            window = slice(first, first + BATCH * num_steps)
            each = each_loss(net, x[window], y[window])
            loss = (each * n[window]).sum() / n[window].sum() if tokens else each.mean()
            optimizer.zero_grad()
            loss.backward()
            norms.append(nn.utils.clip_grad_norm_(net.parameters(), clip).item())
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    return {"losses": losses, "norms": norms, "weights": weights_of(net)}


def weights_of(net: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().cpu().clone() for name, parameter in net.named_parameters()}


def counts() -> tuple[int, int]:
    """Programs compiled and programs run so far. Runs are counted by threads of the runtime, so it waits for them."""
    import torch_xla.core.xla_model as xm
    import torch_xla.debug.metrics as metrics

    xm.wait_device_ops()
    runs = ("ExecuteComputation", "ExecuteReplicated")
    return metrics.counter_value("UncachedCompile") or 0, sum(metrics.counter_value(name) or 0 for name in runs)


def steps(
    accelerator: Accelerator,
    model: Any,
    optimizer: Any,
    batches: Iterable[Any],
    schedule: Any = None,
    *,
    inside: Callable[[Tensor], object] = lambda loss: None,
    loss_of: Callable[..., Tensor] = lambda each, number: each.mean(),
) -> Iterator[Tensor]:
    """The loop of most of these tests: a micro-batch of every batch, and the samples' losses after it.

    `inside` gets the loss inside the window; `loss_of` makes it, from the samples' losses and the number of the batch.
    """
    for number, (x, y, *_) in enumerate(batches):
        with accelerator.accumulate(model):
            each = each_loss(model, x, y)
            loss = loss_of(each, number)
            inside(loss)
            accelerator.backward(loss)
            optimizer.step()
            if schedule is not None:
                schedule.step()
            optimizer.zero_grad()
        yield each.detach()


def train(
    strategy: Strategy,
    make_optimizer: Any = make_sgd,
    *,
    epochs: int = 2,
    clip: float = 0.5,
    tokens: bool = False,
    num_steps: int = STEPS,
    **options: Any,
) -> Any:
    """The same through the library, with metrics kept on the device until after the window."""
    accelerator = Accelerator(strategy, gradient_accumulation_steps=num_steps, **options)
    net = make_net()
    optimizer = make_optimizer(net)
    model, optimizer, schedule, loader = accelerator.prepare(
        net, optimizer, make_schedule(optimizer), DataLoader(make_data(), batch_size=BATCH)
    )
    losses, norms, costs, held = [], [], [], []
    before = counts()
    for _ in range(epochs):
        for x, y, n in loader:
            with accelerator.accumulate(model):
                each = each_loss(model, x, y)
                loss = (each * n).sum() / n.sum() if tokens else each.mean()
                accelerator.backward(loss, weight=n.sum() if tokens else None)
                norm = accelerator.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            held.append((each.detach(), n))
            if accelerator.sync_gradients:
                after = counts()
                costs.append((after[0] - before[0], after[1] - before[1]))
                pairs = [(accelerator.gather_for_metrics(values).cpu(), n.cpu()) for values, n in held]
                weights = [n.double() if tokens else torch.ones(len(n)).double() for _, n in pairs]
                total = sum((values * w).sum() for (values, _), w in zip(pairs, weights, strict=True))
                losses.append(float(total / sum(w.sum() for w in weights)))
                norms.append(float(norm))
                held.clear()
                before = counts()
    result = {"losses": losses, "norms": norms, "costs": costs, "weights": weights_of(model)}
    result["tied"] = model.again.weight is model.down.weight
    result["shapes"] = shapes_on_devices(model, optimizer)
    result["explain"] = str(accelerator.explain())
    accelerator.end_training()
    return result


def shapes_on_devices(model: Any, optimizer: Any) -> dict[str, list[list[int]]]:
    """Of each parameter and its momentum, the shape that every device holds."""
    from torch_xla.distributed.spmd import wrap_if_sharded

    def of(tensor: Tensor) -> list[list[int]]:
        shards = getattr(wrap_if_sharded(tensor.detach()), "local_shards", None)
        return [list(shard.data.shape) for shard in shards] if shards else [list(tensor.shape)]

    found = {name: of(parameter) for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        for key in ("momentum_buffer", "exp_avg"):
            if key in optimizer.state[parameter]:
                found[f"momentum of {name}"] = of(optimizer.state[parameter][key])
    return found


def distance(came: Any, expected: Any) -> dict[str, float]:
    """The largest relative differences of losses and norms, and the largest difference of any weight."""

    def relative(name: str) -> float:
        pairs = zip(came[name], expected[name], strict=True)
        return max(abs(one - other) / abs(other) for one, other in pairs)

    weights = max(float((came["weights"][n] - w).abs().max()) for n, w in expected["weights"].items())
    return {"losses": relative("losses"), "norms": relative("norms"), "weights": weights}
