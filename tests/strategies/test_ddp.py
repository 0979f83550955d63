"""DDP: its settings against the oracle, when ranks communicate, and several Accelerators in one job."""

from __future__ import annotations

from oracle import Case, Run, assert_equal, train_plain, train_prepared
from rank_pool import RankPool


def train_one_after_another(case: Case, times: int) -> list[Run]:
    return [train_prepared(case) for _ in range(times)]


def test_an_accelerator_after_end_training_trains_right(ranks: RankPool) -> None:
    case = Case(length=9, world=2, steps=2, epochs=1)
    for runs in ranks(train_one_after_another, case, 5, nproc=2, timeout=30):
        for run in runs:
            assert_equal(case, train_plain(case), run)
