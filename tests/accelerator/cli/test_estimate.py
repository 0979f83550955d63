"""`accelerator estimate`: sums that can be checked by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from accelerator.bigmodel.estimate import Training, bytes_on_a_rank, size_of_model
from accelerator.cli import main
from blocks_net import make_net

MODULE = """
import torch
from torch import nn

class Huge(nn.Module):
    '''400 GB of weights.'''
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10**5, 10**4)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(10**4, 10**5), nn.Linear(10**5, 10**4)) for _ in range(49))
        self.head = nn.Linear(10**4, 10**5, bias=False)
        self.head.weight = self.embed.weight

number = 3

def sized(width):
    return nn.Linear(width, width)

def failing():
    raise ValueError("no such size")
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module beside which the command is called."""
    (tmp_path / "huge_models.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    return "huge_models"


def test_a_model_that_fits_nowhere(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", f"{module}:Huge", "--ranks", "100"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    block = 2 * 10**9 + 10**5 + 10**4
    total = 10**9 + 49 * block
    first = " ".join(rows[0] + rows[1])
    assert f"Huge: {total:,} parameters, 396 GB as they are; largest block layers.0 with {block:,}" in first
    assert ["float32", "396", "GB", "16", "GB"] in rows
    assert ["int4", "49.5", "GB", "2", "GB"] in rows
    assert ["together", "18", "1.78", "TB"] in rows
    assert ["ddp", "100", "2.18", "TB"] in rows
    assert ["fsdp", "100", "31.8", "GB"] in rows  # 16 bytes / 100 of all, and 8 of the largest block


@pytest.mark.parametrize("as_file", [True, False])
def test_a_checkpoint(as_file: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = make_net()
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    path = tmp_path / "model.safetensors" if as_file else tmp_path
    size = size_of_model(str(path))
    assert size.num_parameters == sum(value.numel() for value in net.state_dict().values())
    assert (size.largest_block, size.largest_block_parameters) == ("layers.0", 296)
    assert main(["estimate", str(path), "--optimizer", "sgd", "--precision", "no", "--ranks", "2"]) == 0
    assert ["together", "8"] in [line.split()[:2] for line in capsys.readouterr().out.splitlines()]


def test_a_tie_in_a_torch_file_is_counted_once(tmp_path: Path) -> None:
    embed, head = torch.nn.Embedding(100, 8), torch.nn.Linear(8, 100, bias=False)
    head.weight = embed.weight
    torch.save(torch.nn.ModuleDict({"embed": embed, "head": head}).state_dict(), tmp_path / "tied.pt")
    size = size_of_model(str(tmp_path / "tied.pt"))
    assert (size.num_parameters, size.stored_bytes, size.largest_block) == (800, 3200, "embed")


def test_the_sums() -> None:
    assert [Training.of("adamw", precision).total for precision in ("no", "bf16")] == [16, 18]
    assert Training.of("sgd-momentum", "no").total == 12


def test_what_an_optimizer_really_holds() -> None:
    for name, make in {
        "sgd": lambda p: torch.optim.SGD(p),
        "sgd-momentum": lambda p: torch.optim.SGD(p, momentum=0.9),
        "adagrad": torch.optim.Adagrad,
        "rmsprop": torch.optim.RMSprop,
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
    }.items():
        weight = torch.nn.Parameter(torch.ones(1000))
        optimizer = make([weight])
        weight.sum().backward()
        optimizer.step()
        held = sum(value.nbytes for value in optimizer.state[weight].values() if torch.is_tensor(value) and value.ndim)
        assert held == 1000 * Training.of(name, "no").optimizer, name


def test_fsdp_holds_a_share_and_two_blocks(tmp_path: Path) -> None:
    save_file(make_net().state_dict(), tmp_path / "model.safetensors")
    size = size_of_model(str(tmp_path))
    training = Training.of("adamw", "no")
    share = -(-16 * size.num_parameters // 4)
    assert bytes_on_a_rank(size, training, "fsdp", 4) == share + 296 * (2 * 4 + 4)
    assert bytes_on_a_rank(size, training, "ddp", 4) == 20 * size.num_parameters


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing.safetensors"], "MODEL is 'nothing.safetensors'; expected a checkpoint"),
        (["huge_models:Hug"], "cannot be imported: module 'huge_models' has no attribute 'Hug'"),
        (["no_such_models:Huge"], "cannot be imported: No module named 'no_such_models'"),
        (["huge_models:number"], "gives a int; expected an nn.Module"),
        (
            ["huge_models:sized"],
            "raised TypeError: sized() missing 1 required positional argument: 'width'. It is called",
        ),
        (["huge_models:failing"], "raised ValueError: no such size. It is called without arguments"),
        (["huge_models:Huge", "--optimizer", "magic"], "invalid choice: 'magic'"),
        (["huge_models:Huge", "--ranks", "0"], "ranks is '0'; expected an integer >= 1"),
    ],
)
@pytest.mark.usefixtures("module")
def test_wrong_arguments(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", *words]) == 2
    assert message in capsys.readouterr().err
