"""What modules put into their state dict themselves comes back as `load_state_dict` would bring it back."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from accelerator import Accelerator
from rank_pool import RankPool
from strategies import CPU, DDP, FSDP
from strategies.shards import whole


class Extra(nn.Linear):
    """Keeps a tensor that grows."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.seen = torch.zeros(0)

    def get_extra_state(self) -> Tensor:
        return self.seen

    def set_extra_state(self, state: Any) -> None:
        self.seen = state


class Own(nn.Linear):
    """Writes and reads a number beside its weights."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.scale = 1.0

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "scale"] = torch.tensor(self.scale)

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        self.scale = float(state.pop(prefix + "scale"))
        assert prefix + "weight" in state  # it is given all of them
        super()._load_from_state_dict(state, prefix, *rest)


class Copied(nn.Linear):
    """Its state dict holds copies of its weights."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.register_state_dict_post_hook(copy_weight)


def copy_weight(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    state[prefix + "weight"] = state[prefix + "weight"].detach().clone()


def save_and_load(strategy: Any, folder: str) -> tuple[list[float], float, float, float]:
    def start() -> tuple[Accelerator, Any]:
        accelerator = Accelerator(strategy, project_dir=folder)
        return accelerator, accelerator.prepare(nn.Sequential(Extra(), Own(), Copied()))

    accelerator, model = start()
    model[0].seen, model[1].scale = torch.tensor([1.0, 2.0]), 5.0
    with torch.no_grad():
        model[2].weight.fill_(9.0)
        model[1].weight.fill_(3.0)
    saved = accelerator.save_state()
    accelerator.end_training()
    accelerator, model = start()
    accelerator.load_state(saved)
    copied, own = (float(whole(model[index].weight).mean()) for index in (2, 1))
    return model[0].seen.tolist(), model[1].scale, copied, own


@pytest.mark.parametrize(("strategy", "nproc"), [(CPU(), 1), (DDP(), 2), (FSDP(), 2)], ids=str)
def test_it_comes_back(ranks: RankPool, tmp_path: Path, strategy: Any, nproc: int) -> None:
    assert ranks(save_and_load, strategy, str(tmp_path), nproc=nproc) == [([1.0, 2.0], 5.0, 9.0, 3.0)] * nproc


class Nested(Extra):
    """Keeps its tensor in a dict, or nothing yet."""

    def get_extra_state(self) -> Any:
        return {"seen": {"a": self.seen, "weight": torch.ones(3)}, "n": 1} if len(self.seen) else None

    def set_extra_state(self, state: Any) -> None:
        self.seen = state["seen"]["a"] if state is not None else torch.zeros(0)


@pytest.mark.parametrize("model", [Nested, Extra])
@pytest.mark.parametrize("length", [0, 2])
def test_tensors_may_be_anywhere_in_what_a_module_adds(tmp_path: Path, model: Any, length: int) -> None:
    first, second = (Accelerator(CPU(), project_dir=tmp_path) for _ in range(2))
    first.prepare(model()).seen = torch.arange(float(length))
    first.save_state()
    for before in (0, 3):
        loaded = second.prepare(model())
        loaded.seen = torch.ones(before)
        second.load_state()
        assert loaded.seen.tolist() == list(range(length))
        second = Accelerator(CPU(), project_dir=tmp_path)


class OnlyOut(nn.Linear):
    """Saves what it does not load."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "version"] = torch.tensor(1)


def test_what_a_module_does_not_take_back_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    accelerator = Accelerator(CPU(), project_dir=tmp_path)
    accelerator.prepare(OnlyOut(2, 2))
    accelerator.save_state()
    with caplog.at_level(logging.WARNING, "accelerator"):
        accelerator.load_state()
    assert "not restored: version" in caplog.text
