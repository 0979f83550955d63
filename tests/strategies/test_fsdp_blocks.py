"""FSDP on models of unusual shape: frozen parts and adapters, blocks in blocks, used twice, and without a forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from accelerator import Accelerator
from blocks_net import Block
from rank_pool import RankPool
from strategies import FSDP, PrepareError, StepError
from strategies.shards import whole

WIDTH = 8


class Net(nn.Module):
    """Blocks in a list between two layers."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 1)
        self.layers = nn.ModuleList(blocks or [Block(WIDTH) for _ in range(3)])

    def run(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.run(self.first(x))).squeeze(1)


class Twice(Net):
    """All blocks run twice, as in ALBERT."""

    def run(self, x: Tensor) -> Tensor:
        return super().run(super().run(x))


class Both(Net):
    """Two forwards of everything in one."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + super().forward(-x)


class Outer(nn.Module):
    """Blocks inside a block."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.mix = nn.ModuleList([Block(WIDTH), Block(WIDTH)]), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.inner:
            x = block(x)
        return self.mix(x)


class Adapted(Block):
    """A frozen block in another dtype than the trained adapter of low rank beside it."""

    def __init__(self) -> None:
        super().__init__(WIDTH)
        self.requires_grad_(False).to(torch.float64)
        self.down_to, self.up_from = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x.double()).float() + self.up_from(self.down_to(x))


class Bag(nn.Module):
    """The user's own container: nobody calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)


class Bags(Net):
    def run(self, x: Tensor) -> Tensor:
        for bag in self.layers:
            x = x + bag.two(torch.tanh(bag.one(x)))
        return x


def frozen(*names: str) -> Net:
    net = Net()
    for name in names:
        net.get_submodule(name).requires_grad_(False)
    return net


def tied() -> Net:
    net = Net()
    net.layers[2] = net.layers[0]
    return net


MODELS: dict[str, Callable[[], nn.Module]] = {
    "a frozen block": lambda: frozen("layers.1"),
    "the first layers frozen": lambda: frozen("first", "layers.0"),
    "a part of each block frozen": lambda: frozen(*[f"layers.{index}.up" for index in range(3)]),
    "adapters on a frozen base": lambda: Net(*[Adapted() for _ in range(3)]),
    "a block in two places": tied,
    "blocks that run twice": Twice,
    "two forwards in one": Both,
    "nested": lambda: Net(Outer(), Outer()),
    "containers without forward": lambda: Bags(Bag(), Bag()),
}
NESTED = {"transformer_layer_cls": ("Outer", "Block")}
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "checkpointing": {"activation_checkpointing": True},
    "prefetch": {"forward_prefetch": 2, "backward_prefetch": 3},
    "keep": {"reshard_after_forward": False},
}


def make(name: str) -> nn.Module:
    torch.manual_seed(3)
    return MODELS[name]()


def train(name: str, strategy: FSDP | None) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Four windows of two micro-batches, through a strategy or in plain PyTorch on the global batch."""
    accelerator = Accelerator(strategy or "cpu", gradient_accumulation_steps=2 if strategy else 1)
    net = make(name)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    model, optimizer = accelerator.prepare(net, optimizer)
    x = torch.randn(4, 2, 2, 2, 5, generator=torch.Generator().manual_seed(5))  # (windows, steps, ranks, samples, 5)
    losses, norms = [], []
    for window in x:
        held = []
        for batch in window[:, accelerator.process_index] if strategy else [window.flatten(0, 2)]:
            with accelerator.accumulate(model):
                loss = ((model(batch) - batch.sum(1).sin()) ** 2).mean()
                accelerator.backward(loss)
                norm = accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
            held.append(accelerator.reduce(loss.detach(), "mean"))
        losses.append(torch.stack(held).mean().item())
        norms.append(float(norm))
    weights = {name: whole(parameter).clone() for name, parameter in model.named_parameters()}
    accelerator.end_training()
    return losses, norms, weights


