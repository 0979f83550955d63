"""FSDP: every setting against one process, precision, several models, and what it refuses."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from accelerator import Accelerator
from blocks_net import WINDOWS, Net, assert_equal, losses_of, make_net, train, train_plain
from rank_pool import RankPool
from strategies import DDP, FSDP
from strategies.conformance import RULES, run_rule
from strategies.tree import iterate_leaves

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


@pytest.mark.parametrize(
    ("nproc", "names"),
    [(2, list(EXACT)[:5]), (2, list(EXACT)[5:10]), (2, list(EXACT)[10:]), (4, ["default", "ignored", *ON_FOUR])],
)
def test_every_setting_gives_the_numbers_of_one_process(ranks: RankPool, nproc: int, names: list[str]) -> None:
    expected = train_plain(nproc, clip=0.5)
    results = ranks(train_named, names, nproc=nproc, timeout=90)
    for name in names:
        losses, norms, weights, seen = results[0][name]
        assert_equal((losses, norms, weights), expected)
        assert seen == 2 * WINDOWS - 1  # the last window is one short micro-batch
        assert all(other[name][2] == {} for other in results[1:])  # whole on rank 0 only
        assert all(other[name][:2] == (losses, norms) for other in results[1:])


def test_ddp_and_fsdp_agree_to_the_last_bit_where_sums_have_two_terms(ranks: RankPool) -> None:
    ddp, fsdp = ranks(train_both, nproc=2)[0]
    assert ddp[0] == fsdp[0]
    for name, weight in ddp[2].items():
        assert torch.equal(weight, fsdp[2][name]), name


def train_both() -> tuple[Any, Any]:
    return train(DDP()), train(FSDP())


def hold(rules: list[str], strategy: FSDP) -> list[str | None]:
    return [run_rule(name, strategy) for name in rules]


def test_rules_hold_on_a_mesh_of_two_dimensions(ranks: RankPool) -> None:
    rules = ["gradient_uneven_ranks", "gradient_weighted", "clip_norm", "two_models", "overflow_skips_everywhere"]
    assert ranks(hold, rules, FSDP(replicate=2), nproc=4) == [[None] * len(rules)] * 4


def test_every_rule_holds_in_a_world_of_one(ranks: RankPool) -> None:
    rules = [name for name, rule in RULES.items() if rule.min_processes == 1]
    rules.remove("exceptions_leave_nothing")  # refused before torch 2.13; see tests/conformance
    assert ranks(hold, rules, FSDP(), nproc=1) == [[None] * len(rules)]


# -- precision -------------------------------------------------------------------------------------------------


def train_in(precision: Any, strategies: list[FSDP]) -> list[tuple[Any, ...]]:
    return [train(strategy, clip=0.5 / 64, precision=precision, unit=1 / 64) for strategy in strategies]


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 3e-2), ("fp16", 5e-3)])
def test_low_precision_stays_near_float32(ranks: RankPool, precision: str, tolerance: float) -> None:
    strategies = [FSDP(), FSDP(activation_checkpointing=True), FSDP(cpu_offload=True)]
    for got in ranks(train_in, precision, strategies, nproc=2, timeout=60)[0]:
        assert_equal(got[:3], train_plain(2, clip=0.5 / 64, unit=1 / 64), tolerance)
        assert all(weight.dtype == torch.float32 for weight in got[2].values())


class Reduced(TorchDispatchMode):
    """Notes the dtype of what is reduced over ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and "reduce_scatter" in func._opname:
            self.dtypes |= {leaf.dtype for leaf in iterate_leaves(args) if isinstance(leaf, Tensor)}
        return func(*args, **(kwargs or {}))


def reduced_in(reduce_dtype: Any) -> set[torch.dtype]:
    accelerator = Accelerator(FSDP(reduce_dtype=reduce_dtype), mixed_precision="bf16")
    model = accelerator.prepare(make_net())
    with Reduced() as reduced:
        accelerator.backward(model(torch.ones(2, 5)).float().mean())
    return reduced.dtypes


@pytest.mark.parametrize(
    ("asked", "got"), [(None, torch.float32), ("bfloat16", torch.bfloat16), ("float32", torch.float32)]
)
def test_gradients_are_reduced_in_float32_unless_asked_otherwise(ranks: RankPool, asked: Any, got: Any) -> None:
    assert ranks(reduced_in, asked, nproc=2) == [{got}] * 2


