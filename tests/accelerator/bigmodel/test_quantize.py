"""Quantized loading: the numbers of torchao, the error that is expected, and never all weights in full."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from accelerator import Accelerator
from accelerator.bigmodel import (
    disk_offload,
    dispatch_model,
    infer_auto_device_map,
    init_empty_weights,
    load_checkpoint_and_dispatch,
    load_checkpoint_in_model,
    quantization_errors,
)
from accelerator.bigmodel.parts import parts_of
from fresh_process import FreshProcesses
from strategies.errors import ConfigurationError, PrepareError, StateError
from torch_version import torchao_runs

pytestmark = torchao_runs


class Language(nn.Module):
    """An embedding whose weight is the head's too, two blocks, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(48, 64)
        self.blocks = nn.Sequential(*[Block() for _ in range(2)])
        self.head = nn.Linear(64, 48, bias=False)
        self.head.weight = self.tokens.weight
        self.classes = nn.Linear(64, 16)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = self.blocks(self.tokens(tokens))
        return self.head(x), self.classes(x)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


QUANTIZED = [f"blocks.{index}.{name}.weight" for index in range(2) for name in ("up", "down")] + ["classes.weight"]


def language() -> Language:
    torch.manual_seed(0)
    return Language().eval()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    state = language().state_dict()
    save_file({name: tensor for name, tensor in state.items() if name != "head.weight"}, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def empty() -> Language:
    with init_empty_weights():
        return Language().eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("way", "error"), [("int8", 0.012), ("int4", 0.12)])
def test_linear_layers_are_quantized(way: str, error: float, dtype: torch.dtype, checkpoint: Path) -> None:
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = empty()
    assert load_checkpoint_in_model(model, checkpoint, dtype=dtype, quantize=way) == ([], [])
    errors = quantization_errors(model, checkpoint)
    assert list(errors) == QUANTIZED
    assert all(error / 4 < found < error for found in errors.values()), errors
    assert model.head.weight is model.tokens.weight
    tokens = torch.arange(48)[None]
    expected = language().to(dtype)
    for name in ("up", "down"):  # one after the other as torchao makes them of a model in memory
        for block in expected.blocks:
            width = block.get_submodule(name).in_features
            int4 = PrototypeInt4WeightOnlyConfig(group_size=64 if width == 64 else 32, set_inductor_config=False)
            quantize_(block.get_submodule(name), Int8WeightOnlyConfig() if way == "int8" else int4)
    with torch.no_grad():
        assert torch.equal(model(tokens)[0], expected(tokens)[0])
    assert not model.classes.weight.requires_grad
    assert model.classes.bias.requires_grad


def test_pieces_are_what_torchao_makes_of_the_whole() -> None:
    from accelerator.bigmodel import quantize

    for rows, width in ((4096 + 16, 128), (48, 32)):
        weight = torch.randn(rows, width)
        for way in ("int8", "int4"):
            whole, pieces = quantize._by_torchao(weight, way), quantize.quantized(weight, way)
            names, attributes = whole.__tensor_flatten__()
            assert (names, attributes) == pieces.__tensor_flatten__()
            assert all(torch.equal(getattr(whole, name), getattr(pieces, name)) for name in names)
            assert quantize.loaded_size(weight, way, None) == sum(getattr(whole, name).nbytes for name in names)


def test_modules_are_chosen_by_name(checkpoint: Path, tmp_path: Path) -> None:
    accelerator = Accelerator("cpu", project_dir=tmp_path)
    accelerator.prepare(language())
    for source in (checkpoint, accelerator.save_state()):
        model = empty()
        load_checkpoint_in_model(model, source, quantize={"blocks": "int4", "blocks.0.up": "int8", "blocks.1.up": None})
        assert {name: round(error, 1) for name, error in quantization_errors(model, source).items()} == {
            "blocks.0.up.weight": 0.0,
            "blocks.0.down.weight": 0.1,
            "blocks.1.down.weight": 0.1,
        }
        assert type(model.classes.weight) is nn.Parameter


