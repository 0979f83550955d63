"""The facade: who does what among processes, what it gathers and explains, and what it refuses."""

from __future__ import annotations

import gc
import os
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from accelerator import Accelerator, SingleDevice
from fresh_process import FreshProcesses
from rank_pool import RankPool
from strategies import (
    ConfigurationError,
    LaunchError,
    PeerLostError,
    PrepareError,
    StepError,
)


def numbers(length: int, batch_size: int) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.arange(length)), batch_size=batch_size)


# -- processes ---------------------------------------------------------------------------------------------


def places() -> tuple[Any, ...]:
    accelerator = Accelerator()
    before = accelerator.num_processes, accelerator.process_index, accelerator.local_process_index
    accelerator.prepare(nn.Linear(1, 1))
    after = accelerator.num_processes, accelerator.process_index, accelerator.local_process_index
    assert before == after
    return (*after, accelerator.is_main_process, accelerator.is_local_main_process, accelerator.device.type)


def test_every_rank_knows_its_place_before_and_after_prepare(ranks: RankPool) -> None:
    assert ranks(places, env={"ACCELERATOR_STRATEGY": "ddp"}) == [
        (2, 0, 0, True, True, "cpu"),
        (2, 1, 1, False, False, "cpu"),
    ]


def report_on_main() -> list[Any]:
    accelerator = Accelerator(strategy="ddp")
    accelerator.print("from", accelerator.process_index, sep="-", end="!\n")

    @accelerator.on_main_process
    def square(number: int, *, offset: int = 0) -> int:
        """Its own words."""
        return number * number + offset

    return [square(3, offset=1), square.__name__, square.__doc__]


def test_only_the_main_process_prints_and_runs_what_is_its(ranks: RankPool, capsys: pytest.CaptureFixture[str]) -> None:
    assert ranks(report_on_main) == [[10, "square", "Its own words."], [None, "square", "Its own words."]]
    assert [line for line in capsys.readouterr().out.splitlines() if "from" in line] == ["from-0!"]


def enter_first(local: bool) -> float:
    accelerator = Accelerator(strategy="ddp")
    with accelerator.local_main_process_first() if local else accelerator.main_process_first():
        if accelerator.is_main_process:
            time.sleep(0.3)
        return time.monotonic()


@pytest.mark.parametrize("local", [False, True])
def test_the_main_process_is_through_before_the_others_begin(ranks: RankPool, local: bool) -> None:
    main, *others = ranks(enter_first, local, nproc=3)
    assert all(main <= other for other in others)


def raise_first(on_main: bool) -> list[float]:
    accelerator = Accelerator(strategy="ddp")
    try:
        with accelerator.main_process_first():
            if accelerator.is_main_process == on_main:
                raise ValueError("no download")
    except ValueError:
        pass
    return accelerator.gather(torch.tensor(1.0)).tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("on_main", [True, False])
def test_a_failure_in_the_block_leaves_nobody_waiting(ranks: RankPool, on_main: bool) -> None:
    assert ranks(raise_first, on_main) == [[1, 1]] * 2


def share(inputs: Any, apply_padding: bool) -> Any:
    with Accelerator(strategy="ddp").split_between_processes(inputs, apply_padding) as part:
        return part


def test_inputs_are_split_over_ranks(ranks: RankPool) -> None:
    assert ranks(share, list(range(5)), False, nproc=3) == [[0, 1], [2, 3], [4]]


def wave_flags() -> list[bool]:
    accelerator = Accelerator(strategy="ddp")
    seen = [accelerator.check_trigger()]
    if accelerator.process_index == 1:
        accelerator.set_trigger()
    return [*seen, accelerator.check_trigger(), accelerator.check_trigger()]


def test_a_trigger_of_any_rank_is_seen_once_by_all(ranks: RankPool) -> None:
    assert ranks(wave_flags) == [[False, True, False]] * 2


# -- what is refused ---------------------------------------------------------------------------------------


def test_a_strategy_with_a_typo_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigurationError, match=r"strategy is 'dpp' .*Did you mean 'ddp'\?"):
        Accelerator(strategy="dpp")


def test_two_processes_asked_for_and_one_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "accelerator.toml").write_text("[launch]\nnproc_per_node = 2\n")
    monkeypatch.chdir(tmp_path)
    asked = r"launch\.nproc_per_node is 2 \(accelerator\.toml line 2\); processes asked for: 2, found: 1"
    with pytest.raises(LaunchError, match=asked):
        Accelerator()


