"""What `fully_shard` of torch leaves to its caller: rank 0's weights, settled flags, released parameters."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.parameter import UninitializedParameter

from . import collectives
from .blocks import class_name
from .errors import PrepareError, StepError, listed
from .process_group import named_failures
from .shards import cut_like, is_sharded, local
from .tree import iterate_leaves, map_tensors
from .world import World


def settle(model: nn.Module, blocks: Sequence[nn.Module], world: World, *, forward: int, backward: int) -> None:
    """Fix what `fully_shard` would fix in the first forward, while parameters are as the user left them.

    `forward` and `backward` are how many of the `blocks`, in their order, are gathered ahead.
    """
    # Its dtypes would be those of the parameters that are not frozen at that time, as another model's window does.
    model._get_fsdp_state()._lazy_init()  # type: ignore[operator]
    for index, block in enumerate(blocks):
        if forward:
            block.set_modules_to_forward_prefetch(blocks[index + 1 : index + 1 + forward])  # type: ignore[operator]
        if backward != 1:  # which is what torch does by itself, and for a block that is told of none
            before = blocks[max(0, index - backward) : index][::-1]
            block.set_modules_to_backward_prefetch(before or [block])  # type: ignore[operator]
    if backward == 0:
        model.set_modules_to_backward_prefetch([model])  # type: ignore[operator]
    for module in model.modules():
        if hasattr(module, "_get_fsdp_state"):
            type(module).__deepcopy__ = _refuse_copy  # type: ignore[attr-defined]  # in the place of torch's refusal
    gathered = _Gathered(_groups(model), world)
    model.register_forward_pre_hook(gathered.before_forward, prepend=True)
    model.register_forward_hook(gathered.after_forward)


def _refuse_copy(model: nn.Module, memo: Any) -> Any:
    raise StepError(
        f"{class_name(model)} is cut over ranks, and a copy would not be: copy the model before prepare(). "
        "accelerator.EMA averages its weights, and get_state_dict(model) gives them whole."
    )


class _Gathered:
    """What a forward left gathered for its backward, and whether the parts were written to since."""

    def __init__(self, groups: Sequence[Any], world: World) -> None:
        self._groups = groups
        self._world = world
        self._drawn: dict[int, int] | None = {id(p): p.sharded_param._version for g in groups for p in g.fsdp_params}
        self._versions: dict[int, int] = {}  # by the place of a group: how often its parts had been written to

    def before_forward(self, model: nn.Module, inputs: Any) -> None:
        """Have it gather anew what was written to by hand since, and refuse what was replaced or converted."""
        self._refuse_replaced()
        if self._drawn is not None and not torch.compiler.is_compiling():
            parameters = [p for g in self._groups for p in g.fsdp_params]
            written = [known for known in parameters if known.sharded_param._version != self._drawn[id(known)]]
            _refuse_written_apart(written, self._world)
            _refuse_same_numbers(written)
            self._drawn = None
        for index, group in enumerate(self._groups):
            first = group.fsdp_params[0]
            if first.sharded_param.dtype != first.orig_dtype:
                raise _converted(model, str(first.orig_dtype), str(first.sharded_param.dtype))
            if not group.is_sharded and self._versions.get(index) != _version(group):
                _release(group)

    def after_forward(self, model: nn.Module, inputs: Any, outputs: Any) -> None:
        """Release what no backward will: else `parameters()` are not those that the optimizer holds."""
        recorded = torch.is_grad_enabled() and any(
            getattr(leaf, "requires_grad", False) for leaf in iterate_leaves(outputs)
        )
        for index, group in enumerate(self._groups):
            if not recorded:
                _release(group)
            elif not group.is_sharded:
                self._versions[index] = _version(group)

    def _refuse_replaced(self) -> None:
        """Raise `StepError` for a parameter in the place of a sharded one, which would undo it in silence."""
        for group in self._groups:
            for known in group.fsdp_params:
                place = known._module_info
                found = place.module._parameters.get(place.param_name)
                if found is not known.sharded_param and found is not getattr(known, "_unsharded_param", None):
                    if found is not None and found is getattr(known, "_sharded_post_forward_param", None):
                        continue
                    raise StepError(
                        f"{known._param_fqn or place.param_name} was replaced after prepare(), and neither ranks nor "
                        "the optimizer know the new parameter. Change the model before prepare(), or write into the "
                        "parameter that it has."
                    )


def _refuse_written_apart(written: Sequence[Any], world: World) -> None:
    """Raise `StepError` if ranks have written to different parameters since the model was sharded. Collective."""
    names = [str(known._param_fqn) for known in written]
    told = collectives.meet("the first forward of a sharded model", world, collectives.digest_of(repr(names)))
    if len(set(told)) > 1:
        everyone = collectives.all_gather_objects(names, world)
        apart = [n for n in dict.fromkeys(itertools.chain(*everyone)) if not all(n in held for held in everyone)]
        raise StepError(
            f"{listed(apart)} were written to after prepare() on some ranks only, each of which holds a part of them. "
            "Write before prepare(), where rank 0's values count, or on every rank."
        )


def _refuse_same_numbers(written: Sequence[Any]) -> None:
    """Raise `StepError` if parameters were drawn at random, by each rank from the same generator.

    Collective where any was written to: each rank then draws only its part, and all parts are alike.
    """
    if not written or written[0].mesh_info.shard_mesh_size == 1:
        return
    mine = {}
    for known in written:
        part = local(known.sharded_param).detach().flatten()[:4096].cpu()
        if part.numel() > 1 and bool((part != part[0]).any()):
            mine[known._param_fqn] = zlib.crc32(bytes(part.contiguous().view(torch.uint8).tolist()))
    everyone: list[dict[str, int]] = [{} for _ in range(written[0].mesh_info.shard_mesh_size)]
    dist.all_gather_object(everyone, mine, group=written[0].mesh_info.shard_process_group)
    alike = [name for name, check in mine.items() if all(other.get(name) == check for other in everyone)]
    if alike:
        raise StepError(
            f"{listed(alike)} were initialised after prepare(), where every rank draws its part from the same random "
            "numbers: all parts are alike. Initialise before prepare(), or load whole values with "
            "model.load_state_dict(state)."
        )


def _version(group: Any) -> int:
    """How often the parts of a group were written to in place; `.data` and optimizers do not count."""
    return sum(known.sharded_param._version + known.sharded_param._local_tensor._version for known in group.fsdp_params)


def discard(model: nn.Module) -> None:
    """Bring `model` back from an exception in its forward or backward, without what its open window had summed.

    Raises `StepError` where torch cannot.
    """
    if not hasattr(model, "reset_iter_state"):
        raise StepError(
            f"after an exception inside accumulate(), fully_shard of torch {torch.__version__} cannot go on. "
            "Let the exception end the job, or use torch 2.13."
        )
    model.reset_iter_state()  # type: ignore[operator]
    for group in _groups(model):
        for parameter in group.fsdp_params:  # where it keeps, until they are reduced, gradients that are not cut
            parameter.unsharded_accumulated_grad = None
            if hasattr(parameter, "_unsharded_param"):
                parameter._unsharded_param.grad = None


def held_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients that are whole and wait for their reduction, by the names of their parameters."""
    found = {}
    for name, known in _named(model):
        gradient = known.unsharded_accumulated_grad
        if gradient is None and hasattr(known, "_unsharded_param"):
            gradient = known._unsharded_param.grad
        if gradient is not None:
            found[name] = gradient
    return found


