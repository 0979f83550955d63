"""What is in memory while a model runs: the next parts are on their way, and never more than the budget."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from accelerator.bigmodel import init_empty_weights, load_checkpoint_and_dispatch

BLOCK = 4 * (64 * 64 + 64)  # bytes


def build() -> nn.Sequential:
    return nn.Sequential(*[nn.Linear(64, 64) for _ in range(6)])


@pytest.mark.parametrize("blocks", [1, 2, 3, 6])
def test_the_next_blocks_are_read_while_one_computes(blocks: int, tmp_path: Path) -> None:
    expected = build()
    save_file(expected.state_dict(), tmp_path / "model.safetensors")
    with init_empty_weights():
        model = build()
    load_checkpoint_and_dispatch(
        model, tmp_path, {"": "disk"}, offload_budget=blocks * BLOCK, no_split_classes=["Linear"]
    )
    residency = model._dispatched.residency  # type: ignore[union-attr]
    ahead: list[int] = []

    def computing(module: nn.Module, args: object, output: object) -> None:
        here = next(index for index, block in enumerate(model) if block is module)
        there = set(residency._held) - {here}  # type: ignore[union-attr]
        for index in there:
            residency._held[index].result(timeout=60)  # type: ignore[union-attr]  # done, though this block is not
        ahead.append(sum((index - here) % 6 <= 2 for index in there))
        assert residency.held_bytes <= blocks * BLOCK  # type: ignore[union-attr]

    for block in model:
        block.register_forward_hook(computing, prepend=True)
    x = torch.randn(3, 64)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(model(x), expected(x))
    assert ahead == [min(blocks - 1, 2)] * 12
