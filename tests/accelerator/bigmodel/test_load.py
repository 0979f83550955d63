"""Loading: every format, straight into place, everything that does not fit at once, and within the memory promised."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from accelerator import Accelerator
from accelerator.bigmodel import init_empty_weights, load_checkpoint_in_model
from blocks_net import Net, make_net
from checkpoint_formats import (
    as_folder,
    as_one_file_per_tensor,
    as_safetensors,
    as_shards,
    as_shards_without_index,
    as_torch_file,
    as_torch_folder,
    as_torch_shards,
)
from fresh_process import FreshProcesses
from rank_pool import RankPool
from strategies.errors import StateError


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
