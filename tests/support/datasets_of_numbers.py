"""Datasets whose samples are their own indices, or follow from them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset


class Numbers(Dataset[Tensor]):
    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor(index)


class Sines(Dataset[Any]):
    """Samples of shape (width,), all alike inside, none like another."""

    def __init__(self, length: int, width: int) -> None:
        self.length = length
        self.width = width

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        return torch.full((self.width,), index / self.length).sin()


class Stream(IterableDataset[Tensor]):
    def __init__(self, length: int) -> None:
        self.length = length

    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.arange(float(self.length)).reshape(-1, 1))


class Plain(IterableDataset[Tensor]):
    """Knows nothing of ranks, workers or states."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.arange(self.length))


class Stateful(Plain):
    """Says where it stands."""

    place = 0
    num_read = 0

    def __iter__(self) -> Iterator[Tensor]:
        while self.place < self.length:
            self.place += 1
            self.num_read += 1
            yield torch.tensor(self.place - 1)
        self.place = 0

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["place"]
