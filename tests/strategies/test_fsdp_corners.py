"""Corners of FSDP and `init_module` that once went wrong in silence, each against one process or refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from accelerator import Accelerator
from blocks_net import Block, make_net
from rank_pool import RankPool
from strategies import FSDP, PrepareError, StepError, clipping
from strategies.shards import is_sharded, whole

TABLE = torch.linspace(-1, 1, 24).view(6, 4)


class Mixed(nn.Module):
    """Parameters and buffers that are real although the model is built under `init_module`."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding.from_pretrained(TABLE.clone(), freeze=False)
        self.norm = nn.LayerNorm(4, device="cpu")
        self.given = nn.Parameter(torch.from_numpy(np.random.randn(4, 4).astype(np.float32)))
        self.made = nn.Parameter(torch.tensor(np.random.randn(8), dtype=torch.float32))
        self.register_buffer("angles", torch.from_numpy(np.arange(4, dtype=np.float32)))
        rates = [rate.item() for rate in torch.linspace(0, 0.3, 4)] + torch.linspace(0, 1, 3).tolist()
        self.rates = rates
        self.linear = nn.Linear(4, 8)


def mixed(seed: int) -> dict[str, Tensor]:
    np.random.seed(seed)
    torch.manual_seed(seed)
    model = Mixed()
    model.head = nn.Linear(8, 3)
    return dict([*model.named_parameters(), *model.named_buffers()])


def build_mixed() -> dict[str, Tensor]:
    accelerator = Accelerator(FSDP())
    np.random.seed(accelerator.process_index)  # rank 0's numbers are those that count
    torch.manual_seed(accelerator.process_index)
    with accelerator.init_module():
        model = Mixed()
    assert model.rates == pytest.approx([0, 0.1, 0.2, 0.3, 0, 0.5, 1])
    model.head = nn.Linear(8, 3)  # real: built after the block
    model = accelerator.prepare(model)
    return {name: whole(t).clone() for name, t in [*model.named_parameters(), *model.named_buffers()]}


def test_real_tensors_in_a_deferred_model_keep_rank_0s_numbers(ranks: RankPool) -> None:
    expected = mixed(0)
    for tensors in ranks(build_mixed, nproc=2):
        assert tensors.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(tensors[name], tensor), name


def build(what: str) -> None:
    accelerator = Accelerator(FSDP())
    with accelerator.init_module():
        if what == "seed":
            torch.manual_seed(7)
        if what == "generator":
            nn.Linear(2, 2).register_buffer("noise", torch.randn(2, generator=torch.Generator().manual_seed(3)))
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        if what == "random":
            float(model[0].weight[0, 0])
    if what == "write":
        nn.init.zeros_(model[1].weight)
    if what == "load":
        model.load_state_dict({name: torch.zeros(4, 4) for name in ("0.weight", "1.weight")}, strict=False)
    accelerator.prepare(model)


@pytest.mark.filterwarnings("ignore:for 0.weight. copying from a non-meta parameter")
@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("seed", "the random generator was seeded"),
        ("generator", "drew from a generator of its own"),
        ("random", "looks at a random number"),
        ("write", r"1\.weight of Sequential had no numbers yet when the script wrote to it"),
    ],
)
def test_what_a_deferred_model_cannot_keep_is_refused(ranks: RankPool, what: str, words: str) -> None:
    with pytest.raises(PrepareError, match=words):
        ranks(build, what, nproc=1)


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.spare = nn.Parameter(torch.tensor(2.0))
        self.table = nn.Embedding(3, 4)

    def forward(self, x: Tensor, head: str) -> Tensor:
        return getattr(self, head)(self.body(x))


def train_heads(by_rank: bool) -> Tensor:
    accelerator = Accelerator(FSDP())
    torch.manual_seed(0)
    net = TwoHeads()
    model, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.5))
    for _ in range(2):
        with accelerator.accumulate(model):
            head = ("one", "two")[accelerator.process_index if by_rank else 0]
            accelerator.backward(model(torch.ones(2, 4), head).sum())
            optimizer.step()
            optimizer.zero_grad()
    return whole(dict(model.named_parameters())["spare"])


def test_a_parameter_used_on_some_ranks_only_is_refused(ranks: RankPool) -> None:
    for outcome in ranks(train_heads, True, nproc=2, return_exceptions=True):
        assert isinstance(outcome, StepError)
        assert "one.weight, one.bias, two.weight, two.bias of TwoHeads took part in the loss on some ranks" in str(
            outcome
        )


def test_a_scalar_that_no_rank_uses_has_no_gradient(ranks: RankPool) -> None:
    assert ranks(train_heads, False, nproc=2) == [torch.tensor(2.0)] * 2


