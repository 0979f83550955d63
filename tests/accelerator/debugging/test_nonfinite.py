"""`detect_nonfinite` names the first module, parameter and rank at which a planted NaN or infinity appears."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from accelerator import Accelerator
from rank_pool import RankPool
from strategies import DDP, FSDP, ConfigurationError, NonfiniteError


class Lambda(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class LogOfZero(nn.Module):
    """log(0) between two of its modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.log(self.first(x) * 0))


class SqrtOfZero(nn.Module):
    """A gradient of sqrt(0) between two of its modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.sqrt(self.first(x).relu() * 0))


class Scaled(nn.Module):
    """A parameter whose own gradient is infinite."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).sum(1, keepdim=True) + torch.sqrt(self.scale)


class Table(nn.Embedding):
    """Divides by the number of the last row."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / (9 - x)[..., None]


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = Table(10, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table(x.abs().long().clamp(max=9)).mean(1))


def stack(*middle: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), *middle, nn.Linear(4, 1))


def with_nan_in(model: nn.Module, name: str) -> nn.Module:
    with torch.no_grad():
        model.get_parameter(name).view(-1)[-1] = torch.nan
    return model


def frozen_batch_norm() -> nn.Module:
    frozen = nn.BatchNorm1d(4).eval()
    frozen.get_buffer("running_var")[2] = torch.inf * 0
    return stack(frozen)


# name: (the model, what the message says, the learning rate, the sample of 8 that is NaN)
PLANTED: dict[str, tuple[Callable[[], nn.Module], str, float, int | None]] = {
    "weight": (
        lambda: with_nan_in(stack(nn.Linear(4, 4)), "2.weight"),
        r"in forward: the output of 2 \((FSDP)?Linear\) of .*, whose inputs are finite, where 2.weight is not finite",
        0.1,
        None,
    ),
    "input": (stack, r"in forward: the inputs of Sequential", 0.1, 1),
    "log(0)": (
        LogOfZero,
        r"in forward: LogOfZero, in its own code before it calls second \((FSDP)?Linear\) of LogOfZero",
        0.1,
        None,
    ),
    "0/0": (
        lambda: stack(Lambda(lambda x: (x * 0) / (x * 0))),
        r"in forward: the output of 2 \((FSDP)?Lambda\) of Sequential",
        0.1,
        None,
    ),
    "overflow": (
        lambda: stack(nn.Linear(4, 4), Lambda(lambda x: torch.exp(x * 0 + 1000))),
        r"in forward: the output of 3 \((FSDP)?Lambda\)",
        0.1,
        None,
    ),
    "gradient of sqrt(0)": (
        SqrtOfZero,
        r"in backward: SqrtOfZero, in its own code after it calls first \((FSDP)?Linear\)",
        0.1,
        None,
    ),
    "gradient of a parameter": (Scaled, r"in backward: the gradient of parameter scale in Scaled", 0.1, None),
    "learning rate": (
        stack,
        r"in update, after step 1 of SGD: parameter 0.weight of Sequential \(learning rate 3e\+38\)",
        3e38,
        None,
    ),
    "batch normalisation": (
        frozen_batch_norm,
        r"in forward: the output of 2 \((FSDP)?BatchNorm1d\) of .*, where 2.running_var is not finite",
        0.1,
        None,
    ),
    "embedding": (
        Words,
        r"in forward: the output of table \((FSDP)?Table\) of Words, whose inputs are finite",
        0.1,
        5,
    ),
}
STRATEGIES: dict[str, Any] = {
    "cpu": "cpu",
    "ddp": DDP(device="cpu", batch_norm="local"),
    "fsdp": FSDP(device="cpu", batch_norm="local", auto_wrap_policy="size", min_num_params=8),
}


def data(name: str, nan_at: int | None) -> DataLoader[Any]:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)).clamp(-3, 3)
    if nan_at is not None:
        x[nan_at] = 9.0 if name == "embedding" else torch.nan  # the last row of the table
    return DataLoader(TensorDataset(x), batch_size=2)


def train(accelerator: Accelerator, make: Callable[[], nn.Module], rate: float, loader: DataLoader[Any]) -> Any:
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for (x,) in loader:
        with accelerator.accumulate(model):
            accelerator.backward(100 * model(x).square().mean())
            optimizer.step()
            optimizer.zero_grad()
    return model


def plant(strategy: str, name: str) -> str:
    make, _, rate, nan_at = PLANTED[name]
    accelerator = Accelerator(STRATEGIES[strategy], detect_nonfinite=True, seed=0)
    with pytest.raises(NonfiniteError) as caught:
        train(accelerator, make, rate, data(name, nan_at))
    accelerator.end_training()
    return str(caught.value)


def plant_all(strategy: str) -> dict[str, str]:
    return {name: plant(strategy, name) for name in PLANTED}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ten_planted_values_are_named_where_they_first_appear(strategy: str, ranks: RankPool) -> None:
    told = [plant_all(strategy)] if strategy == "cpu" else ranks(plant_all, strategy)
    assert all(messages == told[0] for messages in told)
    for name, message in told[0].items():
        assert re.search(PLANTED[name][1], message), (name, message)
    assert "batch 0 of epoch 0, samples [0, 1]" in told[0]["input"]
    # the embedding of sample 5 is in the second batch of rank 0 on two ranks, in the third of one
    where = "batch 2 of epoch 0, samples [4, 5]" if strategy == "cpu" else "batch 1 of epoch 0, samples [4, 5]"
    assert where in told[0]["embedding"]


def second_rank() -> str:
    accelerator = Accelerator(STRATEGIES["ddp"], detect_nonfinite=True, gradient_accumulation_steps=2)
    with pytest.raises(NonfiniteError) as caught:
        train(accelerator, stack, 0.1, data("input", 7))  # batch 1, rank 1
    return str(caught.value)


def test_the_rank_that_has_it_is_named_on_all(ranks: RankPool) -> None:
    first, second = ranks(second_rank)
    assert first == second
    assert "rank 1 in forward: the inputs of Sequential. Micro-batch 1 of its window." in first
    assert "batch 1 of epoch 0, samples [6, 7]" in first


def test_a_float16_overflow_is_not_mistaken_for_one() -> None:
    """The loss scale overflows gradients, and a large sample the activations: the scaler skips both steps."""
    accelerator = Accelerator("cpu", mixed_precision="fp16", detect_nonfinite=True)
    skipped = []
    model = stack()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(6, 4)
    x[3] = 1e6
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(TensorDataset(x), batch_size=1))
    for (batch,) in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(batch).float().sum() * 1e3)
            optimizer.step()
            optimizer.zero_grad()
        skipped.append(accelerator.optimizer_step_was_skipped)
    assert skipped[0]
    assert skipped[3]


@pytest.mark.parametrize(("name", "steps"), [("weight", 1), ("input", 1), ("0/0", 18)])
def test_float16_does_not_hide_one(name: str, steps: int) -> None:
    """Weights and inputs are told at once, all else when the loss scale is no longer the reason."""
    make, message, _, nan_at = PLANTED[name]
    accelerator = Accelerator("cpu", mixed_precision="fp16", detect_nonfinite=True)
    x = torch.randn(30, 4)
    x[0 if nan_at is not None else 1, 0] = torch.nan if nan_at is not None else 1.0
    with pytest.raises(NonfiniteError, match=message) as caught:
        train(accelerator, make, 0.1, DataLoader(TensorDataset(x), batch_size=1))
    assert f"batch {steps - 2 if steps > 1 else 0} of" in str(caught.value)


def test_finite_training_is_as_without_it() -> None:
    trained = [
        train(Accelerator("cpu", detect_nonfinite=on, seed=1), stack, 0.1, data("", None)).state_dict()
        for on in (False, True)
    ]
    for name, value in trained[0].items():
        assert torch.equal(value, trained[1][name])


def test_a_weight_that_is_not_used_is_told_too() -> None:
    model = nn.Embedding(10, 1)
    with torch.no_grad():
        model.weight[9] = torch.inf
    accelerator = Accelerator("cpu", detect_nonfinite=True)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    accelerator.backward(model(torch.tensor([1, 2])).mean())
    with pytest.raises(NonfiniteError, match=r"rank 0 before step 1 of SGD: parameter weight of Embedding"):
        optimizer.step()


def test_it_stays_on_after_memory_was_freed() -> None:
    accelerator = Accelerator("cpu", detect_nonfinite=True)
    train(accelerator, stack, 0.1, data("", None))
    accelerator.free_memory()
    with pytest.raises(NonfiniteError):
        train(accelerator, stack, 0.1, data("input", 1))


def test_evaluation_before_a_window_is_not_blamed() -> None:
    accelerator = Accelerator("cpu", detect_nonfinite=True)
    model = stack()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    model(torch.full((2, 4), torch.nan))
    with accelerator.accumulate(model):
        accelerator.backward(model(torch.ones(2, 4)).mean())
        optimizer.step()


class Masked(nn.Module):
    """Attention under a mask of -inf, and logits that a buffer masks with it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(3))
        self.register_buffer("bias", torch.tensor([0.0, 0.0, 0.0, -torch.inf]))

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, src_mask=self.mask) + self.bias