# -- several models, evaluation, exceptions --------------------------------------------------------------------


def train_gan(strategy: Any, steps: int) -> dict[str, Tensor]:
    """Two models of blocks with windows of their own; the generator's loss runs through the discriminator."""
    accelerator = Accelerator(strategy, gradient_accumulation_steps=steps)
    torch.manual_seed(0)
    made, judge = Net(), Net()
    made.head = nn.Linear(8, 5)
    made.scale = nn.Parameter(torch.ones(1))
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05) for model in (made, judge)]
    made, judge, *optimizers = accelerator.prepare(made, judge, *optimizers)
    noise = torch.randn(2 * steps * 3, 4, 5, generator=torch.Generator().manual_seed(1))
    size, rank = accelerator.num_processes, accelerator.process_index
    for batch in noise:
        mine = batch.view(size, 4 // size, 5)[rank]
        with accelerator.accumulate(judge):
            accelerator.backward((judge(made(mine).detach()) ** 2).mean() - judge(mine).mean())
            optimizers[1].step()
            optimizers[1].zero_grad()
        with torch.no_grad():
            judge(mine)
        with accelerator.accumulate(made):
            accelerator.backward(-judge(made(mine)).mean())
            optimizers[0].step()
            optimizers[0].zero_grad()
    weights = {
        f"{index}.{name}": value
        for index, model in enumerate((made, judge))
        for name, value in accelerator.get_state_dict(model).items()
    }
    accelerator.end_training()
    return weights


@pytest.mark.parametrize("steps", [1, 3])
def test_a_gan_trains_as_on_one_process(ranks: RankPool, steps: int) -> None:
    expected = ranks(train_gan, "cpu", steps, nproc=1)[0]
    got = ranks(train_gan, FSDP(), steps, nproc=2)[0]
    for name, weight in expected.items():
        if "seen" not in name:
            torch.testing.assert_close(got[name], weight, atol=1e-6, rtol=1e-5)


def train_with_failures(strategy: Any, fail_at: list[int]) -> dict[str, Tensor]:
    """Exceptions in forward or after backward, on every rank alike; the loop catches them and goes on."""
    accelerator = Accelerator(strategy, gradient_accumulation_steps=2)
    net = make_net()
    model, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1))
    x = torch.randn(8, 4, 5, generator=torch.Generator().manual_seed(2))
    size, rank = accelerator.num_processes, accelerator.process_index
    done = 0
    while done < len(x):
        try:
            with accelerator.accumulate(model):
                loss = losses_of(model(x[done].view(size, -1, 5)[rank]), torch.ones(4 // size)).mean()
                if done in fail_at:
                    if fail_at.index(done) % 2:
                        loss.backward()
                    raise ZeroDivisionError
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
        except ZeroDivisionError:
            fail_at = [-1 if index == done else index for index in fail_at]
            done -= done % 2  # the window begins again
            continue
        done += 1
    weights = accelerator.get_state_dict(model)
    accelerator.end_training()
    return weights


@pytest.mark.skipif(torch.__version__ < "2.13", reason="torch has no reset_iter_state before 2.13")
def test_a_loop_goes_on_after_an_exception_in_a_window(ranks: RankPool) -> None:
    expected = ranks(train_with_failures, "cpu", [], nproc=1)[0]
    for weights in (
        ranks(train_with_failures, "cpu", [3, 4, 5], nproc=1)[0],
        ranks(train_with_failures, FSDP(), [3, 4, 5], nproc=2)[0],
    ):
        for name, weight in expected.items():
            if name != "seen":
                torch.testing.assert_close(weights[name], weight, atol=1e-6, rtol=1e-5)


def evaluate(strategy: FSDP) -> tuple[bool, Tensor, Tensor]:
    accelerator = Accelerator(strategy)
    net = make_net()
    model, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1))
    x = torch.ones(2, 5)
    with torch.no_grad():
        model.eval()(x)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return all(id(p) in held for p in model.parameters()), model.without_blocks(x).detach(), model(x).add_(1).detach()


def test_parameters_are_the_optimizers_after_evaluation(ranks: RankPool) -> None:
    plain = make_net().eval()
    x = torch.ones(2, 5)
    for same, method, changed in ranks(evaluate, FSDP(forward_methods=("without_blocks",)), nproc=2):
        assert same
        torch.testing.assert_close(method, plain.without_blocks(x))
        torch.testing.assert_close(changed, plain(x) + 1)