def test_what_cannot_be_prepared_is_refused_before_anything_changes() -> None:
    accelerator = Accelerator(strategy="cpu")
    model = nn.Linear(1, 1)
    for wrong, advice in [
        (torch.ones(1), r"tensor\.to\(accelerator\.device\)"),
        ([1, 2], "torch.utils.data.DataLoader"),
        (3, "expected torch modules, optimizers"),
        (None, "got NoneType"),
    ]:
        with pytest.raises(PrepareError, match=advice):
            accelerator.prepare(model, wrong)
    with pytest.raises(PrepareError, match=r"prepare\(\) got nothing"):
        accelerator.prepare()
    assert accelerator.prepare(model) is not None


def test_nothing_is_prepared_twice() -> None:
    accelerator = Accelerator(strategy="cpu")
    model, loader = nn.Linear(1, 1), numbers(4, 2)
    prepared = accelerator.prepare(model, loader)
    for again in (model, loader, *prepared):
        with pytest.raises(PrepareError, match=r"is prepared already\. Prepare each object once"):
            accelerator.prepare(again)
    other = nn.Linear(1, 1)
    with pytest.raises(PrepareError, match="is prepared already"):
        accelerator.prepare(other, other)


def test_an_optimizer_of_no_prepared_model_is_refused() -> None:
    accelerator = Accelerator(strategy="cpu")
    model, stranger = nn.Linear(2, 1), nn.Linear(3, 1)
    with pytest.raises(PrepareError, match=r"SGD holds 2 of 2 parameters that belong to no prepared model .*\(1, 3\)"):
        accelerator.prepare(model, torch.optim.SGD(stranger.parameters()))
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters()))
    assert optimizer.param_groups[0]["params"][0] is prepared.weight


def test_a_scheduler_of_no_prepared_optimizer_is_refused() -> None:
    model = nn.Linear(1, 1)
    scheduler = torch.optim.lr_scheduler.StepLR(torch.optim.SGD(model.parameters()), 1)
    with pytest.raises(PrepareError, match="StepLR schedules a SGD that is not prepared"):
        Accelerator(strategy="cpu").prepare(model, scheduler)


def test_a_model_of_another_accelerator_is_refused() -> None:
    theirs = Accelerator(strategy="cpu").prepare(nn.Linear(1, 1))
    accelerator = Accelerator(strategy="cpu")
    for model in (theirs, nn.Linear(1, 1)):
        with pytest.raises(StepError, match="Linear was not prepared by this Accelerator"):
            accelerator.accumulate(model)


# -- around the loop ---------------------------------------------------------------------------------------


def test_unwrap_gives_the_users_own_module() -> None:
    accelerator = Accelerator(strategy="cpu")
    model = nn.Linear(1, 1)
    assert accelerator.unwrap_model(accelerator.prepare(model)) is model
    assert accelerator.unwrap_model(model) is model


def explain_two() -> str:
    accelerator = Accelerator(strategy="ddp", gradient_accumulation_steps=4, seed=7)
    accelerator.prepare(numbers(9, 2))
    explained = accelerator.explain()
    assert explained["gradient_accumulation_steps"].got == "4"
    assert explained["gradient_accumulation_steps"].origin == "code"
    assert explained["split_batches"].origin == "default"
    with pytest.raises(KeyError):
        explained["nothing"]
    return str(explained)


def test_explain_names_what_was_asked_what_runs_and_from_where(ranks: RankPool) -> None:
    for rank, text in enumerate(ranks(explain_two, env={"ACCELERATOR_MIXED_PRECISION": "bf16"})):
        lines = {line.split("  ")[0].strip(): line for line in text.splitlines()}
        assert "DDP (strategies.ddp)" in lines["strategy"]
        assert f"2, this is rank {rank}" in lines["processes"]
        assert "gloo" in lines["processes"]
        assert "bfloat16" in lines["mixed_precision"]
        assert lines["mixed_precision"].endswith("ACCELERATOR_MIXED_PRECISION")
        assert lines["seed"].endswith("code")
        assert lines["strategy.bucket_cap_mb"].endswith("default")
        assert "9 samples, in order, 3 global batches of 4, the last one of 1" in lines["loader 0"]


