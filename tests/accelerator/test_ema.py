"""`EMA` gives the numbers of torch's AveragedModel, on the shards of its model, and outlives what its model does."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

from accelerator import EMA, Accelerator
from blocks_net import Net, losses_of
from oracle import Case, flat, make_data, make_model, sample_losses
from rank_pool import RankPool
from strategies import CPU, DDP, FSDP, ConfigurationError, StateError, StepError
from strategies.shards import is_sharded, local

pytestmark = pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")  # torch 2.9, in the background
DECAY = 0.8
STRATEGIES: dict[str, tuple[Any, int]] = {"cpu": (CPU(), 1), "ddp": (DDP(), 2), "fsdp": (FSDP(), 2)}
WINDOWS, STEPS, GLOBAL_BATCH = 4, 2, 4


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.05, eps=1e-3)


def make_net() -> Net:
    torch.manual_seed(3)
    return Net()


def data() -> TensorDataset:
    """Four windows of two micro-batches, the last window short."""
    x = torch.randn(WINDOWS * STEPS * GLOBAL_BATCH - GLOBAL_BATCH, 5, generator=torch.Generator().manual_seed(5))
    return TensorDataset(x, x.sum(1).sin())


def plain() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The oracle: averaged weights and the model's own."""
    net, (x, y) = make_net(), data().tensors
    optimizer, averaged = adamw(net), AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    for first in range(0, len(x), STEPS * GLOBAL_BATCH):
        window = slice(first, first + STEPS * GLOBAL_BATCH)
        losses_of(net(x[window]), y[window]).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        averaged.update_parameters(net)
    return dict(averaged.module.named_parameters()), dict(net.named_parameters())


def parts(strategy: Any, **settings: Any) -> tuple[Accelerator, Any, Any, Any, EMA]:
    accelerator = Accelerator(strategy, gradient_accumulation_steps=STEPS, split_batches=True, **settings)
    net = make_net()
    loader = DataLoader(data(), batch_size=GLOBAL_BATCH)
    model, optimizer, loader = accelerator.prepare(net, adamw(net), loader)
    return accelerator, model, optimizer, loader, EMA(accelerator, model, decay=DECAY)


def train(accelerator: Accelerator, model: Any, optimizer: Any, loader: Any, windows: int = WINDOWS) -> None:
    for number, (x, y) in enumerate(loader, 1):
        with accelerator.accumulate(model):
            accelerator.backward(losses_of(model(x), y).mean())
            optimizer.step()
            optimizer.zero_grad()
        if number == windows * STEPS:
            break


def averaged_and_own(accelerator: Accelerator, model: Any, ema: EMA) -> tuple[dict[str, Any], dict[str, Any]]:
    with ema.applied():
        averaged = accelerator.get_state_dict(model)
    return averaged, accelerator.get_state_dict(model)


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value.detach(), atol=2e-6, rtol=2e-6)


# -- the numbers -----------------------------------------------------------------------------------------------


