"""Rules on what is around the step: the world, the data, and leaving."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ... import collectives
from ...base import Strategy
from ...process_group import read_environment
from ...tree import iterate_tensors
from ...world import World
from ..loop import Loop
from ..oracle import Weights
from ..rule import Broken, rule


@rule()
def world_is_consistent(strategy: Strategy) -> None:
    """`setup` tells ranks and sizes that agree with the processes really started, and these can talk to each other.

    A strategy that says "rank 0 of 1" in each of several processes trains several models, and they all write the
    same files. Read RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE, or use `strategies.process_group.join`.
    """
    started = read_environment(os.environ)
    with Loop(strategy) as loop:
        world: Any = loop.world
        if not isinstance(world, World):
            raise Broken(
                f"setup() returned {world!r}", expected="a strategies.World", advice="Return World(device=..., ...)."
            )
        said = {"rank": world.rank, "size": world.size, "local_rank": world.local_rank, "local_size": world.local_size}
        wrong = {name: value for name, value in said.items() if value != getattr(started, name)}
        if wrong:
            raise Broken(
                f"in process {started.rank} of {started.size}, setup() returned a World with "
                + ", ".join(f"{name}={value}" for name, value in wrong.items()),
                expected=", ".join(f"{name}={getattr(started, name)}" for name in wrong) + ", as the launcher says",
                advice="Fill World from the environment, or refuse with LaunchError what the strategy cannot do.",
            )
        told = [row[0] for row in collectives.all_gather_integers([world.rank], world)]
        if told != list(range(world.size)):
            raise Broken(
                f"gathered over the process group, the ranks are {told}",
                expected=str(list(range(world.size))),
                advice="The ranks of torch's default process group must be those of World.",
            )
        torch.zeros(1, device=world.device)


@rule()
def device_loader_keeps_batches(strategy: Strategy) -> None:
    """`device_loader` yields the same batches in the same order, on the device; an exception of the data gets out.

    A batch lost or changed is a sample not trained on, and an exception swallowed ends an epoch early without a
    word. Move tensors and leave all else alone, and let exceptions pass, also from a thread of your own.
    """
    with Loop(strategy) as loop:
        _check_batches(strategy, loop.world)
        _check_exceptions(strategy, loop)


@rule()
def teardown_and_again(strategy: Strategy) -> None:
    """After `teardown` the process is as before `setup`, and a second round in it gives the same numbers.

    Notebooks, sweeps and tests make several Accelerators in one process; a process group that is left behind
    hangs or aborts the exit. While one is at work, another `setup` returns the same facts, and its `teardown`
    leaves the group to its owner: `strategies.process_group.join` and `leave` do all of this.
    """
    joined_before = dist.is_initialized()
    with Loop(strategy) as loop:
        first = _train(loop)
        world = loop.world
        second = strategy.setup()
        facts = [(w.rank, w.size, w.local_rank, w.local_size, w.device) for w in (world, second)]
        if facts[0] != facts[1]:
            raise Broken(
                f"a second setup() returned {second}",
                expected=f"the same facts as the first: {world}",
                advice="Joining a process group that exists already returns what it says.",
            )
        joined = dist.is_initialized()
        strategy.teardown(second)
        if dist.is_initialized() != joined:
            raise Broken(
                "the teardown() of a second Accelerator destroyed the process group that the first one works with",
                expected="the group to be left by the one whose setup() made it",
                advice="Join and leave with strategies.process_group.join and leave: they count who is still in it.",
            )
        _compare_rounds(first, _train(loop), "after another Accelerator joined and left")
    if dist.is_initialized() != joined_before:
        raise Broken(
            "the process group is still there after teardown()",
            expected="the process as it was before setup()",
            advice="teardown(world) must call torch.distributed.destroy_process_group() if its setup() made the group.",
        )
    with Loop(strategy) as loop:
        _compare_rounds(first, _train(loop), "in a second round after teardown()")


def _nested_batches() -> list[dict[str, Any]]:
    """Batches of different sizes and of any nesting, with integers that do not fit into 8 bits."""
    return [
        {
            "x": torch.full((size, 3), 0.1 + size, dtype=torch.float64),
            "tokens": torch.arange(size) * 1000,
            "nested": [(torch.full((size,), size), f"name {size}")],
            "number": size,
            "nothing": None,
        }
        for size in (4, 4, 1, 3)
    ]


def _check_batches(strategy: Strategy, world: World) -> None:
    given, expected = _nested_batches(), _nested_batches()
    came = list(strategy.device_loader(iter(given), world))
    if len(came) != len(expected):
        raise Broken(
            f"device_loader() yielded {len(came)} batches of {len(expected)}",
            expected="every batch, once",
            advice="Mind the last one, and anything that reads ahead.",
        )
    for index, (one, other) in enumerate(zip(came, expected, strict=True)):
        elsewhere = [tensor.device for tensor in iterate_tensors(one) if tensor.device != world.device]
        if elsewhere:
            raise Broken(
                f"a tensor of batch {index} is on {elsewhere[0]}",
                expected=f"on {world.device}",
                advice="strategies.tree.move(batch, world.device) moves the tensors of any nesting.",
            )
        if not _equal(one, other):
            raise Broken(
                f"batch {index} came out of device_loader() changed, or in another order",
                expected="the same nesting, shapes, dtypes and values",
                advice="Only the device may change. float64 on a device without it is for the user to cast.",
            )


def _equal(came: Any, expected: Any) -> bool:
    if isinstance(expected, Tensor):
        return isinstance(came, Tensor) and came.dtype == expected.dtype and torch.equal(came.cpu(), expected)
    if type(came) is not type(expected):
        return False
    if isinstance(expected, dict):
        return list(came) == list(expected) and all(_equal(came[key], expected[key]) for key in expected)
    if isinstance(expected, list | tuple):
        return len(came) == len(expected) and all(map(_equal, came, expected))
    return bool(came == expected)


class _PlantedError(Exception):
    """The exception of a dataset that fails."""


class _Failing(Dataset[Tensor]):
    """Samples, the last of which cannot be read."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Tensor:
        if index >= self.length // 2:
            raise _PlantedError(f"sample {index} cannot be read")
        return torch.tensor([float(index)])


