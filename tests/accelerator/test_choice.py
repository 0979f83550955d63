"""Which strategy runs, and whether the processes that were asked for are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from accelerator.choice import check_world, chosen_name
from accelerator.config import Resolved, resolve_settings
from strategies import CPU, DDP, LaunchError, SingleDevice, World


def resolved(code: dict[str, object], environ: dict[str, str]) -> Resolved:
    return resolve_settings(code, environ=environ, directory=Path(__file__).parent)


TWO = {"RANK": "0", "WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("asked", "environ", "name"),
    [
        ("auto", {}, "single"),
        ("auto", {"RANK": "0", "WORLD_SIZE": "1"}, "single"),
        ("auto", TWO, "ddp"),
        ("cpu", TWO, "cpu"),
        ("ddp", {}, "ddp"),
        ("strategies.ddp:DDP", {}, "strategies.ddp:DDP"),
    ],
)
def test_auto_follows_the_launcher_and_a_name_is_kept(asked: str, environ: dict[str, str], name: str) -> None:
    assert chosen_name(resolved({"strategy": asked}, environ={}), environ) == name


def test_the_strategy_is_built_from_its_options() -> None:
    settings = resolved({}, environ={"ACCELERATOR_DDP__STATIC_GRAPH": "true"})
    assert settings.strategy_for(chosen_name(settings, TWO)) == DDP(static_graph=True)
    assert settings.strategy_for(chosen_name(settings, {})) == SingleDevice()


def test_an_instance_is_taken_as_it_is() -> None:
    strategy = CPU()
    settings = resolved({"strategy": strategy}, environ={})
    assert settings.strategy_for(chosen_name(settings, {})) is strategy


@pytest.mark.parametrize(
    ("nproc", "nnodes", "size", "fits"),
    [
        (None, None, 3, True),
        ("2", None, 2, True),
        ("2", None, 1, False),
        ("1", None, 2, False),
        ("2", "2", 4, True),
        ("2", "2", 2, False),
        ("2", "1:3", 6, True),
        ("2", "1:3", 5, False),
    ],
)
def test_the_processes_asked_for_must_be_the_ones_found(
    nproc: str | None, nnodes: str | None, size: int, fits: bool
) -> None:
    variables = {"ACCELERATOR_LAUNCH__NPROC_PER_NODE": nproc, "ACCELERATOR_LAUNCH__NNODES": nnodes}
    settings = resolved({}, environ={name: value for name, value in variables.items() if value})
    if fits:
        check_world(settings, World(size=size))
        return
    expected = f"launch.nproc_per_node is {nproc} (ACCELERATOR_LAUNCH__NPROC_PER_NODE)"
    with pytest.raises(LaunchError, match=f"{re.escape(expected)}.*, found: {size}.*`accelerator launch`"):
        check_world(settings, World(size=size))
