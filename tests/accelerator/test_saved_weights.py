"""Weights taken out of checkpoints of `save_state`: whoever wrote them, verified, and of one model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from accelerator import Accelerator
from accelerator.bigmodel import init_empty_weights, load_checkpoint_in_model
from accelerator.bigmodel.estimate import size_of_model
from blocks_net import Net, make_net
from rank_pool import RankPool
from strategies.errors import StateError


def save(folder: Path | str, *models: nn.Module, strategy: str = "cpu") -> Path:
    accelerator = Accelerator(strategy, project_dir=folder)
    for model in models:
        accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    return Path(accelerator.save_state())


def save_under_fsdp(folder: str) -> Path:
    return save(folder, make_net(), nn.Linear(3, 3), strategy="fsdp")


def test_one_model_of_a_checkpoint_that_two_ranks_wrote(ranks: RankPool, tmp_path: Path) -> None:
    checkpoint = ranks(save_under_fsdp, str(tmp_path), nproc=2)[0]
    with init_empty_weights():
        model, cast = Net(), Net()
    load_checkpoint_in_model(model, checkpoint)
    load_checkpoint_in_model(cast, checkpoint, {"": "disk"}, dtype=torch.bfloat16, offload_folder=tmp_path / "cast")
    expected = make_net()
    torch.testing.assert_close(dict(model.state_dict()), dict(expected.state_dict()), rtol=0, atol=0)
    torch.testing.assert_close(dict(cast.state_dict()), dict(expected.bfloat16().state_dict()), rtol=0, atol=0)


def test_numbers_are_looked_at_where_a_cast_could_change_them(tmp_path: Path) -> None:
    model = make_net()
    model.scale.data.fill_(1e6)
    checkpoint = save(tmp_path, model)
    with pytest.raises(StateError, match="scale is float32 with numbers that float16 cannot hold"):
        load_checkpoint_in_model(Net(), checkpoint, dtype=torch.float16)


def test_its_size_is_estimated_without_reading_it(tmp_path: Path) -> None:
    size = size_of_model(str(save(tmp_path, make_net())))
    assert size.num_parameters == sum(value.numel() for value in make_net().state_dict().values())


def flip(path: Path) -> Path:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return path


DAMAGED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "no model": (lambda d: save(d), "a checkpoint without a model"),
    "two models": (
        lambda d: save(d, nn.Linear(2, 2), nn.Linear(2, 2)),
        r"holds the models Linear, Linear \(2\), and it is not clear which is meant by a Net; .*accelerator export",
    ),
    "two models of its class": (
        lambda d: save(d, make_net(), make_net()),
        r"holds the models Net, Net \(2\), and it is not clear which is meant by a Net; .*accelerator export",
    ),
    "a bit flipped": (
        lambda d: flip(next(save(d, make_net()).rglob("*.distcp"))).parents[1],
        "distcp has other contents than were written",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_refusals(case: str, tmp_path: Path) -> None:
    make, message = DAMAGED[case]
    with pytest.raises(StateError, match=message):
        load_checkpoint_in_model(make_net(), make(tmp_path))
