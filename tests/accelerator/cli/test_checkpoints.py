"""The commands about checkpoints, and weights that leave a run and enter another."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from accelerator import Accelerator
from accelerator.cli import main
from accelerator.export import write_files
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
        StateError, match=r"missing: 2\.bias, 2\.weight; foreign: 1\.bias, 1\.weight; other shapes or kinds: 0\.b"
    ):
        accelerator.load_model(other, tmp_path / "a")
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    with pytest.raises(StateError, match="load_model changed nothing"):
        accelerator.load_model(other, tmp_path / "nowhere")
    (tmp_path / "b").mkdir()
    index = {"weight_map": {"0.weight": "../a/model.safetensors"}}
    (tmp_path / "b" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(StateError, match="leads out of its folder"):
        accelerator.load_model(model, tmp_path / "b")
    assert load_file(tmp_path / "a" / "model.safetensors").keys() == dict(model.state_dict()).keys()


def made_of(value: float) -> nn.Sequential:
    net = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    for parameter in net.parameters():
        nn.init.constant_(parameter, value)
    return net


def damaged(folder: Path, case: str) -> str:
    """Spoil what is in `folder`; return what loading is to say, if it is to say something."""
    whole = torch.ones(8, 8)
    good = {"0.weight": whole, "1.weight": whole.clone(), "2.weight": whole.clone()}
    index = {"0.weight": "model-00001-of-00002.safetensors"} | dict.fromkeys(
        ["1.weight", "2.weight"], "m-2.safetensors"
    )
    if case == "stale copy":
        save_file({"0.weight": whole}, folder / "model-00001-of-00002.safetensors")
        save_file(good | {"0.weight": 9 * whole}, folder / "m-2.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        return ""
    if case == "no index":
        (folder / "model.safetensors.index.json").write_text("[1]")
        return "cannot be read: .* expected a 'weight_map'"
    path = folder / "model.safetensors"
    save_file(good | ({"1.weight": whole.to(torch.int8)} if case == "int8" else {}), path)
    if case == "truncated":
        path.write_bytes(path.read_bytes()[:-7])
        return "no whole safetensors file"
    return "1.weight is int8 and should be float32"


@pytest.mark.parametrize("case", ["stale copy", "no index", "truncated", "int8"])
def test_files_that_are_not_what_they_seem(case: str, tmp_path: Path) -> None:
    accelerator = Accelerator(CPU())
    model = accelerator.prepare(made_of(4.0))
    message = damaged(tmp_path, case)
    if message:
        with pytest.raises(StateError, match=f"load_model changed nothing: .*{message}"):
            accelerator.load_model(model, tmp_path)
    else:
        accelerator.load_model(model, tmp_path)
    for parameter in model.parameters():
        assert torch.equal(parameter, torch.full((8, 8), 4.0 if message else 1.0))


def test_a_tie_with_two_values_is_not_loaded(tmp_path: Path) -> None:
    accelerator = Accelerator(CPU())
    model = made_of(4.0)
    model[2].weight = model[0].weight
    save_file(
        {f"{index}.weight": torch.full((8, 8), float(index)) for index in range(3)}, tmp_path / "model.safetensors"
    )
    with pytest.raises(StateError, match=r"conflicts: 0.weight and 2.weight are one tensor"):
        accelerator.load_model(accelerator.prepare(model), tmp_path)


def load_own(folder: str) -> str:
    accelerator = Accelerator(DDP())
    model = accelerator.prepare(made_of(1.0))
    try:
        accelerator.load_model(model, Path(folder) / str(accelerator.process_index))
    except StateError as error:
        return str(error)
    return ""


def test_a_file_damaged_on_one_rank_is_told_on_all(ranks: RankPool, tmp_path: Path) -> None:
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        damaged(tmp_path / str(rank), "truncated")
    save_file(dict(made_of(1.0).state_dict()), tmp_path / "0" / "model.safetensors")
    for said in ranks(load_own, str(tmp_path), nproc=2):
        assert "no whole safetensors file" in said


@contextmanager
def full_after(files: int) -> Iterator[None]:
    """A disk that takes so many files."""
    real, left = safetensors.torch.save_file, [files]

    def save(state: Any, path: Any, **options: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        real(state, path, **options)

    safetensors.torch.save_file = save
    try:
        yield
    finally:
        safetensors.torch.save_file = real


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize("shard", [300, "5GB"])
def test_a_save_over_another_is_whole_or_leaves_it(remote: bool, shard: int | str, tmp_path: Path) -> None:
    accelerator = Accelerator(CPU())
    out = f"memory://again/{shard}" if remote else str(tmp_path)

    def save(value: float, shard: int | str) -> None:
        model = made_of(value)
        if remote:
            state = dict(model.state_dict())
            sizes = {name: tensor.nbytes for name, tensor in state.items()}
            write_files(sizes, lambda names: {name: state[name] for name in names}, out, shard)
        else:
            accelerator.save_model(accelerator.prepare(model), out, shard)

    def value() -> float:
        model = accelerator.prepare(made_of(0.0))
        accelerator.load_model(model, out)
        (number,) = {parameter.mean().item() for parameter in model.parameters()}
        return number

    def names() -> list[str]:
        found = fsspec.filesystem("memory").ls(out, detail=False) if remote else tmp_path.iterdir()
        return sorted(Path(name).name for name in found)

    save(1.0, shard)
    before = names()
    assert len(before) == (1 if shard == "5GB" else 4)
    for other in (300, 600):
        with full_after(1), pytest.raises(StateError, match="No space left"):
            save(2.0, other)
        assert (value(), names()) == (1.0, before)
    for number, other in enumerate((600, "5GB", 300, 300, "5GB", shard), 3):
        save(number, other)
        assert value() == number
    assert names() == before
