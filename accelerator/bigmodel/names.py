"""Tensors of a checkpoint under the names that the model has for them."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from accelerator.saved_weights import SavedWeights
from strategies.errors import ConfigurationError, StateError, listed

from .files import tensors_of


def tensors_for(
    model: nn.Module, checkpoint: str | os.PathLike[str] | Mapping[str, Tensor], key_mapping: Mapping[str, str] | None
) -> Mapping[str, Tensor]:
    """Every tensor of a checkpoint, or of those given, named as in `model`; none is read for that.

    `key_mapping`: regular expressions and what takes the place of what they match, one after the other. Names that
    `model` then does not have are those that transformers gives it, if it is a model of transformers.
    """
    if isinstance(checkpoint, str | os.PathLike):
        found = tensors_of(checkpoint, type(model).__name__)
    elif isinstance(checkpoint, Mapping):
        found = dict(checkpoint)
    else:
        raise ConfigurationError(
            f"checkpoint is {checkpoint!r}; expected the path of a file or folder, or tensors by name"
        )
    if key_mapping is not None:
        if isinstance(found, SavedWeights):
            raise ConfigurationError("key_mapping is not for what save_state wrote, which has the model's own names")
        found = _renamed(found, {name: _substituted(name, key_mapping) for name in found})
    return found if isinstance(found, SavedWeights) else _as_transformers_would(model, found)


def hint_at_names(
    model: nn.Module, missing: Sequence[str], unexpected: Sequence[str], known: Collection[str], found: Collection[str]
) -> str:
    """What to do if a checkpoint has the weights of a model under other names; empty if it does not look so."""
    if not missing or not unexpected:
        return ""
    for names, others, words in (
        (unexpected, known, "in the checkpoint only. Load with key_mapping={{{0!r}: ''}}"),
        (missing, found, "in the model only. Load into the module behind it (model.{1}), or with key_mapping={2}"),
    ):
        prefix = names[0].partition(".")[0] + "."
        if all(name.startswith(prefix) and name.removeprefix(prefix) in others for name in names):
            pattern, added = "^" + prefix.replace(".", "[.]"), {"^": prefix}
            return f" Names begin with {prefix!r} " + words.format(pattern, prefix[:-1], added) + "."
    if _is_of_transformers(model):
        return (
            " transformers may save weights under other names than the model's, which its from_pretrained knows: load "
            "with that, and go on from there, with disk_offload(model) or dispatch_model(model, device_map)."
        )
    return ""


def _renamed(found: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors under the names that `names` has for theirs."""
    sources: dict[str, str] = {}
    for name, new in names.items():
        if sources.setdefault(new, name) != name:
            raise StateError(
                f"{sources[new]} and {name} of the checkpoint are both {new} in the model. Have key_mapping give each "
                "a name of its own."
            )
    return {new: found[name] for new, name in sources.items()}


def _substituted(name: str, key_mapping: Mapping[str, str]) -> str:
    expected = r"expected regular expressions and what takes the place of what they match, such as {'^module\\.': ''}"
    if not isinstance(key_mapping, Mapping):
        raise ConfigurationError(f"key_mapping is {key_mapping!r}; {expected}")
    for pattern, replacement in key_mapping.items():
        try:
            name = re.sub(pattern, replacement, name)
        except (re.error, TypeError, IndexError) as error:
            raise ConfigurationError(f"key_mapping has {pattern!r}: {replacement!r} ({error}); {expected}") from error
    return name


def _as_transformers_would(model: nn.Module, found: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """`found` as it is, unless a model of transformers misses something: then with the names of `from_pretrained`.

    Raises `StateError` for weights that it would also merge, split or turn.
    """
    if not _is_of_transformers(model):
        return found
    names_of: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names_of.setdefault(id(tensor), []).append(name)
    if all(any(name in found for name in names) for names in names_of.values()):
        return found
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:  # before 5, where names are those of the files
        return found
    known = [*dict(model.named_parameters(remove_duplicate=False)), *dict(model.named_buffers(remove_duplicate=False))]
    pretrained: Any = model
    transforms: list[Any] = get_model_conversion_mapping(pretrained)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if not isinstance(transform, WeightRenaming)]
    there: dict[str, Any] = dict.fromkeys(known, True)
    names, changed = {}, []
    for name in found:
        new, converted = rename_source_key(name, renamings, converters, pretrained.base_model_prefix, there)
        names[name] = new if new in there else name
        if converted is not None and new in there:
            changed.append(name)
    if changed:
        raise StateError(
            f"{listed(changed)} of the checkpoint are not only renamed in {type(model).__name__}: transformers merges, "
            "splits or turns them as it loads them. Load with its from_pretrained, and go on from there, with "
            "disk_offload(model, offload_folder) or dispatch_model(model, device_map, offload_folder=...)."
        )
    ignored = [re.compile(pattern) for pattern in pretrained._keys_to_ignore_on_load_unexpected or ()]
    needless = {name for name, new in names.items() if new not in there and any(one.search(name) for one in ignored)}
    return _renamed(found, {name: new for name, new in names.items() if name not in needless})


def _is_of_transformers(model: nn.Module) -> bool:
    """Whether transformers made the class of `model`, which is not imported for that."""
    return any(cls.__name__ == "PreTrainedModel" for cls in type(model).__mro__)
