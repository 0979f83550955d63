"""What torch_xla fails at in words of its own: refused by name where it can be seen before, explained where not."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import torch
from torch import nn

from .errors import PrepareError, StepError
from .xla_layout import refuse_others
from .xla_runtime import is_forbidden


def refuse_unknown(model: nn.Module, *, several_devices: bool) -> None:
    """Raise `PrepareError` for a module that torch_xla 2.9 cannot run."""
    for name, module in model.named_modules():
        for words in _unknown(module, several_devices=several_devices):
            raise PrepareError(f"{name or type(model).__name__} is {words}.")


def _unknown(module: nn.Module, *, several_devices: bool) -> Iterator[str]:
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
        yield f"{type(module).__name__}(sparse=True), and torch_xla has no sparse gradients. Leave out sparse=True"
    if several_devices and isinstance(module, nn.GRU) and find_spec("jax") is None:
        yield "GRU, which torch_xla runs on several devices through jax, which is not installed. Add it, or use LSTM"
    # A private name, which other backends leave empty; where torch renames it, the compiler says KeyError: 'xla'.
    if getattr(getattr(module, "dynamo_ctx", None), "compiler_config", None) is not None:
        yield (
            "compiled by torch.compile for its default backend, which knows no device of torch_xla. Prepare the model "
            "itself: a window is compiled as one program in any case"
        )


def refuse_inference_mode() -> None:
    """Raise `StepError` under `torch.inference_mode()`, where torch_xla cannot run a linear layer."""
    if torch.is_inference_mode_enabled():
        raise StepError(
            'a batch was taken under torch.inference_mode(), where torch_xla fails ("Cannot set version_counter for '
            'inference tensor"). Use torch.no_grad().'
        )


def explain(error: BaseException | None, model: nn.Module) -> None:
    """Add to `error`, which arose in a window, what is known here of its cause. (From Python 3.11.)"""
    if error is None or not hasattr(error, "add_note"):
        return
    notes = []
    if is_forbidden(error):
        notes.append(
            "XLA(full_graph=True) makes reading a value inside a window an error: keep it as a tensor, and read it "
            "after the window; evaluate under torch.no_grad(). The line is above, and on standard error."
        )
    try:
        refuse_others(model)
    except StepError as changed:
        notes.append(str(changed))
    for note in notes:
        if note not in getattr(error, "__notes__", ()):  # of several models
            error.add_note(note)