def extra_forwards(strategy: FSDP, when: str) -> list[list[float]]:
    """Losses with a forward beside them whose gradient nobody asks for, and without."""
    results = []
    for extra in (True, False):
        accelerator = Accelerator(strategy, gradient_accumulation_steps=2)
        model, optimizer = accelerator.prepare(net := make_net(), torch.optim.SGD(net.parameters(), lr=0.1))
        losses = []
        for _ in range(6):
            with accelerator.accumulate(model):
                loss = (model(torch.ones(2, 5)) ** 2).mean()
                accelerator.backward(loss)
                _ = extra and when == "before clipping" and model(torch.ones(2, 5))
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                _ = extra and when == "before step" and model(torch.ones(2, 5))
                optimizer.step()
                _ = extra and when == "after step" and model(torch.ones(2, 5))
                optimizer.zero_grad()
            _ = extra and when == "after the window" and model.eval()(torch.ones(2, 5))
            model.train()
            losses.append(loss.item())
        accelerator.end_training()
        results.append(losses)
    return results


@pytest.mark.parametrize("nproc", [1, 2])
def test_forwards_beside_the_loss_change_nothing(ranks: RankPool, nproc: int) -> None:
    for when in ("before clipping", "before step", "after step", "after the window"):
        for strategy in (FSDP(), FSDP(reshard_after_forward=False), FSDP(cpu_offload=True)):
            with_them, without = ranks(extra_forwards, strategy, when, nproc=nproc)[0]
            assert with_them == without, (when, strategy)


def write_by_hand() -> tuple[float, float]:
    accelerator = Accelerator(FSDP())
    model = accelerator.prepare(make_net())
    before = model(torch.ones(2, 5))
    with torch.no_grad():
        for parameter in filter(is_sharded, model.parameters()):
            parameter.zero_()
    return float(before.detach().abs().max()), float(model(torch.ones(2, 5)).detach().abs().max())


def test_a_forward_sees_what_was_written_after_the_one_before(ranks: RankPool) -> None:
    for before, after in ranks(write_by_hand, nproc=2):
        assert before > 0 == after


class Loss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        assert scale.dtype == torch.float32
        return (self.linear(x).float() / scale).mean()


def inputs_in_half() -> float:
    accelerator = Accelerator(FSDP(), mixed_precision="fp16")
    torch.manual_seed(0)
    model = accelerator.prepare(Loss())
    return float(model(torch.ones(2, 4), torch.tensor(1e6)).detach())


def test_inputs_of_the_model_keep_their_dtype(ranks: RankPool) -> None:
    assert all(0 < abs(value) < 1e-5 for value in ranks(inputs_in_half, nproc=2))


def clip_after_a_second_forward() -> float:
    accelerator = Accelerator(FSDP())
    model, optimizer = accelerator.prepare(net := make_net(), torch.optim.SGD(net.parameters(), lr=0.1))
    with accelerator.accumulate(model):
        accelerator.backward(model(torch.ones(2, 5)).sum())
        model(torch.ones(2, 5))  # a metric, without no_grad
        norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return float(norm)


@pytest.mark.parametrize("nproc", [1, 2])
def test_clipping_after_a_second_forward_sees_all_gradients(ranks: RankPool, nproc: int) -> None:
    net = make_net()
    net(torch.ones(2, 5)).sum().backward()
    norm = float(torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0))
    assert ranks(clip_after_a_second_forward, nproc=nproc) == pytest.approx([norm] * nproc, rel=1e-6)


def clip_on_an_equal_mesh() -> float:
    """Rank 0 has a gradient on another mesh than the parameter's, an equal one: DTensor's cache may give it that."""
    accelerator = Accelerator(FSDP(timeout_seconds=20))
    model = accelerator.prepare(net := make_net())
    accelerator.backward(model(torch.ones(2, 5)).sum())
    sharded = [parameter for parameter in net.parameters() if is_sharded(parameter) and parameter.grad is not None]
    for parameter in sharded[: 2 if accelerator.is_main_process else 0]:
        gradient: Any = parameter.grad
        other = DeviceMesh("cpu", gradient.device_mesh.mesh, mesh_dim_names=("shard",), _init_backend=False)
        other._dim_group_names = gradient.device_mesh._dim_group_names
        parameter.grad = DTensor.from_local(gradient.to_local(), other, gradient.placements, run_check=False)
    norm = clipping.clip_grad_norm(list(net.parameters()), 1.0)
    accelerator.wait_for_everyone()
    return float(norm)


def test_gradients_on_equal_meshes_are_reduced_as_one(ranks: RankPool) -> None:
    first, second = ranks(clip_on_an_equal_mesh)
    assert first == second > 0


