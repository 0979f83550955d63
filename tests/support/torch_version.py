"""What differs between the torch releases that the tests run on."""

from __future__ import annotations

import re

import pytest
import torch

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])

ended_peers_are_listed = pytest.mark.skipif(
    TORCH < (2, 13), reason="the elastic agent of this torch does not list the processes that it ended itself"
)
torchao_runs = pytest.mark.skipif(
    TORCH < (2, 11), reason="torchao 0.18, the first that is used, needs torch 2.11 or newer"
)


def without_gloo_lines(text: str) -> str:
    """`text` without the lines that gloo of torch 2.9 prints on standard output, torn ones too, as groups are made."""
    if "[Gloo]" not in text:
        return text
    return re.sub(r"^(?:.*(?:\[Gloo\]|peer ranks).*)?\n", "", text, flags=re.MULTILINE)
