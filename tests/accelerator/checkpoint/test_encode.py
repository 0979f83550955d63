"""State of any object becomes JSON and tensors, and the same object again."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from accelerator.checkpoint.encode import decode, encode
from strategies import StateError

LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text() | st.integers() | st.tuples(st.integers(), st.text()), inner)
        | st.sets(st.integers())
    ),
    max_leaves=20,
)


@given(TREES)
def test_what_is_encoded_is_decoded(tree: Any) -> None:
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(encode(tree, "here", tensors))
    assert decode(json.loads(text), tensors) == tree


def test_arrays_dtypes_and_tensors_are_kept() -> None:
    tree = {
        "a": np.arange(6, dtype=np.int16).reshape(2, 3),
        "b": np.float32(1.5),
        "c": torch.bfloat16,
        "d": torch.ones(2),
    }
    tensors: dict[str, torch.Tensor] = {}
    back = decode(json.loads(json.dumps(encode(tree, "here", tensors))), tensors)
    assert back["a"].dtype == np.int16
    assert (back["a"] == tree["a"]).all()
    assert (back["b"], back["c"], type(back["b"])) == (np.float32(1.5), torch.bfloat16, np.float32)
    assert list(tensors) == ["here/d"]


def test_a_counter_is_one_again() -> None:
    back = decode(json.loads(json.dumps(encode(Counter([5, 5, 7]), "here", {}))), {})
    assert type(back) is Counter
    assert list(back.elements()) == [5, 5, 7]


ONE, TWO = torch.tensor(1.0), torch.tensor(2.0)


@pytest.mark.parametrize(
    "tree",
    [
        {"a": {"b": ONE}, "a/b": TWO},
        {"a/b": ONE, "a": {"b": TWO}, "a/b (2)": ONE},
        {1: ONE, "1": TWO},
        {"a": [ONE], "a/0": TWO},
    ],
)
def test_tensors_whose_paths_are_alike_stay_apart(tree: Any) -> None:
    tensors: dict[str, torch.Tensor] = {}
    assert decode(json.loads(json.dumps(encode(tree, "here", tensors))), tensors) == tree


class Names(list[str]):
    pass


CIRCLE: list[Any] = []
CIRCLE.append(CIRCLE)
UNFIT = [
    (defaultdict(int), r"save dict\(it\)"),
    (Names(), r"save list\(it\)"),
    (np.ma.masked_array([1, 2], [True, False]), r"\.data and its \.mask"),
    (torch.ones(2, 2).to_sparse(), "a tensor that is torch.sparse_coo"),
    (torch.ones(2, device="meta"), r"a tensor that is without memory \(meta\)"),
    (CIRCLE, "holds itself"),
]


@pytest.mark.parametrize(("value", "reason"), UNFIT, ids=[type(value).__name__ + reason for value, reason in UNFIT])
def test_what_would_come_back_as_something_else_is_named(value: Any, reason: str) -> None:
    with pytest.raises(StateError, match=reason) as caught:
        encode({"here": value}, "state", {})
    assert str(caught.value).startswith("state")


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_a_quantized_tensor_is_named() -> None:
    with pytest.raises(StateError, match="state/here is a tensor that is quantized"):
        encode({"here": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)}, "state", {})


@pytest.mark.parametrize("value", [object(), {1: lambda: 0}, [object()]])
def test_what_cannot_be_kept_is_named(value: Any) -> None:
    with pytest.raises(StateError, match=r"state/here.* which a checkpoint cannot hold"):
        encode({"here": value}, "state", {})