@pytest.mark.parametrize("broken", [False, True])
def test_masks_are_no_finding(broken: bool) -> None:
    accelerator = Accelerator("cpu", detect_nonfinite=True)
    model = Masked()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(2):
        accelerator.backward(
            nn.functional.cross_entropy(model(torch.randn(2, 3, 4)).flatten(0, 1), torch.zeros(6).long())
        )
        optimizer.step()
        optimizer.zero_grad()
    if broken:
        x = torch.randn(2, 3, 4)
        x[0, 1, 2] = -torch.inf
        accelerator.backward(nn.functional.cross_entropy(model(x).flatten(0, 1), torch.zeros(6).long()))
        with pytest.raises(
            NonfiniteError, match=r"output of attention\S* .*whose inputs are finite but for -inf, as in a"
        ):
            optimizer.step()


def test_a_forward_that_is_thrown_away_is_no_finding() -> None:
    accelerator = Accelerator("cpu", detect_nonfinite=True)
    model = stack()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with accelerator.accumulate(model):
        model.eval()
        model(torch.full((2, 4), torch.nan))
        model.train()
        accelerator.backward(model(torch.ones(2, 4)).mean())
        optimizer.step()


def test_float16_does_not_hide_a_loss_that_finite_outputs_make_nan() -> None:
    accelerator = Accelerator("cpu", mixed_precision="fp16", detect_nonfinite=True)
    model = stack()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    accelerator.backward(model(torch.ones(2, 4)).float().mean() * torch.nan)
    with pytest.raises(NonfiniteError, match="in forward: the loss, computed from finite outputs"):
        optimizer.step()


def test_the_loss_is_named_where_the_model_was_finite() -> None:
    accelerator = Accelerator("cpu", detect_nonfinite=True)
    model = stack()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    accelerator.backward(torch.log(model(torch.ones(2, 4)) * 0).mean())
    with pytest.raises(NonfiniteError, match="in forward: the loss, computed from finite outputs"):
        optimizer.step()


def test_a_compiled_model_is_refused() -> None:
    model = nn.Linear(2, 2)
    model.compile(backend="eager")
    with pytest.raises(
        ConfigurationError, match=r"detect_nonfinite looks at modules one at a time, but the model is compiled"
    ):
        Accelerator("cpu", detect_nonfinite=True).prepare(model)
