"""Whoever comes from Accelerate hears of every argument that is not here what stands for it."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch

import accelerator.bigmodel as ours
from strategies.errors import ConfigurationError

FUNCTIONS = [
    "init_empty_weights",
    "init_on_device",
    "infer_auto_device_map",
    "get_max_memory",
    "load_checkpoint_in_model",
    "load_checkpoint_and_dispatch",
    "dispatch_model",
    "cpu_offload",
    "cpu_offload_with_hook",
    "disk_offload",
]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_argument_of_accelerate_is_known(name: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    theirs = getattr(accelerate, name, None) or getattr(accelerate.utils, name)
    function = getattr(ours, name)
    own = inspect.signature(function).parameters
    guide = Path(__file__).parents[3].joinpath("docs/guides/from_accelerate.md").read_text()
    for argument in inspect.signature(theirs).parameters:
        if argument in own:
            continue
        with pytest.raises(TypeError, match=rf"{name}\(\) has no argument '{re.escape(argument)}': "):
            function(**{argument: None})
        assert argument in guide or argument == "offload_8bit_bnb"


@pytest.mark.parametrize("size", ["10GB", "10GiB", "7MB", "7MiB", "3KB", "3KiB"])
def test_sizes_are_those_of_accelerate(size: str) -> None:
    utils = pytest.importorskip("accelerate.utils")
    assert ours.get_max_memory({"cpu": size})["cpu"] == utils.convert_file_size_to_int(size)


def test_terabytes() -> None:
    assert ours.get_max_memory({"cpu": "1TB", "disk": "2 tib"}) == {"cpu": 10**12, "disk": 2**41}


def test_what_nobody_knows_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="banana"):
        ours.cpu_offload(torch.nn.Linear(1, 1), banana=1)  # type: ignore[call-arg]
    with pytest.raises(ConfigurationError, match="dtype is True; expected a floating-point one"):
        ours.init_on_device("cpu", True).__enter__()  # type: ignore[arg-type]
