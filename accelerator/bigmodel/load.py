"""Weights from files straight into a model, one tensor at a time."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from accelerator.fit import differing_ties, misfit
from accelerator.saved_weights import SavedWeights
from strategies.deferred_init import EMPTY
from strategies.errors import StateError, listed
from strategies.shards import copy_whole, is_quantized

from . import pages
from .build import fill_buffers
from .files import of_safetensors
from .names import hint_at_names, tensors_for
from .parts import check_dtype
from .places import Device, DeviceMap, check_device_map, device_of
from .quantize import Quantize, quantized, ways_of
from .words import unlike_accelerate

_AT_ONCE = 2**20  # numbers that are copied together
Memory = Literal["file", "own", "shared"]  # of a tensor in a checkpoint: mapped, made for it, or not to be kept


class IncompatibleKeys(NamedTuple):
    """What did not meet, with `strict=False`: names of the model, and names of the checkpoint."""

    missing_keys: list[str]
    unexpected_keys: list[str]


@dataclass
class _Slot:
    """One tensor of a model, under all the names it has."""

    tensor: Tensor
    names: list[str] = field(default_factory=list)
    holders: list[tuple[dict[str, Any], str]] = field(default_factory=list)

    def put(self, new: Tensor) -> None:
        """Have the model hold `new`; a parameter that has memory stays the same object."""
        old = self.tensor
        if isinstance(old, nn.Parameter):
            if not old.is_meta:
                old.data = new
                return
            marks = {name: value for name, value in vars(old).items() if name not in (EMPTY, "_deferred_init")}
            new = nn.Parameter(new, requires_grad=old.requires_grad)
            vars(new).update(marks)
        for holder, name in self.holders:
            holder[name] = new
        self.tensor = new


@unlike_accelerate
def load_checkpoint_in_model(
    model: nn.Module,
    checkpoint: str | os.PathLike[str] | Mapping[str, Tensor],
    device_map: DeviceMap | None = None,
    *,
    dtype: torch.dtype | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    strict: bool = True,
    mmap: bool = True,
    quantize: Quantize | None = None,
    key_mapping: Mapping[str, str] | None = None,
) -> IncompatibleKeys:
    """Fill `model`, on the meta device or not, from a checkpoint; every rank for itself.

    `checkpoint`: a safetensors file, a file of `torch.save`, an index of either, or a folder with those or with one
    tensor per file; a folder that `save_state` wrote, of which every file is verified first; or tensors by name, which
    are copied. `device_map` says where weights go (see `infer_auto_device_map`), otherwise they go where they are, and
    from the meta device to the CPU. They keep the dtype they have in the model, or get `dtype` where they are
    floating-point. Memory: the model and its largest tensor.

    With `mmap`, weights without memory that go to the CPU as they are in the file are mapped from it, copy-on-write:
    loading reads nothing, and the file must not be overwritten in place afterwards (replacing it is fine). Weights on
    `"disk"` always are; where the file has another dtype, they are written once more, to `offload_folder`, as are
    tensors by name and what is cut over files. Weights that share memory in a file of `torch.save` and are no ties of
    the model get their own.

    `quantize`: `"int8"` or `"int4"` has the weights of linear layers quantized by torchao as they are loaded, one at a
    time, and frozen; a mapping from names of modules to those, or to `None`, says it for each. They must be on the meta
    device before, and run where they are (not on `"disk"`). Weights that other modules share, such as an embedding's,
    stay as they are. `quantization_errors` measures what it costs.

    `key_mapping`: regular expressions and what takes the place of what they match in the names of the checkpoint, such
    as `{r"^module\\.": ""}`. A model of transformers 5 that then misses something gets the names that its
    `from_pretrained` gives; `StateError` if that would merge or turn weights too.

    Raises `StateError` before anything is changed: for a checkpoint that is damaged or unsafe; and, all together, for
    names that are missing in it, unexpected, of another shape or kind of number, or with numbers that the dtype of the
    model cannot hold (integers that would wrap, floats that would become infinite); and for two names of one tied
    weight with different numbers. With `strict=False` missing and unexpected ones are returned instead.
    """
    check_dtype(dtype)
    slots = _slots(model)
    if device_map is not None:
        check_device_map(model, device_map)
    ways = ways_of(model, quantize, device_map, dtype)
    in_files = isinstance(checkpoint, str | os.PathLike)
    where = str(checkpoint) if in_files else "the tensors given"
    found = tensors_for(model, checkpoint, key_mapping)
    outlines = found.outlines if isinstance(found, SavedWeights) else found
    _refuse_quantized(model, slots, outlines, where)
    result = _check(model, slots, found, outlines, where, dtype, strict=strict)
    is_mapped = in_files and outlines is found
    if is_mapped:
        _give_back_read(slots, found, dtype)
    chosen = {slot.names[0]: name for slot in slots if (name := _name_in(found, slot.names))}
    own = _own_memory({name: found[chosen[name]] for name in chosen}) if is_mapped else set()
    _check_folder(slots, {name: outlines[chosen[name]] for name in chosen}, own, device_map, dtype, offload_folder)
    fill_buffers(model)
    for slot in _slots(model):
        name = slot.names[0]
        if name in chosen:
            device = None if device_map is None else device_of(name, device_map)
            source = found[chosen[name]].detach()
            memory: Memory = "file" if name in own else "own" if in_files and not is_mapped else "shared"
            if way := ways.get(id(slot.tensor)):
                _fill_quantized(slot, source, device, dtype, way, memory)
            else:
                _fill(slot, source, device, dtype, offload_folder, memory, mmap=mmap)
            del source  # before the next one is read
    if strict:
        _refuse_meta(model)
    return result


def _name_in(found: Mapping[str, Tensor], names: Sequence[str]) -> str | None:
    return next((name for name in names if name in found), None)


def _give_back_read(slots: list[_Slot], found: Mapping[str, Tensor], dtype: torch.dtype | None) -> None:
    """Give back the pages of tensors whose numbers were looked at."""
    for slot in slots:
        there = [found[name] for name in slot.names if name in found]
        for tensor in there:
            if len(there) > 1 or tensor.dtype != _wanted(slot, dtype):
                pages.give_back(tensor)


def _own_memory(tensors: Mapping[str, Tensor]) -> set[str]:
    """The names of those that may become weights as they are: no other, and nothing in themselves, shares memory."""
    spans = []
    for name, tensor in tensors.items():
        if tensor.is_contiguous() and tensor.nbytes:
            start = tensor.data_ptr()
            spans.append((start, start + tensor.nbytes, name))
    own, taken = set(), 0
    for start, end, name in sorted(spans):
        if start >= taken:
            own.add(name)
        taken = max(taken, end)
    return own


def _slots(model: nn.Module) -> list[_Slot]:
    """Every parameter and persistent buffer once."""
    slots: dict[int, _Slot] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        kept = {
            name: value for name, value in module._buffers.items() if name not in module._non_persistent_buffers_set
        }
        for holder, tensors in ((module._parameters, module._parameters), (module._buffers, kept)):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                full = f"{prefix}.{name}" if prefix else name
                if is_lazy(tensor):
                    raise StateError(f"{full} has no shape yet; run the model once before loading it")
                slot = slots.setdefault(id(tensor), _Slot(tensor))
                slot.names.append(full)
                slot.holders.append((holder, name))
    return list(slots.values())


def _check(
    model: nn.Module,
    slots: list[_Slot],
    found: Mapping[str, Tensor],
    outlines: Mapping[str, Tensor],
    where: str,
    dtype: torch.dtype | None,
    *,
    strict: bool,
) -> IncompatibleKeys:
    known = {name for slot in slots for name in slot.names}
    missing = [slot.names[0] for slot in slots if not any(name in found for name in slot.names)]
    unexpected = [name for name in found if name not in known and not _is_derived(model, name)]
    wrong = []
    for slot in slots:
        of_slot = [
            problem
            for name in slot.names
            if name in found
            and (problem := misfit(name, outlines[name], slot.tensor, _wanted(slot, dtype), found.__getitem__))
        ]
        tie = None if of_slot else differing_ties(slot.names, found)
        wrong += [*of_slot, *([tie] if tie else [])]
    both = missing and unexpected  # then they rather have other names
    problems = [f"of another shape or kind, or different: {'; '.join(wrong[:20])}"] if wrong else []
    if strict or wrong:
        problems += [f"missing: {listed(missing)}"] if missing else []
        problems += [f"unexpected: {listed(unexpected)}"] if unexpected else []
    if problems:
        raise StateError(
            f"{where!r} does not fit {type(model).__name__}, and nothing was loaded: {'. '.join(problems)}."
            + hint_at_names(model, missing, unexpected, known, found)
            + (" strict=False leaves out what is missing or unexpected." if strict and not wrong and not both else "")
        )
    return IncompatibleKeys(missing, unexpected)


def _refuse_quantized(model: nn.Module, slots: list[_Slot], outlines: Mapping[str, Tensor], where: str) -> None:
    """Raise `StateError` for quantized weights, of the model or of the checkpoint: full ones are loaded, into none."""
    there = [name for name, tensor in outlines.items() if is_quantized(tensor)]
    if there:
        raise StateError(f"{where!r} holds quantized weights ({listed(there)}); load full ones, with quantize=")
    here = [slot.names[0] for slot in slots if is_quantized(slot.tensor)]
    if here:
        raise StateError(
            f"{listed(here)} of {type(model).__name__} are quantized already, and nothing can be loaded into them. "
            "Build the model anew inside `with init_empty_weights():`."
        )


def _is_derived(model: nn.Module, name: str) -> bool:
    """Whether `name` is a buffer that the model makes itself, which older files may still hold."""
    prefix, _, attribute = name.rpartition(".")
    try:
        return attribute in model.get_submodule(prefix)._non_persistent_buffers_set
    except AttributeError:
        return False


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _wanted(slot: _Slot, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and slot.tensor.is_floating_point() else slot.tensor.dtype


def _check_folder(
    slots: list[_Slot],
    chosen: Mapping[str, Tensor],
    own: set[str],
    device_map: DeviceMap | None,
    dtype: torch.dtype | None,
    folder: str | os.PathLike[str] | None,
) -> None:
    """Raise `StateError` for weights that must be written to rest on the disk, and have no place there."""
    if device_map is None or folder is not None:
        return
    for slot in slots:
        name = slot.names[0]
        if name not in chosen or device_of(name, device_map) != "disk" or not chosen[name].nbytes:
            continue
        if chosen[name].dtype != _wanted(slot, dtype):
            raise StateError(
                f"{name} is {_dtype(chosen[name])} in the checkpoint and {str(_wanted(slot, dtype))[6:]} in the model, "
                "and is to rest on the disk, so it is written once more. Give offload_folder, or load the model in "
                f"the checkpoint's own dtype (dtype={chosen[name].dtype})."
            )
        if name not in own:
            raise StateError(
                f"{name} is to rest on the disk, and no file holds it in memory of its own (it was given as a tensor, "
                "or shares that of another weight, or is not contiguous), so it is written; give offload_folder"
            )


def _fill(
    slot: _Slot,
    source: Tensor,
    device: Device | None,
    dtype: torch.dtype | None,
    folder: str | os.PathLike[str] | None,
    memory: Memory,
    *,
    mmap: bool,
) -> None:
    target, wanted = slot.tensor, _wanted(slot, dtype)
    if hasattr(target, EMPTY):
        delattr(target, EMPTY)
    may_stay = memory != "shared" and source.dtype == wanted  # its memory becomes the model's
    if device == "disk" and source.nbytes:
        slot.put(source if may_stay and memory == "file" else written(source.to(wanted), slot.names[0], folder))
        return
    place = torch.device("cpu" if target.is_meta else target.device)
    if device is not None:
        place = torch.device("cpu" if device == "disk" else device)
    if not target.is_meta and target.dtype == wanted and target.device == place:
        copy_whole(source, target)
    elif place.type == "cpu" and may_stay and (mmap or memory == "own"):
        slot.put(source)
        return
    elif memory == "file":
        slot.put(_copied_in_pieces(source, place, wanted))
        return
    else:
        slot.put(torch.empty(source.shape, device=place, dtype=wanted).copy_(source))
    if memory == "file":
        pages.give_back(source)


def _copied_in_pieces(mapped: Tensor, place: torch.device, dtype: torch.dtype) -> Tensor:
    """A copy of a mapped tensor, with no more than a piece of it in memory besides."""
    new = torch.empty(mapped.shape, device=place, dtype=dtype)
    for piece, target in zip(mapped.view(-1).split(_AT_ONCE), new.view(-1).split(_AT_ONCE), strict=True):
        target.copy_(piece)
        pages.give_back(piece)
    return new


def _fill_quantized(
    slot: _Slot, source: Tensor, device: Device | None, dtype: torch.dtype | None, way: str, memory: Memory
) -> None:
    slot.tensor.requires_grad_(False)
    weight = source.to("cpu" if device is None else torch.device(device), _wanted(slot, dtype))
    slot.put(quantized(weight, way))
    if memory == "file":
        pages.give_back(source)


def written(tensor: Tensor, name: str, folder: str | os.PathLike[str] | None) -> Tensor:
    """`tensor` written to a file of its own in `folder`, and mapped from there. Raises `StateError` if it cannot be.

    The file ends in `.offload`, so that it never takes the place of a checkpoint's file, nor is read as one. What is
    mapped is what this process wrote, even if another one writes the same name.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    if folder is None:
        raise StateError(f"{name} is to rest on the disk and is in no file that can be mapped; give offload_folder")
    path = Path(folder) / f"{name}.offload"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f"{name}.", suffix=".writing", dir=folder)
        os.close(handle)
        try:
            save_file({name: tensor.detach().contiguous()}, temporary)
            mapped = of_safetensors(Path(temporary))[name]
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:  # the latter for a full disk
        raise StateError(f"{name} could not be written to {str(path)!r}: {error}") from error
    return mapped


def _refuse_meta(model: nn.Module) -> None:
    named = [*model.named_parameters(), *model.named_buffers()]
    left = [name for name, tensor in named if tensor.is_meta]
    if not left:
        return
    seen = all(hasattr(tensor, "_deferred_init") for _, tensor in named if tensor.is_meta)
    raise StateError(
        f"{listed(left)} of {type(model).__name__} are on the meta device, and no checkpoint holds them. "
        + (
            "They are random, or made of weights, which have no numbers inside init_empty_weights(). Save them with "
            "the weights (persistent=True), or build the model without init_empty_weights() and load into it."
            if seen
            else "Build the model inside `with init_empty_weights():`, which keeps what buffers are made of."
        )
    )
