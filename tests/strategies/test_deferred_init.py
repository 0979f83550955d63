"""Models built under `init_module`: the numbers of building them on one device, bit for bit, without their memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from strategies import PrepareError
from strategies.deferred_init import filling, record, recording_of
from strategies.shards import copy_whole

CPU = torch.device("cpu")


class ByHand(nn.Module):
    """What constructors do besides calling `reset_parameters`."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 6, padding_idx=0)
        self.position = nn.Parameter(torch.randn(3, 4) * 0.1)
        self.register_buffer("bands", torch.tensor([1.0, 2.0, 3.0]), persistent=False)
        self.register_buffer("mask", torch.tril(torch.ones(4, 4)).view(1, 1, 4, 4))
        self.attention = nn.MultiheadAttention(4, 2)
        self.norm = nn.BatchNorm1d(3)
        self.recurrent = nn.LSTM(3, 4, 2)
        self.head = nn.Linear(6, 10)
        self.head.weight = self.embedding.weight
        self.apply(self._init)
        self.late = nn.Linear(4, 4, bias=False)
        nn.init.sparse_(self.late.weight, 0.5)
        with torch.no_grad():
            self.late.weight[0].fill_(2.0)
            self.late.weight.mul_(self.late.weight.abs().sqrt())

    def _init(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)


def layer(initialise: Callable[[Tensor], Any]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        module = nn.Linear(5, 7)
        initialise(module.weight)
        return module

    return make


MODELS: dict[str, Callable[[], nn.Module]] = {
    "by hand": ByHand,
    "transformer": lambda: nn.Transformer(16, 2, 1, 1, 32, batch_first=True),
    "orthogonal": layer(nn.init.orthogonal_),
    "truncated": layer(nn.init.trunc_normal_),
    "truncated far out": layer(lambda weight: nn.init.trunc_normal_(weight, a=1.5, b=2.0)),
    "sparse": layer(lambda weight: nn.init.sparse_(weight, 0.5)),
    "dirac": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), *[nn.Identity()]).apply(
        lambda m: nn.init.dirac_(m.weight) if isinstance(m, nn.Conv2d) else None
    ),
}


def check(make: Callable[[], nn.Module], seed: int = 3) -> None:
    torch.manual_seed(seed)
    plain = make()
    after = torch.rand(3)
    torch.manual_seed(seed)
    with record(CPU):
        model = make()
    assert all(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(torch.rand(3), after)  # the generator stands where it would
    recording = recording_of(model)
    assert recording is not None
    torch.manual_seed(77)
    before = torch.get_rng_state()
    with filling(model, recording, recording.random_state) as fill:
        fill(copy_whole)
    assert torch.equal(torch.get_rng_state(), before)
    expected = dict([*plain.named_parameters(), *plain.named_buffers()])
    got = dict([*model.named_parameters(), *model.named_buffers()])
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize("name", list(MODELS))
def test_played_back_numbers_are_those_of_plain_construction(name: str) -> None:
    check(MODELS[name])


@given(
    sizes=st.lists(st.integers(1, 6), min_size=2, max_size=5),
    fills=st.lists(st.sampled_from(["normal_", "zeros_", "ones_", "kaiming_uniform_", "xavier_normal_"]), max_size=6),
    seed=st.integers(0, 2**32),
)
def test_any_order_of_fills_gives_the_same_numbers(sizes: list[int], fills: list[str], seed: int) -> None:
    def make() -> nn.Module:
        model = nn.Sequential(*(nn.Linear(*pair) for pair in itertools.pairwise(sizes)))
        for index, fill in enumerate(fills):
            getattr(nn.init, fill)(model[index % len(model)].weight)
        return model

    check(make, seed)


def test_a_second_pass_over_all_modules_does_not_keep_the_model() -> None:
    """Only one tensor is alive at a time, although every one is written twice."""
    num_layers, width = 12, 256

    def make() -> nn.Module:
        model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(num_layers)))
        return model.apply(lambda m: nn.init.normal_(m.weight) if isinstance(m, nn.Linear) else None)

    with record(CPU):
        model = make()
    recording = recording_of(model)
    assert recording is not None
    live = peak = 0
    allocate = recording._memory

    class Counted:
        def __init__(self, memory: torch.UntypedStorage) -> None:
            nonlocal live, peak
            self.size = memory.nbytes()
            live += self.size
            peak = max(peak, live)

        def __del__(self) -> None:
            nonlocal live
            live -= self.size

    def counted(place: Any) -> torch.UntypedStorage:
        memory = allocate(place)
        memory.counted = Counted(memory)  # type: ignore[attr-defined]  # lives as long as the memory
        return memory

    recording._memory = counted  # type: ignore[method-assign]
    recording.play({})
    assert peak == width * width * 4


def build(body: Callable[[], Any]) -> None:
    with record(CPU):
        body()


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(3))
        if self.weight.sum() > 1:
            nn.init.zeros_(self.weight)


def test_what_cannot_be_played_back_is_refused() -> None:
    with pytest.raises(PrepareError, match=r"looks at a random number of a tensor \(\.item"):
        build(Branches)
    with pytest.raises(PrepareError, match="drew random numbers for a tensor on a real device"):
        build(lambda: torch.randn(3, device="cpu"))
    with torch.device("meta"):
        elsewhere = nn.Linear(2, 2)
    with pytest.raises(PrepareError, match=r"2 tensors on the meta device \(weight, bias\), which nothing can fill"):
        recording_of(elsewhere)
    with record(CPU):
        first = nn.Linear(2, 2)
    with record(CPU):
        second = nn.Linear(2, 2)
    with pytest.raises(PrepareError, match="two init_module"):
        recording_of(nn.Sequential(first, second))


def test_a_plain_tensor_as_attribute_is_refused() -> None:
    with record(CPU):
        model = nn.Linear(2, 2)
        model.angles = torch.arange(3.0)  # type: ignore[assignment]
    recording = recording_of(model)
    assert recording is not None
    with (
        pytest.raises(PrepareError, match=r"angles of Linear is a plain tensor.*register_buffer"),
        filling(model, recording, recording.random_state),
    ):
        pass


def test_torch_is_as_before_after_the_block_also_after_an_exception() -> None:
    fill = nn.init._no_grad_trunc_normal_  # type: ignore[attr-defined]

    def fail() -> None:
        assert nn.init._no_grad_trunc_normal_ is not fill  # type: ignore[attr-defined]
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        build(fail)
    assert nn.init._no_grad_trunc_normal_ is fill  # type: ignore[attr-defined]
    assert not nn.Linear(2, 2).weight.is_meta
    assert recording_of(nn.Linear(2, 2)) is None
