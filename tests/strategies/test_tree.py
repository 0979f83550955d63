"""Walking nested containers: what is rebuilt, what is kept, and that nothing is changed in place."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, UserDict, defaultdict
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from strategies.tree import iterate_leaves, iterate_tensors, map_tensors, move, num_samples


class Pair(NamedTuple):
    left: Any
    right: Any


@dataclasses.dataclass
class Batch:
    inputs: Any
    labels: Any
    name: str = "batch"


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    inputs: Any
    size: Any = dataclasses.field(init=False, default=3)


class Output(OrderedDict[str, Any]):
    """Attributes beside keys, and no update(), as the outputs of well-known model libraries."""

    def update(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError("no update")


class ReadOnly(Mapping[str, Any]):
    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values_held = dict(values)

    def __getitem__(self, key: str) -> Any:
        return self.values_held[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_held)

    def __len__(self) -> int:
        return len(self.values_held)


class Moving:
    """Not a container, but it can move itself."""

    def __init__(self, held: Tensor) -> None:
        self.held = held

    def to(self, device: torch.device) -> Moving:
        return Moving(self.held.to(device))


def containers(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    named = st.dictionaries(st.sampled_from("abc"), children, max_size=3)
    return st.one_of(
        st.lists(children, max_size=3),
        st.lists(children, max_size=3).map(tuple),
        named,
        *(named.map(kind) for kind in (OrderedDict, Output, ReadOnly, UserDict, MappingProxyType)),
        named.map(lambda values: defaultdict(list, values)),
        st.builds(Pair, children, children),
        st.builds(Batch, children, children),
        st.builds(Frozen, children),
    )


LEAVES = st.one_of(st.integers(0, 9).map(torch.tensor), st.sampled_from([None, 1, 2.5, "text", b"raw", torch.float32]))
TREES = st.recursive(LEAVES, containers, max_leaves=8)


def plain(tree: Any) -> Any:
    """The tree as nested tuples of class, keys and values, which compare by `==`."""
    if isinstance(tree, Tensor):
        return ("tensor", tree.tolist(), tree.device.type)
    if isinstance(tree, Mapping):
        return type(tree), [(key, plain(tree[key])) for key in tree]
    if isinstance(tree, list | tuple):
        return type(tree), [plain(value) for value in tree]
    if isinstance(tree, Batch | Frozen):
        return type(tree), [plain(getattr(tree, field.name)) for field in dataclasses.fields(tree)]
    return tree


def replaced(described: Any, device: str) -> Any:
    """What `plain` gives once 1 was added to every tensor and it lies on `device`."""
    if isinstance(described, tuple) and described and described[0] == "tensor":
        return ("tensor", described[1] + 1, device)
    if isinstance(described, tuple | list):
        return type(described)(replaced(value, device) for value in described)
    return described


@settings(max_examples=200)
@given(tree=TREES)
def test_every_tensor_is_replaced_and_all_else_kept(tree: Any) -> None:
    before = plain(tree)
    assert plain(map_tensors(lambda tensor: tensor + 1, tree)) == replaced(before, "cpu")
    assert plain(tree) == before


@settings(max_examples=200)
@given(tree=TREES)
def test_tensors_come_in_the_order_of_the_map(tree: Any) -> None:
    visited: list[Tensor] = []
    map_tensors(visited.append, tree)
    assert [id(tensor) for tensor in iterate_tensors(tree)] == [id(tensor) for tensor in visited]
    leaves = [leaf for leaf in iterate_leaves(tree) if isinstance(leaf, Tensor)]
    assert [id(leaf) for leaf in leaves] == [id(tensor) for tensor in visited]


@settings(max_examples=100)
@given(tree=TREES)
def test_moving_puts_every_tensor_on_the_device(tree: Any) -> None:
    def described(tensor: Tensor) -> Tensor:
        assert tensor.device.type == "meta"
        return torch.zeros(())

    skeleton = map_tensors(lambda tensor: torch.zeros(()), tree)
    moved = move(tree, torch.device("meta"))
    assert plain(map_tensors(described, moved)) == plain(skeleton)


def test_an_object_with_to_moves_itself() -> None:
    moved = move({"own": [Moving(torch.ones(2))]}, torch.device("meta"))
    assert moved["own"][0].held.device.type == "meta"


def test_a_class_with_to_is_left_alone() -> None:
    assert move([Moving], torch.device("cpu")) == [Moving]


def test_a_packed_sequence_is_moved_whole() -> None:
    packed = pack_sequence([torch.ones(3), torch.ones(1)])
    moved = move(packed, torch.device("cpu"))
    assert isinstance(moved, PackedSequence)
    assert torch.equal(moved.data, packed.data)


def test_what_torch_returns_as_a_named_tuple_is_rebuilt() -> None:
    rebuilt = map_tensors(lambda tensor: tensor + 1, torch.max(torch.zeros(2, 3), dim=0))
    assert rebuilt.values.tolist() == [1, 1, 1]


def test_a_default_factory_survives() -> None:
    rebuilt = map_tensors(lambda tensor: tensor, defaultdict(list, a=torch.ones(1)))
    assert rebuilt["new"] == []


def test_attributes_of_a_mapping_survive() -> None:
    output = Output(logits=torch.zeros(1))
    output.note = "kept"  # type: ignore[attr-defined]
    rebuilt = map_tensors(lambda tensor: tensor + 1, output)
    assert rebuilt.note == "kept"
    assert output["logits"].item() == 0


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (torch.zeros(4, 2), 4),
        ({"scale": torch.tensor(1.0), "inputs": torch.zeros(3)}, 3),
        (Batch([torch.zeros(5)], torch.zeros(7)), 5),
        ((torch.zeros(0, 2),), 0),
        (torch.tensor(1.0), None),
        (["text", 3], None),
        (None, None),
    ],
)
def test_samples_of_a_batch_are_its_first_dimension(batch: Any, expected: int | None) -> None:
    assert num_samples(batch) == expected
