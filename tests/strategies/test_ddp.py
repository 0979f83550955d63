"""DDP: its settings against the oracle, when ranks communicate, and several Accelerators in one job."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader

from accelerator import Accelerator
from fresh_process import FreshProcesses
from oracle import Case, Run, assert_equal, flat, make_data, make_model, sample_losses, train_plain, train_prepared
from rank_pool import RankPool
from strategies import DDP, ConfigurationError, PrepareError, StepError

CASE = Case(length=15, world=2, steps=3)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.8)


def train_one_after_another(case: Case, times: int) -> list[Run]:
    return [train_prepared(case) for _ in range(times)]


def test_an_accelerator_after_end_training_trains_right(ranks: RankPool) -> None:
    case = Case(length=9, world=2, steps=2, epochs=1)
    for runs in ranks(train_one_after_another, case, 5, nproc=2, timeout=30):
        for run in runs:
            assert_equal(case, train_plain(case), run)


# -- settings --------------------------------------------------------------------------------------------------

EXACT = [
    DDP(find_unused_parameters=True),
    DDP(static_graph=True),
    DDP(gradient_as_bucket_view=True),
    DDP(bucket_cap_mb=0.0001),
    DDP(init_sync=False),
    DDP(broadcast_buffers=False),
    DDP(static_graph=True, gradient_as_bucket_view=True),
    DDP(backend="gloo", device="cpu", timeout_seconds=60),
]


def train_with_each(case: Case, strategies: list[DDP]) -> list[Run]:
    dist.init_process_group("gloo")
    return [train_prepared(case, strategy) for strategy in strategies]


def test_settings_change_no_number(ranks: RankPool) -> None:
    for runs in ranks(train_with_each, CASE, EXACT):
        for run in runs:
            assert_equal(CASE, train_plain(CASE), run)


@pytest.mark.parametrize(
    ("strategy", "tolerance"),
    [
        (DDP(comm_hook="power_sgd", power_sgd_start=2), 0.05),
        (DDP(comm_hook="power_sgd", power_sgd_start=100), 1e-9),
    ],
    ids=["power_sgd", "power_sgd not begun"],
)
def test_compressed_gradients_stay_close(ranks: RankPool, strategy: DDP, tolerance: float) -> None:
    expected, start = train_plain(CASE).weights[-1], flat(make_model())
    several = ranks(train_with_each, CASE, [strategy])
    for (run,) in several:
        assert (run.weights[-1] - expected).norm() <= tolerance * (expected - start).norm()
        assert torch.equal(run.weights[-1], several[0][0].weights[-1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"comm_hook": "fp8"}, "comm_hook is 'fp8'; expected 'none', 'fp16', 'bf16' or 'power_sgd'"),
        ({"batch_norm": "group"}, "batch_norm is 'group'; expected 'error', 'sync' or 'local'"),
        ({"timeout_seconds": 0}, "timeout_seconds is 0; expected a number above 0"),
        ({"power_sgd_rank": 0}, "power_sgd_rank is 0 and power_sgd_start is 1000; expected at least 1 and 2"),
        ({"power_sgd_start": 1}, "power_sgd_rank is 1 and power_sgd_start is 1; expected at least 1 and 2"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_at_once(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        DDP(**settings)


class Branches(nn.Module):
    """Uses one of its two layers, which one depends on the micro-batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([make_model(seed=1), make_model(seed=2)])

    def forward(self, x: Tensor, which: int) -> Tensor:
        return self.layers[which](x)


def train_branches(case: Case) -> Tensor:
    accelerator = Accelerator(DDP(find_unused_parameters=True), gradient_accumulation_steps=case.steps)
    model = Branches()
    model, optimizer, loader = accelerator.prepare(
        model, sgd(model), DataLoader(make_data(case), batch_size=case.batch_size)
    )
    for number, (x, y, _) in enumerate(loader):
        with accelerator.accumulate(model):
            accelerator.backward(sample_losses(lambda x, n=number: model(x, n % 2), x, y).mean())  # type: ignore[arg-type]
            optimizer.step()
            optimizer.zero_grad()
    return flat(model)


@pytest.mark.parametrize("steps", [1, 2])
def test_unused_parameters_are_found(ranks: RankPool, steps: int) -> None:
    case = Case(length=15, world=2, steps=steps)
    model, (x, y, _) = Branches(), make_data(case).tensors
    optimizer, number = sgd(model), 0
    for window in case.windows():
        num_samples = sum(map(len, window))
        for samples in window:
            losses = sample_losses(lambda x, n=number: model(x, n % 2), x[samples], y[samples])  # type: ignore[arg-type]
            (losses.sum() / num_samples).backward()
            number += 1
        optimizer.step()
        optimizer.zero_grad()
    for weights in ranks(train_branches, case):
        torch.testing.assert_close(weights, flat(model), rtol=1e-9, atol=1e-11)


