"""What is in memory while a model runs: the next parts are on their way, and never more than the budget."""

from __future__ import annotations

import contextlib
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from accelerator import Accelerator
from accelerator.bigmodel import disk_offload, init_empty_weights, load_checkpoint_and_dispatch, pages
from fresh_process import FreshProcesses

BLOCK = 4 * (64 * 64 + 64)  # bytes


def build() -> nn.Sequential:
    return nn.Sequential(*[nn.Linear(64, 64) for _ in range(6)])


def offloaded(folder: Path, budget: int) -> tuple[nn.Sequential, nn.Sequential]:
    """A model on the disk, and the same in memory."""
    expected = build()
    save_file(expected.state_dict(), folder / "model.safetensors")
    with init_empty_weights():
        model = build()
    load_checkpoint_and_dispatch(model, folder, {"": "disk"}, offload_budget=budget, no_split_classes=["Linear"])
    return model, expected


@pytest.mark.parametrize("blocks", [1, 2, 3, 6])
def test_the_next_blocks_are_read_while_one_computes(blocks: int, tmp_path: Path) -> None:
    model, expected = offloaded(tmp_path, blocks * BLOCK)
    residency = model._dispatched.residency  # type: ignore[union-attr]
    ahead: list[int] = []

    def computing(module: nn.Module, args: object, output: object) -> None:
        here = next(index for index, block in enumerate(model) if block is module)
        there = set(residency._held) - {here}  # type: ignore[union-attr]
        for index in there:
            residency._held[index].result(timeout=60)  # type: ignore[union-attr]  # done, though this block is not
        ahead.append(sum((index - here) % 6 <= 2 for index in there))
        assert residency.held_bytes <= blocks * BLOCK  # type: ignore[union-attr]

    for block in model:
        block.register_forward_hook(computing, prepend=True)
    x = torch.randn(3, 64)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(model(x), expected(x))
    assert ahead == [min(blocks - 1, 2)] * 12


@pytest.mark.parametrize("apart", [0, 1])
def test_forwards_of_several_threads_keep_the_budget(apart: int, tmp_path: Path) -> None:
    """Two threads are inside the same block together, or one is a block ahead."""
    model, expected = offloaded(tmp_path, BLOCK)
    residency: Any = model._dispatched.residency  # type: ignore[union-attr]
    together, enter = threading.Barrier(2), residency.enter

    def enter_together(index: int, **options: Any) -> None:
        enter(index, **options)
        with contextlib.suppress(threading.BrokenBarrierError):
            together.wait(timeout=60)

    x = torch.randn(3, 64)
    outputs: dict[int, torch.Tensor] = {}

    def run(number: int) -> None:
        with torch.no_grad():
            outputs[number] = model[number:](x) if number else model(x)
        together.abort()  # the one that is behind runs on alone

    residency.enter = enter_together
    threads = [threading.Thread(target=run, args=(number,)) for number in (0, apart)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    with torch.no_grad():
        assert all(torch.equal(output, expected[number:](x)) for number, output in outputs.items())
    assert residency._running == [0] * 6
    assert residency.held_bytes <= BLOCK


def num_pages(model: nn.Module) -> int:
    """How many pages of the weights are in this process's memory."""
    return sum(
        bool(entry & (1 << 63))
        for weight in model.parameters()
        for entry in pages._entries(weight.data_ptr() // 4096 + 1, weight.nbytes // 4096 - 1) or ()
    )


class PastModules(nn.Module):
    """Weights that are used without running their modules."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(256, 256, bias=False) for _ in range(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = nn.functional.linear(x, layer.weight)
        return self.layers[0](x)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel does not tell")
def test_weights_used_past_their_modules_are_given_back(tmp_path: Path) -> None:
    model = PastModules()
    disk_offload(model, tmp_path, offload_budget=2 * 4 * 256 * 256)
    block = 4 * 256 * 256 // 4096
    with torch.no_grad():
        for _ in range(2):
            model(torch.ones(1, 256))
            assert 0 < num_pages(model) <= 2 * block


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel does not tell")
@pytest.mark.parametrize("export", ["save_model", "get_state_dict"])
def test_saving_gives_back_what_it_read(export: str, tmp_path: Path) -> None:
    model = PastModules()
    disk_offload(model, tmp_path / "offload")
    accelerator = Accelerator("cpu")
    accelerator.save_model(model, tmp_path / "saved") if export == "save_model" else accelerator.get_state_dict(model)
    assert num_pages(model) == 0


FORK = """
import multiprocessing, sys, torch
from safetensors.torch import save_file
from torch import nn
from accelerator.bigmodel import init_empty_weights, load_checkpoint_and_dispatch, remove_dispatch

def build():
    return nn.Sequential(*[nn.Linear(64, 64) for _ in range(6)])

torch.set_num_threads(1)
expected = build()
save_file(expected.state_dict(), sys.argv[1] + "/model.safetensors")
with init_empty_weights():
    model = build()
load_checkpoint_and_dispatch(model, sys.argv[1], {"": "disk"}, offload_budget=40000, no_split_classes=["Linear"])
x = torch.randn(3, 64)

@torch.no_grad()
def check():
    assert torch.equal(model(x), expected(x))

def check_and_remove():
    check()
    remove_dispatch(model)
    check()

check()
for target in (check_and_remove, lambda: remove_dispatch(model), check):
    child = multiprocessing.get_context("fork").Process(target=target)
    child.start()
    child.join(60)
    assert child.exitcode == 0, child.exitcode
check()
"""


def test_a_forked_process_reads_for_itself(fresh: FreshProcesses, tmp_path: Path) -> None:
    (finished,) = fresh(FORK, str(tmp_path), warm=True)
    assert finished.returncode == 0, finished.stderr


@pytest.mark.parametrize("copies", [False, True])
def test_an_interrupted_forward_keeps_nothing(copies: bool, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if copies:
        request.getfixturevalue("by_copies")
    model, expected = offloaded(tmp_path, 2 * BLOCK)
    residency: Any = model._dispatched.residency  # type: ignore[union-attr]
    x = torch.randn(3, 64)

    def interrupt(module: nn.Module, args: object) -> None:
        raise KeyboardInterrupt

    for number in range(3):  # as in a notebook
        handle = model[number].register_forward_pre_hook(interrupt)
        with torch.no_grad(), pytest.raises(KeyboardInterrupt):
            model(x)
        handle.remove()
    with torch.no_grad():
        assert torch.equal(model(x), expected(x))
    assert residency._running == [0] * 6
    assert residency.held_bytes <= 2 * BLOCK
    saved: list[torch.Tensor] = []  # no hook of ours is left to hear of tensors that others save
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        (torch.ones(1, requires_grad=True) ** 2).backward()
    assert len(saved) == 1


class CallsItself(nn.Module):
    """Runs its own weights around another run of itself."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((64,), 2.0))
        self.inner = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor, depth: int = 3) -> torch.Tensor:
        return self.scale * (self(self.inner(x), depth - 1) if depth else x) * self.scale


@pytest.mark.parametrize("copies", [False, True])
def test_a_model_that_calls_itself(copies: bool, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if copies:
        request.getfixturevalue("by_copies")
    model = CallsItself().requires_grad_(False)
    x = torch.randn(3, 64)
    expected = model(x)
    disk_offload(model, tmp_path)
    assert torch.equal(model(x), expected)
    assert model._dispatched.residency._running == [0, 0]  # type: ignore[union-attr]
