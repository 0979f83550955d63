"""Device maps: within the budgets, everything once, in order, ties together; and errors that say what is needed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from accelerator.bigmodel import (
    describe_device_map,
    dispatch_model,
    get_max_memory,
    infer_auto_device_map,
    init_empty_weights,
)
from accelerator.bigmodel.parts import parts_of
from accelerator.bigmodel.places import device_of
from blocks_net import Block, Net, make_net
from strategies.errors import ConfigurationError, PrepareError

ORDER = [0, 1, 2, "cpu", "disk"]


class Chain(nn.Module):
    """Weights of these sizes one after the other, some below a container, some tied to an earlier one."""

    def __init__(self, sizes: list[int], nested: list[bool], ties: dict[int, int]) -> None:
        super().__init__()
        for index, size in enumerate(sizes):
            layer = nn.Linear(1, size, bias=False, device="meta")
            layer.register_buffer("seen", torch.zeros(2, device="meta"))
            setattr(self, f"layer_{index}", nn.Sequential(layer, nn.Tanh()) if nested[index] else layer)
        layers = [module for module in self.modules() if isinstance(module, nn.Linear)]
        for index, earlier in ties.items():
            if index < len(sizes) and sizes[index] == sizes[earlier]:
                layers[index].weight = layers[earlier].weight


@st.composite
def chains(draw: st.DrawFn) -> tuple[Chain, dict[int | str, int]]:
    sizes = draw(st.lists(st.integers(1, 50), min_size=1, max_size=12))
    nested = draw(st.lists(st.booleans(), min_size=len(sizes), max_size=len(sizes)))
    ties = {
        index: earlier
        for index, earlier in draw(st.dictionaries(st.integers(1, 11), st.integers(0, 10), max_size=2)).items()
        if earlier < index
    }
    devices = draw(st.sampled_from([["cpu"], [0, "cpu"], [0, 1], [0, 1, 2, "cpu"], ["cpu", "disk"], [0, 1, "disk"]]))
    return Chain(sizes, nested, ties), {device: draw(st.integers(0, 1500)) for device in devices}


@settings(max_examples=150)
@given(
    chains(),
    st.sampled_from(["auto", "balanced", "balanced_low_0", "sequential"]),
    st.sampled_from([None, torch.bfloat16]),
)
def test_what_every_map_holds_to(
    case: tuple[Chain, dict[int | str, int]], kind: str, dtype: torch.dtype | None
) -> None:
    model, budgets = case
    parts = parts_of(model)
    total = sum(part.num_bytes(dtype) for part in parts)
    unique = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    assert sorted(id(tensor) for part in parts for tensor in part.tensors) == sorted(unique)
    try:
        device_map = infer_auto_device_map(model, budgets, dtype=dtype, kind=kind)  # type: ignore[arg-type]
    except ConfigurationError as error:
        main = next(iter(get_max_memory(budgets).values()))
        largest = max(part.num_bytes(dtype) for part in parts)
        assert ("cannot hold the largest part" in str(error) and largest > main) or "the model needs" in str(error)  # noqa: PT017
        return
    used = dict.fromkeys(ORDER, 0)
    for part in parts:
        places = {device_of(name, device_map) for name in part.names}
        assert len(places) == 1  # ties together
        used[places.pop()] += part.num_bytes(dtype)
    assert sum(used.values()) == total
    for device, limit in get_max_memory(budgets).items():
        assert used[device] <= limit
    order = [ORDER.index(device_of(part.names[0], device_map)) for part in parts]
    assert order == sorted(order)
    fetched = [part.num_bytes(dtype) for part in parts if device_of(part.names[0], device_map) in ("cpu", "disk")]
    main = next(iter(get_max_memory(budgets)))
    if main == "cpu":
        fetched = [part.num_bytes(dtype) for part in parts if device_of(part.names[0], device_map) == "disk"]
    assert used[main] + max(fetched, default=0) <= get_max_memory(budgets)[main]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("sequential", [0, 0, 0, 0, 0, 1, 1, 1]),
        ("auto", [0, 0, 0, 1, 1, 1, 2, 2]),
        ("balanced", [0, 0, 0, 1, 1, 1, 2, 2]),
        ("balanced_low_0", [1, 1, 1, 1, 2, 2, 2, 2]),
    ],
)
def test_how_accelerators_share(kind: str, expected: list[int]) -> None:
    model = nn.Sequential(*[nn.Linear(10, 10, bias=False, device="meta") for _ in range(8)])
    device_map = infer_auto_device_map(model, {0: 2000, 1: 2000, 2: 2000}, kind=kind)  # type: ignore[arg-type]
    assert [device_of(str(index), device_map) for index in range(8)] == expected


def test_blocks_stay_whole_and_names_are_few() -> None:
    with init_empty_weights():
        model = Net()
    assert infer_auto_device_map(model, {"cpu": "1GB"}) == {"": "cpu"}
    device_map = infer_auto_device_map(model, {"cpu": 4 * 10**3, 0: 2800})
    assert device_map == {"scale": 0, "seen": 0, "shift": 0, "first": 0, "layers": "cpu", "head": "cpu"}
    split = infer_auto_device_map(model, {0: 1500, "cpu": 10**4}, ["Linear", "LayerNorm"])
    assert {name for name in split if name.startswith("layers.")} > {"layers.0.down"}


def test_the_table() -> None:
    with init_empty_weights():
        model = Net()
    device_map = infer_auto_device_map(model, {"cpu": 2600})
    table = describe_device_map(model, device_map).splitlines()
    assert table[0].split() == ["device", "parts", "bytes", "from", "to"]
    assert [line.split()[0] for line in table[1:]] == ["cpu", "disk"]
    assert table[-1].endswith("head")


@pytest.mark.parametrize(
    ("max_memory", "kind", "message"),
    [
        ({"cpu": 500}, "auto", r"cannot hold the largest part .* 'layers.0' of 1.18 kB \(1184 bytes\)"),
        ({"cpu": 1300, "disk": 10}, "auto", "the model needs 3.82 kB, and max_memory gives 1.3 kB on 'cpu'"),
        ({"cpu": "much"}, "auto", r"max_memory\['cpu'\] is 'much'; expected a number of bytes"),
        ({"gpu": 1}, "auto", "max_memory names 'gpu'; expected the indices of accelerators"),
        ({True: 1, "cpu": 1}, "auto", "max_memory names True; expected the indices of accelerators"),
        ({-1: 1, "cpu": 1}, "auto", "max_memory names -1; expected the indices of accelerators"),
        ("1GB", "auto", "max_memory is '1GB'; expected a mapping"),
        ({"disk": 1}, "auto", "names no device that can compute"),
        (None, "best", "device_map is 'best'; expected one of 'auto'"),
    ],
)
def test_what_cannot_be(max_memory: dict[int | str, int | str] | None, kind: str, message: str) -> None:
    with init_empty_weights():
        model = Net()
    with pytest.raises(ConfigurationError, match=message):
        infer_auto_device_map(model, max_memory, kind=kind)  # type: ignore[arg-type]


def test_classes_that_stay_whole_by_name_or_themselves() -> None:
    maps = [
        infer_auto_device_map(make_net(), {"cpu": "2.6kB"}, classes)
        for classes in (None, ["Block"], "Block", Block, [Block])
    ]
    assert all(one == maps[0] for one in maps)
    with pytest.raises(PrepareError, match=r"no_split_classes names 'Blok', .* expected one of .*Block \(3\)"):
        infer_auto_device_map(make_net(), {"cpu": "2.6kB"}, ["Blok"])


def test_the_memory_of_this_machine() -> None:
    found = get_max_memory()
    assert list(found) == [*range(torch.accelerator.device_count()), "cpu", "disk"]
    assert 2**20 < found["cpu"] < 2**50


class Shared(nn.Module):
    """Modules and a parameter that have several names."""

    def __init__(self) -> None:
        super().__init__()
        twice = nn.Linear(32, 32)
        self.blocks = nn.ModuleList([twice, nn.Linear(32, 32), twice])
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.factor = self.scale
        self.same = self.blocks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.same:
            x = block(x) * self.scale
        return x


def test_a_map_covers_every_name_of_what_is_shared(tmp_path: Path) -> None:
    model, x = Shared(), torch.randn(2, 32)
    expected = model(x)
    device_map = infer_auto_device_map(model, {"cpu": "8.44kB"}, ["Linear"])
    assert set(device_map.values()) == {"cpu", "disk"}
    dispatch_model(model, device_map, offload_folder=tmp_path)
    assert torch.equal(model(x), expected)


class Tabled(nn.Module):
    """A parameter of the root, which is needed while blocks run."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(100))
        self.layers = nn.ModuleList(nn.Linear(10, 10, bias=False) for _ in range(4))


def test_what_runs_around_a_block_needs_room_with_it() -> None:
    with torch.device("meta"):
        model = Tabled()
    assert infer_auto_device_map(model, {"cpu": 800}) == {"table": "cpu", "layers": "disk"}
    with pytest.raises(ConfigurationError, match=r"'layers.0' of 400 B \(400 bytes\) together .* 'table' of 400 B"):
        infer_auto_device_map(model, {"cpu": 799})