def step_with_a_layer_unused() -> tuple[str, Tensor]:
    accelerator = Accelerator(DDP())
    model = Branches()
    before = flat(model)
    model, optimizer = accelerator.prepare(model, sgd(model))
    x, y, _ = make_data(Case(length=3)).tensors

    def step() -> None:
        with accelerator.accumulate(model):
            accelerator.backward(sample_losses(lambda x: model(x, 0), x + accelerator.process_index, y).mean())  # type: ignore[arg-type]
            optimizer.step()

    with pytest.raises(StepError) as raised:
        step()
    return str(raised.value), flat(model) - before


def test_an_unused_parameter_is_named_before_the_step(ranks: RankPool) -> None:
    """Torch says so at the next forward: until then each rank would have trained with its own gradient."""
    for message, change in ranks(step_with_a_layer_unused):
        assert "layers.1" in message
        assert "had no part in the loss" in message
        assert "find_unused_parameters=True" in message
        assert change.abs().max() == 0


# -- one model on all ranks ------------------------------------------------------------------------------------


def prepare_differing(init_sync: bool) -> tuple[Tensor, Tensor]:
    accelerator = Accelerator(DDP(init_sync=init_sync))
    model = nn.Linear(3, 2)
    model.register_buffer("mean", torch.full((2,), float(accelerator.process_index)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(accelerator.process_index + 1.0)
    model = accelerator.prepare(model)
    return flat(model), model.mean


def test_ranks_start_from_the_weights_of_rank_0(ranks: RankPool) -> None:
    for weights, buffer in ranks(prepare_differing, True):
        assert torch.equal(weights, torch.ones(8))
        assert torch.equal(buffer, torch.zeros(2))


def test_without_init_sync_ranks_keep_what_they_had(ranks: RankPool) -> None:
    for rank, (weights, buffer) in enumerate(ranks(prepare_differing, False)):
        assert torch.equal(weights, torch.full((8,), rank + 1.0))
        assert torch.equal(buffer, torch.full((2,), float(rank)))


class Counting(nn.Module):
    """Remembers in a buffer what it saw, as running means do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += x.sum()
        return self.layer(x)


def train_counting(broadcast: bool) -> list[float]:
    accelerator = Accelerator(DDP(broadcast_buffers=broadcast), gradient_accumulation_steps=2)
    model = Counting()
    model, optimizer = accelerator.prepare(model, sgd(model))
    seen = []
    for _ in range(4):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.full((1, 1), accelerator.process_index + 1.0)).mean())
            optimizer.step()
            optimizer.zero_grad()
        seen.append(model.seen.item())
    return seen


def test_buffers_are_those_of_rank_0_after_each_update(ranks: RankPool) -> None:
    assert ranks(train_counting, True) == [[1, 2, 3, 4], [2, 2, 4, 4]]
    assert ranks(train_counting, False) == [[1, 2, 3, 4], [2, 4, 6, 8]]


def prepare_batch_norm(choice: Any) -> bool:
    accelerator = Accelerator(DDP(batch_norm=choice))
    model = accelerator.prepare(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    return isinstance(accelerator.unwrap_model(model)[1], nn.BatchNorm1d)


def test_batch_normalisation_is_a_choice(ranks: RankPool) -> None:
    for error in ranks(prepare_batch_norm, "error", return_exceptions=True):
        assert isinstance(error, PrepareError)
        assert "Sequential has batch normalisation (1), which on 2 processes" in str(error)
        assert "DDP(batch_norm='local')" in str(error)
    assert ranks(prepare_batch_norm, "local") == [True, True]
    assert ranks(prepare_batch_norm, "error", nproc=1) == [True]


@pytest.mark.skipif(torch.accelerator.is_available(), reason="SyncBatchNorm runs on an accelerator")
def test_synchronised_batch_normalisation_is_refused_on_a_cpu(ranks: RankPool) -> None:
    for error in ranks(prepare_batch_norm, "sync", return_exceptions=True):
        assert isinstance(error, ConfigurationError)
        assert "SyncBatchNorm does not run on a CPU. Use batch_norm='local'" in str(error)


# -- when ranks communicate ------------------------------------------------------------------------------------


def count_collectives(strategy: DDP, case: Case, weighted: bool = False) -> list[int]:
    """Collectives of each micro-batch of the second epoch, by the number that gloo gives to each."""
    accelerator = Accelerator(strategy, gradient_accumulation_steps=case.steps)
    model = make_model()
    model, optimizer, loader = accelerator.prepare(
        model, sgd(model), DataLoader(make_data(case), batch_size=case.batch_size)
    )
    counts: list[int] = []
    for epoch in range(2):
        for x, y, _ in loader:
            before = dist.group.WORLD._get_sequence_number_for_group()
            with accelerator.accumulate(model):
                weight = float(len(x)) if weighted else None
                accelerator.backward(sample_losses(model, x, y).mean(), weight=weight)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            if epoch == 1:
                counts.append(dist.group.WORLD._get_sequence_number_for_group() - before)
    return counts


@pytest.mark.parametrize(
    "strategy",
    [DDP(), DDP(static_graph=True), DDP(gradient_as_bucket_view=True)],
    ids=["default", "static_graph", "gradient_as_bucket_view"],
)
def test_ranks_communicate_once_a_window(ranks: RankPool, strategy: DDP) -> None:
    case = Case(length=22, world=2, steps=3)  # 6 micro-batches: two windows, the last of a tail
    for first, *others in ranks(count_collectives, strategy, case):
        assert others == [0, 1, 0, 0, 1]
        assert first <= 1  # ranks agree once an epoch that they are at the same place


def test_explicit_weights_cost_one_more_collective_a_window(ranks: RankPool) -> None:
    case = Case(length=22, world=2, steps=3)
    for first, *others in ranks(count_collectives, DDP(), case, True):
        assert others == [0, 2, 0, 0, 2]
        assert first <= 1


def evaluate_on_one_rank() -> float:
    accelerator = Accelerator("ddp")
    model = make_model()
    model, optimizer, loader = accelerator.prepare(model, sgd(model), DataLoader(make_data(Case())))
    for x, y, _ in loader:
        if accelerator.is_main_process:
            with torch.no_grad():
                model(x)
                model(x)
        with accelerator.accumulate(model):
            accelerator.backward(sample_losses(model, x, y).mean())
            optimizer.step()
            optimizer.zero_grad()
        if not accelerator.is_main_process:
            with torch.inference_mode():
                model(x)
    return model[2].bias.item()


def test_forward_without_gradients_on_one_rank_does_not_wait_for_the_others(ranks: RankPool) -> None:
    first, second = ranks(evaluate_on_one_rank, timeout=30)
    assert first == second


# -- several accelerators --------------------------------------------------------------------------------------


def train_side_by_side(first: Case, second: Case) -> tuple[Tensor, Tensor]:
    loops = []
    for case in (first, second):
        accelerator = Accelerator("ddp", gradient_accumulation_steps=case.steps)
        model = make_model(seed=case.steps)
        model, optimizer, loader = accelerator.prepare(
            model, sgd(model), DataLoader(make_data(case), batch_size=case.batch_size)
        )
        loops.append((accelerator, model, optimizer, iter(loader)))
    for _ in range(first.num_batches):
        for accelerator, model, optimizer, iterator in loops:
            x, y, _ = next(iterator)
            with accelerator.accumulate(model):
                accelerator.backward(sample_losses(model, x, y).mean())
                optimizer.step()
                optimizer.zero_grad()
    return flat(loops[0][1]), flat(loops[1][1])


def test_two_accelerators_side_by_side_do_not_disturb_each_other(ranks: RankPool) -> None:
    cases = [Case(length=24, world=2, steps=2), Case(length=21, world=2, steps=3)]
    expected = []
    for case in cases:
        model, (x, y, _) = make_model(seed=case.steps), make_data(case).tensors
        optimizer = sgd(model)
        for window in case.windows():
            samples = [sample for batch in window for sample in batch]
            optimizer.zero_grad()
            sample_losses(model, x[samples], y[samples]).mean().backward()
            optimizer.step()
        expected.append(flat(model))
    for got in ranks(train_side_by_side, *cases):
        for ours, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


ALONE = """
from accelerator import Accelerator
import torch
accelerator = Accelerator("ddp")
model = torch.nn.Linear(2, 1)
model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
with accelerator.accumulate(model):
    accelerator.backward(model(torch.ones(1, 2)).mean())
    optimizer.step()
print("trained on", accelerator.num_processes)
"""


def test_under_plain_python_the_world_is_one(fresh: FreshProcesses) -> None:
    (finished,) = fresh(ALONE, warm=True)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == "trained on 1\n"
