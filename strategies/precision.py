"""The numeric precision of forward and backward, and what a device can do of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from .errors import ConfigurationError

MixedPrecision = Literal["no", "bf16", "fp16"]


@dataclass(frozen=True)
class Precision:
    """The dtype of autocast regions; parameters, gradients and optimizer state keep their own dtype.

    `"no"` computes in the dtype of the parameters. `"bf16"` and `"fp16"` run the operations that
    `torch.autocast` lists as safe in that dtype. `"fp16"` also scales the loss
    (Micikevicius et al. 2018, arXiv:1710.03740, section 3.2).
    """

    mode: MixedPrecision = "no"

    def __post_init__(self) -> None:
        if self.mode not in ("no", "bf16", "fp16"):
            raise ConfigurationError(f"mixed_precision is {self.mode!r}; expected 'no', 'bf16' or 'fp16'")

    @property
    def dtype(self) -> torch.dtype | None:
        """The autocast dtype, or `None` where there is no autocast."""
        return {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.mode]

    @property
    def scales_loss(self) -> bool:
        """Whether gradients need a loss scale to stay within the range of the dtype."""
        return self.mode == "fp16"

    def check(self, device: torch.device) -> None:
        """Raise `ConfigurationError` if `device` cannot autocast to this dtype."""
        if self.dtype is None:
            return
        if not torch.amp.is_autocast_available(device.type):
            raise ConfigurationError(
                f"mixed_precision is {self.mode!r}, but {device.type} has no autocast. "
                "Use mixed_precision='no' on this device."
            )
        if device.type == "cuda" and self.mode == "bf16" and not torch.cuda.is_bf16_supported():
            name = torch.cuda.get_device_name(device)
            raise ConfigurationError(
                f"mixed_precision is 'bf16', but {name} does not compute in bfloat16. "
                "Use mixed_precision='fp16' or 'no' on this device."
            )
        if device.type == "xla" and self.scales_loss:
            raise ConfigurationError(
                "mixed_precision is 'fp16', but torch_xla has no loss scaler that stays on the device. "
                "Use mixed_precision='bf16', which needs none, or 'no'."
            )
        if device.type == "mps" and self.mode == "bf16" and not torch.backends.mps.is_macos_or_newer(14, 0):
            raise ConfigurationError(
                "mixed_precision is 'bf16', but bfloat16 on MPS needs macOS 14. Use 'fp16' or 'no'."
            )
