"""Tensors that each rank holds whole, and that differ: rank 0's is kept, but each rank goes on with its own buffers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from accelerator import Accelerator
from rank_pool import RankPool
from strategies import DDP, FSDP

STRATEGIES: dict[str, Any] = {
    "ddp": DDP(batch_norm="local"),
    "ddp, buffers apart": DDP(batch_norm="local", broadcast_buffers=False),
    "fsdp": FSDP(batch_norm="local"),
}


class OfThisRank:
    """Tensors of several sizes, all equal to the rank."""

    def __init__(self, rank: int) -> None:
        self.tensors = {str(size): torch.full((size,), float(rank)) for size in range(1, 9)}

    def state_dict(self) -> dict[str, Any]:
        return {"tensors": self.tensors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tensors = state["tensors"]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8), nn.BatchNorm1d(8))


def train(kind: str, folder: str, stop: int | None) -> tuple[list[float], dict[str, Tensor], list[float]]:
    accelerator = Accelerator(STRATEGIES[kind], project_dir=folder, gradient_accumulation_steps=3, seed=1)
    module = net()
    model, optimizer = accelerator.prepare(module, torch.optim.AdamW(module.parameters(), lr=0.01))
    mine = OfThisRank(accelerator.process_index)
    accelerator.register_for_checkpointing(mine)
    losses: list[float] = []
    accelerator.resume()
    kept = sorted({float(value) for tensor in mine.tensors.values() for value in tensor})
    begin = int((Path(folder) / "done").read_text()) if stop is None and (Path(folder) / "done").exists() else 0
    for micro in range(begin, 9):
        generator = torch.Generator().manual_seed(10 * micro + accelerator.process_index)
        data = torch.randn(4, 6, generator=generator, device="cpu") + 3 * accelerator.process_index
        with accelerator.accumulate(model):
            loss = model(data).square().mean()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if micro + 1 == stop:
            accelerator.save_state()
            (Path(folder) / "done").write_text(str(stop))
            break
    return losses, {name: buffer.clone() for name, buffer in module.named_buffers()}, kept


@pytest.mark.parametrize("kind", list(STRATEGIES))
def test_each_rank_goes_on_with_its_own_buffers_and_rank_0_s_objects(
    ranks: RankPool, tmp_path: Path, kind: str
) -> None:
    whole = ranks(train, kind, str(tmp_path / "whole"), None, nproc=2)
    for stop in (4, 6):
        folder = str(tmp_path / str(stop))
        first = ranks(train, kind, folder, stop, nproc=2)
        rest = ranks(train, kind, folder, None, nproc=2)
        for one, two, (losses, buffers, _) in zip(first, rest, whole, strict=True):
            assert one[0] + two[0] == losses
            assert all(torch.equal(two[1][name], buffer) for name, buffer in buffers.items())
            assert two[2] == [0.0]


def test_on_another_number_of_ranks_all_take_rank_0_s(ranks: RankPool, tmp_path: Path) -> None:
    (saved, other) = ranks(train, "ddp", str(tmp_path), 4, nproc=2)
    assert not torch.equal(saved[1]["1.running_mean"], other[1]["1.running_mean"])
    (loaded,) = ranks(load, str(tmp_path), nproc=1)
    assert all(torch.equal(loaded[name], buffer) for name, buffer in saved[1].items())


def load(folder: str) -> dict[str, Tensor]:
    accelerator = Accelerator(DDP(batch_norm="local"), project_dir=folder, gradient_accumulation_steps=3)
    module = net()
    accelerator.prepare(module, torch.optim.AdamW(module.parameters(), lr=0.01))
    accelerator.register_for_checkpointing(OfThisRank(0))
    accelerator.resume()
    return {name: buffer.clone() for name, buffer in module.named_buffers()}
