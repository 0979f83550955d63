"""Checkpoints that others wrote, as tensors mapped from their files: nothing is read before it is used.

One safetensors file, shards with an index, a folder of them; a file of `torch.save`, or shards of those with an
index; a folder with one tensor per file. Those of `save_state` are read, not mapped. No code from a file is run.
"""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from torch import Tensor

from accelerator.saved_weights import SavedWeights
from strategies.errors import StateError, listed

_OF_TORCH = (".pt", ".pth", ".bin", ".ckpt")
_INDEX = ".index.json"


def tensors_of(checkpoint: str | os.PathLike[str], model: str | None = None) -> Mapping[str, Tensor]:
    """Every tensor of a checkpoint by its name, mapped copy-on-write from its file.

    From a folder that `save_state` wrote, `SavedWeights` of `model`, the name of a class. Raises `StateError` for what
    is not there, is truncated, holds anything but tensors, wants to run code, or leads out of its folder.
    """
    path = Path(checkpoint)
    if path.is_dir():
        return SavedWeights(path, model) if SavedWeights.are_in(path) else _of_folder(path)
    if not path.exists():
        raise StateError(f"checkpoint is {str(path)!r}, which is not there; expected a file or a folder")
    if path.name.endswith(_INDEX):
        return _of_index(path)
    return _of_file(path)


def _of_folder(folder: Path) -> dict[str, Tensor]:
    indices = sorted(folder.glob(f"*{_INDEX}"), key=lambda path: (".safetensors" not in path.name, path.name))
    safe = sorted(folder.glob("*.safetensors"))
    of_torch = sorted(path for path in folder.iterdir() if path.suffix in _OF_TORCH)
    kinds = [index for index in indices if ".safetensors" in index.name] or ([] if safe else indices)
    if len(kinds) > 1:
        raise StateError(
            f"{str(folder)!r} holds {len(kinds)} indices ({listed([path.name for path in kinds])}); give the path of "
            "one of them"
        )
    if kinds:
        return _of_index(kinds[0])
    if safe:
        return _together(safe)
    if len(of_torch) == 1:
        found = _load(of_torch[0])
        return {of_torch[0].stem: found} if isinstance(found, Tensor) else _state_dict(found, of_torch[0])
    if of_torch:
        return _one_per_file(of_torch)
    raise StateError(
        f"{str(folder)!r} holds no weights; expected *.safetensors, a file of torch.save ({', '.join(_OF_TORCH)}), an "
        f"index of such files (*{_INDEX}), one tensor per file, or what save_state wrote for one step"
    )


def _of_file(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return of_safetensors(path)
    return _state_dict(_load(path), path)


def _together(paths: Sequence[Path]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in paths:
        part = of_safetensors(path)
        twice = sorted(part.keys() & found.keys())
        if twice:
            raise StateError(
                f"{listed(twice)} is in several files of {str(path.parent)!r}, which has no index to say which one "
                "holds; give the path of one file"
            )
        found |= part
    return found


def _of_index(index: Path) -> dict[str, Tensor]:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        pairs = [(str(name), str(file)) for name, file in weight_map.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StateError(f"the index {str(index)!r} cannot be read: {error!r}; expected a 'weight_map'") from error
    files = sorted({file for _, file in pairs})
    outside = [file for file in files if _leads_elsewhere(file)]
    if outside:
        raise StateError(f"the index {str(index)!r} leads out of its folder: {listed(outside)}; nothing was read")
    absent = [file for file in files if not (index.parent / file).is_file()]
    if absent:
        raise StateError(f"the index {str(index)!r} names files that are not there: {listed(absent)}; copy them too")
    parts = {file: _of_file(index.parent / file) for file in files}
    wrong = [f"{name} in {file}" for name, file in pairs if name not in parts[file]]
    if wrong:
        raise StateError(f"the index {str(index)!r} names tensors that are not in their files: {listed(wrong)}")
    return {name: parts[file][name] for name, file in pairs}


def _leads_elsewhere(file: str) -> bool:
    # By its words only: the cache of huggingface_hub links files to another folder, which is its own business.
    return any(path.is_absolute() or ".." in path.parts for path in (PurePosixPath(file), PureWindowsPath(file)))


def of_safetensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of one safetensors file, mapped. Raises `StateError` if it is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:  # maps the file; refuses one whose size is not as its header says
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
    except (SafetensorError, OSError, ValueError) as error:
        raise StateError(f"{str(path)!r} is no whole safetensors file: {error}; fetch it again") from error


def _one_per_file(paths: Sequence[Path]) -> dict[str, Tensor]:
    found = {}
    for path in paths:
        tensor = _load(path)
        if not isinstance(tensor, Tensor):
            raise StateError(
                f"{str(path)!r} holds a {type(tensor).__name__}, and the folder {len(paths)} such files; expected one "
                "tensor in each, named as in the model. Give the path of one file to load that."
            )
        found[path.stem] = tensor
    return found


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise StateError(
            f"{str(path)!r} holds more than tensors{_named(error)}, and was not read, since reading it could run its "
            "code. If you wrote it yourself, save model.state_dict() instead."
        ) from error
    # A damaged pickle takes torch's reader anywhere.
    except (OSError, ValueError, RuntimeError, EOFError, LookupError, AttributeError, TypeError) as error:
        hint = (
            "written by torch < 1.6: load it once without mmap and torch.save() it again"
            if _is_old(path)
            else ("expected a file of torch.save(); fetch it again")
        )
        raise StateError(f"{str(path)!r} cannot be mapped: {_first_line(error)} ({hint})") from error


def _named(error: Exception) -> str:
    """What a pickle asks for, in torch's words, without its advice to trust it."""
    found = re.search(r"GLOBAL (\S+)", str(error))
    return f" ({found[1]})" if found else ", or is damaged"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [repr(error)])[0]


def _is_old(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"\x80\x02"


def _state_dict(found: Any, path: Path) -> dict[str, Tensor]:
    what = f"a {type(found).__name__}"
    if isinstance(found, dict):
        others = [str(name) for name, value in found.items() if not isinstance(value, Tensor)]
        if not others:
            return {str(name): value.detach() for name, value in found.items()}
        what = f"entries that are no tensors ({listed(others)})"
    raise StateError(
        f"{str(path)!r} holds {what}; expected a state dict. Save the weights alone: "
        "torch.save(model.state_dict(), path)."
    )