def train_all(name: str, strategies: dict[str, FSDP]) -> dict[str, Any]:
    return {setting: train(name, strategy) for setting, strategy in strategies.items()}


@pytest.mark.parametrize("name", list(MODELS))
def test_models_of_unusual_shape_train_as_on_one_process(ranks: RankPool, name: str) -> None:
    more = NESTED if name == "nested" else {}
    strategies = {setting: FSDP(**fields, **more) for setting, fields in SETTINGS.items()}
    expected = train(name, None)
    for setting, got in ranks(train_all, name, strategies, nproc=2, timeout=60)[0].items():
        for one, other in zip(got[:2], expected[:2], strict=True):
            torch.testing.assert_close(torch.tensor(one), torch.tensor(other), atol=1e-6, rtol=1e-5, msg=setting)
        assert got[2].keys() == expected[2].keys()
        for key, weight in expected[2].items():
            torch.testing.assert_close(got[2][key], weight, atol=1e-6, rtol=1e-5, msg=f"{setting}: {key}")


class Around(Net):
    """Goes past the forward of its blocks."""

    def run(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer.down(torch.tanh(layer.up(x)))
        return x


class Reads(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (self.layers[0].up.weight * x.sum()).sum()


def use(what: str) -> None:
    accelerator = Accelerator(FSDP(transformer_layer_cls=("Bag",)) if what == "by class" else FSDP())
    made = {"around": Around, "reads": Reads, "by class": lambda: Bags(Bag(), Bag())}[what]()
    accelerator.prepare(made)(torch.ones(2, 5))


@pytest.mark.parametrize(
    ("what", "kind", "words"),
    [
        ("around", StepError, r"layers\.0\.up of Around was used outside a call of layers\.0, which gathers it\. Call"),
        ("reads", StepError, "Reads used a parameter of a block outside a call of the block that gathers it"),
        ("by class", PrepareError, r"names 'Bag', but what is a Bag in Bags has no forward or no parameters"),
    ],
)
def test_a_block_that_is_not_called_is_named(ranks: RankPool, what: str, kind: Any, words: str) -> None:
    with pytest.raises(kind, match=words):
        ranks(use, what, nproc=2)


class Chooses(nn.Module):
    """One of two ways, of different sizes, by what comes in."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.wide = nn.Linear(5, 1), nn.Sequential(nn.Linear(5, 9), nn.Linear(9, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (self.narrow if x.sum() < 0 else self.wide)(x)


INPUTS = torch.stack([-torch.ones(2, 5), torch.ones(2, 5)])  # (ranks, samples, features)


def choose() -> dict[str, Tensor]:
    accelerator = Accelerator(FSDP(find_unused_parameters=True), gradient_accumulation_steps=2)
    torch.manual_seed(3)
    model, optimizer = accelerator.prepare(net := Chooses(), torch.optim.SGD(net.parameters(), lr=0.1))
    for step in range(6):  # in every second window each rank goes one way only, another than the other's
        x = INPUTS[(accelerator.process_index + (step % 4 == 1)) % 2]
        with accelerator.accumulate(model):
            accelerator.backward(model(x).square().mean())
            optimizer.step()
            optimizer.zero_grad()
    return {name: whole(parameter).clone() for name, parameter in model.named_parameters()}


@pytest.mark.skipif(not hasattr(FSDPModule, "set_reduce_scatter_unused_params"), reason="needs torch 2.13")
def test_ranks_may_use_different_parameters_where_asked_for(ranks: RankPool) -> None:
    torch.manual_seed(3)
    net = Chooses()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(3):
        (sum(net(x).square().mean() for x in INPUTS) / 2).backward()  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()
    for weights in ranks(choose, nproc=2):
        for name, weight in net.named_parameters():
            torch.testing.assert_close(weights[name], weight.detach(), atol=1e-6, rtol=1e-5)