def test_freed_memory_is_free() -> None:
    accelerator = Accelerator(strategy="cpu")
    model = nn.Linear(1, 1)
    held = weakref.ref(model)
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters()))
    del prepared, optimizer, model
    gc.collect()
    assert held() is not None
    accelerator.free_memory()
    assert held() is None
    model = accelerator.prepare(nn.Linear(1, 1))
    with accelerator.accumulate(model):
        accelerator.backward(model(torch.ones(1, 1)).mean())


def test_what_is_given_to_free_memory_is_let_go_of() -> None:
    accelerator = Accelerator(strategy="cpu")
    model = nn.Linear(1, 1)
    held = weakref.ref(model)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters()))
    model, optimizer = accelerator.free_memory(model, optimizer)
    gc.collect()
    assert (model, optimizer, held()) == (None, None, None)
    assert accelerator.free_memory() == []


def end_twice() -> bool:
    accelerator = Accelerator(strategy="ddp")
    model = accelerator.prepare(nn.Linear(1, 1))
    with accelerator.accumulate(model):
        accelerator.backward(model(torch.ones(1, 1)).mean())
    accelerator.end_training()
    accelerator.end_training()
    return torch.distributed.is_initialized()


def test_training_may_be_ended_twice(ranks: RankPool) -> None:
    assert ranks(end_twice) == [False, False]


TRAINING = """
import torch
from torch.utils.data import DataLoader, TensorDataset
from accelerator import Accelerator
accelerator = Accelerator(strategy="ddp", gradient_accumulation_steps=2)
model = torch.nn.Linear(2, 1)
optimizer = torch.optim.AdamW(model.parameters())
scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
loader = DataLoader(TensorDataset(torch.randn(21, 2)), batch_size=2, shuffle=True)
model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)
for (batch,) in loader:
    with accelerator.accumulate(model):
        accelerator.backward(model(batch).mean())
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
print("done")
"""


@pytest.mark.timeout(300)
def test_two_processes_exit_cleanly_every_time(fresh: FreshProcesses) -> None:
    for warm in (False, True, True, True):  # fifty times in tests/benchmarks/bench_exit.py
        for finished in fresh(TRAINING, nproc=2, warm=warm):
            assert (finished.returncode, finished.stdout, finished.stderr) == (0, "done\n", "")


def outlive(how: str) -> list[int]:
    first = Accelerator(strategy="ddp")
    if how == "after the end":
        first.gather(torch.ones(1))
        first.end_training()
        second = Accelerator(strategy="ddp")
    else:
        second = Accelerator(strategy="ddp")
        if how == "forgotten":
            del first
            gc.collect()
        else:
            first.end_training()
    return second.gather(torch.tensor(second.process_index)).tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("how", ["forgotten", "ended", "after the end"])
def test_a_second_accelerator_outlives_the_first(ranks: RankPool, how: str) -> None:
    assert ranks(outlive, how) == [[0, 1]] * 2


class Broken(torch.utils.data.Dataset[Tensor]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Tensor:
        raise ValueError("sample is broken")


def recover_then_lose_a_peer() -> None:
    accelerator = Accelerator(strategy="ddp")
    with pytest.raises(ValueError, match="sample is broken"):
        next(iter(accelerator.prepare(DataLoader(Broken()))))
    accelerator.wait_for_everyone()
    if accelerator.process_index == 1:
        os._exit(0)
    with pytest.raises(PeerLostError, match="cannot end: rank 1 left"):
        accelerator.gather(torch.ones(1))


def test_an_error_that_was_recovered_from_is_not_blamed_later(ranks: RankPool) -> None:
    assert ranks(recover_then_lose_a_peer, return_exceptions=True)[0] is None


def test_the_origin_of_an_option_is_known_under_auto(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "accelerator.toml").write_text('[single]\ndevice = "cpu"\n')
    monkeypatch.chdir(tmp_path)
    row = Accelerator().explain()["strategy.device"]
    assert (row.got, row.origin) == ("cpu", "accelerator.toml line 2")


def test_a_default_of_a_strategy_given_as_a_class_is_a_default() -> None:
    assert Accelerator(strategy=SingleDevice).explain()["strategy.device"].origin == "default"


def test_use_after_the_end_is_an_error_of_ours(ranks: RankPool) -> None:
    for error in ranks(use_after_the_end, return_exceptions=True):
        assert type(error).__module__ == "strategies.errors", repr(error)


def use_after_the_end() -> None:
    accelerator = Accelerator(strategy="ddp")
    accelerator.end_training()
    accelerator.wait_for_everyone()
