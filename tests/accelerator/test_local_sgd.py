"""`LocalSGD`: each rank trains alone, and averages now and then, as ranks that are written down by hand do."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader

from accelerator import EMA, Accelerator, LocalSGD
from oracle import Case, flat, make_data, make_model, micro_batch_loss, sample_losses
from rank_pool import RankPool
from strategies import CPU, DDP, FSDP, XLA, ConfigurationError, StateError, StepError


@dataclass(frozen=True)
class Local:
    """A block of local SGD."""

    every: int = 2
    warmup: int = 0


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.8, weight_decay=0.1)


def train(case: Case, local: Local) -> tuple[Tensor, list[list[int]], Tensor]:
    """Two epochs of local SGD, one together: weights after the block, what this rank saw in it, weights at last."""
    accelerator = Accelerator("ddp", gradient_accumulation_steps=case.steps)
    model = make_model()
    model, optimizer, loader = accelerator.prepare(model, sgd(model), DataLoader(make_data(case), case.batch_size))
    seen: list[list[int]] = []
    x_all = make_data(case).tensors[0]

    def epoch() -> None:
        for x, y, tokens in loader:
            with accelerator.accumulate(model):
                loss, weight = micro_batch_loss(case, model, x, y, tokens)
                accelerator.backward(loss, weight=weight)
                optimizer.step()
                optimizer.zero_grad()
            ghost = accelerator._accumulation.sources.latest.is_ghost  # type: ignore[union-attr]
            seen.append([] if ghost else [int((x_all == row).all(1).nonzero()) for row in x])

    with LocalSGD(accelerator, model, local.every, warmup_steps=local.warmup):
        epoch()
        epoch()
    in_block, at_end = seen[:], flat(model)
    accelerator.verify_replicas()
    epoch()
    accelerator.verify_replicas()
    result = flat(model)
    accelerator.end_training()
    return at_end, in_block, result


def by_hand(case: Case, local: Local, seen: list[list[list[int]]]) -> tuple[Tensor, Tensor]:
    """The oracle, all ranks in one process: the weights at the end of the block, and an epoch later."""
    models = [make_model() for _ in seen]
    optimizers = [sgd(model) for model in models]
    x, y, tokens = make_data(case).tensors
    per_epoch = case.num_batches

    def loss_of(model: nn.Module, samples: list[int]) -> Tensor:
        losses = sample_losses(model, x[samples], y[samples])
        if case.weights == "none":
            return losses.mean()
        return (losses * tokens[samples]).sum() / tokens[samples].sum().clamp(min=1)

    def step(rank: int, samples: list[int]) -> None:
        optimizers[rank].zero_grad()
        loss = loss_of(models[rank], samples) if samples else 0.0 * flat_of(models[rank]).sum()
        loss.backward()
        optimizers[rank].step()

    taken = 0
    for start in (0, per_epoch):
        for first in range(start, start + per_epoch, case.steps):
            window = range(first, min(first + case.steps, start + per_epoch))
            mine = [[sample for index in window for sample in of_rank[index]] for of_rank in seen]
            everyone = [sample for samples in mine for sample in samples]
            for rank, samples in enumerate(mine):
                step(rank, everyone if taken < local.warmup else samples)
            taken += 1
            if taken > local.warmup and (taken - local.warmup) % local.every == 0:
                average([list(model.parameters()) for model in models])
    if taken > local.warmup:
        average([list(model.parameters()) for model in models])
        average([[state["momentum_buffer"] for state in optimizer.state.values()] for optimizer in optimizers])
    at_end = flat(models[0])
    for window in case.windows():
        step(0, [sample for batch in window for sample in batch])
    return at_end, flat(models[0])


def flat_of(model: nn.Module) -> Tensor:
    return torch.cat([parameter.reshape(-1) for parameter in model.parameters()])


def average(of_ranks: list[list[Any]]) -> None:
    with torch.no_grad():
        for alike in zip(*of_ranks, strict=True):
            mean = torch.stack([tensor.detach() for tensor in alike]).mean(0)
            for tensor in alike:
                tensor.copy_(mean)


@settings(max_examples=5)
@given(data=st.data())
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_train_alone_and_average(world: int, ranks: RankPool, data: st.DataObject) -> None:
    batch_size = data.draw(st.integers(1, 3), "batch_size")
    case = Case(
        world=world,
        length=data.draw(st.integers(1, 4 * batch_size * world), "length"),
        batch_size=batch_size,
        steps=data.draw(st.integers(1, 3), "steps"),
        weights=data.draw(st.sampled_from(["none", "number", "tensor"]), "weights"),  # type: ignore[arg-type]
        num_weightless=data.draw(st.integers(0, 2), "num_weightless"),
    )
    local = Local(every=data.draw(st.integers(1, 3), "every"), warmup=data.draw(st.integers(0, 3), "warmup"))
    everywhere = ranks(train, case, local, nproc=world)
    expected = by_hand(case, local, [seen for _, seen, _ in everywhere])
    for at_end, _, result in everywhere:
        torch.testing.assert_close(at_end, expected[0], rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(result, expected[1], rtol=1e-9, atol=1e-11)


def test_the_cases_hold_ranks_that_part(ranks: RankPool) -> None:
    """Not every equality above is one of ranks that never differed."""
    alone, together = (ranks(train, Case(world=2), Local(every=every))[0][0] for every in (100, 1))
    assert not torch.allclose(alone, together)


class Net(nn.Module):
    """Keeps its storage in view, a buffer that each rank fills differently, and a parameter without dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 1)
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += x.sum().detach()
        return self.inner(x) * self.scale


