"""FSDP: every setting against one process, and what it refuses."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from accelerator import Accelerator
from rank_pool import RankPool
from strategies import FSDP

WINDOWS, STEPS = 12, 2


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    """Blocks in a list, something before and after them, a buffer that changes, one that is not saved."""

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

    def twice(self, x: Tensor) -> Tensor:
        return 2 * self.head(self.first(x)).squeeze(1)


def make_net(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(3)
    return Net().to(dtype)


def make_data(world: int, dtype: torch.dtype = torch.float32) -> TensorDataset:
    """Twelve windows, the last of them short and uneven over ranks."""
    generator = torch.Generator().manual_seed(5)
    length = 2 * world * STEPS * (WINDOWS - 1) + world + 1
    x = torch.randn(length, 5, generator=generator, dtype=dtype)
    return TensorDataset(x, x.sum(1).sin())


def losses_of(prediction: Tensor, target: Tensor) -> Tensor:
    return (prediction - target) ** 2


def train_plain(world: int, clip: float | None = None, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """The oracle: one process, the global batch; losses and norms of every window, and the weights at the end."""
    net, (x, y) = make_net(dtype), make_data(world, dtype).tensors
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    losses, norms = [], []
    for first in range(0, len(x), 2 * world * STEPS):
        window = slice(first, first + 2 * world * STEPS)
        loss = losses_of(net(x[window]), y[window]).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), clip if clip is not None else 1e9)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        norms.append(norm.item())
    return losses, norms, {name: parameter.detach().clone() for name, parameter in net.named_parameters()}


def train(strategy: Any, clip: float | None = None, precision: Any = "no") -> tuple[Any, ...]:
    """The same through a strategy, from rank 0's view: what one micro-batch loses is averaged over its window."""
    accelerator = Accelerator(strategy, gradient_accumulation_steps=STEPS, mixed_precision=precision)
    world = accelerator.num_processes
    net = make_net()
    torch.manual_seed(100 + accelerator.process_index)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    model, optimizer, loader = accelerator.prepare(net, optimizer, DataLoader(make_data(world), batch_size=2))
    losses, norms, held = [], [], []
    for x, y in loader:
        with accelerator.accumulate(model):
            each = losses_of(model(x), y)
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
    weights = {name: value for name, value in state.items() if name != "seen"}
    return losses, norms, weights, seen


def assert_equal(got: tuple[Any, ...], expected: tuple[Any, ...], atol: float = 1e-6, rtol: float = 1e-6) -> None:
    assert len(got[0]) == WINDOWS
    torch.testing.assert_close(torch.tensor(got[0]), torch.tensor(expected[0]), atol=atol, rtol=rtol)
    torch.testing.assert_close(torch.tensor(got[1]), torch.tensor(expected[1]), atol=atol, rtol=rtol)
    for name, weight in expected[2].items():
        torch.testing.assert_close(got[2][name], weight, atol=atol, rtol=rtol)


# -- every setting, against one process ------------------------------------------------------------------------

EXACT = {
    "default": FSDP(),
    "reshard": FSDP(reshard_after_forward=True),
    "keep": FSDP(reshard_after_forward=False),
    "SHARD_GRAD_OP": FSDP(sharding_strategy="SHARD_GRAD_OP"),
    "NO_SHARD": FSDP(sharding_strategy="NO_SHARD"),
    "none": FSDP(auto_wrap_policy="NO_WRAP"),
    "classes": FSDP(transformer_layer_cls=("Block", "LayerNorm")),
    "size": FSDP(auto_wrap_policy="SIZE_BASED_WRAP", min_num_params=100),
    "predicate": FSDP(auto_wrap_policy=lambda name, module: name.endswith("up")),
    "reduce_every_micro_batch": FSDP(reduce_every_micro_batch=True),
    "cpu_offload": FSDP(cpu_offload=True),
    "ignored": FSDP(ignored_params=("head.*", "scale")),
    "checkpointing": FSDP(activation_checkpointing=True),
    "prefetch": FSDP(forward_prefetch=2, backward_prefetch=2),
    "compile": FSDP(compile=True, compile_backend="aot_eager"),
}
ON_FOUR = {
    "reshard to two": FSDP(reshard_after_forward=2),
    "replicate": FSDP(replicate=2),
    "HYBRID_SHARD": FSDP(sharding_strategy="HYBRID_SHARD", shard=2),
    "HYBRID_SHARD_ZERO2": FSDP(sharding_strategy="HYBRID_SHARD_ZERO2", replicate=2),
    "replicate, reducing always": FSDP(replicate=2, reduce_every_micro_batch=True),
    "replicate, ignoring": FSDP(replicate=2, ignored_params=("scale",), reshard_after_forward=True),
}


def train_named(names: list[str]) -> dict[str, tuple[Any, ...]]:
    with warnings.catch_warnings():  # torch.compile looks at .grad of whatever it meets
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
        return {name: train((EXACT | ON_FOUR)[name], 0.5) for name in names}


@pytest.mark.parametrize("nproc", [2, 4])
def test_every_setting_gives_the_numbers_of_one_process(ranks: RankPool, nproc: int) -> None:
    names = list(EXACT) if nproc == 2 else ["default", "NO_SHARD", "ignored", *ON_FOUR]
    expected = train_plain(nproc, clip=0.5)
    results = ranks(train_named, names, nproc=nproc, timeout=90)
    for name in names:
        losses, norms, weights, seen = results[0][name]
        assert_equal((losses, norms, weights), expected)
        assert seen == 2 * WINDOWS - 1  # the last window is one short micro-batch
        assert all(other[name][2] == {} for other in results[1:])  # whole on rank 0 only
        assert all(other[name][:2] == (losses, norms) for other in results[1:])
