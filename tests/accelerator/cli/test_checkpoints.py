"""The commands about checkpoints, and weights that leave a run and enter another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from accelerator import Accelerator
from accelerator.cli import main
from rank_pool import RankPool
from strategies import CPU, DDP, FSDP, StateError


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 8)
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("low", torch.randn(8, 8).bfloat16())
        self.head = nn.Linear(8, 40, bias=False)
        self.head.weight = self.embedding.weight


def saved(strategy: Any, folder: str, models: int = 1) -> dict[str, torch.Tensor]:
    accelerator = Accelerator(strategy, project_dir=folder)
    torch.manual_seed(0)
    nets = [Tied() for _ in range(models)]
    accelerator.prepare(*nets)
    accelerator.save_state(metrics={"val_loss": 0.25})
    with torch.no_grad():
        nets[0].norm.running_mean.add_(1.0)  # type: ignore[union-attr, operator]
    accelerator.save_state(Path(folder) / "checkpoints" / "step-000000002")
    return {name: value.clone() for name, value in nets[0].state_dict().items()}


def first(folder: Path) -> Path:
    return folder / "checkpoints" / "step-000000000"


def test_ls_verify_and_diff(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(CPU(), str(tmp_path))
    assert main(["checkpoint", "ls", str(tmp_path / "checkpoints")]) == 0
    listed = capsys.readouterr().out
    assert "val_loss 0.25" in listed
    assert "not read" in listed
    assert main(["checkpoint", "verify", str(first(tmp_path))]) == 0
    assert main(["checkpoint", "diff", str(first(tmp_path)), str(first(tmp_path))]) == 0
    capsys.readouterr()
    assert main(["checkpoint", "diff", str(first(tmp_path)), str(first(tmp_path).with_name("step-000000002"))]) == 1
    assert capsys.readouterr().out == "model/Tied/norm.running_mean: differs by up to 1\n"
    state = first(tmp_path) / "state.json"
    state.write_bytes(state.read_bytes()[:-1])
    assert main(["checkpoint", "verify", str(tmp_path / "checkpoints")]) == 1
    assert "step-000000000: state.json has" in capsys.readouterr().out
    assert main(["export", str(first(tmp_path)), str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()
    assert main(["checkpoint", "ls", str(tmp_path / "nowhere")]) == 2


def load(strategy: Any, folder: str) -> dict[str, torch.Tensor]:
    accelerator = Accelerator(strategy)
    net = Tied()
    model = accelerator.prepare(net)
    accelerator.load_model(model, folder)
    return accelerator.get_state_dict(model)


@pytest.mark.parametrize("shard", ["5GB", "300"])
def test_exported_weights_are_loaded_on_every_strategy(ranks: RankPool, tmp_path: Path, shard: str) -> None:
    strategies: list[tuple[Any, int]] = [(CPU(), 1), (DDP(batch_norm="local"), 2), (FSDP(batch_norm="local"), 2)]
    saved(CPU(), str(tmp_path))
    expected = {name: value for name, value in saved(CPU(), str(tmp_path / "b")).items() if name != "norm.running_mean"}
    assert main(["export", str(first(tmp_path)), str(tmp_path / "out"), "--max-shard-size", shard]) == 0
    assert (tmp_path / "out" / "model.safetensors").exists() == (shard == "5GB")
    for strategy, nproc in strategies:
        loaded = ranks(load, strategy, str(tmp_path / "out"), nproc=nproc)[0]
        for name, value in expected.items():
            assert torch.equal(loaded[name], value), name
            assert loaded[name].dtype == value.dtype


def test_remote_folders(tmp_path: Path) -> None:
    expected = saved(CPU(), str(tmp_path), models=2)
    for url in ("memory://somewhere/out", f"file://{tmp_path}/out"):
        assert main(["export", str(first(tmp_path)), url, "--model", "Tied", "--max-shard-size", "400"]) == 0
        loaded = load(CPU(), url)
        assert torch.equal(loaded["embedding.weight"], expected["embedding.weight"])
    names = [Path(name).name for name in fsspec.filesystem("memory").ls("/somewhere/out", detail=False)]
    assert "model.safetensors.index.json" in names
    assert main(["export", str(first(tmp_path)), str(tmp_path / "which")]) == 2


def test_what_does_not_fit_is_named_together(tmp_path: Path) -> None:
    accelerator = Accelerator(CPU())
    model = accelerator.prepare(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)))
    accelerator.save_model(model, tmp_path / "a")
    other = accelerator.prepare(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)))
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(
        StateError, match=r"missing: 2\.bias, 2\.weight; foreign: 1\.bias, 1\.weight; other shapes: 0\.b"
    ):
        accelerator.load_model(other, tmp_path / "a")
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    with pytest.raises(StateError, match="load_model changed nothing"):
        accelerator.load_model(other, tmp_path / "nowhere")
    (tmp_path / "b").mkdir()
    index = {"weight_map": {"0.weight": "../a/model.safetensors"}}
    (tmp_path / "b" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(StateError, match="leads elsewhere"):
        accelerator.load_model(model, tmp_path / "b")
    assert load_file(tmp_path / "a" / "model.safetensors").keys() == dict(model.state_dict()).keys()
