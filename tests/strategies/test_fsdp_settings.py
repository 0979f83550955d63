"""Settings of FSDP and of optimizers under it: what they do, and values that do not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode

from accelerator import Accelerator
from blocks_net import Block, make_net
from rank_pool import RankPool
from strategies import DDP, FSDP, XLA, ConfigurationError, PrepareError, Strategy


class Collectives(TorchDispatchMode):
    """Notes when parameters are gathered and gradients reduced."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.seen += "g" * ("allgather" in func._opname) + "r" * ("reduce_scatter" in func._opname)
        return func(*args, **(kwargs or {}))


def in_backward(backward_prefetch: int) -> str:
    accelerator = Accelerator(FSDP(backward_prefetch=backward_prefetch, reshard_after_forward=True))
    model, _ = accelerator.prepare(net := make_net(), torch.optim.SGD(net.parameters()))
    with accelerator.accumulate(model):
        loss = model(torch.ones(2, 5)).sum()
        with Collectives() as collectives:
            accelerator.backward(loss)
    return collectives.seen


def test_blocks_are_gathered_as_far_ahead_as_asked(ranks: RankPool) -> None:
    seen = {number: ranks(in_backward, number, nproc=2)[0] for number in (0, 1, 2)}
    # the rest of the model, then three blocks: each gathered before its own gradients are reduced
    assert seen == {0: "ggrgrgrr", 1: "gggrgrrr", 2: "ggggrrrr"}


WRONG: list[tuple[type[Strategy], dict[str, Any], str]] = [
    (FSDP, {"compile": "inductor"}, "compile is 'inductor'; expected True or False"),
    (FSDP, {"cpu_offload": "yes"}, "cpu_offload is 'yes'; expected True or False"),
    (FSDP, {"activation_checkpointing": 1}, "activation_checkpointing is 1; expected True or False"),
    (FSDP, {"replicate": "2"}, "replicate is '2'; expected a whole number or None"),
    (FSDP, {"replicate": True}, "replicate is True; expected a whole number or None"),
    (FSDP, {"min_num_params": "1e6"}, "min_num_params is '1e6'; expected a whole number"),
    (FSDP, {"backward_prefetch": "BACKWARD_PRE"}, "backward_prefetch is 'BACKWARD_PRE'; expected a whole number"),
    (FSDP, {"forward_prefetch": 1.5}, "forward_prefetch is 1.5; expected a whole number"),
    (FSDP, {"reshard_after_forward": "true"}, "expected True or False, a whole number or None"),
    (FSDP, {"reduce_dtype": torch.bfloat16}, "reduce_dtype is torch.bfloat16; expected 'float32', 'bfloat16'"),
    (FSDP, {"auto_wrap_policy": None}, "auto_wrap_policy is None; expected a name or a function"),
    (FSDP, {"ignored_params": nn.Linear(1, 1).weight}, "expected a tuple of names"),
    (FSDP, {"forward_methods": (3,)}, r"forward_methods is \(3,\); expected a tuple of names"),
    (DDP, {"find_unused_parameters": "no"}, "find_unused_parameters is 'no'; expected True or False"),
    (DDP, {"bucket_cap_mb": "25"}, "bucket_cap_mb is '25'; expected a number or None"),
    (DDP, {"power_sgd_rank": 1.5}, "power_sgd_rank is 1.5; expected a whole number"),
    (XLA, {"shard": True}, "shard is True; expected 'none', 'data' or 'fsdp'"),
    (XLA, {"shard": "fsdp", "mesh": (2, 2, 2)}, "expected a tuple of 2 whole numbers or None"),
]


@pytest.mark.parametrize(("strategy", "fields", "words"), WRONG)
def test_values_of_the_wrong_type_are_refused(strategy: type[Strategy], fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        strategy(**fields)


def test_a_whole_number_may_be_written_as_a_float() -> None:
    made = FSDP(auto_wrap_policy="size", min_num_params=1e8)  # type: ignore[arg-type]
    assert type(made.min_num_params) is int
    assert made.min_num_params == 100_000_000


def test_names_may_be_one_a_list_or_classes() -> None:
    made = FSDP(transformer_layer_cls=Block, ignored_params="head.*", forward_methods=["one", "two"])  # type: ignore
    assert made == FSDP(
        transformer_layer_cls=("Block",), ignored_params=("head.*",), forward_methods=("one", "two"), replicate=None
    )
    assert FSDP(transformer_layer_cls=(Block, "Linear")).transformer_layer_cls == ("Block", "Linear")  # type: ignore


def compile_with(backend: str) -> None:
    Accelerator(FSDP(compile=True, compile_backend=backend)).prepare(make_net())


def test_a_backend_that_torch_compile_has_not_is_refused(ranks: RankPool) -> None:
    with pytest.raises(
        PrepareError, match=r"compile_backend is 'inductorr'; expected one of .*Did you mean 'inductor'"
    ):
        ranks(compile_with, "inductorr", nproc=1)


def prepare_muon(shortest: int) -> None:
    net = make_net()  # its widest weights have 16 rows, its head one
    matrices = [p for p in net.parameters() if p.ndim == 2 and len(p) >= shortest]
    Accelerator(FSDP()).prepare(net, torch.optim.Muon(matrices))


@pytest.mark.skipif(
    not hasattr(FSDPModule, "set_reduce_scatter_unused_params"),
    reason="torch has no Muon, or one (2.9) that steps on shards of no rows, before 2.13",
)
def test_an_optimizer_is_tried_on_weights_of_which_a_rank_holds_nothing(ranks: RankPool) -> None:
    assert ranks(prepare_muon, 2, nproc=2) == [None, None]
    with pytest.raises(PrepareError, match="Muon cannot step on sharded parameters"):
        ranks(prepare_muon, 1, nproc=2)
