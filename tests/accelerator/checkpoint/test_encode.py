"""State of any object becomes JSON and tensors, and the same object again."""

from __future__ import annotations

import json
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


@pytest.mark.parametrize("value", [object(), {1: lambda: 0}, [object()]])
def test_what_cannot_be_kept_is_named(value: Any) -> None:
    with pytest.raises(StateError, match=r"state/here.* which a checkpoint cannot hold"):
        encode({"here": value}, "state", {})
