"""Dispatched models compute what they compute in memory, within their budget, and are themselves again afterwards."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from accelerator import Accelerator
from accelerator.bigmodel import (
    cpu_offload,
    cpu_offload_with_hook,
    disk_offload,
    dispatch_model,
    init_empty_weights,
    load_checkpoint_and_dispatch,
    remove_dispatch,
)
from blocks_net import Net, make_net
from fresh_process import FreshProcesses
from offloaded_net import check_equal, offloaded
from rank_pool import RankPool
from strategies.errors import ConfigurationError, PrepareError, StateError, StepError


@pytest.mark.parametrize("budget", [None, 1500, "2.5kB", "1GB"])
def test_forward_from_the_disk(net: Path, budget: int | str | None) -> None:
    before = sorted(net.iterdir())
    model = offloaded(net, offload_budget=budget)
    check_equal(model, make_net())
    assert sorted(net.iterdir()) == before  # nothing is written again
    residency = model._dispatched.residency  # type: ignore[union-attr]
    assert residency.held_bytes <= {None: 4 + 2 * 1184, 1500: 1500, "2.5kB": 2500, "1GB": 10**9}[budget]


@pytest.mark.usefixtures("by_copies")
@pytest.mark.parametrize("budget", [None, 1500, "1GB"])
def test_forward_with_copies(net: Path, budget: int | str | None) -> None:
    check_equal(offloaded(net, offload_budget=budget), make_net())


@pytest.mark.parametrize("device_map", [{"": "cpu"}, {"": "cpu", "layers.1": "disk", "head": "disk"}])
def test_maps_over_memory_and_disk(net: Path, device_map: dict[str, str]) -> None:
    with init_empty_weights():
        model = Net()
    load_checkpoint_and_dispatch(model, net, device_map)
    check_equal(model, make_net())
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())


def test_an_inferred_map(net: Path) -> None:
    with init_empty_weights():
        model = Net()
    load_checkpoint_and_dispatch(model, net, max_memory={"cpu": "2.6kB"})
    assert set(model._dispatched.device_map.values()) == {"cpu", "disk"}  # type: ignore[union-attr]
    check_equal(model, make_net())


def test_weights_that_are_written_to_keep_what_was_written(net: Path) -> None:
    model, expected = offloaded(net, offload_budget=1500), make_net()
    for one in (model, expected):
        one.layers[1].up.weight.data += 1  # behind autograd's back
        with torch.no_grad():
            one.layers[0].down.bias.mul_(2)
    check_equal(model, expected)


def add_to_bias(module: nn.Linear, args: object) -> None:
    module.bias.add_(1)  # while it runs


@pytest.mark.usefixtures("by_copies")
@pytest.mark.parametrize("budget", [1500, None, "1GB"])
def test_what_is_written_to_a_model_of_copies_is_what_runs(net: Path, tmp_path: Path, budget: int | str | None) -> None:
    model = offloaded(net, offload_budget=budget)
    check_equal(model, make_net())
    model.load_state_dict(make_net(seed=5).state_dict())
    check_equal(model, make_net(seed=5))
    Accelerator("cpu").save_model(make_net(seed=6), tmp_path / "other")
    Accelerator("cpu").load_model(model, tmp_path / "other")
    check_equal(model, make_net(seed=6))
    changed = make_net(seed=6)
    for one in (model, changed):
        one.layers[2].up.weight.data = torch.ones(16, 8)
        one.layers[1].up.register_forward_pre_hook(add_to_bias)
    check_equal(model, changed)
    torch.testing.assert_close(dict(model.named_parameters()), dict(changed.named_parameters()), rtol=0, atol=0)
    check_equal(remove_dispatch(model), changed)


@pytest.mark.parametrize("copies", [False, True])
def test_a_dispatched_model_is_neither_moved_nor_cast(net: Path, copies: bool, request: pytest.FixtureRequest) -> None:
    if copies:
        request.getfixturevalue("by_copies")
    model = offloaded(net)
    for change in (nn.Module.bfloat16, lambda model: model.to("meta"), lambda model: nn.Sequential(model).double()):
        with pytest.raises(PrepareError, match=r"Net is dispatched, .* call remove_dispatch\(model\) first"):
            change(model)
    check_equal(model.to("cpu").float(), make_net())
    assert remove_dispatch(model).bfloat16().head.weight.dtype is torch.bfloat16


@pytest.mark.parametrize("copies", [False, True])
def test_removing_gives_the_model_back(net: Path, copies: bool, request: pytest.FixtureRequest) -> None:
    if copies:
        request.getfixturevalue("by_copies")
    model, plain = offloaded(net), make_net()
    check_equal(model, plain)
    hooks = [dict(module._forward_hooks) for module in plain.modules()]
    assert remove_dispatch(model) is model
    assert [dict(module._forward_hooks) for module in model.modules()] == hooks
    assert [dict(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert vars(model).keys() == vars(plain).keys()
    check_equal(copy.deepcopy(model), plain)
    torch.testing.assert_close(dict(model.named_parameters()), dict(plain.named_parameters()), rtol=0, atol=0)
    remove_dispatch(model)
    model(torch.ones(2, 5)).sum().backward()


def test_removing_between_forward_and_backward(net: Path, request: pytest.FixtureRequest) -> None:
    x, y = (torch.ones(2, 5, requires_grad=True) for _ in range(2))
    model = offloaded(net, offload_budget=1500)
    model.requires_grad_(False)
    loss = model(x).sum()
    remove_dispatch(model)
    loss.backward()  # mapped weights are there
    make_net()(y).sum().backward()
    assert torch.equal(x.grad, y.grad)
    request.getfixturevalue("by_copies")
    model = offloaded(net).requires_grad_(False)
    loss = model(x).sum()
    remove_dispatch(model)
    with pytest.raises(StepError, match=r"between forward and backward.*Call it after backward\(\)"):
        loss.backward()


def test_a_model_in_memory_goes_to_the_disk(tmp_path: Path) -> None:
    model = make_net()
    with pytest.raises(StateError, match="give offload_folder"):
        disk_offload(make_net())
    disk_offload(model, tmp_path)
    assert {path.stem for path in tmp_path.iterdir()} == {name for name, _ in model.named_parameters()}
    check_equal(model, make_net())


def test_a_checkpoint_of_another_dtype_is_written_once_more(net: Path, tmp_path: Path) -> None:
    with init_empty_weights():
        model = Net().bfloat16()
    with pytest.raises(StateError, match=r"float32 in the checkpoint and bfloat16 in the model.*Give offload_folder"):
        load_checkpoint_and_dispatch(model, net, {"": "disk"})
    load_checkpoint_and_dispatch(model, net, {"": "disk"}, offload_folder=tmp_path / "cast")
    x = torch.ones(2, 5, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(model(x), make_net().bfloat16()(x))


def test_an_offload_folder_never_changes_a_checkpoint(tmp_path: Path) -> None:
    for name, tensor in make_net().state_dict().items():
        save_file({name: tensor}, tmp_path / f"{name}.safetensors")
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for seed in range(2):
        with init_empty_weights():
            model = Net()
        load_checkpoint_and_dispatch(model, tmp_path, {"": "disk"}, offload_folder=tmp_path, dtype=torch.bfloat16)
        assert model.head.weight.dtype is torch.bfloat16, seed
    assert {path: path.read_bytes() for path in files} == files
    check_equal(offloaded(tmp_path), make_net())


FULL = """
import resource, signal, sys, torch
from accelerator.bigmodel import disk_offload
from strategies.errors import StateError

