"""Ranks that wait in vain are told of without being asked, once for each wait; long phases that are meant are not."""

from __future__ import annotations

import logging
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset

from accelerator import Accelerator
from accelerator.debugging.hang_table import Report, is_worth_telling
from accelerator.debugging.hangs import HangWatch
from rank_pool import RankPool
from strategies import DDP


def line(mark: str) -> str:
    """The line of this file that ends in a comment with `mark`."""
    lines = Path(__file__).read_text().splitlines()
    (number,) = [number for number, text in enumerate(lines, 1) if text.endswith(f"# {mark}")]
    return f"{Path(__file__).name}:{number} in "


def at_call(inside: str, waits_in: str | None = None) -> Report:
    """A rank inside a call of the library; in a collective of it unless `waits_in` is empty."""
    return Report(0, "train.py:5 in main", f"{inside} (all_gather)" if waits_in is None else waits_in, inside=inside)


def told_while(waits: Callable[[Accelerator], None], notice: int = 1) -> list[str]:
    """What this rank logs of ranks that do not move."""
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("accelerator").addHandler(handler)
    try:
        accelerator = Accelerator(DDP(device="cpu"), hang_notice=notice)
        accelerator.wait_for_everyone()
        waits(accelerator)
        assert accelerator.reduce(torch.ones(2)).tolist() == [2.0, 2.0]
        accelerator.end_training()
    finally:
        logging.getLogger("accelerator").removeHandler(handler)
    return [text for text in told if "no rank has moved" in text]


def gathers_too_early(accelerator: Accelerator) -> None:
    for _ in range(2):
        if accelerator.is_main_process:
            accelerator.gather(torch.ones(7, 3))  # before the other
        else:
            time.sleep(3)  # and comes late
            accelerator.gather(torch.ones(7, 3))


def in_different_calls(accelerator: Accelerator) -> None:
    if accelerator.is_main_process:
        dist.broadcast(torch.ones(5), src=1)  # of torch itself
    else:
        time.sleep(3)
        dist.broadcast(torch.ones(5), src=1)


def test_ranks_that_wait_in_vain_are_told_of_once_for_each_wait_and_go_on(ranks: RankPool) -> None:
    told = [text for texts in ranks(told_while, gathers_too_early) for text in texts]
    assert len(told) == 2, told
    for text in told:
        assert re.match("no rank has moved for 1 s; they go on waiting. Rank 0 waits in gather", text)
        assert line("before the other") in text.partition(" at ")[2].partition(". Rank 1")[0]
        assert line("and comes late") in text.partition("Rank 1 is in no collective, at ")[2]
        assert re.search(r"^0 +gather \(all_gather\) of \(7, 3\) float32 +\d s ", text, re.MULTILINE)
        assert "hang_timeout=2 would end the job" in text
    (text,) = [text for texts in ranks(told_while, in_different_calls) for text in texts]
    assert line("of torch itself") in text.partition("Rank 0 waits in broadcast at ")[2]


def prepares_first(accelerator: Accelerator) -> None:
    with accelerator.main_process_first():
        if accelerator.is_main_process:
            time.sleep(2.5)


def evaluates_alone(accelerator: Accelerator) -> None:
    begun = time.monotonic()
    while accelerator.is_main_process and time.monotonic() - begun < 2.5:
        sum(range(1000))
    accelerator.wait_for_everyone()


def reads_slowly(accelerator: Accelerator) -> None:
    data = DataLoader(Numbers(slow=accelerator.is_main_process), batch_size=2, num_workers=1)
    for batch in accelerator.prepare(data):
        accelerator.gather(batch)


class Numbers(IterableDataset[torch.Tensor]):
    def __init__(self, slow: bool) -> None:
        self.slow = slow

    def __iter__(self) -> Iterator[torch.Tensor]:
        if self.slow:
            time.sleep(2.5)
        yield from torch.arange(4)


@pytest.mark.parametrize("phase", [prepares_first, evaluates_alone, reads_slowly])
def test_long_phases_that_are_meant_are_not_told_of(phase: Callable[[Accelerator], None], ranks: RankPool) -> None:
    assert ranks(told_while, phase) == [[], []]


def draws(accelerator: Accelerator) -> None:
    random.seed(3)
    time.sleep(1.5)  # is looked at meanwhile
    assert random.random() == random.Random(3).random()


def test_the_looks_leave_the_draws_of_the_script_as_they_are(ranks: RankPool) -> None:
    assert ranks(told_while, draws) == [[], []]


def test_no_notice_where_none_is_wanted(ranks: RankPool) -> None:
    assert ranks(told_while, gathers_too_early, 0) == [[], []]


@pytest.mark.parametrize(
    ("reports", "expected"),
    [
        ([at_call("gather"), at_call("", "")], True),
        ([at_call("gather"), at_call("backward")], True),
        ([at_call("gather"), at_call("gather")], True),  # none is missing: the network
        ([at_call("main_process_first"), at_call("", "")], False),
        ([at_call("main_process_first"), at_call("gather")], True),
        ([at_call("save_state"), at_call("save_state", "")], False),  # one writes
        ([at_call("forward"), at_call("forward", "")], False),  # one compiles
        ([at_call("save_state"), at_call("forward", "")], True),
        ([at_call("", ""), at_call("", "")], False),
    ],
)
def test_which_waits_are_told_of(reports: list[Report], expected: bool) -> None:
    assert is_worth_telling(reports) is expected
    assert is_worth_telling(reports[::-1]) is expected


class EndsItself(HangWatch):
    """As where the thread happens to collect an Accelerator that was dropped."""

    def _seen(self) -> object:
        if threading.current_thread() is getattr(self, "_thread", None):
            self.stop()
        return super()._seen()


def test_the_thread_may_be_the_one_that_ends_the_watch() -> None:
    accumulation = Accelerator("cpu")._accumulation
    watch = EndsItself(accumulation, notice=0, timeout=60, first_step_timeout=60)  # an exception would fail the test
    watch._thread.join(10)
    assert not watch._thread.is_alive()


def make_and_drop() -> list[int]:
    return [Accelerator("ddp").process_index for _ in range(8)]


def test_accelerators_that_are_dropped_at_once_do_not_end_in_the_thread(ranks: RankPool) -> None:
    """It held them where it looked as they were made; a group was then closed while the next one was joined."""
    assert ranks(make_and_drop) == [[0] * 8, [1] * 8]
