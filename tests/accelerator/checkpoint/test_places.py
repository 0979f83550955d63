"""Where a checkpoint may go: never over anything but an older checkpoint."""

from __future__ import annotations

import re
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from accelerator import Accelerator
from rank_pool import RankPool
from strategies import CPU, DDP, ConfigurationError, StateError


def prepared(folder: Path | None = None) -> Accelerator:
    accelerator = Accelerator(CPU(), project_dir=folder)
    net = nn.Linear(4, 3)
    accelerator.prepare(net, torch.optim.AdamW(net.parameters()))
    return accelerator


def all_files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def results(folder: Path) -> Path:
    (folder / "output" / "best").mkdir(parents=True)
    (folder / "output" / "train.log").write_text("a day of work")
    (folder / "output" / "best" / "model.bin").write_bytes(b"weights")
    return folder / "output"


def linked(folder: Path) -> Path:
    (folder / "link").symlink_to(results(folder))
    return folder / "link"


def plain_file(folder: Path) -> Path:
    (folder / "notes").write_text("a day of work")
    return folder / "notes"


def web_site(folder: Path) -> Path:
    (folder / "site").mkdir()
    (folder / "site" / "manifest.json").write_text('{"name": "site"}')
    return folder / "site"


def with_a_file_of_ones_own(folder: Path) -> Path:
    target = prepared().save_state(folder / "saved")
    (target / "notes.txt").write_text("the good one")
    return target


def tensors_of_ones_own(folder: Path) -> Path:
    (folder / "mine" / "tensors").mkdir(parents=True)
    (folder / "mine" / "tensors" / ".metadata").write_bytes(b"index")
    return folder / "mine"


def named_like_a_step(folder: Path) -> Path:
    target = results(folder).with_name("step-000000000")
    return (folder / "output").rename(target)


def empty_working_directory(folder: Path) -> Path:
    (folder / "work").mkdir()
    return folder / "work"


TAKEN: dict[str, tuple[Callable[[Path], Path], str]] = {
    "results": (results, "is no checkpoint, or holds more than one: best/model.bin, train.log"),
    "link": (linked, "is a link"),
    "file": (plain_file, "is a file"),
    "manifest of something else": (web_site, r"is no checkpoint, or holds more than one: manifest\.json"),
    "checkpoint and more": (with_a_file_of_ones_own, r"is a checkpoint, and notes\.txt in it would be deleted"),
    "tensors": (tensors_of_ones_own, r"is no checkpoint, or holds more than one: tensors/\.metadata"),
    "named like a step": (named_like_a_step, "is no checkpoint, or holds more than one: best/model.bin"),
}


@pytest.mark.parametrize("in_background", [False, True])
@pytest.mark.parametrize("case", list(TAKEN))
def test_what_is_no_checkpoint_is_not_replaced(tmp_path: Path, case: str, in_background: bool) -> None:
    make, reason = TAKEN[case]
    target = make(tmp_path)
    before = all_files(tmp_path)
    with pytest.raises(StateError, match=reason):
        prepared().save_state(target, async_=in_background)
    assert all_files(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted({Path(name).relative_to(tmp_path).parts[0]
        for name in before} | {target.name})  # fmt: skip


def test_the_folder_of_the_run_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work" / "run").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    accelerator = prepared(tmp_path / "work" / "run")
    for place in ("", ".", "..", tmp_path / "work" / "run", tmp_path):
        with pytest.raises(StateError, match="which a checkpoint would replace"):
            accelerator.save_state(place)
    assert (tmp_path / "work" / "run").is_dir()
    assert accelerator.save_state("saved") == Path("saved")


def test_an_empty_folder_and_an_older_checkpoint_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    accelerator = prepared(tmp_path)
    for place in (tmp_path / "empty", tmp_path / "empty", None, None):
        accelerator.load_state(accelerator.save_state(place))


@pytest.mark.parametrize("damage", ["manifest.json", "state.json", "tensors/.metadata"])
def test_a_broken_one_of_the_same_step_is_replaced(tmp_path: Path, damage: str) -> None:
    accelerator = prepared(tmp_path)
    (accelerator.save_state() / damage).unlink()
    accelerator.load_state(accelerator.save_state())


@pytest.mark.parametrize("damage", ["", "{}", None])
def test_one_with_a_broken_manifest_is_replaced_under_any_name(tmp_path: Path, damage: str | None) -> None:
    accelerator = prepared()
    saved = accelerator.save_state(tmp_path / "out")
    (saved / "manifest.json").write_text(damage) if damage is not None else (saved / "manifest.json").unlink()
    accelerator.load_state(accelerator.save_state(saved))


def test_the_working_directory_may_be_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    accelerator = prepared()
    saved = accelerator.save_state(tmp_path / "saved")
    monkeypatch.chdir(tmp_path / "work")
    (tmp_path / "work").rmdir()
    accelerator.load_state(accelerator.save_state(saved))


def test_a_url_is_no_place_to_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    accelerator = prepared()
    places: list[Any] = ["s3://bucket/saved", Path("s3://bucket/saved"), "memory://saved"]
    for place in places:
        with pytest.raises(StateError, match=r"got the URL .*; expected a path on a disk"):
            accelerator.save_state(place)
        with pytest.raises(ConfigurationError, match=r"project_dir is .*; expected a folder on a disk"):
            prepared(place)
    assert not list(tmp_path.iterdir())


def without_room(folder: str) -> str:
    """What is said when no file can have more than 1000 bytes."""
    accelerator = Accelerator(DDP())
    net = nn.Linear(40, 30)
    accelerator.prepare(net, torch.optim.AdamW(net.parameters()))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(StateError) as caught:
            accelerator.save_state(Path(folder) / "saved")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    accelerator.save_state(Path(folder) / "saved")
    return str(caught.value)


@pytest.mark.parametrize("nproc", [1, 2])
def test_the_system_s_reason_is_given_where_a_file_cannot_be_written(
    ranks: RankPool, tmp_path: Path, nproc: int
) -> None:
    for said in ranks(without_room, str(tmp_path), nproc=nproc):
        assert re.search("writing tensors failed: .*File too large", said), said
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_bad_options(tmp_path: Path) -> None:
    accelerator = prepared(tmp_path)
    with pytest.raises(ConfigurationError, match="keep_last is True; expected a number"):
        accelerator.save_state(keep_last=True)
    with pytest.raises(StateError, match=r"metrics is \[1\]; expected numbers by name"):
        accelerator.save_state(metrics=[1])  # type: ignore[arg-type]
