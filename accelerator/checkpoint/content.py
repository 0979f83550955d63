"""What is in a checkpoint: every prepared and registered object by its name, as JSON and tensors.

Names come from the objects: parameters are called as in their model, an optimizer's state by its parameters. The order
of `prepare` counts only among objects that are called alike, such as two models of one class.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from strategies.accumulation import Accumulation
from strategies.errors import DataError, StateError, listed
from strategies.shards import cut_like, is_sharded, local

from .encode import decode, encode, hold, names_of_tensors

_log = logging.getLogger("accelerator")
Index = Mapping[str, tuple[torch.Size, torch.dtype]]


class Content:
    """The objects of one run under their names, and their state."""

    def __init__(self, accumulation: Accumulation, registered: Sequence[Any]) -> None:
        self._accumulation = accumulation
        self.models = _numbered((link.name, link) for link in accumulation.models)
        self.model_names = {id(link): name for name, link in self.models.items()}
        self.optimizers = _numbered(
            (f"{type(link.original).__name__} of {self._trained(link)}", link) for link in accumulation.optimizers
        )
        optimizer_names = {id(link): name for name, link in self.optimizers.items()}
        self.schedulers = _numbered(
            (f"{type(link.original).__name__} of {optimizer_names[id(link.optimizer)]}", link)
            for link in accumulation.schedulers
        )
        self.loaders = _numbered([(_name_of_loader(link.original), link) for link in accumulation.loaders])
        self.registered = _numbered((type(item).__name__, item) for item in registered)

    def _trained(self, optimizer: Any) -> str:
        return "+".join(name for name, link in self.models.items() if link in optimizer.models)

    # -- out -----------------------------------------------------------------------------------------------

    def collect(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The state of everything, as JSON, and the tensors that it names. Not a copy."""
        tensors: dict[str, Tensor] = {}
        positions = {name: link.state_dict() for name, link in self.loaders.items()}  # a collective for streams
        state = {
            "loaders": {name: encode(position, f"loader/{name}", tensors) for name, position in positions.items()},
            "models": {name: self._of_model(name, link, tensors) for name, link in self.models.items()},
            "optimizers": {name: self._of_optimizer(name, link, tensors) for name, link in self.optimizers.items()},
            "schedulers": {
                name: {
                    "state": encode(link.original.state_dict(), f"scheduler/{name}", tensors),
                    "num_followed": link.num_followed,
                }
                for name, link in self.schedulers.items()
            },
            "registered": {
                name: encode(item.state_dict(), f"registered/{name}", tensors) for name, item in self.registered.items()
            },
            "step": encode(self._accumulation.state_dict(self.model_names), "step", tensors),
        }
        return state, tensors

    def _of_model(self, name: str, link: Any, tensors: dict[str, Tensor]) -> dict[str, Any]:
        extra = {}
        seen: set[int] = set()
        state = link.original.state_dict(keep_vars=True)
        live = _live(link.original)
        for key, value in state.items():
            if id(value) in live and id(value) not in seen:  # tied weights once
                seen.add(id(value))
                hold(value, f"model/{name}/{key}", tensors)
        for key, value in state.items():  # after the weights, whose names are theirs
            if id(value) not in live:
                extra[key] = encode(value, f"model/{name}/{key}", tensors)
        return {"extra": extra}

    def _of_optimizer(self, name: str, link: Any, tensors: dict[str, Tensor]) -> dict[str, Any]:
        names = self._parameter_names(link)
        groups = []
        for index, group in enumerate(link.original.param_groups):
            options = {key: value for key, value in group.items() if key != "params"}
            groups.append(
                {
                    "parameters": [names[id(parameter)] for parameter in group["params"]],
                    "options": encode(options, f"optimizer/{name}/options/{index}", tensors),
                }
            )
        state = {
            names[id(parameter)]: encode(dict(values), f"optimizer/{name}/state/{names[id(parameter)]}", tensors)
            for parameter, values in link.original.state.items()
        }
        return {"groups": groups, "state": state, "num_steps": link.num_steps}

    def _parameter_names(self, optimizer: Any) -> dict[int, str]:
        return {
            id(parameter): f"{self.model_names[id(model)]}.{name}"
            for model in optimizer.models
            for name, parameter in model.original.named_parameters()
        }

    def buffers(self, name: str) -> dict[str, Tensor]:
        """The buffers of a model that its state dict names, each once, but for sharded ones."""
        module = self.models[name].original
        live = {id(buffer): buffer for buffer in module.buffers()}
        named = [(key, live.pop(id(value), None)) for key, value in module.state_dict(keep_vars=True).items()]
        return {key: value.detach() for key, value in named if value is not None and not is_sharded(value)}

    # -- in ------------------------------------------------------------------------------------------------

    def check(self, state: Mapping[str, Any], index: Index) -> None:
        """Raise `StateError` with everything that does not fit, before anything is changed."""
        wrong: list[str] = []
        for kind in ("models", "optimizers", "schedulers", "loaders", "registered"):
            wrong += _differing(kind, state[kind], getattr(self, kind))
        for name in self.models.keys() & state["models"].keys():
            wrong += self._check_model(name, state["models"][name]["extra"], index)
        for name in self.optimizers.keys() & state["optimizers"].keys():
            saved = [set(group["parameters"]) for group in state["optimizers"][name]["groups"]]
            names = self._parameter_names(self.optimizers[name])
            here = [{names[id(p)] for p in group["params"]} for group in self.optimizers[name].original.param_groups]
            if saved != here and not wrong:
                wrong.append(
                    f"{name}: parameter groups of {[len(group) for group in saved]} parameters were saved, and there "
                    f"are {[len(group) for group in here]}, or they hold other parameters"
                )
        if not wrong:
            wrong += self._check_values(state, index)
        wrong += [f"{name}: named but not there" for name in names_of_tensors(dict(state)) if name not in index]
        if wrong:
            raise StateError("the checkpoint cannot be loaded here, and nothing was loaded. " + "; ".join(wrong))

    def _check_values(self, state: Mapping[str, Any], index: Index) -> list[str]:
        """Read everything as `apply` will, but without tensors, and change nothing."""
        wrong: list[str] = []
        stand_ins = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in index.items()}
        for kind in ("models", "optimizers", "schedulers", "registered", "step"):
            decode(state[kind], stand_ins)
        for name, saved in state["optimizers"].items():
            options = [decode(group["options"], stand_ins) for group in saved["groups"]]
            well = all(isinstance(one, dict) and "params" not in one for one in options)
            if not well or not isinstance(saved["num_steps"], int):
                wrong.append(f"{name}: its options name parameters or are none, or its steps are no number")
        for name, saved in state["schedulers"].items():
            if not isinstance(saved["num_followed"], int) or "state" not in saved:
                wrong.append(f"{name}: its state is not as it was written")
        for name, link in self.loaders.items():
            try:
                link.check_state_dict(decode(state["loaders"][name], stand_ins))
            except DataError as error:
                wrong.append(f"{name}: {error}")
        joined = {part for key in ("scalers", "units") for names in state["step"][key] for part in names.split("+")}
        wrong += [f"{name}: a window of it, but no such model" for name in sorted(joined - self.models.keys())]
        return wrong

    def _check_model(self, name: str, extra: Mapping[str, Any], index: Index) -> list[str]:
        prefix = f"model/{name}/"
        within = {
            inner for key, value in extra.items() for inner in names_of_tensors(value) if inner != f"{prefix}{key}"
        }
        saved = {
            key.removeprefix(prefix): shape
            for key, (shape, _) in index.items()
            if key.startswith(prefix) and key not in within
        }
        here: dict[str, torch.Size] = {}
        seen: set[int] = set()
        values = self.models[name].original.state_dict(keep_vars=True)
        for key, value in values.items():
            if isinstance(value, Tensor) and id(value) not in seen:
                seen.add(id(value))
                here[key] = value.shape
        live = _live(self.models[name].original)
        free = {key for key in extra.keys() & values.keys() if id(values[key]) not in live}  # a tensor or not, as it is
        kept, expected = ({key: one[key] for key in one.keys() - free} for one in (saved, here))
        wrong = _differing(f"tensors of {name}", kept, expected)
        own = _names_of_weights(self.models[name].original)  # what a module adds to these may change its shape
        reshaped = [key for key in saved.keys() & here.keys() & own if saved[key] != here[key]]
        if reshaped:
            shapes = [f"{key} is {tuple(saved[key])} and should be {tuple(here[key])}" for key in sorted(reshaped)]
            wrong.append(f"other shapes in {name}: {listed(shapes)}")
        return wrong

    def targets(self, state: Mapping[str, Any], index: Index) -> dict[str, Tensor]:
        """The tensors to be read: in their place where they are there, others new, cut as their parameter is."""
        targets: dict[str, Tensor] = {}
        for name, link in self.models.items():
            values = link.original.state_dict(keep_vars=True)
            live = _live(link.original)
            for key, value in values.items():
                tensor = f"model/{name}/{key}"
                if tensor in index and isinstance(value, Tensor):
                    targets[tensor] = value.detach() if id(value) in live else _like(value, *index[tensor])
        for name, link in self.optimizers.items():
            targets |= self._targets_of_optimizer(name, link, state["optimizers"][name]["state"], index)
        for name, item in self.registered.items():
            here: dict[str, Tensor] = {}
            encode(item.state_dict(), f"registered/{name}", here)
            cut = {tensor: value for tensor, value in here.items() if tensor in index and is_sharded(value)}
            targets |= {tensor: _like(value, *index[tensor]) for tensor, value in cut.items()}
        for tensor in names_of_tensors(
            {kind: value for kind, value in state.items() if kind not in ("windows", "buffers")}
        ):
            if tensor not in targets:
                shape, dtype = index[tensor]
                targets[tensor] = torch.empty(shape, dtype=dtype)
        return targets

    def _targets_of_optimizer(self, name: str, link: Any, state: Mapping[str, Any], index: Index) -> dict[str, Tensor]:
        names = self._parameter_names(link)
        targets: dict[str, Tensor] = {}
        taken = {None, *(_memory(parameter) for parameter in link.parameters())} - {0}
        for parameter in link.parameters():
            path = f"optimizer/{name}/state/{names[id(parameter)]}"
            held = link.original.state.get(parameter, {})
            places = {f"{path}/{key}": value.detach() for key, value in held.items() if isinstance(value, Tensor)}
            for tensor in names_of_tensors(state.get(names[id(parameter)], {})):
                place = places.get(tensor)
                if place is None or (place.shape, place.dtype) != index[tensor] or _memory(place) in taken:
                    place = _like(parameter, *index[tensor])
                taken |= {_memory(place)} - {0}
                targets[tensor] = place
        return targets

    def apply(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Give every object its state. `tensors` were read; those of the models are in their place already."""
        for name, link in self.models.items():
            extra = {key: decode(value, tensors) for key, value in state["models"][name]["extra"].items()}
            if extra:
                _load_beside(name, link.original, extra)
        for name, link in self.optimizers.items():
            self._apply_optimizer(link, state["optimizers"][name], tensors)
        for name, link in self.schedulers.items():
            link.original.load_state_dict(decode(state["schedulers"][name]["state"], tensors))
            link.num_followed = state["schedulers"][name]["num_followed"]
        for name, link in self.loaders.items():
            link.load_state_dict(decode(state["loaders"][name], tensors))
        for name, item in self.registered.items():
            item.load_state_dict(decode(state["registered"][name], tensors))
        self._accumulation.load_state_dict(decode(state["step"], tensors), self.models)

    def _apply_optimizer(self, link: Any, saved: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        names = self._parameter_names(link)
        for group, stored in zip(link.original.param_groups, saved["groups"], strict=True):
            group.update(decode(stored["options"], tensors))
            on_device = group.get("fused") or group.get("capturable")
            for parameter in group["params"]:
                link.original.state.pop(parameter, None)
                if names[id(parameter)] in saved["state"]:
                    values = decode(saved["state"][names[id(parameter)]], tensors)
                    step = values.get("step")
                    if isinstance(step, Tensor) and on_device:
                        values["step"] = step.to(parameter.device)
                    link.original.state[parameter] = values
        link.num_steps = saved["num_steps"]
        link.last_call = "none"


def _live(model: nn.Module) -> set[int]:
    """The parameters and buffers themselves; any other tensor in a state dict is of a module's own making."""
    return {id(tensor) for tensor in (*model.parameters(), *model.buffers())}


def _names_of_weights(model: nn.Module) -> set[str]:
    pairs = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name for name, _ in pairs}


