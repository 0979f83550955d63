"""Where the parts of a model are to be: device maps, read and checked."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from strategies.errors import ConfigurationError, listed, nearest

Device = int | str  # the index of an accelerator, "cpu", "disk", or a device such as "cuda:1"
DeviceMap = Mapping[str, Device]
_CPU = torch.device("cpu")


def device_of(name: str, device_map: DeviceMap) -> Device:
    """Where the tensor or module `name` is to be: what the longest module name in front of it says."""
    while name not in device_map:
        if not name:
            raise KeyError(name)
        name = name.rpartition(".")[0]
    return device_map[name]


def main_device(device_map: DeviceMap) -> torch.device:
    """Where what rests runs: the first accelerator of a map, else the CPU."""
    return next((torch.device(device) for device in device_map.values() if device not in ("cpu", "disk")), _CPU)


def device_that_computes(device: Device, main: torch.device) -> torch.device:
    """The device on which weights that are on `device` run, if they do not rest there."""
    return main if device == "disk" else torch.device(device)


def rests(device: Device, main: torch.device) -> bool:
    """Whether weights on `device` are fetched to the device `main` to run."""
    return device == "disk" or (device == "cpu" and main.type != "cpu")


def check_device_map(model: nn.Module, device_map: DeviceMap) -> None:
    """Raise `ConfigurationError` if a device map does not give each tensor of the model one place, or names others."""
    if not isinstance(device_map, Mapping) or not all(isinstance(name, str) for name in device_map):
        raise ConfigurationError(
            f"device_map is {device_map!r}; expected a mapping from names of modules to devices, such as {{'': 'disk'}}"
        )
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    known = {name for name, _ in model.named_modules(remove_duplicate=False)} | set(tensors)
    problems = []
    for name in device_map:
        if name not in known:
            near = nearest(name, known)
            problems.append(f"{name!r} is not in it" + (f".{near}" if near else ""))
    left_out = [name for name in tensors if not _is_covered(name, device_map)]
    if left_out:
        covered = {id(tensor): name for name, tensor in tensors.items() if name not in left_out}
        ties = [f"{name} is {covered[id(tensors[name])]}" for name in left_out if id(tensors[name]) in covered]
        tied = f" ({listed(ties)}: give tied weights the same place under all their names)" if ties else ""
        problems.append(f"nothing says where {listed(left_out)} should be{tied}")
    problems += [problem for device in dict.fromkeys(device_map.values()) if (problem := _problem(device))]
    problems = problems or _in_two_places(tensors, device_map)
    if problems:
        raise ConfigurationError(f"device_map does not fit {type(model).__name__}: {'; '.join(problems)}")


def _in_two_places(tensors: Mapping[str, Tensor], device_map: DeviceMap) -> list[str]:
    first: dict[int, str] = {}
    problems = []
    for name, tensor in tensors.items():
        other = first.setdefault(id(tensor), name)
        here, there = device_of(name, device_map), device_of(other, device_map)
        if _spelled_out(here) != _spelled_out(there):
            problems.append(f"{other} is {name}, and is to be on {there!r} and on {here!r}")
    return [*problems[:20], "give tied weights the same place under all their names"] if problems else []


def _spelled_out(device: Device) -> object:
    found = None if device == "disk" else torch.device(device)
    return found and (found.type, found.index or 0)


def _is_covered(name: str, device_map: DeviceMap) -> bool:
    try:
        device_of(name, device_map)
    except KeyError:
        return False
    return True


def _problem(device: Device) -> str | None:
    if device in ("cpu", "disk"):
        return None
    expected = "expected the index of an accelerator, 'cpu', 'disk' or a device such as 'cuda:1'"
    count = torch.accelerator.device_count()
    if isinstance(device, int):
        return None if 0 <= device < count else f"{device!r} is not there (accelerators: {count}); {expected}"
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        return f"{device!r} is no place for weights; {expected}"
    if found.type in ("meta", "xla"):
        return f"{device!r} is no place for weights; {expected}"
    return None if found.type == "cpu" or (found.index or 0) < count else f"{device!r} is not there; {expected}"