@settings(max_examples=12)
@given(st.integers(1, 13), st.integers(1, 3), st.integers(1, 3), st.sampled_from([0.0, 0.5, 0.999, 1.0]))
def test_averages_are_those_of_averaged_model(length: int, batch_size: int, steps: int, decay: float) -> None:
    case = Case(length=length, batch_size=batch_size, steps=steps)
    expected, (x, y, _) = make_model(), make_data(case).tensors
    optimizer, averaged = adamw(expected), AveragedModel(expected, multi_avg_fn=get_ema_multi_avg_fn(decay))
    for window in case.windows() * 2:
        samples = [sample for batch in window for sample in batch]
        optimizer.zero_grad()
        sample_losses(expected, x[samples], y[samples]).mean().backward()
        optimizer.step()
        averaged.update_parameters(expected)
    accelerator = Accelerator("cpu", gradient_accumulation_steps=steps)
    model = make_model()
    model, optimizer, loader = accelerator.prepare(model, adamw(model), DataLoader(make_data(case), batch_size))
    ema = EMA(accelerator, model, decay=decay)
    for x, y, _ in [batch for _ in range(2) for batch in iterate(accelerator, model, optimizer, loader)]:
        del x, y
    with ema.applied():
        torch.testing.assert_close(flat(model), flat(averaged.module), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(flat(model), flat(expected), rtol=1e-9, atol=1e-11)


def iterate(accelerator: Accelerator, model: Any, optimizer: Any, loader: Any) -> list[Any]:
    taken = []
    for x, y, tokens in loader:
        with accelerator.accumulate(model):
            accelerator.backward(sample_losses(model, x, y).mean())
            optimizer.step()
            optimizer.zero_grad()
        taken.append((x, y, tokens))
    return taken


def run(strategy: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, tuple[int, int]]]:
    accelerator, model, optimizer, loader, ema = parts(strategy)
    train(accelerator, model, optimizer, loader)
    held = {
        name: (local(a).numel(), local(p).numel())
        for (name, a), p in zip(ema._averages.items(), model.parameters(), strict=True)
    }
    assert all(is_sharded(a) == is_sharded(p) for a, p in zip(ema._averages.values(), model.parameters(), strict=True))
    try:
        return *averaged_and_own(accelerator, model, ema), held
    finally:
        accelerator.end_training()


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_gives_the_numbers_of_one_process(name: str, ranks: RankPool) -> None:
    strategy, nproc = STRATEGIES[name]
    expected = plain()
    everywhere = ranks(run, strategy, nproc=nproc)
    assert_equal(everywhere[0][0], expected[0])
    assert_equal(everywhere[0][1], expected[1])
    for _, _, held in everywhere:
        assert all(average == parameter for average, parameter in held.values())  # a rank averages what it holds


def overflowing(name: str) -> tuple[Tensor, list[Tensor]]:
    """Averaged weights after each of four steps, the second of which a float16 overflow on rank 1 skips."""
    accelerator = Accelerator(name, mixed_precision="fp16")
    model = nn.Linear(2, 1)
    nn.init.constant_(model.weight, 0.5)
    x = torch.full((8, 2), 0.25)
    x[3] = 1e6
    model, optimizer, loader = accelerator.prepare(
        model, torch.optim.SGD(model.parameters(), lr=0.5), DataLoader(TensorDataset(x), batch_size=1)
    )
    ema, weights, averages = EMA(accelerator, model, decay=0.5), [], []
    for (batch,) in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(batch).float().mean() / 16)
            optimizer.step()
            optimizer.zero_grad()
        weights.append(accelerator.optimizer_step_was_skipped)
        with ema.applied():
            averages.append(flat(model))
    accelerator.end_training()
    return weights, averages  # type: ignore[return-value]


def test_a_skipped_step_is_not_averaged(ranks: RankPool) -> None:
    for skipped, averages in ranks(overflowing, "ddp"):
        assert skipped == [False, True, False, False]
        assert torch.equal(averages[0], averages[1])
        assert not torch.equal(averages[1], averages[2])


def test_each_optimizer_moves_the_averages_of_its_own_parameters() -> None:
    accelerator = Accelerator("cpu")
    net = nn.ModuleDict({"a": nn.Linear(1, 1, bias=False), "b": nn.Linear(1, 1, bias=False), "c": nn.Linear(1, 1)})
    net["c"].requires_grad_(False)
    for name in "ab":
        nn.init.ones_(net[name].weight)
    one, two = (torch.optim.SGD(net[name].parameters(), lr=1.0) for name in "ab")
    model, one, two = accelerator.prepare(net, one, two)
    ema = EMA(accelerator, model, decay=0.5)
    for steps in ("ab", "a", "ab"):
        with accelerator.accumulate(model):
            accelerator.backward(model["a"].weight.sum() + model["b"].weight.sum())
            for name, optimizer in zip("ab", (one, two), strict=True):
                if name in steps:
                    optimizer.step()
                optimizer.zero_grad()
    frozen = net["c"].weight.clone()
    with ema.applied():
        # a: 0, -1, -2 and b: 0, -1, each first copied, then averaged
        assert model["a"].weight.item() == -1.25
        assert model["b"].weight.item() == -0.5
        assert torch.equal(model["c"].weight, frozen)
    assert (model["a"].weight.item(), model["b"].weight.item()) == (-2, -1)


