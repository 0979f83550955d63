"""Weights of linear layers in 8 or 4 bits, through torchao, one after the other: they are never all there in full."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from strategies.errors import ConfigurationError, nearest
from strategies.shards import is_quantized

from .names import tensors_for
from .parts import size_of
from .places import DeviceMap, device_of, main_device, rests

Quantize = str | Mapping[str, str | None]  # "int8", "int4", or names of modules to those or to None
_WAYS = ("int8", "int4")
_GROUPS = (128, 64, 32)  # numbers that share a scale in int4: the largest that divides the width
_AT_ONCE = 2**18  # numbers that are quantized together, in CPU memory
_ROWS = 64  # that int4 packs together
_PER_ROW = 5  # bytes beside the numbers of a row in int8
_PROBES = 16


def ways_of(
    model: nn.Module, quantize: Quantize | None, device_map: DeviceMap | None, dtype: torch.dtype | None
) -> dict[int, str]:
    """How each weight is to be quantized, by its `id`.

    Raises `ConfigurationError` if that is not possible: for words that are none, without torchao, and with the names of
    weights that are not on the meta device, rest where they do not run, or have a shape or dtype that will not do.
    """
    if quantize is None:
        return {}
    asked = _checked(model, quantize)
    places = device_map or {"": "cpu"}
    main = main_device(places)
    ways: dict[int, str] = {}
    problems = []
    for names, weight in _linear_weights(model):
        name, way = names[0], _nearest_above(names[0], asked)
        if any(_nearest_above(other, asked) != way for other in names):
            problems.append(f"{' and '.join(names)} are one weight, and are to be quantized in different ways")
            continue
        if way is None:
            continue
        ways[id(weight)] = way
        device = device_of(name, places)
        if not weight.is_meta:
            problems.append(f"{name} has memory already; build the model inside `with init_empty_weights():`")
        elif rests(device, main):
            problems.append(f"{name} is to rest on {device!r}, and quantized weights stay where they run")
        elif problem := _misshaped(name, weight, way, torch.device(device), dtype):
            problems.append(problem)
    if problems:
        raise ConfigurationError(
            f"quantize={quantize!r} does not fit {type(model).__name__}: {'; '.join(problems[:20])}. A mapping leaves "
            'weights out, as {"": "int8", "head": None} does.'
        )
    if not ways:
        raise ConfigurationError(
            f"quantize={quantize!r} finds nothing in {type(model).__name__}: only weights of nn.Linear are quantized, "
            "and those that an embedding shares stay as they are"
        )
    return ways


def _checked(model: nn.Module, quantize: Quantize) -> Mapping[str, str | None]:
    asked: Mapping[str, Any] = {"": quantize} if isinstance(quantize, str) else quantize
    known = [name for name, _ in model.named_modules(remove_duplicate=False)]
    for name, way in asked.items():
        if name not in known:
            raise ConfigurationError(
                f"quantize names {name!r}, which is no module of {type(model).__name__}.{nearest(name, known)}"
            )
        if way not in (*_WAYS, None):
            raise ConfigurationError(
                f"quantize is {way!r}; expected 'int8' or 'int4', or a mapping from names of modules to those or None"
            )
    try:
        from torchao.prototype.quantization import int4  # noqa: F401
    except ImportError as error:
        raise ConfigurationError(
            f"quantize={quantize!r} needs torchao 0.18 or newer, and with it torch 2.11 or newer ({error}). "
            "pip install 'torch-accelerator[quantize]'"
        ) from error
    return asked


def _linear_weights(model: nn.Module) -> list[tuple[list[str], nn.Parameter]]:
    """The weights that only linear layers use, with all their names."""
    used_by: dict[int, list[tuple[str, nn.Module, nn.Parameter]]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                full = f"{prefix}.{name}" if prefix else name
                used_by.setdefault(id(parameter), []).append((full, module, parameter))
    return [
        ([name for name, _, _ in users], users[0][2])
        for users in used_by.values()
        if all(_is_linear(module) and module.weight is parameter for _, module, parameter in users)
    ]


def _is_linear(module: nn.Module) -> bool:
    # The other kind is the projection of nn.MultiheadAttention, which takes the weight past the module.
    return isinstance(module, nn.Linear) and not isinstance(module, NonDynamicallyQuantizableLinear)


def _nearest_above(name: str, asked: Mapping[str, str | None]) -> str | None:
    while name not in asked and name:
        name = name.rpartition(".")[0]
    return asked.get(name)


def _misshaped(name: str, weight: Tensor, way: str, device: torch.device, dtype: torch.dtype | None) -> str | None:
    wanted = dtype or weight.dtype
    if way == "int8":
        return None
    rows, width = weight.shape
    if _group(width) is None or rows % 16:
        return f"{name} is {rows}x{width}, and int4 needs a multiple of 16 rows of a multiple of 32 numbers"
    if device.type == "cuda" and wanted != torch.bfloat16:
        return f"{name} is {str(wanted).removeprefix('torch.')}, and int4 on {str(device)!r} needs dtype=torch.bfloat16"
    if device.type not in ("cpu", "cuda"):
        return f"{name} is to be on {str(device)!r}, and int4 runs on CPUs and CUDA devices; take int8"
    return None


def _group(width: int) -> int | None:
    return next((group for group in _GROUPS if width % group == 0), None)


def loaded_size(tensor: Tensor, way: str | None, dtype: torch.dtype | None) -> int:
    """Bytes of a tensor once it is loaded: floating-point ones in `dtype`, or quantized, with their scales."""
    if way is None:
        return size_of(tensor, dtype)
    rows, width = tensor.shape
    if way == "int8":
        return rows * width + _PER_ROW * rows
    scales = 2 * rows * (width // (_group(width) or width))
    return rows * width // 2 + scales * (dtype or tensor.dtype).itemsize


def quantized(weight: Tensor, way: str) -> Tensor:
    """The weight of a linear layer, on its device, in `way`, the same as torchao makes it of the whole.

    In CPU memory a few rows at a time, since torchao takes up to eight bytes for each number meanwhile.
    """
    at_once = max(_AT_ONCE // weight.shape[1] // _ROWS, 1) * _ROWS
    if weight.device.type != "cpu" or len(weight) <= at_once:
        return _by_torchao(weight, way)
    inner: dict[str, Tensor] = {}
    for start in range(0, len(weight), at_once):
        rows = weight[start : start + at_once]
        piece: Any = _by_torchao(rows, way)
        names, attributes = piece.__tensor_flatten__()
        for name in names:
            part, dim = getattr(piece, name), int(name == "scale_and_zero")
            if start == 0:
                shape = list(part.shape)
                shape[dim] = len(weight)
                inner[name] = part.new_empty(shape)
            inner[name].narrow(dim, start, len(rows)).copy_(part)
    attributes |= {"shape": weight.shape} if "shape" in attributes else {}
    return type(piece).__tensor_unflatten__(inner, attributes, None, None)  # type: ignore[no-any-return]


def _by_torchao(weight: Tensor, way: str) -> Tensor:
    from torchao.quantization import quantize_

    holder = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    holder.weight = nn.Parameter(weight, requires_grad=False)
    quantize_(holder, _config(weight, way))
    return holder.weight.detach()


def _config(weight: Tensor, way: str) -> Any:
    from torchao import quantization

    if way == "int8":
        return quantization.Int8WeightOnlyConfig()
    # Otherwise torchao changes settings of the compiler, for the whole process.
    options = {"group_size": _group(weight.shape[1]), "set_inductor_config": False}
    if weight.device.type == "cpu":
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

        return PrototypeInt4WeightOnlyConfig(**options)
    return quantization.Int4WeightOnlyConfig(**options, int4_packing_format="tile_packed_to_4d")


def quantization_errors(
    model: nn.Module,
    checkpoint: str | os.PathLike[str] | Mapping[str, Tensor],
    key_mapping: Mapping[str, str] | None = None,
) -> dict[str, float]:
    """How far quantized weights of `model` are from those of the checkpoint that it was loaded from, by name.

    The relative error of what their layers give for inputs drawn from a normal distribution, which on average is that
    of the weights themselves (Frobenius norm). One weight at a time is read.
    """
    found = tensors_for(model, checkpoint, key_mapping)
    errors: dict[str, float] = {}
    seen: set[int] = set()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in found and id(parameter) not in seen and is_quantized(parameter):
            seen.add(id(parameter))
            weight = found[name].to(parameter.device, parameter.dtype)
            probes = torch.randn(_PROBES, weight.shape[1], generator=generator).to(weight)
            exact, given = (nn.functional.linear(probes, one).float() for one in (weight, parameter))
            errors[name] = ((given - exact).norm() / exact.norm()).item()
    return errors