def test_a_map_counts_what_is_quantized_and_dispatch_leaves_it_in_memory(checkpoint: Path) -> None:
    model, expected = empty(), empty()
    whole = sum(part.num_bytes() for part in parts_of(model))
    device_map = infer_auto_device_map(model, {"cpu": whole // 2}, quantize="int8")
    assert device_map == {"": "cpu"}
    assert "disk" in infer_auto_device_map(model, {"cpu": whole // 2}).values()
    load_checkpoint_and_dispatch(model, checkpoint, max_memory={"cpu": whole // 2}, quantize="int8")
    assert sum(part.num_bytes() for part in parts_of(model)) < whole // 2
    load_checkpoint_in_model(expected, checkpoint, quantize="int8")
    tokens = torch.arange(48)[None]
    mixed = empty()
    ways = {"blocks": "int8"}
    load_checkpoint_and_dispatch(mixed, checkpoint, {"": "cpu", "classes": "disk"}, quantize=ways)
    with torch.no_grad():
        assert all(map(torch.equal, model(tokens), expected(tokens)))
        assert torch.equal(mixed(tokens)[0], expected(tokens)[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "int3"}, "quantize is 'int3'; expected 'int8' or 'int4'"),
        ({"quantize": {"block": "int8"}}, "names 'block', which is no module of Language. Did you mean 'blocks'?"),
        ({"quantize": {"tokens": "int8"}}, "finds nothing in Language: only weights of nn.Linear"),
        (
            {"quantize": "int8", "device_map": {"": "cpu", "blocks.1": "disk"}},
            "blocks.1.up.weight is to rest on 'disk', and quantized weights stay where they run; blocks.1.down.weight",
        ),
    ],
)
def test_refusals(options: dict[str, object], message: str, checkpoint: Path) -> None:
    model = empty()
    with pytest.raises(ConfigurationError) as raised:
        load_checkpoint_in_model(model, checkpoint, **options)  # type: ignore[arg-type]
    assert message in str(raised.value)
    assert model.classes.weight.is_meta  # before anything was loaded


def test_further_refusals(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"blocks.0.up.weight has memory already; .*init_empty_weights"):
        load_checkpoint_in_model(language(), checkpoint, quantize="int8")
    with init_empty_weights():
        odd = nn.Sequential(nn.Linear(40, 16), nn.Linear(32, 10))
    with pytest.raises(ConfigurationError, match=r"0.weight is 16x40, and int4 needs .*; 1.weight is 10x32.*leaves"):
        load_checkpoint_in_model(odd, {}, quantize="int4")
    model = empty()
    load_checkpoint_in_model(model, checkpoint, quantize="int8")
    with pytest.raises(ConfigurationError, match=r"'blocks.0' is to be on 'disk', and its weights are quantized"):
        disk_offload(model, tmp_path)
    with pytest.raises(PrepareError, match=r"blocks.0.up.weight, .* are quantized by torchao: .*without prepare\(\)"):
        Accelerator("cpu").prepare(model)
    with pytest.raises(StateError, match=r"are quantized, which safetensors cannot hold.*quantize= again"):
        Accelerator("cpu").save_model(model, tmp_path / "saved")
    dispatch_model(model, {"": "cpu"})
    assert not (tmp_path / "saved").exists()


class Adapted(nn.Module):
    def __init__(self, base: Language) -> None:
        super().__init__()
        self.base, self.adapter = base.requires_grad_(False), nn.Linear(64, 64)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.base.tokens(tokens)
        return self.base.blocks(x + self.adapter(x))


def test_adapters_are_trained_over_int8(checkpoint: Path) -> None:
    base = empty()
    load_checkpoint_in_model(base, checkpoint, quantize="int8")
    plain = language()
    for name, parameter in base.named_parameters():  # the numbers that int8 stands for
        if name in QUANTIZED:
            plain.get_parameter(name).data.copy_(parameter.dequantize())  # type: ignore[attr-defined]
    results = []
    for one in (base, plain):
        torch.manual_seed(1)
        model = Adapted(one)
        optimizer = torch.optim.SGD(model.adapter.parameters(), lr=0.1)
        for _ in range(3):
            model(torch.arange(48)[None]).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(model.adapter.weight)
    torch.testing.assert_close(*results)


# -- memory ------------------------------------------------------------------------------------------------

SCRIPT = """
import json, sys
from pathlib import Path
import torch, torchao
from accelerator.bigmodel import init_empty_weights, load_checkpoint_in_model

def memory(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 2**10

def model(count, width):
    with init_empty_weights():
        return torch.nn.Sequential(*[torch.nn.Linear(width, width, bias=False) for _ in range(count)])

torch.set_num_threads(1)
for way in ("int8", "int4"):
    load_checkpoint_in_model(model(1, 64), {"0.weight": torch.ones(64, 64)}, quantize=way)  # what is imported
    net, before = model(8, 2048), memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    load_checkpoint_in_model(net, sys.argv[1], quantize=way)
    print(memory("VmHWM") - before)
    del net
"""


def test_peak_memory_is_what_is_quantized_and_a_layer(fresh: FreshProcesses, tmp_path: Path) -> None:
    save_file({f"{index}.weight": torch.randn(2048, 2048) for index in range(8)}, tmp_path / "all.safetensors")
    given_back = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # else glibc keeps up to 80 MiB of what was freed
    (finished,) = fresh(SCRIPT, str(tmp_path / "all.safetensors"), env=given_back)
    assert finished.returncode == 0, finished.stderr
    int8, int4 = map(float, finished.stdout.split())
    assert int8 < 32 + 2 * 16  # MiB, of 128 in float32: what is quantized, one layer that is mapped, and its pieces
    assert int4 < 18 + 2 * 16


def test_one_weight_is_not_quantized_in_two_ways() -> None:
    def make() -> nn.Sequential:
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
        model[1].weight = model[0].weight
        return model

    source = make().state_dict()
    with init_empty_weights():
        model = make()
    with pytest.raises(ConfigurationError, match=r"0.weight and 1.weight are one weight, and are to be quantized in"):
        load_checkpoint_in_model(model, source, quantize={"": "int8", "1": None})
    load_checkpoint_in_model(model, source, quantize="int8")
    assert model[1].weight is model[0].weight


def test_quantized_weights_are_no_source_and_no_target(checkpoint: Path) -> None:
    model = empty()
    load_checkpoint_in_model(model, checkpoint, quantize="int8")
    with pytest.raises(StateError, match=r"blocks.0.up.weight, .* of Language are quantized already"):
        load_checkpoint_in_model(model, checkpoint)
    with pytest.raises(StateError, match=r"'the tensors given' holds quantized weights .*; load full ones"):
        load_checkpoint_in_model(language(), model.state_dict())