def _check_exceptions(strategy: Strategy, loop: Loop) -> None:
    def failing() -> Iterator[Any]:
        yield from _nested_batches()[:2]
        raise _PlantedError("batch 2 cannot be read")

    (loader,) = loop.prepare(DataLoader(_Failing(4 * loop.world.size), batch_size=1))
    for source, batches in (
        ("the batches given to device_loader()", lambda: strategy.device_loader(failing(), loop.world)),
        ("a prepared loader's dataset", lambda: iter(loader)),
    ):
        num_batches = 0
        try:
            for _ in batches():
                num_batches += 1
        except _PlantedError:
            if num_batches == 2:
                continue
            came = f"raised its exception after {num_batches} batches"
        except Exception as error:
            came = f"ended in {type(error).__name__}: {error}"
        else:
            came = f"ended after {num_batches} batches, without an exception"
        raise Broken(
            f"{source} fail after two batches, and the loop over them {came}",
            expected="two batches, and then the data's own exception",
            advice="Let exceptions pass through device_loader() at the place where they arose.",
        )


def _train(loop: Loop) -> Weights:
    """The weights after two windows of training, from the same beginning every time."""
    model, optimizer = loop.model_and_optimizer()
    _, loader = loop.loader(4 * loop.world.size)
    return list(loop.train(model, optimizer, loader))[-1].after


def _compare_rounds(first: Weights, second: Weights, when: str) -> None:
    distance = max(float((first[name] - second[name]).abs().max()) for name in first)
    if distance > 1e-6:
        raise Broken(
            f"the same training {when} ended {distance:.2g} away from the first",
            expected="the same weights",
            advice="Something of the first round is still at work: keep no state outside World and the wrapped model.",
        )