def corners(folder: str) -> None:
    """What stays in place, what no collective disturbs, and what is refused inside the block."""
    accelerator = Accelerator(DDP(), project_dir=folder)
    net = Net()
    model, optimizer = accelerator.prepare(net, torch.optim.AdamW(net.parameters(), lr=0.1))
    rank, place = accelerator.process_index, net.inner.weight.data_ptr()

    def step() -> None:
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.full((1, 2), 1.0 + rank)).square().mean())
            optimizer.step()
            optimizer.zero_grad()

    with LocalSGD(accelerator, model, local_sgd_steps=2):
        step()
        assert len(set(accelerator.gather(model.inner.weight.detach()[:1, 0]).tolist())) == 2
        for name, call in (
            ("save_state", accelerator.save_state),
            ("load_state", lambda: accelerator.load_state(folder)),
            ("resume", accelerator.resume),
            ("save_model", lambda: accelerator.save_model(model, folder)),
            ("get_state_dict", lambda: accelerator.get_state_dict(model)),
        ):
            with pytest.raises(StateError, match=rf"{name}\(\) was called inside LocalSGD"):
                call()
        with pytest.raises(StepError, match="entered inside another"), LocalSGD(accelerator, model, 2):
            pass
        step()
        accelerator.verify_replicas()  # weights and buffers
        step()
    assert net.inner.weight.data_ptr() == place
    accelerator.verify_replicas()
    moments = torch.cat([state["exp_avg"].reshape(-1) for state in optimizer.state.values()])
    assert torch.equal(*accelerator.gather(moments).chunk(2))
    accelerator.save_state()
    step()
    accelerator.verify_replicas()
    accelerator.end_training()


def test_what_holds_inside_the_block_and_after_it(ranks: RankPool, tmp_path: Path) -> None:
    ranks(corners, str(tmp_path))


def leave_open(how: str) -> None:
    accelerator = Accelerator(DDP(), gradient_accumulation_steps=2)
    net = nn.Linear(2, 1)
    model, optimizer = accelerator.prepare(net, sgd(net))

    def step() -> None:
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.ones(1, 2)).square().mean())
            optimizer.step()
            optimizer.zero_grad()

    try:
        if how == "enter":
            step()
            with pytest.raises(StepError, match="entered inside an open accumulation window"):
                LocalSGD(accelerator, model, 2).__enter__()
        elif how == "leave":
            with (
                pytest.raises(StepError, match="left inside an open accumulation window"),
                LocalSGD(accelerator, model, 2),
            ):
                step()
        elif how == "exception":
            with pytest.raises(KeyError), LocalSGD(accelerator, model, 2):
                raise KeyError
            with pytest.raises(StepError, match="LocalSGD was left by KeyError"):
                step()
    finally:
        accelerator.end_training()


@pytest.mark.parametrize("how", ["enter", "leave", "exception"])
def test_windows_and_exceptions_at_the_edges(how: str, ranks: RankPool) -> None:
    ranks(leave_open, how)


def enter_again() -> None:
    """Each block begins with its own steps together, and apart after them."""
    accelerator = Accelerator(DDP())
    net = nn.Linear(2, 1)
    model, optimizer = accelerator.prepare(net, sgd(net))
    block = LocalSGD(accelerator, model, 100, warmup_steps=1)
    for _ in range(2):
        with block:
            for agree in (True, False):
                with accelerator.accumulate(model):
                    accelerator.backward(model(torch.full((1, 2), 1.0 + accelerator.process_index)).square().mean())
                    optimizer.step()
                    optimizer.zero_grad()
                seen = accelerator.gather(net.bias.detach())
                assert torch.equal(*seen.chunk(2)) == agree
        accelerator.verify_replicas()
    accelerator.end_training()