def _load_beside(name: str, model: nn.Module, extra: Mapping[str, Any]) -> None:
    """Give the modules what they added to their state dict themselves, beside the weights, which are in place."""
    unfit = model.load_state_dict({**model.state_dict(), **extra}, strict=False)
    if unfit.missing_keys or unfit.unexpected_keys:
        _log.warning(
            "%s: load_state_dict() of the model takes other keys than its state_dict() gives; not restored: %s",
            name,
            listed(sorted((*unfit.missing_keys, *unfit.unexpected_keys))),
        )


def _like(parameter: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    if shape == parameter.shape and parameter.ndim:
        empty = torch.empty_like(parameter.detach(), dtype=dtype)
        return empty if is_sharded(empty) else cut_like(empty, parameter.detach())
    return torch.empty(shape, dtype=dtype)


def _memory(tensor: Tensor) -> int | None:
    """What tells the memory of a tensor from that of others; `None` if its own elements share some, 0 if unknown."""
    held = local(tensor)
    if 0 in held.stride() and held.numel() > 1:
        return None
    is_plain = type(held) in (Tensor, nn.Parameter) and held.device.type != "xla"
    return held.untyped_storage().data_ptr() if is_plain else 0


def _numbered(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """What has one name (models of one class, say) is told apart by the order in which it was prepared."""
    seen: Counter[str] = Counter()
    numbered = {}
    for name, item in pairs:
        seen[name] += 1
        numbered[name if seen[name] == 1 else f"{name} ({seen[name]})"] = item
    return numbered


def _name_of_loader(loader: Any) -> str:
    dataset = loader.dataset
    try:
        return f"{type(dataset).__name__} of {len(dataset)}"
    except TypeError:  # a stream has no length
        return type(dataset).__name__


def _differing(kind: str, saved: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    missing = sorted(here.keys() - saved.keys())
    foreign = sorted(saved.keys() - here.keys())
    wrong = [f"missing {kind}: {listed(missing)}"] if missing else []
    return [*wrong, f"foreign {kind}: {listed(foreign)}"] if foreign else wrong