class Remembering(nn.Linear):
    """Extra state, and a hook that renames."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.count = 0
        self.register_load_state_dict_pre_hook(rename)

    def get_extra_state(self) -> int:
        return self.count

    def set_extra_state(self, state: int) -> None:
        self.count = state


def rename(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    if "old_weight" in state:
        state["weight"] = 2 * state.pop("old_weight")


def load_with_hooks() -> tuple[int, Tensor]:
    accelerator = Accelerator(FSDP())
    model = accelerator.prepare(Remembering())
    model.load_state_dict({"old_weight": torch.ones(4, 4), "bias": torch.zeros(4), "_extra_state": 7})
    return model.count, whole(model.weight)


def test_loading_runs_hooks_and_extra_state(ranks: RankPool) -> None:
    for count, weight in ranks(load_with_hooks, nproc=2):
        assert count == 7
        assert torch.equal(weight, torch.full((4, 4), 2.0))


def round_trip() -> list[Tensor]:
    """An optimizer's state, gathered whole, goes into another run's optimizer."""
    accelerator = Accelerator(FSDP())
    results = []
    state: Any = None
    for _ in range(2):
        net = make_net()
        model, optimizer = accelerator.prepare(net, torch.optim.AdamW(net.parameters(), lr=0.1))
        if state is not None:
            optimizer.load_state_dict(state)
        for _ in range(2):
            with accelerator.accumulate(model):
                accelerator.backward(model(torch.ones(2, 5)).sum())
                optimizer.step()
                optimizer.zero_grad()
        raw = optimizer.state_dict()
        gathered = {k: {n: whole(v).clone() for n, v in values.items()} for k, values in raw["state"].items()}
        state = {**raw, "state": gathered}
        results.append(whole(next(model.parameters())).clone())
    return results


def test_whole_state_of_an_optimizer_is_cut(ranks: RankPool) -> None:
    for first, second in ranks(round_trip, nproc=2):
        assert not torch.equal(first, second)


class Normalised(torch.optim.SGD):
    """Divides by the norm of what it takes for the whole gradient."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    norm = getattr(parameter.grad, "_local_tensor", parameter.grad).norm()
                    parameter.data.add_(parameter.grad / float(norm), alpha=-group["lr"])


class Lookahead(torch.optim.SGD):
    def __init__(self, base: torch.optim.Optimizer) -> None:
        super().__init__(base.param_groups[0]["params"], lr=0.1)
        self.base, self.num_steps = base, 0

    def step(self, closure: Any = None) -> Any:
        self.base.step()
        self.num_steps += 1


def prepare_optimizer(kind: str) -> tuple[int, int]:
    accelerator = Accelerator(FSDP())
    net = make_net()
    if kind == "lookahead":
        base = torch.optim.AdamW(net.parameters())
        optimizer: Any = Lookahead(base)
    else:
        optimizer = Normalised(net.parameters(), lr=0.1)
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)  # a warmup begins at 0
    before = torch.get_rng_state()
    accelerator.prepare(net, optimizer)
    assert torch.equal(torch.get_rng_state(), before)
    return optimizer.num_steps, len(base.state)


def test_the_trial_step_sees_through_a_warmup_and_touches_nothing(ranks: RankPool) -> None:
    with pytest.raises(PrepareError, match="Normalised gives other numbers on sharded parameters"):
        ranks(prepare_optimizer, "normalised", nproc=2)
    assert ranks(prepare_optimizer, "lookahead", nproc=2) == [(0, 0)] * 2


class Opaque:
    def __init__(self, value: Tensor) -> None:
        self.value = value


class ReturnsAnObject(Block):
    def forward(self, x: Tensor) -> Any:
        return Opaque(super().forward(x))


def prepare_odd(what: str) -> None:
    accelerator = Accelerator(FSDP())
    if what == "object":
        accelerator.prepare(ReturnsAnObject(4))(torch.ones(2, 4))
    elif what == "max_norm":
        accelerator.prepare(nn.Sequential(nn.Embedding(4, 4, max_norm=1.0)))
    elif what == "lazy":
        accelerator.prepare(nn.Sequential(nn.LazyLinear(3)))
    else:
        net = make_net()
        accelerator.prepare(net)
        accelerator.free_memory()
        accelerator.prepare(net)


@pytest.mark.parametrize(
    ("what", "kind", "words"),
    [
        ("object", StepError, "ReturnsAnObject returned Opaque, in which no tensor can be found"),
        ("max_norm", PrepareError, r"0 of Sequential has max_norm=1\.0"),
        ("lazy", PrepareError, r"0\.weight of Sequential has no shape"),
        ("again", PrepareError, "Net is sharded already"),
    ],
)
def test_models_that_cannot_be_sharded_are_refused(ranks: RankPool, what: str, kind: Any, words: str) -> None:
    with pytest.raises(kind, match=words):
        ranks(prepare_odd, what, nproc=2)


def test_buffers_of_an_empty_model_are_always_filled() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
            self.two.weight = self.one.weight
            self.register_buffer("filled", torch.empty(4, 4).fill_(3.0))

    accelerator = Accelerator("cpu")
    for _ in range(50):
        with accelerator.init_module(empty=True):
            net = Net()
        assert torch.equal(net.filled, torch.full((4, 4), 3.0))