model = torch.nn.Linear(64, 64)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))  # fails in the same place as a full disk
try:
    disk_offload(model, sys.argv[1])
except StateError as error:
    assert "weight could not be written to" in str(error), error
    model(torch.ones(64)).sum().item()
else:
    raise AssertionError("nothing was raised")
"""


def test_a_full_disk(fresh: FreshProcesses, tmp_path: Path) -> None:
    (finished,) = fresh(FULL, str(tmp_path), warm=True)
    assert finished.returncode == 0, finished.stderr
    assert not list(tmp_path.iterdir())


def offload_often(folder: str, times: int) -> None:
    for _ in range(times):
        with init_empty_weights():
            model = Net().double()
        load_checkpoint_and_dispatch(model, folder, {"": "disk"}, offload_folder=Path(folder) / "shared")
        expected = make_net().double()
        assert all(torch.equal(one, two) for one, two in zip(model.parameters(), expected.parameters(), strict=True))


def test_ranks_share_an_offload_folder(net: Path, ranks: RankPool) -> None:
    ranks(offload_often, str(net), 10, nproc=2)
    assert {path.suffix for path in (net / "shared").iterdir()} == {".offload"}


@pytest.mark.parametrize("budget", ["100kB", None])
def test_generate_of_transformers_with_tied_heads(tmp_path: Path, budget: str | None) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_layer=3, n_embd=32, n_head=2, vocab_size=99, n_positions=32, bos_token_id=0, eos_token_id=98)
    expected = GPT2LMHeadModel(config).eval()
    expected.save_pretrained(tmp_path)
    with init_empty_weights():
        model = GPT2LMHeadModel(config).eval()
    load_checkpoint_and_dispatch(model, tmp_path, {"": "disk"}, offload_budget=budget)
    tokens = torch.tensor([[3, 14, 15], [9, 26, 5]])
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 98, "attention_mask": torch.ones_like(tokens)}
    assert torch.equal(model.generate(tokens, **options), expected.generate(tokens, **options))
    outputs = [one(input_ids=tokens, labels=tokens, output_hidden_states=True) for one in (model, expected)]
    assert torch.equal(outputs[0].loss, outputs[1].loss)
    assert all(map(torch.equal, outputs[0].hidden_states, outputs[1].hidden_states))
    remove_dispatch(model)


class Tuples(nn.Module):
    """Blocks that take keywords and return a tuple with `None` and a mapping in it."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.norm = nn.LayerNorm(4)

        def forward(self, x: Tensor, *, scale: float) -> tuple[Tensor, None, dict[str, Tensor]]:
            return self.norm(self.linear(x)) * scale, None, {"x": x}

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(self.Block() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            y, _, more = block(x, scale=0.5)
            x = y + more["x"]
        return x


@pytest.mark.parametrize("copies", [False, True])
def test_keywords_and_tuples(copies: bool, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if copies:
        request.getfixturevalue("by_copies")
    model = Tuples()
    expected = copy.deepcopy(model)
    disk_offload(model.requires_grad_(False), tmp_path)
    x, y = (torch.ones(2, 4, requires_grad=True) for _ in range(2))
    model(x).sum().backward()
    expected(y).sum().backward()
    assert torch.equal(x.grad, y.grad)


def test_without_accelerators_nothing_is_attached_to_a_model_in_memory() -> None:
    model = make_net()
    cpu_offload(model, "cpu")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    check_equal(model, make_net())


def test_models_of_a_pipeline_take_turns() -> None:
    one, first = cpu_offload_with_hook(make_net(), "cpu")
    two, second = cpu_offload_with_hook(make_net(seed=4), "cpu", first)
    x = torch.ones(2, 5)
    assert torch.equal(two(one(x)[:, None].expand(2, 5)), make_net(seed=4)(make_net()(x)[:, None].expand(2, 5)))
    second.offload()
    second.remove()
    first.remove()
    assert not one._forward_pre_hooks
    assert not two._forward_pre_hooks


# -- refusals ----------------------------------------------------------------------------------------------


def test_refusals(net: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"offload_budget is 1 kB, .* 'layers.0' of 1.18 kB \(1184 bytes\)"):
        offloaded(net, offload_budget="1kB")
    with pytest.raises(ConfigurationError, match=r"together with what runs around it, 'scale' of 4 B \(1188 bytes in"):
        offloaded(net, offload_budget=1184)
    with pytest.raises(ConfigurationError, match="offload_budget is 'banana'"):
        dispatch_model(make_net(), {"": "cpu"}, offload_budget="banana")
    with init_empty_weights():
        empty = Net()
    with pytest.raises(PrepareError, match="have no numbers yet; load them first"):
        dispatch_model(empty, {"": "cpu"})
    with pytest.raises(ConfigurationError, match="max_memory is for a device map that is inferred"):
        load_checkpoint_and_dispatch(empty, net, {"": "cpu"}, max_memory={"cpu": 1})
    with pytest.raises(ConfigurationError, match="main_device is 'meta'"):
        dispatch_model(make_net(), {"": "cpu"}, main_device="meta")
    model = offloaded(net)
    with pytest.raises(PrepareError, match="dispatched already"):
        dispatch_model(model, {"": "cpu"})
    for copied in (copy.deepcopy, pickle.dumps, lambda model: torch.save(model, net / "copy.pt")):
        with pytest.raises(PrepareError, match="cannot be copied or pickled; call remove_dispatch"):
            copied(model)
    assert pickle.loads(pickle.dumps(remove_dispatch(model))) is not None


# -- memory ------------------------------------------------------------------------------------------------

SCRIPT = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from accelerator.bigmodel import init_empty_weights, load_checkpoint_and_dispatch

MIB = 2**20

def memory(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024

class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = (torch.nn.Linear(1024, 512), torch.nn.Linear(512, 1024))
    def forward(self, x):
        return x + self.two(torch.tanh(self.one(x)))

torch.set_num_threads(1)
with init_empty_weights():
    model = torch.nn.Sequential(*[Block() for _ in range(16)])
folder = Path(sys.argv[1])
for index, block in enumerate(model):
    state = {f"{index}.{name}": torch.full(weight.shape, 1e-3) for name, weight in block.named_parameters()}
    save_file(state, folder / f"{index}.safetensors")
del state
model.requires_grad_(False)
load_checkpoint_and_dispatch(model, folder, {"": "disk"}, offload_budget="12MiB")
x = torch.ones(2, 1024, requires_grad=True)
torch.nn.Linear(1024, 1024)(x).sum().backward()
before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
for _ in range(2):
    with torch.no_grad():
        y = model(x)
    forward = memory("VmHWM") - before
    model(x).sum().backward()
trained = memory("VmHWM") - before
model.requires_grad_(True)  # as weights are that nobody froze
with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
    for _ in range(2):
        model(x)
print(json.dumps([forward, trained, memory("VmHWM") - before]))
"""


def test_peak_memory_is_the_budget_not_the_model(fresh: FreshProcesses, tmp_path: Path) -> None:
    (finished,) = fresh(SCRIPT, str(tmp_path))
    assert finished.returncode == 0, finished.stderr
    forward, backward, autocast = json.loads(finished.stdout)
    assert forward < 12 + 4  # MiB, of 64
    assert backward < 12 + 8
    assert autocast < 12 + 12  # with casts of one block, and not with those of all, which autocast would keep
