"""Tensors of a megabyte and more are read from the file straight to their place, however they were cut and laid out."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from accelerator import Accelerator
from rank_pool import RankPool
from strategies import CPU, DDP, FSDP


class Large(nn.Module):
    """Rows, a convolution whose channels come last in memory, and buffers of bfloat16 and of whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Linear(600, 1000)
        self.convolution = nn.Conv2d(192, 192, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.register_buffer("short", torch.randn(1000, 600).bfloat16())
        self.register_buffer("counts", torch.randint(2**60, (2**18,)))

    def forward(self, x: Tensor) -> Tensor:
        folded = self.convolution(x[:, : 192 * 3].reshape(1, 192, 1, 3).expand(-1, -1, 3, -1))
        return self.rows(x).sum() + folded.sum()


def run(strategy: Any, folder: str, save: bool) -> dict[str, Tensor]:
    accelerator = Accelerator(strategy)
    torch.manual_seed(int(save))
    net = Large()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    model, optimizer = accelerator.prepare(net, optimizer)
    step = partial(take_step, accelerator, model, optimizer)
    if save:
        step()
        accelerator.save_state(folder)
    else:
        accelerator.load_state(folder)
    weights = {name: value.clone() for name, value in accelerator.get_state_dict(model).items()}
    step()  # shows what the momenta are
    return weights | {f"then {name}": value for name, value in accelerator.get_state_dict(model).items()}


def take_step(accelerator: Accelerator, model: Any, optimizer: Any) -> None:
    accelerator.backward(model(torch.arange(600.0)[None] / 600))
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize(("writer", "nproc"), [(CPU(), 1), (FSDP(), 2)], ids=str)
def test_they_are_what_was_saved(ranks: RankPool, tmp_path: Path, writer: Any, nproc: int) -> None:
    folder = str(tmp_path / "saved")
    saved = ranks(run, writer, folder, True, nproc=nproc)[0]
    again: list[tuple[Any, int]] = [(CPU(), 1), (DDP(), 2), (FSDP(), 2), (FSDP(), 4), (FSDP(replicate=2), 4)]
    results = [ranks(run, strategy, folder, False, nproc=number)[0] for strategy, number in again]
    for (strategy, _), loaded in zip(again, results, strict=True):
        for name, value in saved.items():
            if name.startswith("then "):
                torch.testing.assert_close(loaded[name], value, msg=f"{name} on {strategy}")
            else:
                assert torch.equal(loaded[name], value), (strategy, name)
    assert not torch.equal(saved["then rows.weight"], saved["rows.weight"])


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_plain_dcp_reads_them(tmp_path: Path) -> None:
    saved = run(CPU(), str(tmp_path / "saved"), True)
    state = {"model/Large/rows.weight": torch.zeros(1000, 600)}
    dcp.load(state, checkpoint_id=tmp_path / "saved" / "tensors")
    assert torch.equal(state["model/Large/rows.weight"], saved["rows.weight"])


def test_a_backward_of_what_was_before_is_noticed(tmp_path: Path) -> None:
    accelerator = Accelerator(CPU())
    net = nn.Sequential(nn.Linear(600, 600), nn.Linear(600, 600))
    model = accelerator.prepare(net)
    saved = accelerator.save_state(tmp_path / "saved")
    loss = model(torch.ones(1, 600)).sum()
    accelerator.load_state(saved)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
