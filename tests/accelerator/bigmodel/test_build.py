"""Models without memory: parameters on the meta device, everything else as the constructor left it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from accelerator.bigmodel import init_empty_weights, init_on_device, load_checkpoint_in_model
from blocks_net import Net, make_net
from strategies.errors import PrepareError, StateError


class Odd(nn.Module):
    """Buffers of every kind, a tensor that is none, a tie, and a constructor that looks at its numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("steps", torch.arange(5).float() / 4, persistent=False)
        self.register_buffer("same", self.steps, persistent=False)
        self.plain = torch.arange(3)
        self.largest = float(self.steps.max())
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight


def test_parameters_have_no_memory_and_buffers_their_numbers() -> None:
    with init_empty_weights():
        model = Odd()
    expected = Odd()
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.head.weight is model.embed.weight
    assert model.largest == expected.largest
    assert model.same is model.steps
    torch.testing.assert_close(dict(model.named_buffers()), dict(expected.named_buffers()), rtol=0, atol=0)
    assert torch.equal(model.plain, expected.plain)


def test_nothing_is_drawn() -> None:
    before = torch.get_rng_state()
    with init_empty_weights():
        Odd()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("include_buffers", [False, True])
def test_loading_fills_buffers_that_no_checkpoint_holds(include_buffers: bool) -> None:
    expected = Odd()
    expected.norm.running_mean += 1
    with init_empty_weights(include_buffers):
        model = Odd()
    assert model.steps.is_meta == include_buffers
    load_checkpoint_in_model(model, expected.state_dict())
    torch.testing.assert_close(dict(model.state_dict()), dict(expected.state_dict()), rtol=0, atol=0)
    torch.testing.assert_close(dict(model.named_buffers()), dict(expected.named_buffers()), rtol=0, atol=0)
    assert model.head.weight is model.embed.weight


def test_a_random_buffer_waits_for_its_checkpoint() -> None:
    with init_empty_weights():
        model = nn.Linear(2, 2)
        model.register_buffer("noise", torch.randn(2))
    assert model.noise.is_meta
    state = {"weight": torch.ones(2, 2), "bias": torch.ones(2), "noise": torch.ones(2)}
    load_checkpoint_in_model(model, state)
    assert torch.equal(model.noise, torch.ones(2))


def test_init_on_device() -> None:
    with init_on_device("meta", torch.bfloat16):
        meta = nn.Linear(2, 2)
    with init_on_device("cpu"):
        real = nn.Linear(2, 2)
    assert meta.weight.is_meta
    assert meta.weight.dtype is torch.bfloat16
    assert real.weight.device.type == "cpu"
    assert torch.ones(1).dtype is torch.float32


def test_a_model_of_transformers() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=50
    )
    expected = LlamaForCausalLM(config).eval()
    with init_empty_weights():
        model = LlamaForCausalLM(config).eval()
    assert all(parameter.is_meta for parameter in model.parameters())
    load_checkpoint_in_model(model, expected.state_dict())
    tokens = torch.arange(6)[None]
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, expected(tokens).logits)


def test_a_model_built_and_run_in_inference_mode() -> None:
    expected = make_net()
    with torch.inference_mode():
        with init_empty_weights():
            model = Net()
        load_checkpoint_in_model(model, expected.state_dict())
        assert torch.equal(model(torch.ones(2, 5)), expected(torch.ones(2, 5)))


class Containers(nn.Module):
    """Tensors that are no buffers, within containers; and buffers that nothing can fill."""

    def __init__(self, noise: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.scales = [torch.arange(4.0) + 1, {"deep": torch.full((4,), 2.0)}]
        self.shifts = {"one": torch.ones(4) * 3, "none": None}
        self.weights = [self.linear.weight]
        if noise:
            self.register_buffer("noise", torch.randn(4), persistent=False)
            self.register_buffer("norm", self.linear.weight.detach().norm(), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * self.scales[0] * self.scales[1]["deep"] + self.shifts["one"]  # type: ignore[index]


def test_tensors_in_lists_and_dictionaries_have_their_numbers() -> None:
    expected = Containers()
    with init_empty_weights():
        model = Containers()
    assert model.weights[0] is model.linear.weight
    load_checkpoint_in_model(model, expected.state_dict())
    x = torch.randn(2, 4)
    assert torch.equal(model(x), expected(x))


def test_buffers_that_nothing_can_fill_are_named() -> None:
    with init_empty_weights():
        model = Containers(noise=True)
    with pytest.raises(StateError, match=r"noise, norm of Containers .* random, or made of weights.*persistent=True"):
        load_checkpoint_in_model(model, Containers().state_dict())


def test_a_constructor_that_looks_at_its_weights() -> None:
    with (
        pytest.raises(PrepareError, match=r"looks at a number of a weight .* \(init_empty_weights\(\), or init_module"),
        init_empty_weights(),
    ):
        nn.Linear(2, 2).weight.std().item()


class OfOldDays(nn.Module):
    """As in Wav2Vec2 of transformers: the constructor of this tensor hears of no device."""

    def __init__(self) -> None:
        super().__init__()
        self.mask = nn.Parameter(torch.Tensor(4).uniform_())
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * self.mask


def test_a_constructor_that_draws_into_a_tensor_of_the_cpu() -> None:
    expected = OfOldDays()
    with init_empty_weights():
        model = OfOldDays()
    assert model.linear.weight.is_meta
    load_checkpoint_in_model(model, expected.state_dict())
    x = torch.randn(2, 4)
    assert torch.equal(model(x), expected(x))
