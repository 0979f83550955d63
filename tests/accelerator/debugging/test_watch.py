"""`watch` gives the statistics that plain torch computes from the global batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from accelerator import Accelerator
from rank_pool import RankPool
from strategies import DDP, FSDP, ConfigurationError

STRATEGIES: dict[str, Any] = {
    "cpu": "cpu",
    "ddp": DDP(device="cpu"),
    "fsdp": FSDP(device="cpu", auto_wrap_policy="size", min_num_params=8),
}


def make() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))


def watched(strategy: str, every: int) -> list[dict[str, float]]:
    accelerator, told = Accelerator(STRATEGIES[strategy]), []
    model = make()
    model, optimizer, loader = accelerator.prepare(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        DataLoader(data(), batch_size=8 // accelerator.num_processes),
    )
    accelerator.watch(model, every=every, log=lambda values: told.append({k: float(v) for k, v in values.items()}))
    for (x,) in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(x).square().mean())
            optimizer.step()
            optimizer.zero_grad()
    return told


def data() -> TensorDataset:
    return TensorDataset(torch.randn(32, 4, generator=torch.Generator().manual_seed(0)))


def plain() -> list[dict[str, float]]:
    model, told = make(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x in data().tensors[0].split(8):
        outputs, flowing = {}, x
        for name, module in model.named_children():
            flowing = outputs[f"activation/{name}"] = module(flowing)
        flowing.square().mean().backward()
        outputs |= {f"gradient/{name}": parameter.grad for name, parameter in model.named_parameters()}
        told.append(
            {
                f"{name}/{statistic}": float(value)
                for name, tensor in ((name, tensor.detach()) for name, tensor in outputs.items())
                for statistic, value in {
                    "mean": tensor.mean(),
                    "std": tensor.std(correction=0),
                    "max_abs": tensor.abs().max(),
                    "zeros": (tensor == 0).float().mean(),
                }.items()
            }
        )
        optimizer.step()
        optimizer.zero_grad()
    return told


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_statistics_are_those_of_the_global_batch(strategy: str, ranks: RankPool) -> None:
    told = [watched(strategy, 2)] if strategy == "cpu" else ranks(watched, strategy, 2)
    assert all(others == [] for others in told[1:])
    expected = plain()[1::2]
    assert [list(values) for values in told[0]] == [list(values) for values in expected]
    for ours, theirs in zip(told[0], expected, strict=True):
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_values_go_to_the_trackers_without_a_function(tmp_path: Any) -> None:
    accelerator = Accelerator("cpu", project_dir=tmp_path)
    model = make()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    accelerator.watch(model, every=1)
    with accelerator.accumulate(model):
        accelerator.backward(model(torch.ones(2, 4)).mean())
        optimizer.step()
    accelerator.end_training()
    written = "".join(path.read_text() for path in tmp_path.rglob("*.jsonl"))
    assert '"gradient/2.bias/mean":1.0' in written


def test_wrong_arguments_are_refused() -> None:
    accelerator = Accelerator("cpu")
    model = accelerator.prepare(make())
    with pytest.raises(ConfigurationError, match="every is 0; expected a number of steps >= 1"):
        accelerator.watch(model, every=0)
