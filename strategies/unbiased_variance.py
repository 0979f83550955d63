"""Batch and instance normalisation as torch defines them, on devices whose running variance is the biased one."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .errors import PrepareError


def correct_running_variance(model: nn.Module) -> None:
    """Have every normalisation of `model` that keeps a running variance keep the one that torch keeps on a CPU.

    torch estimates it with n - 1 (n: elements per channel in the batch, or in a sample for instance normalisation);
    torch_xla 2.9 with n. Raises `PrepareError` for batch normalisation with `momentum=None`, which reads a count from
    the device in every forward.
    """
    for name, module in model.named_modules():
        if not isinstance(module, nn.modules.batchnorm._NormBase) or not module.track_running_stats:
            continue
        if module.momentum is None and isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise PrepareError(
                f"{name or type(module).__name__} is {type(module).__name__}(momentum=None), which would read a number "
                "from the device in every forward. Give it a momentum, or use GroupNorm or LayerNorm."
            )
        if not any(isinstance(hook, _Before) for hook in module._forward_pre_hooks.values()):
            before = _Before()
            module.register_forward_pre_hook(before)
            module.register_forward_hook(_After(before))


class _Before:
    """Remembers the running variance before a forward that changes it."""

    def __init__(self) -> None:
        self.variance: Tensor | None = None

    def __call__(self, module: Any, inputs: Any) -> None:
        # The hooks go with a copy of the model, which may be trained elsewhere.
        changes = module.training and module.running_var is not None and module.running_var.device.type == "xla"
        self.variance = module.running_var.clone() if changes else None


class _After:
    """Scales what the forward added by n / (n - 1)."""

    def __init__(self, before: _Before) -> None:
        self.before = before

    def __call__(self, module: Any, inputs: Any, output: Any) -> None:
        old, self.before.variance = self.before.variance, None
        if old is None:
            return
        number = inputs[0].numel() // len(old)
        if isinstance(module, nn.modules.instancenorm._InstanceNorm) and inputs[0].ndim > module._get_no_batch_dim():
            number //= len(inputs[0])  # each sample has a variance of its own
        variance = module.running_var.data  # backward holds the buffer, and does not use it in training
        variance.add_((variance - (1 - (module.momentum or 0.0)) * old) / (number - 1))
