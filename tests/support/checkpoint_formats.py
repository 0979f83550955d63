"""Weights written to a folder, in the formats that are loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file


def as_safetensors(state: dict[str, torch.Tensor], folder: Path) -> Path:
    save_file(state, folder / "model.safetensors")
    return folder / "model.safetensors"


def as_folder(state: dict[str, torch.Tensor], folder: Path) -> Path:
    return as_safetensors(state, folder).parent


def as_shards(state: dict[str, torch.Tensor], folder: Path) -> Path:
    return _shards(state, folder, "model-{}.safetensors", save_file)


def as_shards_without_index(state: dict[str, torch.Tensor], folder: Path) -> Path:
    (as_shards(state, folder) / "model.safetensors.index.json").unlink()
    return folder


def as_torch_file(state: dict[str, torch.Tensor], folder: Path) -> Path:
    torch.save(state, folder / "model.pth")
    return folder / "model.pth"


def as_torch_folder(state: dict[str, torch.Tensor], folder: Path) -> Path:
    torch.save(state, folder / "pytorch_model.bin")
    return folder


def as_torch_shards(state: dict[str, torch.Tensor], folder: Path) -> Path:
    return _shards(state, folder, "pytorch_model-{}.bin", torch.save)


def as_one_file_per_tensor(state: dict[str, torch.Tensor], folder: Path) -> Path:
    for name, tensor in state.items():
        torch.save(tensor, folder / f"{name}.pt")
    return folder


def _shards(
    state: dict[str, torch.Tensor], folder: Path, form: str, save: Callable[[dict[str, torch.Tensor], Path], None]
) -> Path:
    weight_map = {name: form.format(index % 3) for index, name in enumerate(state)}
    for file in set(weight_map.values()):
        save({name: state[name] for name in state if weight_map[name] == file}, folder / file)
    index = "pytorch_model.bin.index.json" if form.endswith("bin") else "model.safetensors.index.json"
    (folder / index).write_text(json.dumps({"weight_map": weight_map}))
    return folder
