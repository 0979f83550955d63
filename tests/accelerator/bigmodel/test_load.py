"""Loading: every format, straight into place, everything that does not fit at once, and within the memory promised."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from accelerator import Accelerator
from accelerator.bigmodel import (
    disk_offload,
    init_empty_weights,
    load_checkpoint_and_dispatch,
    load_checkpoint_in_model,
)
from blocks_net import Net, make_net
from fresh_process import FreshProcesses
from rank_pool import RankPool
from strategies.errors import ConfigurationError, StateError


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


def as_saved_state(state: dict[str, torch.Tensor], folder: Path) -> Path:
    model = make_net(seed=1)
    model.load_state_dict(state)
    return save(model, folder)


def save(model: nn.Module, folder: Path) -> Path:
    accelerator = Accelerator("cpu", project_dir=folder)
    accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    return Path(accelerator.save_state())


def as_mapping(state: dict[str, torch.Tensor], folder: Path) -> dict[str, torch.Tensor]:
    return state


def _shards(
    state: dict[str, torch.Tensor], folder: Path, form: str, save: Callable[[dict[str, torch.Tensor], Path], None]
) -> Path:
    weight_map = {name: form.format(index % 3) for index, name in enumerate(state)}
    for file in set(weight_map.values()):
        save({name: state[name] for name in state if weight_map[name] == file}, folder / file)
    index = "pytorch_model.bin.index.json" if form.endswith("bin") else "model.safetensors.index.json"
    (folder / index).write_text(json.dumps({"weight_map": weight_map}))
    return folder


FORMATS = [
    as_safetensors,
    as_folder,
    as_shards,
    as_shards_without_index,
    as_torch_file,
    as_torch_folder,
    as_torch_shards,
    as_one_file_per_tensor,
    as_saved_state,
    as_mapping,
]


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("write", FORMATS)
def test_every_format_gives_the_same_model(
    write: Callable[[dict[str, torch.Tensor], Path], Path], mmap: bool, tmp_path: Path
) -> None:
    expected = make_net()
    checkpoint = write(expected.state_dict(), tmp_path)
    with init_empty_weights():
        empty = Net()
    real = Net()
    parameters = [id(parameter) for parameter in real.parameters()]
    for model in (empty, real):
        assert load_checkpoint_in_model(model, checkpoint, mmap=mmap) == ([], [])
        torch.testing.assert_close(dict(model.state_dict()), dict(expected.state_dict()), rtol=0, atol=0)
        assert all(parameter.requires_grad for parameter in model.parameters())
    assert [id(parameter) for parameter in real.parameters()] == parameters
    x = torch.randn(3, 5)
    assert torch.equal(empty(x), expected(x))


@pytest.mark.parametrize("write", [as_safetensors, as_torch_file, as_one_file_per_tensor])
def test_training_does_not_change_the_file(
    write: Callable[[dict[str, torch.Tensor], Path], Path], tmp_path: Path
) -> None:
    checkpoint = write(make_net().state_dict(), tmp_path)
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with init_empty_weights():
        model = Net()
    load_checkpoint_in_model(model, checkpoint)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = make_net()
    optimizer_there = torch.optim.SGD(expected.parameters(), lr=0.1)
    for one, step in ((model, optimizer), (expected, optimizer_there)):
        one(torch.ones(2, 5)).sum().backward()
        step.step()
    torch.testing.assert_close(dict(model.state_dict()), dict(expected.state_dict()), rtol=0, atol=0)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files


@pytest.mark.parametrize("empty", [True, False])
def test_weights_are_cast_on_the_way(empty: bool, tmp_path: Path) -> None:
    expected = make_net()
    checkpoint = as_safetensors(expected.state_dict(), tmp_path)
    for dtype in (torch.bfloat16, torch.float64):
        with init_empty_weights() if empty else torch.device("cpu"):
            model = Net()
        load_checkpoint_in_model(model, checkpoint, dtype=dtype)
        torch.testing.assert_close(
            dict(model.state_dict()), {k: v.to(dtype) for k, v in expected.state_dict().items()}, rtol=0, atol=0
        )
        with init_empty_weights():
            model = Net().to(dtype)  # the model's own dtype, without being told
        load_checkpoint_in_model(model, checkpoint)
        assert model.head.weight.dtype is dtype


def test_a_tied_weight_is_found_under_any_of_its_names(tmp_path: Path) -> None:
    for kept in ("0.weight", "1.weight"):
        with init_empty_weights():
            model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
            model[1].weight = model[0].weight
        load_checkpoint_in_model(model, {kept: torch.ones(2, 2)})
        assert model[0].weight is model[1].weight
        assert torch.equal(model[0].weight, torch.ones(2, 2))


def test_parameters_keep_what_was_noted_on_them() -> None:
    with init_empty_weights():
        model = nn.Linear(2, 2)
        model.weight.no_decay = True
    model.bias.requires_grad_(False)
    load_checkpoint_in_model(model, nn.Linear(2, 2).state_dict())
    assert model.weight.no_decay
    assert not model.bias.requires_grad


def load_into_a_sharded_model(folder: str) -> None:
    accelerator = Accelerator("fsdp")
    model = accelerator.prepare(make_net(seed=4))
    load_checkpoint_in_model(model, folder)
    state = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        torch.testing.assert_close(state, dict(make_net().state_dict()), rtol=0, atol=0)


def test_a_prepared_model_that_is_cut_over_ranks(ranks: RankPool, tmp_path: Path) -> None:
    ranks(load_into_a_sharded_model, str(as_shards(make_net().state_dict(), tmp_path)), nproc=2)


def save_shards(folder: str) -> None:
    accelerator = Accelerator("fsdp")
    accelerator.save_model(accelerator.prepare(make_net()), folder, max_shard_size="600B")


def test_shards_that_two_ranks_saved(ranks: RankPool, tmp_path: Path) -> None:
    ranks(save_shards, str(tmp_path), nproc=2)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    with init_empty_weights():
        model = Net()
    load_checkpoint_in_model(model, tmp_path)
    torch.testing.assert_close(dict(model.state_dict()), dict(make_net().state_dict()), rtol=0, atol=0)


def test_everything_that_does_not_fit_is_reported_together_and_nothing_loaded() -> None:
    model = make_net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = dict(make_net(seed=4).state_dict())
    del state["layers.1.up.weight"]
    state |= {"layers.7.up": torch.ones(2), "head.weight": torch.ones(2, 8), "scale": torch.tensor(1)}
    with pytest.raises(StateError) as raised:
        load_checkpoint_in_model(model, state)
    for part in (
        "scale is int64 and should be float32; head.weight is 2x8 and should be 1x8",
        "missing: layers.1.up.weight",
        "unexpected: layers.7.up",
        "nothing was loaded",
    ):
        assert part in str(raised.value)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


def test_what_is_missing_or_unexpected_is_returned_if_not_strict() -> None:
    model, state = make_net(), dict(make_net(seed=4).state_dict())
    del state["scale"]
    assert load_checkpoint_in_model(model, {**state, "more": torch.ones(1)}, strict=False) == (["scale"], ["more"])
    assert torch.equal(model.head.weight, state["head.weight"])
    assert model.scale == 1.5


def test_an_older_file_may_hold_a_buffer_that_the_model_makes_itself() -> None:
    state = {**make_net().state_dict(), "shift": torch.zeros(8)}
    model = make_net()
    load_checkpoint_in_model(model, state)
    assert model.shift[0] == 0.25


def test_a_buffer_that_nothing_can_fill() -> None:
    with torch.device("meta"):
        model = Net()
    with pytest.raises(StateError, match=r"shift of Net are on the meta device.*init_empty_weights"):
        load_checkpoint_in_model(model, make_net().state_dict())


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("EVIL",)


def cut(path: Path, by: int = 10) -> Path:
    os.truncate(path, path.stat().st_size - by)
    return path


def written(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def flipped(path: Path, where: bytes) -> Path:
    """The file with other bits in the byte behind these."""
    content = bytearray(path.read_bytes())
    content[content.index(where) + len(where)] ^= 0xFF
    path.write_bytes(content)
    return path


def index(folder: Path, **weight_map: str) -> Path:
    as_shards(make_net().state_dict(), folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


DAMAGED = {
    "absent": (lambda d: d / "nothing.safetensors", "which is not there"),
    "empty folder": (lambda d: d, "holds no weights"),
    "truncated safetensors": (lambda d: cut(as_safetensors(make_net().state_dict(), d)), "no whole safetensors file"),
    "truncated torch file": (lambda d: cut(as_torch_file(make_net().state_dict(), d)), "cannot be mapped"),
    "truncated shard": (
        lambda d: cut(as_shards(make_net().state_dict(), d) / "model-1.safetensors").parent,
        "no whole safetensors file",
    ),
    "longer than it says": (
        lambda d: (lambda p: p.write_bytes(p.read_bytes() + b"more") and p)(as_safetensors(make_net().state_dict(), d)),
        "no whole safetensors file",
    ),
    "absent shard": (lambda d: index(d, scale="model-8.safetensors"), "not there: model-8.safetensors"),
    "tensor not in its shard": (lambda d: index(d, other="model-1.safetensors"), "other in model-1.safetensors"),
    "shard above": (lambda d: index(d, scale="../model-1.safetensors"), r"leads out of its folder: \.\./model-1"),
    "absolute shard": (lambda d: index(d, scale="/etc/passwd"), "leads out of its folder: /etc/passwd"),
    "index of something else": (
        lambda d: (index(d) / "model.safetensors.index.json").write_text("[]") and d,
        "expected a 'weight_map'",
    ),
    "no state dict": (lambda d: written(d / "a.pt", {"model": {}, "step": 1}), r"no tensors \(model, step\)"),
    "a tensor": (lambda d: written(d / "a.pt", torch.ones(2)), "holds a Tensor; expected a state dict"),
    "code": (
        lambda d: written(d / "a.pt", {"a": Evil()}),
        r"more than tensors \(posix.mkdir\), and was not read, since reading it could run its code. If you wrote",
    ),
    "a damaged pickle": (
        lambda d: flipped(as_torch_file(dict(make_net().state_dict()), d), b"_rebuild_tensor_v2\nq"),
        "cannot be mapped: .*fetch it again",
    ),
    "an index without an end": (
        lambda d: (index(d) / "model.safetensors.index.json").write_text("[" * 10**5) and d,
        "expected a 'weight_map'",
    ),
    "a pickle": (lambda d: (d / "a.pt").write_bytes(pickle.dumps({"a": 1})) and d / "a.pt", "cannot be mapped"),
    "old torch file": (
        lambda d: torch.save({"a": torch.ones(1)}, d / "a.pt", _use_new_zipfile_serialization=False) or d / "a.pt",
        "torch < 1.6",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_or_unsafe_checkpoint(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make, message = DAMAGED[case]
    with pytest.raises(StateError, match=message):
        load_checkpoint_in_model(make_net(), make(tmp_path))
    assert not Path("EVIL").exists()


@pytest.mark.parametrize("checkpoint", [None, ["a.safetensors"], 3])
def test_what_is_no_checkpoint(checkpoint: Any) -> None:
    with pytest.raises(ConfigurationError, match="expected the path of a file or folder, or tensors by name"):
        load_checkpoint_in_model(make_net(), checkpoint)


@pytest.mark.parametrize("dtype", ["float16", torch.int8])
def test_what_is_no_dtype_for_weights(dtype: Any) -> None:
    with pytest.raises(ConfigurationError, match="expected a floating-point one, such as"):
        load_checkpoint_in_model(make_net(), make_net().state_dict(), dtype=dtype)


def test_names_with_a_prefix() -> None:
    state = make_net().state_dict()
    with pytest.raises(StateError) as raised:
        load_checkpoint_in_model(make_net(), {f"module.{name}": tensor for name, tensor in state.items()})
    assert "begin with 'module.' in the checkpoint only. Load {name.removeprefix('module.')" in str(raised.value)
    assert "strict=False" not in str(raised.value)
    with pytest.raises(StateError, match=r"begin with 'transformer.' in the model only.* \(model.transformer\)"):
        load_checkpoint_in_model(nn.ModuleDict({"transformer": make_net()}), state)


def test_weights_that_transformers_saves_under_other_names(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
    )
    expected = ViTForImageClassification(config).eval()
    expected.save_pretrained(tmp_path)
    with init_empty_weights():
        model = ViTForImageClassification(config)
    with pytest.raises(StateError, match=r"which its from_pretrained knows.* disk_offload\(model\)") as raised:
        load_checkpoint_in_model(model, tmp_path)
    assert "strict=False" not in str(raised.value)
    model = ViTForImageClassification.from_pretrained(tmp_path).eval()
    disk_offload(model)  # it stays in its own file, which transformers maps too
    pixels = torch.ones(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(pixels).logits, expected(pixels).logits)


def test_a_tensor_in_two_files_without_an_index(tmp_path: Path) -> None:
    as_safetensors({"a": torch.ones(1)}, tmp_path)
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(StateError, match="a is in several files"):
        load_checkpoint_in_model(make_net(), tmp_path)


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        ({"first": "cpu"}, "nothing says where scale, layers.0.norm.weight, "),
        ({"": "cpu", "layer.1": "disk"}, r"'layer.1' is not in it. Did you mean 'layers.1'\?"),
        ({"": "disc"}, "'disc' is no place for weights"),
        ({"": 99}, "99 is not there"),
    ],
)
def test_a_device_map_that_does_not_fit(device_map: dict[str, int | str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=f"device_map does not fit Net: .*{message}"):
        load_checkpoint_in_model(make_net(), make_net().state_dict(), device_map)


def test_a_device_map_that_leaves_out_one_name_of_a_tied_weight() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    with pytest.raises(ConfigurationError, match=r"where 1.weight should be \(1.weight is 0.weight: give tied weights"):
        load_checkpoint_in_model(model, {"0.weight": torch.ones(2, 2)}, {"0": "cpu"})


@pytest.mark.parametrize("device_map", [None, {1: "cpu"}, ["cpu"]])
def test_what_is_no_device_map(device_map: Any) -> None:
    with pytest.raises(ConfigurationError, match="expected a mapping from names of modules to devices"):
        load_checkpoint_and_dispatch(make_net(), make_net().state_dict(), device_map)


# -- memory ------------------------------------------------------------------------------------------------

SCRIPT = """
import json, sys
from pathlib import Path
import torch
from accelerator.bigmodel import init_empty_weights, load_checkpoint_in_model

