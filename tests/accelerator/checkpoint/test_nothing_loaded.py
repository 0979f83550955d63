"""What does not fit is refused before anything is changed; what fails later is named as half loaded, on all ranks."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from torch import nn

from accelerator import Accelerator
from rank_pool import RankPool
from strategies import CPU, DDP, StateError


class Numbers(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Any:
        return torch.full((4,), index / 24)


class Counter:
    """Counts; refuses the state of a run on the rank that it is told."""

    def __init__(self, refuses: bool = False) -> None:
        self.count, self.refuses = 0, refuses

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.refuses:
            raise ValueError("not that one")
        self.count = state["count"]


class Run:
    """A run that took some steps, of which the last one is inside a window."""

    def __init__(
        self, folder: Path | str, *, steps: int = 0, seed: int = 1, shuffle: bool = True, **options: Any
    ) -> None:
        self.accelerator = Accelerator(
            options.get("strategy", CPU()), project_dir=folder, seed=seed, gradient_accumulation_steps=2
        )
        net = nn.Linear(4, 3)
        optimizer = torch.optim.AdamW(net.parameters())
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        loader = torch.utils.data.DataLoader(Numbers(), 4, shuffle=shuffle)
        self.model, self.optimizer, self.scheduler, self.loader = self.accelerator.prepare(
            net, optimizer, scheduler, loader
        )
        self.counter = Counter(options.get("refuses", False))
        self.accelerator.register_for_checkpointing(self.counter)
        for _, batch in zip(range(steps), self.loader, strict=False):
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(self.model(batch).sum())
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
            self.counter.count += 1

    def state(self) -> Any:
        return copy.deepcopy(
            (
                {name: value.tolist() for name, value in self.model.state_dict().items()},
                str(self.optimizer.state_dict()),
                self.scheduler.state_dict(),
                self.loader.state_dict(),
                self.counter.count,
                torch.get_rng_state().tolist(),
            )
        )


def refused(run: Run, folder: Path, reason: str) -> None:
    before = run.state()
    with pytest.raises(StateError, match=reason) as caught:
        run.accelerator.load_state(folder)
    assert "in part" not in str(caught.value)
    assert run.state() == before


def test_a_loader_of_another_kind_changes_nothing(tmp_path: Path) -> None:
    saved = Run(tmp_path, steps=3).accelerator.save_state()
    refused(Run(tmp_path, steps=1, shuffle=False), saved, "nothing was loaded.*saved with the order 'shuffled'")
    refused(Run(tmp_path, steps=1, seed=2), saved, r"nothing was loaded.*saved with seed \d+")
    Run(tmp_path, steps=1).accelerator.load_state(saved)


def only(values: dict[str, Any]) -> Any:
    (value,) = values.values()
    return value


FORGED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no objects": lambda state: state.clear(),
    "no kind": lambda state: state.pop("step"),
    "models as a list": lambda state: state.update(models=[]),
    "no steps": lambda state: only(state["optimizers"]).pop("num_steps"),
    "steps as text": lambda state: only(state["optimizers"]).update(num_steps="3"),
    "parameters as an option": lambda state: only(state["optimizers"])["groups"][0]["options"].update(params=[]),
    "options as a list": lambda state: only(state["optimizers"])["groups"][0].update(options=[["lr", 1]]),
    "scheduler": lambda state: only(state["schedulers"]).pop("state"),
    "position": lambda state: only(state["loaders"]).pop("seed"),
    "position as text": lambda state: only(state["loaders"]).update(position="3"),
    "version": lambda state: only(state["loaders"]).update(version=9),
    "array": lambda state: state["registered"].update(Counter={"~": "array", "dtype": "O", "base64": ""}),
    "kind": lambda state: state["registered"].update(Counter={"~": "module", "name": "os"}),
    "unit": lambda state: state["step"]["units"].update(Other=1.0),
    "random": lambda state: state["random"][0].update(python=[1]),
    "no random": lambda state: state.update(random=[]),
    "no windows": lambda state: state.update(windows=[]),
    "window of no model": lambda state: state["windows"][0].update(Other=only(state["windows"][0])),
    "loader of a window": lambda state: only(state["windows"][0])["state"].update(loader="Other"),
    "gradients": lambda state: only(only(state["windows"][0])["gradients"])["weight"].update(name="other"),
}


@pytest.mark.parametrize("case", list(FORGED))
def test_a_forged_state_changes_nothing(tmp_path: Path, case: str) -> None:
    folder = Run(tmp_path, steps=3).accelerator.save_state()
    state = json.loads((folder / "state.json").read_text())
    FORGED[case](state)
    content = json.dumps(state).encode()
    (folder / "state.json").write_bytes(content)
    body = json.loads((folder / "manifest.json").read_text())
    del body["digest"]
    body["files"]["state.json"] = {"size": len(content), "xxh3_128": xxhash.xxh3_128(content).hexdigest()}
    digest = xxhash.xxh3_128(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps({**body, "digest": digest}))
    refused(Run(tmp_path, steps=1), folder, ".")


def half(folder: str) -> str:
    first = Accelerator(DDP())  # which lives on: one group at a time
    run = Run(folder, steps=3, strategy=DDP(), refuses=first.process_index == 1)
    saved = run.accelerator.save_state()
    with pytest.raises(StateError) as caught:
        run.accelerator.load_state(saved)
    return str(caught.value)


def test_an_object_that_refuses_its_state_on_one_rank_is_named_on_all(ranks: RankPool, tmp_path: Path) -> None:
    for said in ranks(half, str(tmp_path), nproc=2):
        assert said.startswith("rank 1: ValueError: not that one. The checkpoint is loaded in part"), said
