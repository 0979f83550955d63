"""Any damage to any file of a checkpoint, also of one that several ranks wrote, is noticed before anything changes."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from accelerator import Accelerator
from rank_pool import RankPool
from strategies import CPU, FSDP, StateError
from strategies.shards import local

FILES = {"manifest.json", "state.json", "tensors/.metadata"}
KINDS: dict[str, tuple[Any, int, set[str]]] = {
    "cpu": (CPU(), 1, {*FILES, "tensors/__0_0.distcp"}),
    "fsdp 2": (FSDP(), 2, {*FILES, "tensors/__0_0.distcp", "tensors/__1_0.distcp"}),
}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[random.Random(str(path)).randrange(len(content))] ^= 1 << 3
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def swap(path: Path) -> None:
    other = next(one for one in path.parent.iterdir() if one.is_file() and one != path)
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "flip": flip, "truncate": truncate, "delete": Path.unlink, "swap": swap,
    "link": lambda path: (path.rename(path.with_name("moved")), path.symlink_to("moved")),
}  # fmt: skip


class Run:
    def __init__(self, kind: str) -> None:
        self.accelerator = Accelerator(KINDS[kind][0], gradient_accumulation_steps=2)
        net = nn.Linear(4, 3)
        self.model, self.optimizer = self.accelerator.prepare(net, torch.optim.AdamW(net.parameters()))

    def train(self, micro_batches: int) -> None:
        for _ in range(micro_batches):
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(self.model(torch.ones(2, 4)).sum())
                self.optimizer.step()
                self.optimizer.zero_grad()

    def weights(self) -> list[Any]:
        """What this rank holds of them."""
        return [local(parameter.detach()).tolist() for parameter in self.model.parameters()]


def save(kind: str, folder: str, micro_batches: int) -> None:
    run = Run(kind)
    run.train(micro_batches)
    run.accelerator.save_state(Path(folder) / "whole")


def load(kind: str, folder: str) -> None:
    run = Run(kind)
    before = run.weights()
    for damaged in sorted(Path(folder).glob("damaged-*")):
        with pytest.raises(StateError) as caught:
            run.accelerator.load_state(damaged)
        assert "in part" not in str(caught.value)
    assert run.weights() == before
    run.accelerator.load_state(Path(folder) / "whole")
    assert run.weights() != before


@pytest.mark.parametrize("micro_batches", [2, 3], ids=["between windows", "inside a window"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_any_damage_to_any_file_is_noticed_before_anything_changes(
    ranks: RankPool, tmp_path: Path, kind: str, micro_batches: int
) -> None:
    _, nproc, files = KINDS[kind]
    ranks(save, kind, str(tmp_path), micro_batches, nproc=nproc)
    found = {str(path.relative_to(tmp_path / "whole")) for path in (tmp_path / "whole").rglob("*") if path.is_file()}
    assert found - {"certificate.json"} == files
    for name in files:
        for damage, do in DAMAGE.items():
            copy = tmp_path / f"damaged-{name.replace('/', '-')}-{damage}"
            shutil.copytree(tmp_path / "whole", copy)
            do(copy / name)
    ranks(load, kind, str(tmp_path), nproc=nproc)


def test_every_byte_is_handed_to_the_system_before_it_is_asked_to_put_it_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_disk: dict[int, int] = {}
    real = os.fsync

    def fsync(descriptor: int) -> None:
        real(descriptor)
        on_disk[os.fstat(descriptor).st_ino] = os.fstat(descriptor).st_size

    monkeypatch.setattr(os, "fsync", fsync)
    save("cpu", str(tmp_path), 2)
    files = {path.name: path.stat() for path in (tmp_path / "whole").rglob("*") if path.is_file()}
    assert all(on_disk[file.st_ino] == file.st_size for file in files.values()), files
