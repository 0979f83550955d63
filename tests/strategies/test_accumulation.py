"""Windows of micro-batches against the oracle: one plain process with the global batch."""

from __future__ import annotations

import torch.distributed as dist
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from oracle import Case, Run, assert_equal, cases, train_plain, train_prepared
from rank_pool import RankPool

PHASES = (Phase.explicit, Phase.reuse, Phase.generate)


def train_all(several: list[Case]) -> list[Run]:
    dist.init_process_group("gloo")  # once for all of them: every Accelerator finds its place in it
    return [train_prepared(case) for case in several]


def check(ranks: RankPool, *several: Case) -> None:
    """Every rank's runs are those of the oracle."""
    for runs in ranks(train_all, list(several), nproc=several[0].world):
        for case, run in zip(several, runs, strict=True):
            assert_equal(case, train_plain(case), run)


@settings(max_examples=120, phases=PHASES)
@given(case=cases())
def test_any_loop_on_one_process_equals_the_plain_one(case: Case) -> None:
    assert_equal(case, train_plain(case), train_prepared(case))


@settings(max_examples=40, phases=PHASES)
@given(case=st.sampled_from(["bf16", "fp16"]).flatmap(lambda precision: cases(precision=precision)))
def test_any_loop_in_low_precision_equals_the_plain_one(case: Case) -> None:
    assert_equal(case, train_plain(case), train_prepared(case))


@settings(max_examples=10, phases=PHASES)
@given(several=st.lists(cases(world=2), min_size=5, max_size=7))
def test_any_loop_on_two_processes_equals_the_plain_one(ranks: RankPool, several: list[Case]) -> None:
    check(ranks, *several)


@settings(max_examples=4, phases=PHASES)
@given(several=st.lists(cases(world=3), min_size=3, max_size=5))
def test_any_loop_on_three_processes_equals_the_plain_one(ranks: RankPool, several: list[Case]) -> None:
    check(ranks, *several)


@settings(max_examples=5, phases=PHASES)
@given(several=st.lists(cases(world=2, precision="bf16") | cases(world=2, precision="fp16"), min_size=5, max_size=6))
def test_low_precision_on_two_processes_equals_the_plain_one(ranks: RankPool, several: list[Case]) -> None:
    check(ranks, *several)
