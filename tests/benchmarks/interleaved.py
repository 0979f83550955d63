"""Time several ways of doing the same thing in turn, and compare them round by round."""

from __future__ import annotations

import contextlib
import gc
import io
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping


def ratios(
    arms: Mapping[str, Callable[[], None]],
    *,
    baseline: str,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
    before: Callable[[], None] = lambda: None,
) -> dict[str, tuple[float, float, float]]:
    """Median, lower and upper quartile of each arm's time over the baseline's, taken within each round.

    Every arm runs once before anything counts. Garbage is collected between runs and not during them, and `before`
    is called before each, which does not count. The order of arms is drawn anew for each round, the same on every
    rank, so that none follows itself, whose memory is still in the caches, more often than others.
    """
    for run in arms.values():
        before()
        run()
    times: dict[str, list[float]] = {name: [] for name in arms}
    names = list(arms)
    draws = random.Random(0)
    for _ in range(rounds):
        for name in draws.sample(names, len(names)):
            before()
            gc.collect()
            gc.disable()
            start = clock()
            arms[name]()
            times[name].append(clock() - start)
            gc.enable()
    result = {}
    for name in names:
        if name == baseline:
            continue
        of_rounds = [one / base for one, base in zip(times[name], times[baseline], strict=True)]
        lower, median, upper = statistics.quantiles(of_rounds, n=4)
        result[name] = (median, lower, upper)
    seconds = statistics.median(times[baseline])
    print(f"  {baseline}: {seconds * 1e3:.1f} ms a run, {rounds} rounds")
    for name, (median, lower, upper) in result.items():
        print(f"  {name} / {baseline}: {median:.3f}  (quartiles {lower:.3f} to {upper:.3f})")
    return result


def ratios_over_ranks(arms: Mapping[str, Callable[[], None]], *, baseline: str, rounds: int) -> None:
    """`ratios` on every rank of a process group, each run begun by all together; rank 0 prints its own."""
    import torch.distributed as dist

    def together(run: Callable[[], None]) -> Callable[[], None]:
        def run_together() -> None:
            dist.barrier()
            run()

        return run_together

    with contextlib.redirect_stdout(io.StringIO() if dist.get_rank() > 0 else sys.stdout):
        ratios({name: together(run) for name, run in arms.items()}, baseline=baseline, rounds=rounds)


def start_two(script: str) -> None:
    """Run `script --worker` on two processes of this machine."""
    launch = ["-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([sys.executable, *launch, script, "--worker"], check=True)
