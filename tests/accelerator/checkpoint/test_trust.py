"""What a checkpoint survives, what is noticed, and that reading one runs nothing."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import random
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata

from accelerator import Accelerator
from rank_pool import RankPool, WorkerDied
from strategies import CPU, DDP, FSDP, PrepareError, StateError


class Net(nn.Linear):
    pass


def written(folder: Path, steps: int = 1) -> Accelerator:
    """An Accelerator that trained `steps` steps and saved after each."""
    accelerator = Accelerator(CPU(), project_dir=folder)
    net = Net(4, 3)
    model, optimizer = accelerator.prepare(net, torch.optim.AdamW(net.parameters()))
    for _ in range(steps):
        accelerator.backward(model(torch.ones(2, 4)).sum())
        optimizer.step()
        accelerator.save_state()
    return accelerator


def reader(folder: Path, net: nn.Module | None = None) -> tuple[Accelerator, Any]:
    accelerator = Accelerator(CPU(), project_dir=folder)
    net = net or Net(4, 3)
    model, _ = accelerator.prepare(net, torch.optim.AdamW(net.parameters()))
    return accelerator, model


def checkpoint_of(folder: Path, step: int = 1) -> Path:
    return folder / "checkpoints" / f"step-{step:09d}"


# -- damage ----------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[random.Random(str(path)).randrange(len(content))] ^= 1 << 3
    path.write_bytes(content)


def test_resume_walks_back_past_broken_ones_and_says_why(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    written(tmp_path, steps=3)
    flip(checkpoint_of(tmp_path, 3) / "state.json")
    (checkpoint_of(tmp_path, 2) / "manifest.json").unlink()
    accelerator, _ = reader(tmp_path)
    assert accelerator.resume() == checkpoint_of(tmp_path, 1).absolute()
    assert "state.json has other contents" in caplog.text
    assert "has no manifest.json; it was never finished" in caplog.text
    flip(checkpoint_of(tmp_path, 1) / "tensors" / ".metadata")
    with pytest.raises(StateError, match=r"none of the 3 checkpoints .* is whole"):
        accelerator.resume()


def test_without_a_checkpoint(tmp_path: Path) -> None:
    accelerator, _ = reader(tmp_path)
    assert accelerator.resume() is None
    with pytest.raises(StateError, match="found no checkpoint"):
        accelerator.load_state()
    with pytest.raises(StateError, match="has no manifest"):
        accelerator.load_state(tmp_path)


def test_saving_again_replaces_and_keep_last_deletes_the_oldest(tmp_path: Path) -> None:
    accelerator = written(tmp_path, steps=3)
    accelerator.save_state()
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == [".lock", *(f"step-{step:09d}" for step in (1, 2, 3))]
    accelerator.save_state(keep_last=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [".lock", *names[2:]]
    reader(tmp_path)[0].load_state(accelerator.save_state(tmp_path / "named"))


# -- failures while saving -------------------------------------------------------------------------------------


def save_into(strategy: Any, folder: str, spoil: str) -> str:
    accelerator = Accelerator(strategy, project_dir=folder)
    net = Net(4, 3)
    accelerator.prepare(net, torch.optim.AdamW(net.parameters()))
    if spoil in ("object", "raises") and accelerator.process_index == 1:
        accelerator.register_for_checkpointing(Unserialisable() if spoil == "object" else Raises())
    if spoil == "folder" and accelerator.is_main_process:
        (Path(folder) / "checkpoints").write_text("in the way")
    accelerator.wait_for_everyone()
    with pytest.raises(StateError) as caught:
        accelerator.save_state()
    if spoil == "folder" and accelerator.is_main_process:
        (Path(folder) / "checkpoints").unlink()
    accelerator.wait_for_everyone()
    if spoil == "folder":
        accelerator.save_state()  # the run goes on
    return str(caught.value)


class Unserialisable:
    def state_dict(self) -> dict[str, Any]:
        return {"model": {"stream": object()}}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Raises(Unserialisable):
    def state_dict(self) -> dict[str, Any]:
        raise RuntimeError("no connection")


def test_a_failure_of_one_rank_is_that_of_all_with_its_reason(ranks: RankPool, tmp_path: Path) -> None:
    for index, strategy in enumerate((DDP(), FSDP())):
        for message in ranks(save_into, strategy, str(tmp_path / f"a{index}"), "object", nproc=2):
            assert "rank 1: registered/Unserialisable/model/stream is <object object" in message
        for message in ranks(save_into, strategy, str(tmp_path / f"c{index}"), "raises", nproc=2):
            assert message == "rank 1: RuntimeError: no connection"
        (tmp_path / f"b{index}").mkdir()
        for message in ranks(save_into, strategy, str(tmp_path / f"b{index}"), "folder", nproc=2):
            assert "rank 0:" in message
        assert (tmp_path / f"b{index}" / "checkpoints" / "step-000000000" / "manifest.json").exists()


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    import fcntl

    accelerator = written(tmp_path)
    with (tmp_path / "checkpoints" / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(StateError, match="another job is writing a checkpoint"):
            accelerator.save_state()
    accelerator.save_state()


class Deep(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(*[nn.Linear(300, 300) for _ in range(8)])


def deep(folder: str | Path) -> tuple[Accelerator, Any, Any]:
    accelerator = Accelerator(CPU(), project_dir=folder)
    net = Deep()
    return (accelerator, *accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)))


def train_until_killed(folder: str, delay: float) -> None:
    accelerator, model, optimizer = deep(folder)
    accelerator.resume()
    for step in itertools.count():
        accelerator.backward(model(torch.ones(2, 300)).pow(2).mean())
        optimizer.step()
        optimizer.zero_grad()
        accelerator.save_state(keep_last=2)
        if step == 0:
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()


def test_a_kill_at_any_moment_leaves_the_one_before(ranks: RankPool, tmp_path: Path) -> None:
    steps = []
    for index in range(4):
        arguments = (str(tmp_path), 0.05 + 0.037 * index)
        (killed,) = ranks(train_until_killed, *arguments, nproc=1, return_exceptions=True)
        assert isinstance(killed, WorkerDied), killed
        found = deep(tmp_path)[0].resume()
        assert found is not None
        steps.append(int(found.name.removeprefix("step-")))
    assert steps == sorted(set(steps))
    # Two last ones, the newest known to be good, the oldest not known yet, and one whose deletion the kill came before.
    assert len(list((tmp_path / "checkpoints").glob("step-*"))) <= 5


# -- another run -----------------------------------------------------------------------------------------------


class Wider(nn.Linear):
    pass


Wider.__name__ = "Net"


def test_a_checkpoint_of_another_run_is_refused_whole(tmp_path: Path) -> None:
    written(tmp_path)
    accelerator, _ = reader(tmp_path, Wider(4, 5))
    with pytest.raises(StateError, match=r"other shapes in Net: bias is \(3,\) and should be \(5,\), weight"):
        accelerator.load_state()
    accelerator, _ = reader(tmp_path, Wider(4, 3, bias=False))
    with pytest.raises(StateError, match="foreign tensors of Net: bias"):
        accelerator.load_state()
    accelerator, _ = reader(tmp_path, nn.Sequential(nn.Linear(4, 3)))
    with pytest.raises(
        StateError, match=r"missing models: Sequential; foreign models: Net; missing optimizers: AdamW of"
    ):
        accelerator.load_state()
    accelerator = Accelerator(CPU(), project_dir=tmp_path)
    net = Net(4, 3)
    accelerator.prepare(net, torch.optim.AdamW([{"params": [net.weight]}, {"params": [net.bias]}]))
    with pytest.raises(StateError, match=r"parameter groups of \[2\] parameters were saved, and there are \[1, 1\]"):
        accelerator.load_state()
    accelerator, _ = reader(tmp_path)
    accelerator.register_for_checkpointing(Unserialisable())
    with pytest.raises(StateError, match="missing registered: Unserialisable"):
        accelerator.load_state()


def test_bad_input(tmp_path: Path) -> None:
    accelerator = Accelerator(CPU())
    with pytest.raises(StateError, match="a checkpoint has no place"):
        accelerator.save_state()
    with pytest.raises(PrepareError, match="got int; expected objects with state_dict"):
        accelerator.register_for_checkpointing(3)


def test_two_models_of_one_class_are_told_apart_by_their_order(tmp_path: Path) -> None:
    accelerator = Accelerator(CPU(), project_dir=tmp_path)
    first, second = Net(4, 3), Net(4, 3)
    optimizers = [torch.optim.SGD(net.parameters(), lr=rate) for net, rate in ((first, 0.1), (second, 0.2))]
    accelerator.prepare(first, second, *optimizers)
    accelerator.save_state()
    kept = [net.weight.clone() for net in (first, second)]
    for net in (first, second):
        nn.init.zeros_(net.weight)
    optimizers[1].param_groups[0]["lr"] = 9.0
    accelerator.load_state()
    assert [torch.equal(net.weight, value) for net, value in zip((first, second), kept, strict=True)] == [True, True]
    assert [optimizer.param_groups[0]["lr"] for optimizer in optimizers] == [0.1, 0.2]


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest as somebody would who knows how it is made."""
    path = folder / "manifest.json"
    body = json.loads(path.read_text())
    del body["digest"]
    change(body)
    body["digest"] = xxhash.xxh3_128(json.dumps(body, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(body))


def forge(folder: Path, name: str, content: bytes) -> None:
    """Put a file of one's own into a checkpoint, with a digest that fits."""
    (folder / name).write_bytes(content)
    entry = {"size": len(content), "xxh3_128": xxhash.xxh3_128(content).hexdigest()}
    rewrite(folder, lambda body: body["files"].update({name: entry}))


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    written(tmp_path)
    rewrite(checkpoint_of(tmp_path), lambda body: body.update(format=2))
    with pytest.raises(StateError, match="has format 2, and this release reads 1"):
        reader(tmp_path)[0].load_state(checkpoint_of(tmp_path))


def test_resume_does_not_walk_back_past_a_newer_format(tmp_path: Path) -> None:
    written(tmp_path, steps=2)
    rewrite(checkpoint_of(tmp_path, 2), lambda body: body.update(format=2))
    with pytest.raises(StateError, match="has format 2, and this release reads 1"):
        reader(tmp_path)[0].resume()


# -- foreign code ----------------------------------------------------------------------------------------------


class Runs:
    """Unpickled, it would run a command."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def metadata_of(folder: Path) -> Any:
    return pickle.loads((folder / "tensors" / ".metadata").read_bytes())


def with_bytes(folder: Path, proof: Path) -> bytes:
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    metadata = metadata_of(folder)
    metadata.state_dict_metadata["model/Net/weight"] = BytesStorageMetadata()
    return pickle.dumps(metadata)


def with_path(folder: Path, proof: Path) -> bytes:
    metadata = metadata_of(folder)
    for place in metadata.storage_data.values():
        place.relative_path = "../../../elsewhere.distcp"
    return pickle.dumps(metadata)


def with_planner(folder: Path, proof: Path) -> bytes:
    metadata = metadata_of(folder)
    metadata.planner_data = Runs(os.system, f"touch {proof}")
    return pickle.dumps(metadata)


def attribute_set(target: str) -> bytes:
    """The begin of a pickle that makes `target.is_file` a `set`, and then goes on with another value."""
    return b"\x80\x04" + target.encode() + b"N}X\x07\0\0\0is_filecbuiltins\nset\ns\x86b0"


def the_index(folder: Path) -> bytes:
    return (folder / "tensors" / ".metadata").read_bytes()


def with_no_dictionaries(folder: Path, proof: Path) -> bytes:
    metadata = metadata_of(folder)
    metadata.state_dict_metadata = {1, 2}
    return pickle.dumps(metadata)


MALICIOUS: dict[str, tuple[Callable[[Path, Path], bytes], str]] = {
    "os.system": (
        lambda folder, proof: pickle.dumps(Runs(os.system, f"touch {proof}")),
        r"names posix\.system, which no checkpoint needs",
    ),
    "eval": (lambda folder, proof: pickle.dumps(Runs(eval, f"open({str(proof)!r}, 'w')")), r"names builtins\.eval, "),
    "open": (lambda folder, proof: pickle.dumps(Runs(open, str(proof), "w")), r"names _?io\.open, "),
    "getattr": (lambda folder, proof: pickle.dumps(Runs(getattr, "text", "upper")), r"names builtins\.getattr, "),
    "torch.load": (lambda folder, proof: pickle.dumps(Runs(torch.load, str(proof))), r"names torch\S+load, "),
    "torch.hub": (lambda folder, proof: pickle.dumps(Runs(torch.hub.load, "a/b", "c")), r"names torch\.hub\.load, "),
    "planner": (with_planner, r"names posix\.system, "),
    "bytes": (with_bytes, "names .*BytesStorageMetadata, "),
    "path": (with_path, r"leads elsewhere: '\.\./\.\./\.\./elsewhere\.distcp'"),
    "attribute of a class": (
        lambda folder, proof: attribute_set("ctorch.distributed.checkpoint.metadata\nMetadata\n") + the_index(folder),
        "sets attributes of <class 'torch.distributed.checkpoint.metadata.Metadata'>",
    ),
    "attribute of a path": (
        lambda folder, proof: attribute_set("cpathlib\nPosixPath\n") + the_index(folder),
        "sets attributes of <function",
    ),
    "attribute of a function": (
        lambda folder, proof: attribute_set("ctorch.serialization\n_get_layout\n") + the_index(folder),
        "sets attributes of <function",
    ),
    "no dictionaries": (with_no_dictionaries, "cannot be read: "),
    "other object": (lambda folder, proof: pickle.dumps({"a": 1}), "is a dict"),
    "no pickle": (lambda folder, proof: b"\x80\x04K", "cannot be read: "),
}


@pytest.mark.parametrize("name", list(MALICIOUS))
def test_a_malicious_index_is_refused_and_runs_nothing(tmp_path: Path, name: str) -> None:
    written(tmp_path)
    folder, proof = checkpoint_of(tmp_path), tmp_path / "proof"
    make, reason = MALICIOUS[name]
    forge(folder, "tensors/.metadata", make(folder, proof))
    with pytest.raises(StateError, match=reason):
        reader(tmp_path)[0].load_state(folder)
    assert not proof.exists()
    changed = Metadata, type(tmp_path), torch.serialization._get_layout
    assert not any(vars(one).get("is_file") is set for one in changed)


@pytest.mark.parametrize("name", ["../outside.json", "/etc/hostname"])
def test_a_manifest_that_leads_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    written(tmp_path)
    folder = checkpoint_of(tmp_path)
    rewrite(folder, lambda body: body["files"].update({name: {"size": 0, "xxh3_128": ""}}))
    with pytest.raises(StateError, match="is not as it was written"):
        reader(tmp_path)[0].load_state(folder)


def test_tensor_data_that_is_a_pickle_runs_nothing(tmp_path: Path) -> None:
    written(tmp_path)
    folder, proof = checkpoint_of(tmp_path), tmp_path / "proof"
    place = next(iter(metadata_of(folder).storage_data.values()))
    content = pickle.dumps(Runs(os.system, f"touch {proof}")).ljust(1000, b"\0")
    forge(folder, f"tensors/{place.relative_path}", content)
    with pytest.raises(StateError):
        reader(tmp_path)[0].load_state(folder)
    assert not proof.exists()
