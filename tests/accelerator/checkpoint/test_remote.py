"""Checkpoints are loaded from URLs: verified in a copy, of which nothing stays, and under the same rules."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from torch import nn

from accelerator import Accelerator
from accelerator.checkpoint.folder import digest_of
from accelerator.cli.checkpoints import export
from rank_pool import RankPool
from strategies import CPU, DDP, FSDP, StateError

URL = "memory://bucket/step-000000001"


def made(strategy: Any = None) -> tuple[Accelerator, Any, Any]:
    accelerator = Accelerator(strategy or CPU())
    net = nn.Linear(4, 3)
    model, optimizer = accelerator.prepare(net, torch.optim.AdamW(net.parameters(), lr=0.1))
    return accelerator, model, optimizer


def step(accelerator: Accelerator, model: Any, optimizer: Any) -> None:
    accelerator.backward(model(torch.ones(2, 4)).square().sum())
    optimizer.step()
    optimizer.zero_grad()


@pytest.fixture
def uploaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.Tensor]]:
    """The weights of a checkpoint at `URL`, as they were when it was written; copies go to an empty folder."""
    accelerator, model, optimizer = made()
    step(accelerator, model, optimizer)
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    folder = accelerator.save_state(tmp_path / "step-000000001")
    step(accelerator, model, optimizer)  # for the certificate
    system = fsspec.filesystem("memory")
    system.put(f"{folder}/", "/bucket/step-000000001/", recursive=True)
    copies = tmp_path / "copies"
    copies.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(copies))
    yield weights
    assert not list(copies.iterdir())
    system.rm("/bucket", recursive=True)


def test_a_checkpoint_at_a_url_is_loaded(uploaded: list[torch.Tensor], caplog: pytest.LogCaptureFixture) -> None:
    accelerator, model, optimizer = made()
    with caplog.at_level("INFO", "accelerator"):
        assert accelerator.load_state(URL).name == "step-000000001"
        assert all(torch.equal(one, two) for one, two in zip(model.parameters(), uploaded, strict=True))
        step(accelerator, model, optimizer)
    assert f"the first step after {URL}: exact" in caplog.text


@pytest.mark.parametrize(
    ("file", "damage", "reason"),
    [
        ("state.json", lambda content: b"x" + content[1:], "state.json has other contents"),
        ("tensors/.metadata", lambda content: content[:-1], r"tensors/.metadata has \d+ bytes, not \d+"),
        ("manifest.json", lambda content: content[:-1], "cannot be read as a manifest"),
        ("tensors/__0_0.distcp", None, "cannot be read: FileNotFoundError"),
        ("manifest.json", None, "cannot be read: FileNotFoundError"),
    ],
)
def test_damage_is_noticed_before_anything_changes(
    uploaded: list[torch.Tensor], file: str, damage: Any, reason: str
) -> None:
    system, path = fsspec.filesystem("memory"), f"/bucket/step-000000001/{file}"
    if damage is None:
        system.rm(path)
    else:
        system.pipe(path, damage(system.cat(path)))
    accelerator, model, _ = made()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(StateError, match=reason) as caught:
        accelerator.load_state(URL)
    assert URL in str(caught.value)
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("name", ["../outside", "tensors/../../outside", "/tmp/outside"])
def test_a_manifest_writes_nothing_elsewhere(uploaded: list[torch.Tensor], tmp_path: Path, name: str) -> None:
    system, path = fsspec.filesystem("memory"), "/bucket/step-000000001/manifest.json"
    body = json.loads(system.cat(path))
    del body["digest"]
    body["files"][name] = {"size": 3, "xxh3_128": ""}
    system.pipe(path, json.dumps({**body, "digest": digest_of(body)}).encode())
    system.pipe("/bucket/outside", b"foo")
    with pytest.raises(StateError, match="is not as it was written"):
        made()[0].load_state(URL)
    assert not (tmp_path / "copies" / "outside").exists()
    assert not Path("/tmp/outside").exists()


def test_a_place_that_there_is_not(tmp_path: Path) -> None:
    accelerator, _, _ = made()
    for url in ("memory://nowhere/at-all", f"file://{tmp_path}/nothing", "nosuchsystem://bucket/x"):
        with pytest.raises(StateError, match="cannot be read") as caught:
            accelerator.load_state(url)
        assert url in str(caught.value)


def test_the_weights_of_one_at_a_url_are_exported(uploaded: list[torch.Tensor], tmp_path: Path) -> None:
    assert export([URL, str(tmp_path / "out")]) == 0
    accelerator, model, _ = made()
    accelerator.load_model(model, tmp_path / "out")
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), uploaded, strict=True))


def save(strategy: Any, folder: str) -> dict[str, Any]:
    accelerator, model, optimizer = made(strategy)
    step(accelerator, model, optimizer)
    accelerator.save_state(folder)
    return accelerator.get_state_dict(model)


def load(strategy: Any, url: str, temporary: str) -> tuple[dict[str, Any], list[str]]:
    tempfile.tempdir = temporary
    try:
        accelerator, model, _ = made(strategy)
        accelerator.load_state(url)
        accelerator.wait_for_everyone()
        return accelerator.get_state_dict(model), os.listdir(temporary)
    finally:
        tempfile.tempdir = None


def test_all_ranks_of_a_machine_read_one_copy(ranks: RankPool, tmp_path: Path) -> None:
    (tmp_path / "copies").mkdir()
    weights = ranks(save, FSDP(), str(tmp_path / "saved"), nproc=2)[0]
    for strategy in (DDP(), FSDP()):
        found, left = ranks(load, strategy, f"file://{tmp_path}/saved", str(tmp_path / "copies"), nproc=2)[0]
        assert all(torch.equal(found[name], value) for name, value in weights.items())
        assert left == []
    (tmp_path / "saved" / "state.json").write_text("{}")
    arguments = (DDP(), f"file://{tmp_path}/saved", str(tmp_path / "copies"))
    for error in ranks(load, *arguments, nproc=2, return_exceptions=True):
        assert "state.json has 2 bytes" in str(error)
