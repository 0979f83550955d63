"""The oracle of the step: plain PyTorch in one process with the global batch, and the same training as a prepared loop.

Both sides train the same tiny model on the same samples in the order of the dataset; what they record after every
optimizer step must be equal. Nothing of the library is used by `train_plain`.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from accelerator import Accelerator

RTOL, ATOL = 1e-9, 1e-11


@dataclass(frozen=True, kw_only=True)
class Case:
    """One training run: its data, how it is cut, and how the loop is written."""

    length: int = 8
    batch_size: int = 2
    world: int = 1
    steps: int = 1
    epochs: int = 2
    drop_last: bool = False
    split_batches: bool = False
    padded: bool = False
    losses: Literal["mean", "of samples"] = "mean"
    clip: float | None = None
    weights: Literal["none", "number", "tensor"] = "none"
    weight_unit: float = 1.0
    num_weightless: int = 0  # leading samples without any token
    precision: Literal["no", "bf16", "fp16"] = "no"
    overflow_at: int | None = None  # the sample that overflows float16
    zero: Literal["after", "top", "before", "model"] = "after"
    step: Literal["inside", "outside"] = "inside"
    scheduler: Literal["inside", "outside", "epoch", "none"] = "inside"
    optimizer: Literal["sgd", "adamw"] = "sgd"

    @property
    def dtype(self) -> torch.dtype:
        """float64 where nothing is cast down, so that any wrong factor shows."""
        return torch.float64 if self.precision == "no" else torch.float32

    @property
    def global_batch(self) -> int:
        return self.batch_size if self.split_batches else self.batch_size * self.world

    @property
    def num_batches(self) -> int:
        full, tail = divmod(self.length, self.global_batch)
        return full + (tail > 0 and not self.drop_last)

    def windows(self) -> list[list[list[int]]]:
        """The samples of one epoch: of every optimizer step, of every global batch."""
        cut = [
            list(range(k * self.global_batch, min((k + 1) * self.global_batch, self.length)))
            for k in range(self.num_batches)
        ]
        return [cut[first : first + self.steps] for first in range(0, len(cut), self.steps)]


@dataclass
class Run:
    """What a training run looked like after each of its optimizer steps."""

    weights: list[Tensor] = field(default_factory=list)
    norms: list[float | None] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    skipped: list[bool] = field(default_factory=list)

    def record(self, model: nn.Module, norm: Tensor | None, rate: float, skipped: bool) -> None:
        self.weights.append(flat(model))
        self.norms.append(None if norm is None else float(norm))
        self.rates.append(rate)
        self.skipped.append(skipped)


def flat(model: nn.Module) -> Tensor:
    """All parameters in one vector, detached from the model."""
    return torch.cat([parameter.detach().reshape(-1).clone() for parameter in model.parameters()])


def make_model(dtype: torch.dtype = torch.float64, seed: int = 7) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def make_data(case: Case) -> TensorDataset:
    """Inputs, targets and counts of tokens; losses differ enough between samples for any wrong weight to show."""
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(case.length, 3, generator=generator, dtype=torch.float64).to(case.dtype)
    y = torch.linspace(-2, 3, case.length, dtype=torch.float64).to(case.dtype)
    tokens = torch.randint(0, 6, (case.length,), generator=generator)
    tokens[: case.num_weightless] = 0
    if case.overflow_at is not None:
        x[case.overflow_at] = 1e6
    return TensorDataset(x, y, tokens)


def make_optimizer(case: Case, model: nn.Module) -> torch.optim.Optimizer:
    if case.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=0.05, eps=1e-3)
    return torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.8)


def make_scheduler(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))


def sample_losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """One loss per sample; small enough that the float16 scale of 65536 does not overflow by itself."""
    return 0.0002 * (model(x).squeeze(-1).to(y.dtype) - y) ** 2  # (samples,)


def train_plain(case: Case) -> Run:
    """The oracle: one process, the global batch of each step in one piece."""
    model, (x, y, tokens) = make_model(case.dtype), make_data(case).tensors
    optimizer = make_optimizer(case, model)
    scheduler = make_scheduler(optimizer)
    run = Run()
    low = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(case.precision)
    for _ in range(case.epochs):
        taken = False
        for window in case.windows():
            samples = [sample for batch in window for sample in batch]
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=low) if low else nullcontext():
                losses = sample_losses(model, x[samples], y[samples])
            if case.weights == "none":
                loss = losses.mean()
            else:
                loss = (losses * tokens[samples]).sum() / tokens[samples].sum().clamp(min=1)
            overflow = case.precision == "fp16" and case.overflow_at in samples
            norm = None
            if not overflow:
                loss.backward()
                norm = None if case.clip is None else nn.utils.clip_grad_norm_(model.parameters(), case.clip)
                optimizer.step()
                taken = True
                if case.scheduler in ("inside", "outside"):
                    scheduler.step()
            run.record(model, norm, optimizer.param_groups[0]["lr"], overflow)
        if case.scheduler == "epoch" and taken:  # an epoch in which every step overflowed moves no schedule
            scheduler.step()
    return run


def train_prepared(case: Case, strategy: Any = None) -> Run:
    """The same run as a loop over prepared objects, written in the order that `case` asks for. On every rank."""
    accelerator = Accelerator(
        strategy if strategy is not None else "ddp" if case.world > 1 else "cpu",
        mixed_precision=case.precision,
        gradient_accumulation_steps=case.steps,
        split_batches=case.split_batches,
        pad_batches=case.padded,
    )
    model = make_model(case.dtype)
    optimizer = make_optimizer(case, model)
    model, optimizer, scheduler, loader = accelerator.prepare(
        model,
        optimizer,
        make_scheduler(optimizer),
        DataLoader(make_data(case), batch_size=case.batch_size, drop_last=case.drop_last),
    )
    run = Run()

    def update() -> Tensor | None:
        norm = None if case.clip is None else accelerator.clip_grad_norm_(model.parameters(), case.clip)
        optimizer.step()
        if case.scheduler == "inside":
            scheduler.step()
        zero(case, model, optimizer)
        return norm

    for _ in range(case.epochs):
        for x, y, tokens in loader:
            norm = None
            if case.zero == "before":
                optimizer.zero_grad()
            with accelerator.accumulate(model):
                if case.zero == "top":
                    optimizer.zero_grad()
                loss, weight = micro_batch_loss(case, model, x, y, tokens)
                accelerator.backward(loss, weight=weight)
                if case.step == "inside":
                    norm = update()
            if case.step == "outside":
                norm = update()
            if case.scheduler == "outside":
                scheduler.step()
            if accelerator.sync_gradients:
                skipped = accelerator.optimizer_step_was_skipped
                run.record(model, None if skipped else norm, optimizer.param_groups[0]["lr"], skipped)
            else:
                assert norm is None
        if case.scheduler == "epoch":
            scheduler.step()
    accelerator.end_training()
    return run


def micro_batch_loss(
    case: Case, model: nn.Module, x: Tensor, y: Tensor, tokens: Tensor
) -> tuple[Tensor, float | Tensor | None]:
    """The mean loss of a micro-batch and its weight, or those of its samples, as a user would write them."""
    losses = sample_losses(model, x, y)
    if case.losses == "of samples":
        shares = case.global_batch // case.world, -(-case.global_batch // case.world)
        assert len(x) in shares or not case.padded
        return losses, None if case.weights == "none" else tokens.double() * case.weight_unit
    if case.weights == "none":
        return losses.mean(), None
    weight = tokens.sum()
    loss = (losses * tokens).sum() / weight.clamp(min=1)
    return loss, weight.double() * case.weight_unit if case.weights == "tensor" else weight.item() * case.weight_unit


def zero(case: Case, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    if case.zero == "after":
        optimizer.zero_grad()
    elif case.zero == "model":
        model.zero_grad()


def assert_equal(case: Case, expected: Run, got: Run) -> None:
    """Every step of `got` is that of the oracle, within what the order of additions allows."""
    assert got.skipped == expected.skipped
    assert got.rates == expected.rates
    assert len(got.weights) == len(expected.weights)
    start = flat(make_model(case.dtype))
    for number, (theirs, ours) in enumerate(zip(expected.weights, got.weights, strict=True)):
        if case.precision == "no":
            torch.testing.assert_close(
                ours, theirs, rtol=RTOL, atol=ATOL, msg=lambda text, n=number: f"step {n}: {text}"
            )
        else:
            moved = max((theirs - start).norm().item(), 1e-4)
            assert (ours - theirs).norm().item() <= 0.04 * moved, f"step {number}"
    for theirs, ours in zip(expected.norms, got.norms, strict=True):
        assert (theirs is None) == (ours is None)
        if theirs is not None and ours is not None:
            tolerance = 1e-9 if case.precision == "no" else 0.04
            assert abs(ours - theirs) <= tolerance * max(abs(theirs), 1e-3)


@st.composite
def cases(draw: st.DrawFn, world: int = 1, precision: str = "no") -> Case:
    """Any legal run on `world` ranks."""
    split_batches = draw(st.booleans())
    batch_size = draw(st.integers(world if split_batches else 1, world + 3 if split_batches else 3))
    global_batch = batch_size if split_batches else batch_size * world
    length = draw(st.integers(1, 5 * global_batch + 1))
    weights = draw(st.sampled_from(["none", "number", "tensor"]))
    losses = draw(st.sampled_from(["mean", "of samples"]))
    overflows = precision == "fp16" and weights == "none" and draw(st.booleans())
    return Case(
        length=length,
        batch_size=batch_size,
        world=world,
        steps=draw(st.integers(1, 4)),
        drop_last=draw(st.booleans()) and length >= global_batch,
        split_batches=split_batches,
        padded=losses == "of samples" and draw(st.booleans()),
        losses=losses,  # type: ignore[arg-type]
        clip=draw(st.sampled_from([None, 0.05, 100.0])),
        weights=weights,
        weight_unit=draw(st.sampled_from([1.0, 1e-3, 1e6])),
        num_weightless=draw(st.sampled_from([0, 0, 3, 8])),
        precision=precision,  # type: ignore[arg-type]
        overflow_at=draw(st.integers(0, length - 1)) if overflows else None,
        zero=draw(st.sampled_from(["after", "top", "before", "model"])),
        step=draw(st.sampled_from(["inside", "inside", "outside"])),
        scheduler=draw(st.sampled_from(["inside", "outside", "epoch", "none"])),
        optimizer=draw(st.sampled_from(["sgd", "adamw"])),
    )
