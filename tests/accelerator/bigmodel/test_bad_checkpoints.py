"""Checkpoints that are damaged, unsafe or of another model, and arguments that are none: nothing is loaded."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from accelerator.bigmodel import (
    load_checkpoint_and_dispatch,
    load_checkpoint_in_model,
)
from blocks_net import make_net
from checkpoint_formats import as_safetensors, as_shards, as_torch_file
from strategies.errors import ConfigurationError, StateError


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("EVIL",)


def cut(path: Path, by: int = 10) -> Path:
    os.truncate(path, path.stat().st_size - by)
    return path


def written(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def flipped(path: Path, where: bytes) -> Path:
    """The file with other bits in the byte behind these."""
    content = bytearray(path.read_bytes())
    content[content.index(where) + len(where)] ^= 0xFF
    path.write_bytes(content)
    return path


def index(folder: Path, **weight_map: str) -> Path:
    as_shards(make_net().state_dict(), folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


DAMAGED = {
    "absent": (lambda d: d / "nothing.safetensors", "which is not there"),
    "empty folder": (lambda d: d, "holds no weights"),
    "truncated safetensors": (lambda d: cut(as_safetensors(make_net().state_dict(), d)), "no whole safetensors file"),
    "truncated torch file": (lambda d: cut(as_torch_file(make_net().state_dict(), d)), "cannot be mapped"),
    "truncated shard": (
        lambda d: cut(as_shards(make_net().state_dict(), d) / "model-1.safetensors").parent,
        "no whole safetensors file",
    ),
    "longer than it says": (
        lambda d: (lambda p: p.write_bytes(p.read_bytes() + b"more") and p)(as_safetensors(make_net().state_dict(), d)),
        "no whole safetensors file",
    ),
    "absent shard": (lambda d: index(d, scale="model-8.safetensors"), "not there: model-8.safetensors"),
    "tensor not in its shard": (lambda d: index(d, other="model-1.safetensors"), "other in model-1.safetensors"),
    "shard above": (lambda d: index(d, scale="../model-1.safetensors"), r"leads out of its folder: \.\./model-1"),
    "absolute shard": (lambda d: index(d, scale="/etc/passwd"), "leads out of its folder: /etc/passwd"),
    "index of something else": (
        lambda d: (index(d) / "model.safetensors.index.json").write_text("[]") and d,
        "expected a 'weight_map'",
    ),
    "no state dict": (lambda d: written(d / "a.pt", {"model": {}, "step": 1}), r"no tensors \(model, step\)"),
    "a tensor": (lambda d: written(d / "a.pt", torch.ones(2)), "holds a Tensor; expected a state dict"),
    "code": (
        lambda d: written(d / "a.pt", {"a": Evil()}),
        r"more than tensors \(posix.mkdir\), and was not read, since reading it could run its code. If you wrote",
    ),
    "a damaged pickle": (
        lambda d: flipped(as_torch_file(dict(make_net().state_dict()), d), b"_rebuild_tensor_v2\nq"),
        "cannot be mapped: .*fetch it again",
    ),
    "an index without an end": (
        lambda d: (index(d) / "model.safetensors.index.json").write_text("[" * 10**5) and d,
        "expected a 'weight_map'",
    ),
    "a pickle": (lambda d: (d / "a.pt").write_bytes(pickle.dumps({"a": 1})) and d / "a.pt", "cannot be mapped"),
    "old torch file": (
        lambda d: torch.save({"a": torch.ones(1)}, d / "a.pt", _use_new_zipfile_serialization=False) or d / "a.pt",
        "torch < 1.6",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_or_unsafe_checkpoint(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make, message = DAMAGED[case]
    with pytest.raises(StateError, match=message):
        load_checkpoint_in_model(make_net(), make(tmp_path))
    assert not Path("EVIL").exists()


@pytest.mark.parametrize("checkpoint", [None, ["a.safetensors"], 3])
def test_what_is_no_checkpoint(checkpoint: Any) -> None:
    with pytest.raises(ConfigurationError, match="expected the path of a file or folder, or tensors by name"):
        load_checkpoint_in_model(make_net(), checkpoint)


@pytest.mark.parametrize("dtype", ["float16", torch.int8])
def test_what_is_no_dtype_for_weights(dtype: Any) -> None:
    with pytest.raises(ConfigurationError, match="expected a floating-point one, such as"):
        load_checkpoint_in_model(make_net(), make_net().state_dict(), dtype=dtype)


def test_names_with_a_prefix() -> None:
    state = make_net().state_dict()
    with pytest.raises(StateError) as raised:
        load_checkpoint_in_model(make_net(), {f"module.{name}": tensor for name, tensor in state.items()})
    assert "begin with 'module.' in the checkpoint only. Load with key_mapping={'^module[.]': ''}." in str(raised.value)
    assert "strict=False" not in str(raised.value)
    load_checkpoint_in_model(
        make_net(), {f"module.{name}": tensor for name, tensor in state.items()}, key_mapping={"^module[.]": ""}
    )
    inside = nn.ModuleDict({"transformer": make_net()})
    with pytest.raises(StateError, match=r"only.* \(model.transformer\), or with key_mapping={'\^': 'transformer.'}"):
        load_checkpoint_in_model(inside, state)
    load_checkpoint_in_model(inside, state, key_mapping={"^": "transformer."})


def test_a_tensor_in_two_files_without_an_index(tmp_path: Path) -> None:
    as_safetensors({"a": torch.ones(1)}, tmp_path)
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(StateError, match="a is in several files"):
        load_checkpoint_in_model(make_net(), tmp_path)


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        ({"first": "cpu"}, "nothing says where scale, layers.0.norm.weight, "),
        ({"": "cpu", "layer.1": "disk"}, r"'layer.1' is not in it. Did you mean 'layers.1'\?"),
        ({"": "disc"}, "'disc' is no place for weights"),
        ({"": 99}, "99 is not there"),
    ],
)
def test_a_device_map_that_does_not_fit(device_map: dict[str, int | str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=f"device_map does not fit Net: .*{message}"):
        load_checkpoint_in_model(make_net(), make_net().state_dict(), device_map)


def test_a_device_map_that_leaves_out_one_name_of_a_tied_weight() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    with pytest.raises(ConfigurationError, match=r"where 1.weight should be \(1.weight is 0.weight: give tied weights"):
        load_checkpoint_in_model(model, {"0.weight": torch.ones(2, 2)}, {"0": "cpu"})


def test_a_device_map_that_gives_a_tied_weight_two_places() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    with pytest.raises(
        ConfigurationError, match=r"0.weight is 1.weight, and is to be on 'cpu' and on 'disk'; give tied"
    ):
        load_checkpoint_in_model(model, {"0.weight": torch.ones(2, 2)}, {"0": "cpu", "1": "disk"})
    load_checkpoint_in_model(model, {"0.weight": torch.ones(2, 2)}, {"0": "cpu", "1": "cpu:0"})


@pytest.mark.parametrize("device_map", [None, {1: "cpu"}, ["cpu"]])
def test_what_is_no_device_map(device_map: Any) -> None:
    with pytest.raises(ConfigurationError, match="expected a mapping from names of modules to devices"):
        load_checkpoint_and_dispatch(make_net(), make_net().state_dict(), device_map)
