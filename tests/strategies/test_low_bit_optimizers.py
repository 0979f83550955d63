"""The 8-bit and 4-bit optimizers of torchao: under FSDP they train what one process trains."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from accelerator import Accelerator
from rank_pool import RankPool
from torch_version import torchao_runs

pytestmark = torchao_runs


def train(strategy: str, optimizer: str) -> tuple[list[float], Tensor, str]:
    """Losses of five steps of 8 samples, a weight after them, and what holds its average."""
    from torchao import optim

    accelerator = Accelerator(strategy)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 64))
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    share = x[accelerator.process_index :: accelerator.num_processes]
    losses = []
    with torch.compiler.set_stance("force_eager"):  # it compiles its step, which takes longer than this test may
        model, prepared = accelerator.prepare(model, getattr(optim, optimizer)(model.parameters(), lr=1e-2))
        for _ in range(5):
            with accelerator.accumulate(model):
                loss = (model(share) - share).square().mean()
                accelerator.backward(loss)
                prepared.step()
                prepared.zero_grad()
            losses.append(accelerator.reduce(loss.detach(), "mean").item())
    average = prepared.state[model[0].weight]["exp_avg"]
    weight = accelerator.get_state_dict(model).get("0.weight", torch.empty(0))
    return losses, weight, type(getattr(average, "_local_tensor", average)).__name__


@pytest.mark.parametrize("bits", [8, 4])
def test_under_fsdp_they_train_what_one_process_trains(bits: int, ranks: RankPool) -> None:
    (expected, weight, kind), *_ = ranks(train, "cpu", f"AdamW{bits}bit", nproc=1)
    (losses, sharded, kind_there), *_ = ranks(train, "fsdp", f"AdamW{bits}bit", nproc=2)
    assert kind == kind_there == f"OptimState{bits}bit"
    assert losses == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(sharded, weight, rtol=1e-5, atol=1e-6)
