"""The weights in a checkpoint of `save_state`, by name, for rooms that know nothing of checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from strategies.errors import StateError, listed


class SavedWeights(Mapping[str, Tensor]):
    """Every tensor of one model in a checkpoint; each is read when it is asked for, whole, into memory of its own.

    `name`: of the model in the checkpoint, which is its class; where there is but one, that one. Not a collective. All
    files are verified here: raises `StateError` if one is not as it was written, or if it is not clear which model is
    meant. No code of a checkpoint is run.
    """

    def __init__(self, folder: Path, name: str | None = None) -> None:
        from .checkpoint import offline

        offline.require_whole(folder)
        models = offline.models(folder)
        if name not in models and len(models) == 1:
            name = next(iter(models))
        alike = [one for one in models if one.partition(" (")[0] == name]  # of one class, told apart by a number
        if name not in models or len(alike) > 1:
            raise StateError(
                f"{str(folder)!r} holds the models {listed(list(models))}, and it is not clear which is meant"
                + (f" by a {name}" if name else "")
                + f"; write one of them with `accelerator export {folder} OUT --model NAME`, and load that"
                if models
                else f"{str(folder)!r} is a checkpoint without a model"
            )
        self._read = offline.reader(folder, name)
        self._index = models[name]
        self.outlines: Mapping[str, Tensor] = {
            key: torch.empty((), dtype=dtype).expand(shape) for key, (shape, dtype) in self._index.items()
        }  # shapes and dtypes; without memory and numbers

    @staticmethod
    def are_in(folder: Path) -> bool:
        """Whether `folder` is a checkpoint of `save_state`."""
        return (folder / "manifest.json").is_file()  # as checkpoint.folder has it; importing that takes 40 ms

    def __getitem__(self, name: str) -> Tensor:
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._index)

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, name: object) -> bool:
        return name in self._index
