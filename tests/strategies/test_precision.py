"""What a precision means, and which device can do it."""

from __future__ import annotations

import pytest
import torch

from accelerator import Accelerator
from strategies import ConfigurationError, Precision


@pytest.mark.parametrize(
    ("mode", "dtype", "scales"), [("no", None, False), ("bf16", torch.bfloat16, False), ("fp16", torch.float16, True)]
)
def test_modes(mode: str, dtype: torch.dtype | None, scales: bool) -> None:
    precision = Precision(mode)  # type: ignore[arg-type]  # a parameter of the test
    assert precision.dtype is dtype
    assert precision.scales_loss is scales
    precision.check(torch.device("cpu"))


@pytest.mark.parametrize("mode", ["fp32", "BF16", "", None, 16])
def test_an_unknown_mode_is_refused(mode: object) -> None:
    with pytest.raises(ConfigurationError, match=r"mixed_precision is .*; expected 'no', 'bf16' or 'fp16'"):
        Precision(mode)  # type: ignore[arg-type]  # that is the point


def test_a_device_without_autocast_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="mixed_precision is 'bf16', but meta has no autocast"):
        Precision("bf16").check(torch.device("meta"))
    Precision("no").check(torch.device("meta"))


@pytest.mark.parametrize(("mode", "dtype"), [("no", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_autocast_covers_what_is_outside_a_prepared_model(mode: str, dtype: torch.dtype) -> None:
    accelerator = Accelerator(strategy="cpu", mixed_precision=mode)  # type: ignore[arg-type]  # a parameter
    weight = torch.ones(2, 2)
    with accelerator.autocast():
        assert (weight @ weight).dtype is dtype
    assert (weight @ weight).dtype is torch.float32
    assert accelerator.mixed_precision == mode