def test_a_block_may_be_entered_again(ranks: RankPool) -> None:
    ranks(enter_again)


def go_astray(how: str) -> None:
    accelerator = Accelerator(DDP())
    net, other = nn.Linear(2, 1), nn.Linear(2, 1)
    model, optimizer = accelerator.prepare(net, sgd(net))
    warmup = 1 if how == "EMA in the warm-up" else 0
    try:
        with LocalSGD(accelerator, model, 3, warmup_steps=warmup):
            if how == "another model":
                model, optimizer = accelerator.prepare(other, sgd(other))
            if how.startswith("EMA"):
                EMA(accelerator, model)
            for number in range(3):
                with accelerator.accumulate(model):
                    if how == "a batch left out" and number == accelerator.process_index:
                        continue
                    accelerator.backward(model(torch.ones(1, 2)).square().mean())
                    optimizer.step()
                    optimizer.zero_grad()
            if how == "a batch left out" and accelerator.process_index == 1:
                with accelerator.accumulate(model):
                    accelerator.backward(model(torch.ones(1, 2)).square().mean())
                    optimizer.step()
    finally:
        accelerator.end_training()


@pytest.mark.parametrize(
    ("how", "wrong", "message"),
    [
        ("another model", StepError, "SGD of another model than Linear steps inside LocalSGD"),
        ("EMA", StateError, r"EMA\(\) was called inside LocalSGD"),
        ("EMA in the warm-up", ConfigurationError, "LocalSGD and EMA were asked for together"),
        ("a batch left out", StepError, r"other numbers of steps on other ranks \(by rank: \[2, 3\]\)"),
    ],
)
def test_what_would_leave_ranks_apart_is_refused(
    how: str, wrong: type[Exception], message: str, ranks: RankPool
) -> None:
    with pytest.raises(wrong, match=message):
        ranks(go_astray, how)


def refused(strategy: Any, what: str) -> None:
    accelerator = Accelerator(strategy, mixed_precision="fp16" if what == "fp16" else "no")
    net, other = nn.Linear(2, 1), nn.Linear(2, 1)
    model, _ = accelerator.prepare(net, sgd(net))
    if what == "two models":
        accelerator.prepare(other, sgd(other))
    if what == "EMA":
        ema = EMA(accelerator, model)
        assert ema is not None
    try:
        with LocalSGD(accelerator, model, 2):
            pass
    finally:
        accelerator.end_training()


@pytest.mark.parametrize(
    ("strategy", "what", "message"),
    [
        (FSDP(), "", "LocalSGD .* which FSDP does not offer. Use strategy='ddp'"),
        (DDP(static_graph=True), "", "static_graph is True"),
        (DDP(), "fp16", "mixed_precision='fp16'.*Use 'bf16'"),
        (DDP(), "two models", "Linear is trained beside it"),
        (DDP(), "EMA", "LocalSGD and EMA were asked for together"),
    ],
)
def test_what_cannot_train_apart_is_refused(strategy: Any, what: str, message: str, ranks: RankPool) -> None:
    with pytest.raises(ConfigurationError, match=message):
        ranks(refused, strategy, what)


def test_xla_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="which XLA does not offer"):
        XLA().train_alone(nn.Linear(1, 1))


@pytest.mark.parametrize(("every", "warmup"), [(0, 0), (1, -1)])
def test_steps_out_of_range_are_refused(every: int, warmup: int) -> None:
    accelerator = Accelerator("cpu")
    model = accelerator.prepare(nn.Linear(1, 1))
    with pytest.raises(ConfigurationError, match="expected at least 1 and 0"):
        LocalSGD(accelerator, model, every, warmup_steps=warmup)


@pytest.mark.parametrize("enabled", [True, False])
def test_one_process_is_not_disturbed(enabled: bool) -> None:
    results = []
    for local in (True, False):
        accelerator = Accelerator(CPU())
        model = make_model()
        twin = copy.deepcopy(model)
        model, optimizer = accelerator.prepare(model, sgd(model))
        with LocalSGD(accelerator, model, 2, enabled) if local else accelerator.autocast():
            for _ in range(3):
                with accelerator.accumulate(model):
                    accelerator.backward(
                        sample_losses(model, torch.ones(1, 3, dtype=torch.float64), torch.ones(1)).mean()
                    )
                    optimizer.step()
                    optimizer.zero_grad()
            accelerator.get_state_dict(model)
        results.append(flat(model))
        assert not torch.equal(flat(model), flat(twin))
    assert torch.equal(*results)