def memory(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024

def model():
    with init_empty_weights():
        return torch.nn.Sequential(*[torch.nn.Linear(2048, 2048, bias=False) for _ in range(4)])

torch.set_num_threads(1)
model()
compiler = "torch._dynamo" in sys.modules
import torch.distributed.checkpoint  # what reads the checkpoints of save_state takes 50 MB for itself
for checkpoint, dtype, mmap in json.loads(sys.argv[1]):
    net, before = model(), memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    load_checkpoint_in_model(net, checkpoint, dtype=getattr(torch, dtype), mmap=mmap)
    assert sum(parameter.sum().item() for parameter in net.parameters()) == sum(range(4)) * 2**22
    print(memory("VmHWM") - before)
    del net
print(compiler)
"""


def test_peak_memory_is_the_model_and_a_piece(fresh: FreshProcesses, tmp_path: Path) -> None:
    state = {f"{index}.weight": torch.full((2048, 2048), float(index)) for index in range(4)}  # 64 MiB
    paths = {}
    for write in (as_safetensors, as_torch_file, as_one_file_per_tensor):
        (tmp_path / write.__name__).mkdir()
        paths[write] = str(write(state, tmp_path / write.__name__))
    with init_empty_weights():
        model = nn.Sequential(*[nn.Linear(2048, 2048, bias=False) for _ in range(4)])
    model.load_state_dict(state, assign=True)
    paths[save] = str(save(model, tmp_path))
    cases = [
        *((path, "float32", mmap, 64) for path in paths.values() for mmap in (True, False)),
        *((path, "bfloat16", True, 32) for path in paths.values()),
    ]
    given_back = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # else glibc keeps some of what was freed
    (finished,) = fresh(SCRIPT, json.dumps([case[:3] for case in cases]), env=given_back)
    assert finished.returncode == 0, finished.stderr
    *peaks, compiler = finished.stdout.splitlines()
    for case, peak in zip(cases, peaks, strict=True):
        # MiB: the model, a piece, and a little; torch reads all of what save_state wrote, and then copies it into place
        assert float(peak) < case[3] + (24 if case[0] == paths[save] else 4) + 4, case
    assert compiler == "False"  # building without memory imports no compiler, which takes seconds and 70 MB
