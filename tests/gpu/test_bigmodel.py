"""Dispatched models on accelerators: what the tests on a CPU cannot see. Not run by `make test`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from accelerator.bigmodel import (
    cpu_offload,
    cpu_offload_with_hook,
    init_empty_weights,
    load_checkpoint_and_dispatch,
    remove_dispatch,
)
from blocks_net import Net, make_net
from strategies.errors import StepError

pytestmark = pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")


@pytest.fixture
def net(tmp_path: Path) -> Path:
    """The weights of `make_net()` in a file."""
    save_file(make_net().state_dict(), tmp_path / "model.safetensors")
    return tmp_path


def device() -> torch.device:
    found = torch.accelerator.current_accelerator()
    assert found is not None
    return torch.device(found.type, 0)


def check_equal(model: torch.nn.Module) -> None:
    expected = make_net().to(device())
    for seed in range(3):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            y = model(x)
        assert y.device == x.device  # outputs come back to where the inputs were
        torch.testing.assert_close(y, expected(x.to(device())).cpu(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rest", ["cpu", "disk"])
@pytest.mark.parametrize("budget", [None, 1500, "1GB"])
def test_weights_that_rest_elsewhere(net: Path, rest: str, budget: int | str | None) -> None:
    with init_empty_weights():
        model = Net()
    places = {"": 0, "layers": rest}
    load_checkpoint_and_dispatch(model, net, places, offload_budget=budget)
    check_equal(model)
    assert model.head.weight.device == device()
    remove_dispatch(model)
    assert model.layers[0].up.weight.device.type == "cpu"


def test_an_inferred_map(net: Path) -> None:
    with init_empty_weights():
        model = Net()
    load_checkpoint_and_dispatch(model, net, max_memory={0: "2.8kB", "cpu": "1.2kB"})
    check_equal(model)


def test_backward_fetches_again(net: Path) -> None:
    with init_empty_weights():
        model = Net()
    model.requires_grad_(False)
    load_checkpoint_and_dispatch(model, net, {"": 0, "layers": "disk"}, offload_budget=1500)
    x, y = (torch.ones(2, 5, device=device(), requires_grad=True) for _ in range(2))
    model(x).sum().backward()
    make_net().to(device())(y).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_weights_that_rest_elsewhere_are_not_trained() -> None:
    model = cpu_offload(make_net())
    with pytest.raises(StepError, match="rest on another device"):
        model(torch.ones(2, 5))
    check_equal(model)


@pytest.mark.parametrize("budget", [1500, "1GB"])
def test_what_is_written_at_rest_runs_next(net: Path, budget: int | str) -> None:
    with init_empty_weights():
        model = Net()
    load_checkpoint_and_dispatch(model, net, {"": 0, "layers": "disk"}, offload_budget=budget)
    check_equal(model)
    for seed in (4, 3):
        model.load_state_dict(make_net(seed).state_dict())
    check_equal(model)
    assert {parameter.device.type for parameter in model.layers.parameters()} == {"cpu"}


def test_few_trained_weights_of_a_frozen_block_stay_on_the_device() -> None:
    model = make_net().requires_grad_(False)
    model.layers[1].down.bias.requires_grad_(True)
    cpu_offload(model)
    model(torch.ones(2, 5)).sum().backward()
    assert model.layers[1].down.bias.device == device()
    assert model.layers[1].down.weight.device.type == "cpu"
    plain = make_net()
    plain(torch.ones(2, 5)).sum().backward()
    torch.testing.assert_close(model.layers[1].down.bias.grad.cpu(), plain.layers[1].down.bias.grad)


def test_memory_on_the_device_stays_within_the_budget(tmp_path: Path) -> None:
    model = torch.nn.Sequential(*[torch.nn.Linear(1024, 1024, bias=False) for _ in range(16)])
    before = torch.accelerator.memory_allocated()
    torch.accelerator.reset_peak_memory_stats()
    cpu_offload(model, 0, offload_budget="12MiB")
    with torch.no_grad():
        for _ in range(3):
            model(torch.ones(1, 1024))
    assert torch.accelerator.max_memory_allocated() - before < 20 * 2**20


def test_models_of_a_pipeline_take_turns() -> None:
    one, first = cpu_offload_with_hook(make_net(), 0)
    two, second = cpu_offload_with_hook(make_net(seed=4), 0, first)
    one(torch.ones(2, 5))
    assert one.head.weight.device == device()
    two(torch.ones(2, 5))
    assert one.head.weight.device.type == "cpu"
    second.offload()
    assert two.head.weight.device.type == "cpu"


@pytest.mark.skipif(torch.accelerator.device_count() < 2, reason="needs two accelerators")
def test_two_accelerators(net: Path) -> None:
    with init_empty_weights():
        model = Net()
    load_checkpoint_and_dispatch(model, net, {"": 0, "layers.1": 1, "layers.2": 1, "head": 1})
    check_equal(model)
    assert model.head.weight.device.index == 1
