"""Fixtures of the tests of big models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from accelerator.bigmodel import dispatch
from accelerator.bigmodel.pages import FileMappings
from accelerator.bigmodel.parts import Part
from accelerator.bigmodel.residency import Copies
from blocks_net import make_net


@pytest.fixture
def net(tmp_path: Path) -> Path:
    """The weights of `make_net()` in a file."""
    save_file(make_net().state_dict(), tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def by_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are copied to be used, as to an accelerator, though the copies are in CPU memory too."""

    def holding(part: Part, main: torch.device, mappings: FileMappings) -> Copies:
        return Copies(part, main, mappings)

    monkeypatch.setattr(dispatch, "_holding", holding)
