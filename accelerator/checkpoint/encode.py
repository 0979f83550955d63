"""State of any object as JSON and tensors, and back, without running any code from the file.

JSON has no tuples, no keys but text and no tensors: each of these becomes an object with one tagged key.
"""

from __future__ import annotations

import base64
from collections import Counter, OrderedDict
from collections.abc import Mapping
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from strategies.errors import StateError

_TAG = "~"


def encode(tree: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """`tree` as JSON; its tensors are put into `tensors` under names that begin with `path`.

    Raises `StateError` for what can be neither, naming where it is.
    """
    try:
        return _encode(tree, path, tensors)
    except RecursionError:
        raise StateError(f"{path} holds itself, or is nested too deeply. Have state_dict() return less.") from None


def _encode(tree: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if tree is None or type(tree) in (bool, int, float, str):
        return tree
    if isinstance(tree, Tensor):
        return {_TAG: "tensor", "name": hold(tree, path, tensors)}
    if isinstance(tree, bytes):
        return {_TAG: "bytes", "base64": base64.b64encode(tree).decode()}
    if isinstance(tree, np.generic | np.ndarray) and not isinstance(tree, np.ma.MaskedArray):
        return _encode_array(tree, path)
    if isinstance(tree, torch.dtype):
        return {_TAG: "dtype", "name": str(tree).removeprefix("torch.")}
    if type(tree) is list:
        return [_encode(item, f"{path}/{index}", tensors) for index, item in enumerate(tree)]
    if type(tree) in (tuple, set, frozenset):
        items = [_encode(item, f"{path}/{index}", tensors) for index, item in enumerate(tree)]
        return {_TAG: type(tree).__name__, "items": items}
    if type(tree) in (dict, OrderedDict, Counter):
        plain = type(tree) is not Counter and all(type(key) is str for key in tree) and _TAG not in tree
        if plain:
            return {key: _encode(value, f"{path}/{key}", tensors) for key, value in tree.items()}
        pairs = [[_encode(k, path, tensors), _encode(v, f"{path}/{k}", tensors)] for k, v in tree.items()]
        return {_TAG: "counter" if type(tree) is Counter else "dict", "pairs": pairs}
    kind = f"{type(tree).__module__}.{type(tree).__qualname__}"
    hints: dict[Any, str] = {
        Enum: "Save its .value",
        Mapping: "It would come back as a dict: save dict(it)",
        list: "It would come back as a list: save list(it)",
        np.ma.MaskedArray: "Save its .data and its .mask",
    }
    otherwise = "Have state_dict() return numbers, text, lists, dicts, tensors"
    hint = next((text for cls, text in hints.items() if isinstance(tree, cls)), otherwise)
    raise StateError(f"{path} is {tree!r:.60} of {kind}, which a checkpoint cannot hold. {hint}.")


def hold(tensor: Tensor, path: str, tensors: dict[str, Tensor]) -> str:
    """Put a tensor into `tensors`, under `path` or, where another has it, a name like it; return the name."""
    if tensor.is_quantized or tensor.is_nested or tensor.is_meta or tensor.layout is not torch.strided:
        what = "quantized" if tensor.is_quantized else "nested" if tensor.is_nested else ""
        what = what or ("without memory (meta)" if tensor.is_meta else f"{tensor.layout}")
        raise StateError(f"{path} is a tensor that is {what}, which a checkpoint cannot hold. Save plain tensors.")
    name, number = path, 1
    while name in tensors:  # {"a": {"b": ...}, "a/b": ...}
        name, number = f"{path} ({number + 1})", number + 1
    tensors[name] = tensor.detach()
    return name


def decode(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `encode` was given. Raises `StateError` for a file that it did not write."""
    if isinstance(tree, list):
        return [decode(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    kind = tree.get(_TAG)
    if kind is None:
        return {key: decode(value, tensors) for key, value in tree.items()}
    try:
        if kind == "tensor":
            return tensors[tree["name"]]
        if kind == "bytes":
            return base64.b64decode(tree["base64"], validate=True)
        if kind == "array":
            array = np.frombuffer(base64.b64decode(tree["base64"]), dtype=np.dtype(tree["dtype"]))
            array = array.reshape(tree["shape"]).copy()
            return array if tree["shape"] or not tree["scalar"] else array[()]
        if kind == "dtype" and isinstance(found := getattr(torch, tree["name"], None), torch.dtype):
            return found
        if kind in ("tuple", "set", "frozenset"):
            cls: Any = {"tuple": tuple, "set": set, "frozenset": frozenset}[kind]
            return cls(decode(item, tensors) for item in tree["items"])
        if kind in ("dict", "counter"):
            items = {decode(key, tensors): decode(value, tensors) for key, value in tree["pairs"]}
            return items if kind == "dict" else Counter(items)
    except (KeyError, ValueError, TypeError) as error:
        raise StateError(f"the checkpoint holds a {kind!r} that cannot be read: {error!r}") from error
    raise StateError(f"the checkpoint holds a value of the unknown kind {kind!r}")


def names_of_tensors(tree: Any) -> list[str]:
    """The names of all tensors in an encoded tree."""
    if isinstance(tree, list):
        return [name for item in tree for name in names_of_tensors(item)]
    if isinstance(tree, dict):
        if tree.get(_TAG) == "tensor":
            return [tree["name"]]
        return [name for value in tree.values() for name in names_of_tensors(value)]
    return []


def _encode_array(array: np.generic | np.ndarray[Any, Any], path: str) -> dict[str, Any]:
    dtype = array.dtype
    if dtype.hasobject or dtype.names:
        raise StateError(f"{path} is an array of {dtype}, which a checkpoint cannot hold. Save numbers or text.")
    data = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
    scalar = isinstance(array, np.generic)
    return {_TAG: "array", "dtype": dtype.str, "shape": list(array.shape), "scalar": scalar, "base64": data}
