"""Every collective of `strategies.collectives`, on a small and a large tensor: is it right, and how fast."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from strategies import World, collectives

SMALL_REPEATS, LARGE_REPEATS = 20, 3


@dataclass(frozen=True)
class Timing:
    """One collective. `latency_seconds` is of the small tensor; `bytes_per_second` what each rank moved, 0.0 if none.

    `error` is empty if the answers were right.
    """

    name: str
    latency_seconds: float
    bytes_per_second: float = 0.0
    error: str = ""


@dataclass(frozen=True)
class Probe:
    """A collective to try: `run` is called with a tensor of this rank's number, `expected` with the same length.

    `moved` is how often each rank sends its tensor; 0 if it takes none.
    """

    name: str
    run: Callable[[Tensor], Any]
    expected: Callable[[int], Any]
    moved: float = 0.0


def probes(world: World) -> list[Probe]:
    """All collectives, with the answers that they must give."""
    size, ranks = world.size, list(range(world.size))
    total = sum(ranks)

    def each(length: int) -> Tensor:
        return torch.tensor(ranks, dtype=torch.float32).repeat_interleave(length)

    def every(value: float) -> Callable[[int], Tensor]:
        return lambda length: torch.full((length,), float(value))

    return [
        Probe("reduce", lambda t: collectives.reduce(t, world), every(total), 2 * (size - 1) / size),
        Probe("gather", lambda t: collectives.gather(t, world), each, size - 1),
        Probe("gather_uneven", lambda t: collectives.gather_uneven(t, world, keep=True), each, size - 1),
        Probe("broadcast", lambda t: collectives.broadcast(t, world), every(0), 1 if size > 1 else 0),
        Probe(
            "pad_across_processes",
            lambda t: collectives.pad_across_processes(t, world)[: len(t)],
            every(world.rank),
        ),
        Probe(
            "sum_scalar",
            lambda t: collectives.sum_scalar(float(world.rank), world, "sum"),
            lambda n: torch.tensor(total),
        ),
        Probe("any_true", lambda t: collectives.any_true(world.rank == size - 1, world), lambda n: True),
        Probe("all_gather_integers", lambda t: collectives.all_gather_integers([world.rank], world), _tuples(ranks)),
        Probe("all_gather_objects", lambda t: collectives.all_gather_objects(world.rank, world), lambda n: ranks),
        Probe("meet", lambda t: collectives.meet("accelerator doctor", world, world.rank), lambda n: ranks),
        Probe("meet_alike", lambda t: collectives.meet_alike("accelerator doctor", "alike", world), lambda n: None),
        Probe("barrier", lambda t: collectives.barrier(world), lambda n: None),
    ]


def _tuples(ranks: list[int]) -> Callable[[int], Any]:
    return lambda length: [(rank,) for rank in ranks]


def measure(world: World, large_bytes: int) -> list[Timing]:
    """Run every collective on one number and on `large_bytes` per rank. Collective."""
    return [_measure(probe, world, large_bytes) for probe in probes(world)]


def _measure(probe: Probe, world: World, large_bytes: int) -> Timing:
    small, wrong = _time(probe, world, 1, SMALL_REPEATS)
    if not probe.moved:
        return Timing(probe.name, small, error=wrong)
    large, wrong_large = _time(probe, world, large_bytes // 4, LARGE_REPEATS)
    return Timing(probe.name, small, probe.moved * large_bytes / large, wrong or wrong_large)


def _time(probe: Probe, world: World, length: int, repeats: int) -> tuple[float, str]:
    """Median seconds of one call, and what was wrong with its last answer."""
    tensor = torch.full((length,), float(world.rank), device=world.device)
    seconds, answer = [], None
    for _ in range(repeats + 1):  # the first one warms up
        start = time.perf_counter()
        answer = probe.run(tensor)
        if isinstance(answer, Tensor):
            answer.reshape(-1)[:1].cpu()  # waits for the device, whichever it is
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:]), _compare(answer, probe.expected(length))


def _compare(answer: Any, expected: Any) -> str:
    if isinstance(expected, Tensor):
        found = answer.cpu().to(torch.float64)
        if found.shape == expected.shape and torch.equal(found, expected.to(torch.float64)):
            return ""
        return f"wrong: {found.reshape(-1)[:4].tolist()}, expected {expected.reshape(-1)[:4].tolist()}"
    return "" if answer == expected else f"wrong: {answer!r}, expected {expected!r}"
