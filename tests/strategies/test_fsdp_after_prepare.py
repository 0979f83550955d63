"""What a script may do with a model after FSDP has cut it, and what it is told not to."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from accelerator import Accelerator, LocalSGD
from blocks_net import make_net
from rank_pool import RankPool
from strategies import FSDP, CollectiveError, ConfigurationError, PrepareError, StepError
from strategies.shards import whole


def prepared() -> tuple[Accelerator, Any, Any]:
    accelerator = Accelerator(FSDP())
    model, optimizer = accelerator.prepare(net := make_net(), torch.optim.SGD(net.parameters(), lr=0.1))
    return accelerator, model, optimizer


KEEP: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda model: None,
    "to(device)": lambda model: model.to("cpu"),
    "float": lambda model: model.float(),
    "unshard": lambda model: model.unshard(),
    "reshard": lambda model: (model.unshard(), model.reshard()),
    "set_requires_gradient_sync": lambda model: model.set_requires_gradient_sync(True),
}


def two_steps(what: str) -> float:
    accelerator, model, optimizer = prepared()
    for _ in range(2):
        with accelerator.accumulate(model):
            loss = model(torch.ones(2, 5)).square().mean()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        result = KEEP[what](model)
        assert not isinstance(result, nn.Module) or result is model
    return loss.item()


def test_what_changes_no_parameter_may_be_called(ranks: RankPool) -> None:
    expected = ranks(two_steps, "nothing", nproc=2)
    for what in KEEP:
        assert ranks(two_steps, what, nproc=2) == expected, what


CONVERT: dict[str, Callable[[Accelerator, Any], Any]] = {
    "torch.bfloat16 on cpu": lambda accelerator, model: model.to(torch.bfloat16),
    "torch.float64 on cpu": lambda accelerator, model: model.double(),
    "torch.float32 on meta": lambda accelerator, model: model.to("meta"),
    "memory that processes share": lambda accelerator, model: model.share_memory(),
    "torch.bfloat16": lambda accelerator, model: accelerator.unwrap_model(model).bfloat16(),
}


def convert(what: str) -> None:
    accelerator, model, _ = prepared()
    CONVERT[what](accelerator, model)
    model(torch.ones(2, 5))


@pytest.mark.parametrize("what", list(CONVERT))
def test_conversions_are_refused(ranks: RankPool, what: str) -> None:
    with pytest.raises(StepError, match=f"of Net are cut over ranks as torch.float32.* cannot become {what}: neither"):
        ranks(convert, what, nproc=2)


def on_one_rank(call: str, folder: str) -> None:
    accelerator, model, _ = prepared()
    if accelerator.is_main_process:
        getattr(accelerator, call)(model, *([folder] if call == "save_model" else []))
    accelerator.wait_for_everyone()


@pytest.mark.parametrize("call", ["get_state_dict", "save_model"])
def test_a_call_on_one_rank_is_named_on_all(ranks: RankPool, tmp_path: Path, call: str) -> None:
    for outcome in ranks(on_one_rank, call, str(tmp_path), nproc=2, return_exceptions=True):
        assert isinstance(outcome, CollectiveError)
        assert f"rank 0: {call}; rank 1: wait_for_everyone" in str(outcome)


@pytest.mark.parametrize("nproc", [1, 2])
def test_weights_that_were_taken_out_are_a_copy(ranks: RankPool, nproc: int) -> None:
    assert ranks(change_what_was_taken_out, nproc=nproc) == [0.0] * nproc


def change_what_was_taken_out() -> float:
    accelerator, model, _ = prepared()
    before = {name: whole(parameter).clone() for name, parameter in model.named_parameters()}
    for tensor in accelerator.get_state_dict(model).values():
        tensor.add_(1)
    return max(float((whole(p) - before[name]).abs().max()) for name, p in model.named_parameters())


def again(what: str) -> None:
    accelerator, model, _ = prepared()
    if what == "prepare":
        accelerator.prepare(model)
    elif what == "accumulate":
        accelerator.free_memory()
        accelerator.accumulate(model)
    else:
        with LocalSGD(accelerator, model, 2):
            pass


def prepare_sparse() -> None:
    Accelerator(FSDP()).prepare(nn.Sequential(nn.Embedding(4, 4, sparse=True)))


def test_messages_name_the_users_class(ranks: RankPool) -> None:
    for what, words in {
        "prepare": "^Net is prepared already",
        "accumulate": "^Net was not prepared by this Accelerator",
        "local_sgd": "a whole copy of Net by itself",
    }.items():
        with pytest.raises((PrepareError, StepError, ConfigurationError), match=words):
            ranks(again, what, nproc=1)
    with pytest.raises(PrepareError, match="0 of Sequential has sparse=True"):
        ranks(prepare_sparse, nproc=1)


def test_random_numbers_after_prepare_are_refused_where_all_parts_are_alike(ranks: RankPool) -> None:
    for how in ("init", "apply"):
        for outcome in ranks(initialise, how, nproc=2, return_exceptions=True):
            assert isinstance(outcome, StepError), how
            assert "layers.0.up.weight" in str(outcome)
            assert "after prepare(), where every rank draws its part from the same random numbers" in str(outcome)
    for how in ("other seeds", "zeros", "load"):
        assert ranks(initialise, how, nproc=2) == [None, None], how
    assert ranks(initialise, "init", nproc=1) == [None]


def initialise(how: str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="DTensor random operators may not have complete support")
        accelerator, model, _ = prepared()
        torch.manual_seed(accelerator.process_index if how == "other seeds" else 0)
        if how == "apply":
            model.apply(lambda module: module.reset_parameters() if isinstance(module, nn.Linear) else None)
        elif how == "load":
            model.load_state_dict(make_net(9).state_dict())
        else:
            (nn.init.zeros_ if how == "zeros" else nn.init.normal_)(model.layers[0].up.weight)
        model(torch.ones(2, 5))


def write_on_rank_0(training: bool) -> None:
    accelerator, model, _ = prepared()
    if accelerator.is_main_process:
        with torch.no_grad():
            model.layers[0].up.weight.mul_(2)
    with torch.set_grad_enabled(training):
        model(torch.ones(2, 5))


@pytest.mark.parametrize("training", [True, False])
def test_writing_on_some_ranks_only_is_refused_on_all(ranks: RankPool, training: bool) -> None:
    for outcome in ranks(write_on_rank_0, training, nproc=2, return_exceptions=True):
        assert isinstance(outcome, StepError)
        assert "layers.0.up.weight were written to after prepare() on some ranks only" in str(outcome)


def first_forward_on_rank_0() -> None:
    accelerator, model, _ = prepared()
    if accelerator.is_main_process:
        with torch.no_grad():
            model(torch.ones(2, 5))
    else:
        accelerator.gather(torch.ones(1))


def test_a_first_forward_on_one_rank_is_named(ranks: RankPool) -> None:
    for outcome in ranks(first_forward_on_rank_0, nproc=2, return_exceptions=True):
        assert isinstance(outcome, CollectiveError)
        assert "rank 0: the first forward of a sharded model; rank 1: gather" in str(outcome)


def copy_model(what: str) -> None:
    accelerator, model, _ = prepared()
    copy.deepcopy({"view": model, "module": accelerator.unwrap_model(model), "block": model.layers[0]}[what])


@pytest.mark.parametrize(("what", "name"), [("view", "Net"), ("module", "Net"), ("block", "Block")])
def test_a_copy_is_refused_with_what_to_do_instead(ranks: RankPool, what: str, name: str) -> None:
    with pytest.raises(StepError, match=rf"{name} is cut over ranks, and a copy would not be: .*EMA averages"):
        ranks(copy_model, what, nproc=1)