def test_averages_of_16_bit_weights_move_by_less_than_they_can_show() -> None:
    accelerator = Accelerator("cpu")
    net = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    nn.init.ones_(net.weight)
    model, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.0))
    ema = EMA(accelerator, model, decay=0.999)
    for step in range(1001):
        with accelerator.accumulate(model):
            accelerator.backward(model.weight.sum())
            optimizer.step()
        if step == 0:
            nn.init.zeros_(net.weight)
    with ema.applied():
        assert model.weight.item() == pytest.approx(math.exp(-1), rel=0.01)
    assert model.weight.item() == 0


# -- in and out of the model -----------------------------------------------------------------------------------


class Breaks(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            raise KeyError("evaluation")
        return x


def leave_by_exceptions(strategy: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train half, evaluate with the averages in a forward that breaks, and train the rest."""
    accelerator = Accelerator(strategy, gradient_accumulation_steps=STEPS, split_batches=True)
    net = make_net()
    net.layers[1].register_module("breaks", Breaks())
    before = net.layers[1].forward
    net.layers[1].forward = lambda x: net.layers[1].breaks(before(x))  # type: ignore[method-assign]
    loader = DataLoader(data(), batch_size=GLOBAL_BATCH)
    model, optimizer, loader = accelerator.prepare(net, adamw(net), loader)
    ema = EMA(accelerator, model, decay=DECAY)
    for number, (x, y) in enumerate(loader, 1):
        with accelerator.accumulate(model):
            accelerator.backward(losses_of(model(x), y).mean())
            optimizer.step()
            optimizer.zero_grad()
        if number in (4, 5):  # after the second step, when the averages differ; and inside an open window
            model.eval()
            with pytest.raises(KeyError, match="evaluation"), ema.applied(), torch.no_grad():
                model(x)
            model.train()
    try:
        return averaged_and_own(accelerator, model, ema)
    finally:
        accelerator.end_training()


@pytest.mark.parametrize(
    ("strategy", "nproc"),
    [(CPU(), 1), (DDP(), 2), (FSDP(), 2), (FSDP(reshard_after_forward=False, forward_prefetch=1), 2)],
)
def test_an_exception_in_an_evaluation_leaves_the_training_as_it_was(
    strategy: Any, nproc: int, ranks: RankPool
) -> None:
    averaged, own = ranks(leave_by_exceptions, strategy, nproc=nproc)[0]
    expected = plain()
    assert_equal(averaged, expected[0])
    assert_equal(own, expected[1])


def export(strategy: Any, folder: str) -> None:
    accelerator, model, optimizer, loader, ema = parts(strategy)
    train(accelerator, model, optimizer, loader)
    with ema.applied():
        accelerator.save_model(model, folder)
    accelerator.end_training()


@pytest.mark.parametrize("name", ["cpu", "fsdp"])
def test_averaged_weights_are_written_by_save_model(name: str, ranks: RankPool, tmp_path: Path) -> None:
    strategy, nproc = STRATEGIES[name]
    ranks(export, strategy, str(tmp_path), nproc=nproc)
    assert_equal(load_file(tmp_path / "model.safetensors"), plain()[0])


# -- saved and loaded ------------------------------------------------------------------------------------------


def first_half(strategy: Any, folder: str, in_background: bool) -> None:
    accelerator, model, optimizer, loader, _ = parts(strategy, project_dir=folder)
    train(accelerator, model, optimizer, loader, windows=2)
    accelerator.save_state(async_=in_background)
    accelerator.end_training()


def second_half(strategy: Any, folder: str) -> tuple[dict[str, Any], dict[str, Any]]:
    accelerator, model, optimizer, loader, ema = parts(strategy, project_dir=folder)
    accelerator.load_state()
    train(accelerator, model, optimizer, loader)
    try:
        return averaged_and_own(accelerator, model, ema)
    finally:
        accelerator.end_training()


@pytest.mark.parametrize(
    ("writer", "reader"), [("cpu", "fsdp"), ("fsdp", "cpu"), ("fsdp", "ddp"), ("fsdp", "fsdp"), ("ddp", "cpu")]
)
def test_averages_go_on_under_any_strategy(writer: str, reader: str, ranks: RankPool, tmp_path: Path) -> None:
    (one, nproc_one), (other, nproc_other) = STRATEGIES[writer], STRATEGIES[reader]
    ranks(first_half, one, str(tmp_path), reader == "fsdp", nproc=nproc_one)
    averaged, own = ranks(second_half, other, str(tmp_path), nproc=nproc_other)[0]
    expected = plain()
    assert_equal(averaged, expected[0])
    assert_equal(own, expected[1])


def test_a_resumed_average_is_exact_in_the_same_place(tmp_path: Path) -> None:
    expected, _ = run(CPU())[:2]
    first_half(CPU(), str(tmp_path), False)
    averaged, _ = second_half(CPU(), str(tmp_path))
    assert all(torch.equal(averaged[name], expected[name]) for name in expected)


# -- refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [-0.1, 1.5, math.nan])
def test_a_decay_out_of_range_is_refused(decay: float) -> None:
    accelerator = Accelerator("cpu")
    model = accelerator.prepare(nn.Linear(1, 1))
    with pytest.raises(ConfigurationError, match=r"decay is .*; expected a number from 0 to 1"):
        EMA(accelerator, model, decay=decay)


@pytest.mark.parametrize("kind", ["unprepared", "frozen"])
def test_a_model_that_is_not_trained_here_is_refused(kind: Literal["unprepared", "frozen"]) -> None:
    accelerator = Accelerator("cpu")
    model: nn.Module = nn.Linear(1, 1)
    if kind == "frozen":
        model = accelerator.prepare(model.requires_grad_(False))
    wrong = StepError if kind == "unprepared" else ConfigurationError
    with pytest.raises(wrong, match=r"was not prepared|no parameter that is trained"):
        EMA(accelerator, model)


def test_no_training_and_no_checkpoint_with_the_averages_in_the_model(tmp_path: Path) -> None:
    accelerator, model, optimizer, loader, ema = parts(CPU(), project_dir=str(tmp_path))
    train(accelerator, model, optimizer, loader, windows=1)
    accelerator.save_state()
    before = flat(model)
    with ema.applied():
        with pytest.raises(StepError, match=r"backward\(\) ran inside EMA.applied"):
            train(accelerator, model, optimizer, loader, windows=1)
        with pytest.raises(StateError, match="Save and load after the block"):
            accelerator.save_state()
        with pytest.raises(StateError, match="Save and load after the block"):
            accelerator.load_state()
        with pytest.raises(StepError, match="entered inside another"), ema.applied():
            pass
    assert torch.equal(flat(model), before)
    train(accelerator, model, optimizer, loader, windows=1)
    assert not torch.equal(flat(model), before)


def test_averages_of_other_parameters_are_refused() -> None:
    accelerator = Accelerator("cpu")
    one, other = accelerator.prepare(nn.Linear(1, 1), nn.Linear(1, 1, bias=False))
    with pytest.raises(StateError, match="other parameters than those that Linear trains: bias"):
        EMA(accelerator, other).load_state_dict(EMA(accelerator, one).state_dict())


def test_before_the_first_step_and_no_step_with_the_averages_in_the_model() -> None:
    accelerator = Accelerator("cpu")
    net = nn.Linear(2, 1)
    model, optimizer = accelerator.prepare(net, adamw(net))
    ema = EMA(accelerator, model)
    model.load_state_dict({name: value + 1 for name, value in net.state_dict().items()})
    loaded = flat(model)
    accelerator.backward(model(torch.ones(1, 2)).square().mean())
    with ema.applied():
        assert torch.equal(flat(model), loaded)
        with pytest.raises(StepError, match=r"stepped inside EMA.applied\(\)"):
            optimizer.step()
    optimizer.step()
    assert not torch.equal(flat(model), loaded)


def test_a_parameter_that_is_unfrozen_later_is_refused() -> None:
    accelerator = Accelerator("cpu")
    net = nn.Linear(2, 1)
    net.bias.requires_grad_(False)
    model, optimizer = accelerator.prepare(net, adamw(net))
    EMA(accelerator, model)
    net.bias.requires_grad_(True)
    accelerator.backward(model(torch.ones(1, 2)).square().mean())
    with pytest.raises(StepError, match="frozen when its EMA was made, and is trained now"):
        optimizer.step()