def hold_gradients(model: nn.Module, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Have whole gradients wait for their reduction; return those of parameters that are not sharded."""
    rest = dict(gradients)
    for name, known in _named(model):
        gradient = rest.pop(name, None)
        if hasattr(known, "_unsharded_param"):
            known._unsharded_param.grad = None
        if gradient is not None:
            dtype = known.reduce_dtype or known.param_dtype or known.orig_dtype
            gradient = gradient.to(device=known.device, dtype=dtype)
        known.unsharded_accumulated_grad = gradient
    return rest


def set_averaged(model: nn.Module, gradients: Mapping[str, Tensor], world: World) -> None:
    """Average whole gradients over ranks, and give each sharded parameter its part. Collective."""
    for name, parameter in model.named_parameters():
        if not is_sharded(parameter):
            parameter.grad = gradients[name].to(parameter) if name in gradients else None
            continue
        whole = Parameter(torch.empty(parameter.shape, dtype=parameter.dtype, device=world.device))
        whole.grad = gradients[name].to(whole) if name in gradients else None
        average(whole, world)
        parameter.grad = None if whole.grad is None else cut_like(whole.grad, parameter).to(parameter.device)


def _named(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """What `fully_shard` knows of each sharded parameter, with its name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in _groups(model):
        for known in group.fsdp_params:
            yield names[id(known.sharded_param)], known


def return_no_views(model: nn.Module, inputs: Any, outputs: Any) -> Any:
    """An operation in place on a view that a block returned would undo the hook that gathers for backward."""

    def is_view(leaf: Any) -> bool:
        return isinstance(leaf, Tensor) and leaf.requires_grad and leaf._is_view()

    leaves = list(iterate_leaves(outputs))
    if torch.is_grad_enabled() and outputs is not None and not any(isinstance(leaf, Tensor) for leaf in leaves):
        raise StepError(
            f"{class_name(model)} returned {type(outputs).__name__}, in which no tensor can be found, so that its "
            "parameters would not be gathered for backward. Return a tensor, or a tuple, list, mapping or "
            "dataclass of them."
        )
    if not any(is_view(leaf) for leaf in leaves):
        return outputs
    return map_tensors(lambda tensor: tensor.clone() if is_view(tensor) else tensor, outputs)


def explain_forward(model: nn.Module, error: Exception) -> StepError | None:
    """What an exception of a forward means, if it is that a parameter was used where its block had not gathered it."""
    if "mixed torch.Tensor and DTensor" not in str(error):
        return None
    names = {id(module): name for name, module in model.named_modules()}
    used, trace = "", error.__traceback__
    while trace is not None:  # the innermost module whose method ran
        used = names.get(id(trace.tb_frame.f_locals.get("self")), used)
        trace = trace.tb_next
    groups = {names.get(id(module)) for group in _groups(model) for module in group.modules}
    parts = used.split(".")
    block = next((name for end in range(len(parts), 0, -1) if (name := ".".join(parts[:end])) in groups), None)
    what = f"{used} of {class_name(model)} was used" if used else f"{class_name(model)} used a parameter of a block"
    return StepError(
        f"{what} outside a call of {f'{block}, which' if block else 'the block that'} gathers it. Call the block "
        "itself; shard other modules (auto_wrap_policy, transformer_layer_cls; 'none' makes the model one block); or "
        "name the method of the model that uses it in forward_methods."
    )


def refuse_conversion(model: nn.Module, convert: Callable[[Tensor], Tensor]) -> None:
    """Raise `StepError` if `convert`, of `model.to()` and the like, would make other tensors of sharded parameters."""
    for dtype, device in {(p.dtype, p.device) for p in map(local, model.parameters())}:
        made = convert(torch.empty(0, dtype=dtype, device=device))
        if (made.dtype, made.device) != (dtype, device):
            raise _converted(model, f"{dtype} on {device}", f"{made.dtype} on {made.device}")
        if device.type == "cpu" and made.is_shared():  # torch crashes on parts of tensors
            raise _converted(model, f"{dtype} on {device}", "memory that processes share")


def _converted(model: nn.Module, what: str, other: str) -> StepError:
    return StepError(
        f"parameters of {class_name(model)} are cut over ranks as {what}; after prepare() they cannot become {other}: "
        "neither the optimizer nor fully_shard would know. Convert the model before prepare(); to compute in low "
        "precision, set mixed_precision."
    )


def release_gathered(model: nn.Module) -> None:
    """Release what a forward without backward left gathered, so that the next one gathers what the parts hold then.

    Gradients of an open window stay. Between a forward and its backward it is not to be called.
    """
    for group in _groups(model):
        _release(group)


def _release(group: Any) -> None:
    if group._all_gather_result is not None:  # gathered ahead, for a block that was never reached
        group.wait_for_unshard()
    group._to_sharded()  # its reshard() leaves a group that was inside a forward as it is


def _groups(model: Any) -> list[Any]:
    """The groups of parameters that `fully_shard` made of a settled model; torch 2.9 has one or none of a module."""
    groups: list[Any] = []
    for state in model._get_fsdp_state()._state_ctx.all_states:
        if hasattr(state, "_fsdp_param_groups"):
            groups += state._fsdp_param_groups
        elif state._fsdp_param_group is not None:
            groups.append(state._fsdp_param_group)
    return groups


def refuse_sharded(model: nn.Module) -> None:
    """Raise `PrepareError` for a model that was sharded before, by whomever: it cannot be cut again."""
    from torch.distributed.fsdp import FSDPModule

    cut = any(isinstance(module, FSDPModule) for module in model.modules())
    if cut or any(is_sharded(parameter) for parameter in model.parameters()):
        raise PrepareError(
            f"{class_name(model)} is sharded already: fully_shard changes a model in place. Build it again for another "
            "prepare()."
        )
    lazy = [name for name, parameter in model.named_parameters() if isinstance(parameter, UninitializedParameter)]
    if lazy:
        raise PrepareError(f"{lazy[0]} of {class_name(model)} has no shape before a first forward; give it one")


def average(parameter: Parameter, world: World) -> None:
    """Average the gradient of a whole parameter over ranks; where no rank has one, none has one after."""
    if not parameter.requires_grad:
        return
    has_any = torch.tensor(parameter.grad is not None, dtype=torch.float32, device=parameter.device)
    with named_failures(world):
        dist.all_reduce(has_any, op=dist.ReduceOp.MAX)
        if has_any.item():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            dist.all_reduce(parameter.grad.div_(world.size))


def refuse_uneven_use(model: nn.Module, world: World) -> None:
    """Raise `StepError` on every rank if a parameter has a gradient on some ranks only: others' were added to it."""
    named = [(name, p.grad is not None) for name, p in model.named_parameters() if p.requires_grad and is_sharded(p)]
    used = bytes(has for _, has in named)
    seen = collectives.meet("the step that closes a window", world, zlib.crc32(used))
    if len(set(seen)) > 1:
        everywhere = collectives.all_gather_objects(used, world)
        names = [name for index, (name, _) in enumerate(named) if len({each[index] for each in everywhere}) > 1]
        raise StepError(
            f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''} of {class_name(model)} took part in the loss "
            "on some ranks only, where fully_shard adds gradients of different parameters together. Use every "
            "parameter on every rank (add 0 times the output of the part that is left out), or set "
            "find_unused_parameters=True (torch 2.13)."
        )


def reduce_unused(model: nn.Module) -> None:
    """Have parameters without a gradient reduced as zeros. Raises `PrepareError` where torch cannot."""
    if not hasattr(model, "set_reduce_scatter_unused_params"):
        raise PrepareError(
            f"find_unused_parameters is True, which fully_shard of torch {torch.__version__} cannot do; it needs 2.13. "
            "Add 0 times the output of what a rank leaves out, or use DDP."
        )
    model.set_reduce_scatter_unused_params(True)  # type: ignore[operator]


def take_from_rank_0(parameters: Iterable[Parameter], device: torch.device) -> None:
    """Give real parameters rank 0's values, on the device. Collective."""
    for parameter in parameters:
        if not parameter.is_meta:
            data: Tensor = parameter.data.to(device).contiguous()
            if dist.get_world_size() > 1:
                dist.broadcast(data, src=0)
            parameter.data = data
