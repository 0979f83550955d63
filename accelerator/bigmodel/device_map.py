"""Which device each part of a model is to be on: pure arithmetic on the sizes of parts and the room there is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from accelerator.byte_sizes import in_words, number_of_bytes
from strategies.errors import ConfigurationError

from .host_memory import free_on_host
from .parts import Classes, Part, check_dtype, described, parts_of, running_around
from .places import Device, DeviceMap, device_of
from .quantize import Quantize, loaded_size, ways_of
from .words import unlike_accelerate

Kind = Literal["auto", "balanced", "balanced_low_0", "sequential"]
_KINDS = ("auto", "balanced", "balanced_low_0", "sequential")
_UNLIMITED = 2**62
_SHARE = 0.9  # of the free memory of a device, unless told


@unlike_accelerate
def infer_auto_device_map(
    model: nn.Module,
    max_memory: Mapping[Device, int | str] | None = None,
    no_split_classes: Classes | None = None,
    dtype: torch.dtype | None = None,
    *,
    kind: Kind = "auto",
    quantize: Quantize | None = None,
) -> dict[str, Device]:
    """Where each module of `model` should be, by name. The model may be on the meta device. Not a collective.

    `max_memory`: bytes, or texts such as `"10GB"`, that weights may take on the accelerators (by index), on `"cpu"` and
    on `"disk"`; only those named are used, and the disk always unless it is given 0. `None` reads 90 % of what is free.
    `no_split_classes`: classes whose modules stay whole; `None` finds the repeated blocks. `dtype`: of floating-point
    weights once they are loaded; `quantize`: as for `load_checkpoint_in_model`. `kind`: `"sequential"` fills one device
    after the other; `"balanced"` (`"auto"` is the same) loads accelerators alike where there are several and they hold
    the model; `"balanced_low_0"` leaves as much of accelerator 0 free as it can.

    Devices follow each other in the order of execution; tied weights are counted once and stay together. What no
    accelerator holds goes to the CPU's memory, then to the disk, and is fetched to the first device of the map when it
    runs: room for the two largest such parts at once is left there, or for one if there is no more. Raises
    `ConfigurationError` if not even that is there, or if the model does not fit.
    """
    if kind not in _KINDS:
        raise ConfigurationError(
            f"device_map is {kind!r}; expected one of {', '.join(map(repr, _KINDS))}, or a mapping"
        )
    check_dtype(dtype)
    parts = parts_of(model, no_split_classes)
    ways = ways_of(model, quantize, None, dtype)
    sizes = [sum(loaded_size(tensor, ways.get(id(tensor)), dtype) for tensor in part.tensors) for part in parts]
    room = get_max_memory(max_memory)
    devices, limits = list(room), list(room.values())
    accelerators = [device for device in devices if device not in ("cpu", "disk")]
    spread = None
    if kind != "sequential" and len(accelerators) > 1:
        spread = _balanced(sizes, limits[: len(accelerators)], low_0=kind == "balanced_low_0")
    placed = spread or _with_room_to_run(parts, sizes, devices, limits)
    return _compact(
        model, {name: devices[index] for part, index in zip(parts, placed, strict=True) for name in part.names}
    )


def get_max_memory(max_memory: Mapping[Device, int | str] | None = None) -> dict[Device, int]:
    """Bytes for weights on each device, in the order in which they are filled: accelerators, CPU, disk."""
    if max_memory is None:
        found: dict[Device, int] = {
            index: int(_SHARE * _free(index)) for index in range(torch.accelerator.device_count())
        }
        return {**found, "cpu": int(_SHARE * free_on_host()), "disk": _UNLIMITED}
    if not isinstance(max_memory, Mapping):
        raise ConfigurationError(f"max_memory is {max_memory!r}; expected a mapping, such as {{'cpu': '10GB'}}")
    given = {device: number_of_bytes(size, f"max_memory[{device!r}]") for device, size in max_memory.items()}
    strange = [device for device in given if device not in ("cpu", "disk") and not _is_index(device)]
    if strange:
        raise ConfigurationError(
            f"max_memory names {strange[0]!r}; expected the indices of accelerators, 'cpu' and 'disk'"
        )
    indices = sorted(device for device in given if isinstance(device, int))
    ordered: list[Device] = [*indices, *(["cpu"] if "cpu" in given else []), "disk"]
    if len(ordered) == 1:
        raise ConfigurationError(
            "max_memory names no device that can compute; expected an accelerator's index or 'cpu'"
        )
    return {device: given.get(device, _UNLIMITED) for device in ordered}


def _is_index(device: Device) -> bool:
    return isinstance(device, int) and not isinstance(device, bool) and device >= 0


def _free(index: int) -> int:
    return int(torch.get_device_module().mem_get_info(index)[0])


def _fill(sizes: Sequence[int], limits: Sequence[int]) -> list[int] | None:
    """The device of each part, filling one after the other; `None` if the last one overflows."""
    device, left, placed = 0, limits[0], []
    for size in sizes:
        while size > left:
            device += 1
            if device == len(limits):
                return None
            left = limits[device]
        left -= size
        placed.append(device)
    return placed


def _balanced(sizes: Sequence[int], limits: Sequence[int], *, low_0: bool) -> list[int] | None:
    """The devices with the smallest largest load; `None` if they do not hold the parts at all."""
    if low_0:
        others = _least(lambda cap: _fill(sizes, [0, *(min(cap, limit) for limit in limits[1:])]), max(limits))
        return others or _least(lambda cap: _fill(sizes, [min(cap, limits[0]), *limits[1:]]), limits[0])
    return _least(lambda cap: _fill(sizes, [min(cap, limit) for limit in limits]), max(limits))


def _least(attempt: Any, most: int) -> list[int] | None:
    """What `attempt` gives for the smallest number up to `most` for which it gives something."""
    best: list[int] | None = attempt(most)
    if best is None:
        return None
    low, high = 0, most
    while low < high:
        middle = (low + high) // 2
        found = attempt(middle)
        if found is None:
            low = middle + 1
        else:
            best, high = found, middle
    return best


def _with_room_to_run(
    parts: Sequence[Part], sizes: Sequence[int], devices: Sequence[Device], limits: Sequence[int]
) -> list[int]:
    """Fill one device after the other, with room left on the first for what is fetched to it."""
    runs = {index for index, device in enumerate(devices) if device not in ("cpu", "disk")} or {0}
    around = running_around(parts)
    largest, needed = 0, 0
    for at_once in (2, 1):
        room = 0
        while room <= limits[0]:
            placed = _fill(sizes, [limits[0] - room, *limits[1:]])
            if placed is None:
                break
            fetched = [0 if device in runs else size for device, size in zip(placed, sizes, strict=True)]
            together = [size and size + sum(fetched[other] for other in around[i]) for i, size in enumerate(fetched)]
            needed = max(together, default=0)
            largest = together.index(needed) if needed else largest
            if needed + (at_once - 1) * max(fetched, default=0) <= room:
                return placed
            room = needed + (at_once - 1) * max(fetched, default=0)
    if needed > limits[0]:
        raise ConfigurationError(
            f"max_memory[{devices[0]!r}] is {in_words(limits[0])}, which cannot hold the largest part that has to run "
            f"there, {described(largest, parts, fetched, around)}. Give it more, or name smaller no_split_classes."
        )
    raise ConfigurationError(
        f"the model needs {in_words(sum(sizes))}, and max_memory gives "
        + ", ".join(f"{in_words(limit)} on {device!r}" for device, limit in zip(devices, limits, strict=True))
        + ". Give more, or leave the disk unlimited."
    )


def _compact(model: nn.Module, places: dict[str, Device]) -> dict[str, Device]:
    """The same map with as few names as it takes."""
    below: dict[str, set[Device]] = {}
    for name, device in places.items():
        below.setdefault("", set()).add(device)
        for end, letter in enumerate(name):
            if letter == ".":
                below.setdefault(name[:end], set()).add(device)
        below.setdefault(name, set()).add(device)
    found: dict[str, Device] = {}
    for name, device in places.items():
        candidates = ["", *(name[:end] for end, letter in enumerate(name) if letter == "."), name]
        found[next(candidate for candidate in candidates if len(below[candidate]) == 1)] = device
    return found or {"": "cpu"}


def describe_device_map(model: nn.Module, device_map: DeviceMap, dtype: torch.dtype | None = None) -> str:
    """A table of where the parts of `model` are to be, and how much that is on each device."""
    from rich.console import Console
    from rich.table import Table

    table = Table("device", "parts", "bytes", "from", "to", box=None)
    rows: dict[Device, list[Part]] = {}
    for part in parts_of(model, named=device_map):
        rows.setdefault(device_of(part.names[0], device_map), []).append(part)
    for device, parts in rows.items():
        total = in_words(sum(part.num_bytes(dtype) for part in parts))
        table.add_row(str(device), str(len(parts)), total, parts[0].names[0] or "all", parts[-1].names[0] or "all")
    console = Console(width=100, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())
