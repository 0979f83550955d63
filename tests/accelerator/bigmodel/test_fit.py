"""Weights of a loaded model have memory of their own, and numbers that a cast does not change beyond rounding."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch
from torch import nn

from accelerator.bigmodel import init_empty_weights, load_checkpoint_in_model
from accelerator.bigmodel.pages import FileMappings
from strategies.errors import StateError


def of_torch(state: dict[str, torch.Tensor], folder: Path) -> Path:
    torch.save(state, folder / "model.pth")
    return folder / "model.pth"


class Two(nn.Module):
    """Two weights, one if `tie`."""

    def __init__(self, tie: bool = False) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        if tie:
            self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x))  # type: ignore[no-any-return]


def train_once(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.ones(2, 8)).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize(
    "state", [Two(tie=True).state_dict(), {n: torch.ones(1, 8).expand(8, 8) for n in ("a.weight", "b.weight")}]
)
def test_weights_that_share_memory_in_a_file_do_not_share_it_in_the_model(
    state: dict[str, torch.Tensor], where: str, tmp_path: Path
) -> None:
    checkpoint = of_torch(state, tmp_path)
    with init_empty_weights():
        model = Two()
    if where == "disk":
        with pytest.raises(StateError, match=r"no file holds it in memory of its own.*give offload_folder"):
            load_checkpoint_in_model(model, checkpoint, {"": "disk"})
    load_checkpoint_in_model(model, checkpoint, {"": where}, offload_folder=tmp_path / "offload")
    expected = Two()
    expected.load_state_dict(state)
    for one in (model, expected):
        train_once(one)
    torch.testing.assert_close(dict(model.state_dict()), dict(expected.state_dict()), rtol=0, atol=0)


def test_a_tied_model_maps_its_tied_file(tmp_path: Path) -> None:
    checkpoint = of_torch(Two(tie=True).state_dict(), tmp_path)
    with init_empty_weights():
        model = Two(tie=True)
    load_checkpoint_in_model(model, checkpoint, {"": "disk"})
    assert model.a.weight is model.b.weight
    assert FileMappings.read().hold(model.a.weight)


def test_tensors_by_name_are_copied() -> None:
    source = Two()
    before = source.a.weight.detach().clone()
    with init_empty_weights():
        model = Two()
    load_checkpoint_in_model(model, dict(source.named_parameters()))
    train_once(model)
    assert torch.equal(source.a.weight, before)


class Counts(nn.Module):
    """Numbers of small range."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("few", torch.zeros(3, dtype=torch.int8))
        self.register_buffer("flags", torch.zeros(3, dtype=torch.bool))
        self.register_buffer("low", torch.zeros(3, dtype=torch.float16))


def test_numbers_that_do_not_fit_are_refused_and_others_cast() -> None:
    model = Counts()
    good = {"few": torch.tensor([1, -128, 3]), "flags": torch.tensor([0, 1, 1]), "low": torch.tensor([1.0, 6e4, 3])}
    load_checkpoint_in_model(model, good)
    assert model.few.tolist() == [1, -128, 3]
    bad = {
        "few": torch.tensor([1, 300, 3]),
        "flags": torch.tensor([0, 2, 1]),
        "low": torch.tensor([1.0, 1e30, float("nan")]),
    }
    with pytest.raises(StateError) as raised:
        load_checkpoint_in_model(model, bad)
    for words in (
        "few is int64 with numbers that int8",
        "flags is int64 with numbers that bool",
        "low is float32 with",
    ):
        assert words in str(raised.value)
    assert model.few.tolist() == [1, -128, 3]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a.weight": numpy.zeros((8, 8))}, "a.weight is a ndarray and should be a tensor"),
        ({"a.weight": torch.zeros(8, 8, device="meta")}, "a.weight is on the meta device, and has no numbers"),
        ({"a.weight": torch.zeros(8, 8).to_sparse()}, "a.weight is sparse_coo and should be a dense tensor"),
        ({"a.weight": torch.zeros(8, 8), "b.weight": torch.ones(8, 8)}, "a.weight and b.weight are one tensor of the"),
    ],
)
def test_what_can_be_no_weight(state: dict[str, torch.Tensor], message: str) -> None:
    model = Two(tie=True)
    before = model.a.weight.detach().clone()
    with pytest.raises(StateError, match=message):
        load_checkpoint_in_model(model, state)
    assert torch.equal(model.a.weight, before)
