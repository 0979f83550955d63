"""The kit: right strategies pass every rule, and each broken one is rejected by the rule meant for it, by name."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import unittest
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import FSDPModule
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from rank_pool import RankPool
from rank_worker import load_test_module
from strategies import CPU, DDP, FSDP, ConfigurationError, ConformanceError, Strategy, registry
from strategies.conformance import RULES, Processes, Rule, RuleNotRun, check, run, run_rule
from torch_version import without_gloo_lines

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
GUIDE = ROOT / "docs" / "guides" / "write_a_strategy.md"
EXAMPLE = ROOT / "examples" / "custom_strategy.py"
ACROSS = [name for name, rule in RULES.items() if rule.min_processes > 1]

for name in ("broken_strategies", "broken_beginnings"):
    load_test_module(name, str(HERE / f"{name}.py"))
import broken_beginnings as beginnings  # noqa: E402  # found by the lines above
import broken_strategies as broken  # noqa: E402


def hold(rule: str, strategy: Strategy) -> str | None:
    return run_rule(rule, strategy)


def hold_all(strategy: Strategy, among: list[str]) -> dict[str, str | None]:
    return {name: run_rule(name, strategy) for name in among}


# --- right strategies -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", list(RULES))
@pytest.mark.parametrize(
    ("strategy", "nproc"),
    [(CPU(), 1), (DDP(), 1), (DDP(), 2), (FSDP(), 2), (broken.ByHand(), 2)],
    ids=["cpu-1", "ddp-1", "ddp-2", "fsdp-2", "by-hand-2"],
)
def test_a_right_strategy_keeps_the_rule(ranks: RankPool, strategy: Strategy, nproc: int, rule: str) -> None:
    if nproc < RULES[rule].min_processes:
        with pytest.raises(RuleNotRun, match="needs 2 processes, and there is 1"):
            ranks(hold, rule, strategy, nproc=nproc)
    else:
        notes = ranks(hold, rule, strategy, nproc=nproc)
        if (
            rule == "exceptions_leave_nothing"
            and isinstance(strategy, FSDP)
            and not hasattr(FSDPModule, "reset_iter_state")
        ):
            assert all(
                "refused: after an exception inside accumulate(), fully_shard of torch" in note for note in notes
            )
        else:
            assert notes == [None] * nproc


@pytest.mark.parametrize(
    "strategy",
    [
        DDP(find_unused_parameters=True),
        DDP(static_graph=True),
        DDP(gradient_as_bucket_view=True),
        DDP(bucket_cap_mb=1e-4),
    ],
    ids=["find_unused_parameters", "static_graph", "gradient_as_bucket_view", "bucket_cap_mb"],
)
def test_every_setting_of_ddp_keeps_every_rule(ranks: RankPool, strategy: Strategy) -> None:
    assert ranks(hold_all, strategy, list(RULES), nproc=2) == [dict.fromkeys(RULES)] * 2


def test_ddp_keeps_every_rule_on_three_ranks(ranks: RankPool) -> None:
    assert ranks(hold_all, DDP(), list(RULES), nproc=3) == [dict.fromkeys(RULES)] * 3


# --- broken strategies ----------------------------------------------------------------------------------------

BROKEN = [
    ("world_is_consistent", broken.EachAlone, 2, "World with (rank=0, )?size=1"),
    ("world_is_consistent", broken.AlwaysTheFirst, 2, "World with rank=0"),
    ("unwrap_returns_the_module", broken.ReturnsTheWrapper, 2, "is a DistributedDataParallel"),
    ("unwrap_returns_the_module", broken.TrainsACopy, 1, "is another Net"),
    ("live_parameters", broken.ReplacesParametersSilently, 1, "have no gradient"),
    ("live_parameters", broken.ReplacesParametersLate, 1, "it is stale"),
    ("step_changes_weights", broken.RestoresMasterWeights, 1, "changed once more in the forward"),
    ("step_changes_weights", broken.ReplacesParametersSilently, 1, "did not change in an optimizer step"),
    ("device_loader_keeps_batches", beginnings.DropsTheLastBatch, 1, "3 batches of 4"),
    ("device_loader_keeps_batches", beginnings.SwallowsExceptions, 1, "without an exception"),
    ("device_loader_keeps_batches", broken.NarrowsIntegers, 1, "changed"),
    ("gradient_full_window", broken.SumsGradients, 2, "is 2 times that.*divide the sum by world.size"),
    ("gradient_full_window", broken.ScalesGradients, 1, r"is 0\.3333 times that"),
    ("gradient_full_window", broken.ReplacesParametersSilently, 1, "is 0 times that.*Nothing reached the optimizer"),
    ("gradient_short_window", broken.CountsMicroBatches, 1, r"at optimizer step 2 .* is 0\.6667 times that"),
    ("gradient_uneven_ranks", broken.PadsBatches, 2, "away from that"),
    ("gradient_ghost_rank", broken.LeavesOutIdleRanks, 2, "is 2 times that"),
    ("gradient_weighted", broken.NarrowsIntegers, 1, "away from that"),
    ("clip_norm", broken.ReducesInTheOptimizer, 2, "clipping returned the norm"),
    ("forward_before_step", broken.DropsCopiesInBackward, 1, "in the window that ends with micro-batch 4"),
    ("two_models", broken.KnowsOneModel, 2, "for the generator of a GAN"),
    ("replicas_agree", broken.NeverBroadcasts, 2, "initialised differently"),
    (
        "init_context_keeps_numbers",
        beginnings.DrawsAgain,
        1,
        "inner.weight, inner.bias, outer.weight, outer.bias have other",
    ),
    ("init_context_keeps_numbers", broken.NeverBroadcasts, 2, "have other numbers than in plain PyTorch"),
    ("exceptions_leave_nothing", beginnings.KeepsGradients, 1, "in the window after two that ended in an exception"),
    ("no_communication_in_open_window", broken.NeverDefers, 2, "1 of them reductions"),
    ("communication_at_close", broken.NeverSyncsAgain, 2, "without any collective"),
    ("communication_at_close", broken.AveragesTwice, 2, "fewer than twice"),
    ("memory_per_rank", broken.KeepsCopies, 2, "after 4 steps, rank . holds .* bytes of tensors"),
    ("autocast_dtype", broken.NeverAutocasts, 1, "is float32. Expected: bfloat16"),
    ("autocast_dtype", broken.CastsTheModel, 1, "a parameter is bfloat16"),
    ("overflow_skips_everywhere", broken.HidesOverflow, 2, "stepped although the gradients of rank 1 overflowed"),
    ("teardown_and_again", broken.LeavesNothing, 2, "still there after teardown"),
    ("teardown_and_again", broken.TearsDownTheGroupOfOthers, 2, "destroyed the process group"),
]


@pytest.mark.parametrize(
    ("rule", "strategy", "nproc", "words"), BROKEN, ids=[f"{rule}-{cls.__name__}" for rule, cls, _, _ in BROKEN]
)
def test_a_broken_strategy_is_rejected(
    ranks: RankPool, rule: str, strategy: type[Strategy], nproc: int, words: str
) -> None:
    with pytest.raises(ConformanceError, match=rf"{strategy.__name__} breaks the rule {rule}: (.|\n)*{words}"):
        ranks(hold, rule, strategy(), nproc=nproc, timeout=30)


def test_every_rule_has_a_strategy_that_it_rejects() -> None:
    needs_torch_xla = {"recorded_work_runs"}  # rejects one in tests/xla
    assert {rule for rule, *_ in BROKEN} | needs_torch_xla == set(RULES)


@pytest.mark.parametrize(
    ("rule", "strategy", "nproc"),
    [
        ("gradient_full_window", broken.NeverDefers, 2),
        ("gradient_full_window", broken.AveragesTwice, 2),
        ("gradient_full_window", broken.CountsMicroBatches, 1),
        ("gradient_full_window", broken.PadsBatches, 2),
        ("gradient_full_window", broken.LeavesOutIdleRanks, 2),
        ("gradient_full_window", broken.ReducesInTheOptimizer, 2),
        ("gradient_uneven_ranks", broken.LeavesOutIdleRanks, 2),
    ],
)
def test_what_one_rule_finds_no_other_would(ranks: RankPool, rule: str, strategy: type[Strategy], nproc: int) -> None:
    assert ranks(hold, rule, strategy(), nproc=nproc) == [None] * nproc


def hold_beside_a_fake_tensor(rule: str, strategy: Strategy) -> str | None:
    sizes = ShapeEnv()
    fake = FakeTensorMode(shape_env=sizes).from_tensor(torch.ones(3, 4), static_shapes=False)
    assert fake.shape[0].node.is_symbolic()
    return run_rule(rule, strategy)


def test_what_torch_compile_leaves_counts_for_no_memory(ranks: RankPool) -> None:
    assert ranks(hold_beside_a_fake_tensor, "memory_per_rank", CPU(), nproc=1) == [None]


def test_a_forgotten_method_fails_at_construction() -> None:
    with pytest.raises(TypeError, match="mark_step"):
        broken.ForgetsMarkStep()


# --- what a rule is -------------------------------------------------------------------------------------------


def test_rules_cannot_be_changed_and_explain_themselves() -> None:
    with pytest.raises(TypeError):
        RULES["new"] = RULES["clip_norm"]  # type: ignore[index]
    for name, rule in RULES.items():
        assert isinstance(rule, Rule)
        assert rule.name == name
        assert rule.promise.endswith((".", ","))
        assert len(rule.explanation.splitlines()) > 2


def test_a_rule_that_is_not_run_counts_as_skipped_for_test_runners() -> None:
    assert issubclass(RuleNotRun, unittest.SkipTest)
    with pytest.raises(RuleNotRun):
        run_rule("replicas_agree", CPU())


def test_the_nearest_rule_is_named() -> None:
    with pytest.raises(ConfigurationError, match="Did you mean 'gradient_weighted'"):
        run_rule("gradients_weighted", CPU())


def test_an_exception_of_a_strategy_is_its_fault(ranks: RankPool) -> None:
    with pytest.raises(ConformanceError, match="CPU breaks the rule clip_norm: LaunchError: CPU trains in one process"):
        ranks(hold, "clip_norm", CPU(), nproc=2)


# --- processes of its own -------------------------------------------------------------------------------------


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let new processes import `broken_strategies` by its name."""
    monkeypatch.syspath_prepend(str(HERE))


def test_run_prints_a_line_for_every_rule(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("cpu", 1) == 0
    printed = capsys.readouterr().out
    for name in RULES:
        outcome = "not run  needs 2 processes, and there is 1" if name in ACROSS else "ok "
        assert re.search(rf"^{name} +{outcome}", printed, re.MULTILINE), name
    assert f"{len(RULES) - len(ACROSS)} ok, 0 FAILED, {len(ACROSS)} not run" in printed


def test_run_reports_hangs_deaths_and_goes_on(capsys: pytest.CaptureFixture[str], importable: None) -> None:
    rules = ["unwrap_returns_the_module", "device_loader_keeps_batches"]
    assert run("broken_strategies:DiesOnOneRank", 2, rules, timeout_seconds=20) == 1
    printed = capsys.readouterr().out
    assert "the rule unwrap_returns_the_module did not end: rank 1 ended with exit code 3" in " ".join(printed.split())
    assert "1 ok, 1 FAILED, 0 not run" in printed
    assert run("broken_strategies:HangsOnOneRank", 2, ["world_is_consistent", "clip_norm"], timeout_seconds=3) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "the rule world_is_consistent did not end" in printed
    assert re.search(r"rank 1 did not finish within 3 s, waiting in setup \(.*broken_strategies.py:\d+\)", printed)
    assert "not run world_is_consistent failed, which all others rely on" in printed
    assert "0 ok, 1 FAILED, 1 not run" in printed


def test_run_reports_a_strategy_that_cannot_be_made(capsys: pytest.CaptureFixture[str], importable: None) -> None:
    assert run("broken_strategies:ForgetsMarkStep", 2) == 1
    assert re.search("construction +FAILED\n.*mark_step", capsys.readouterr().out)


@pytest.mark.parametrize(("strategy", "number"), [("cpu", "1 process"), ("ddp", "2 processes")])
def test_two_processes_unless_the_strategy_trains_in_one(
    strategy: str, number: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(strategy, None, ["world_is_consistent"]) == 0
    assert capsys.readouterr().out.startswith(f"{strategy} on {number}: 1 rules")


def test_nothing_checked_is_no_success(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("cpu", 1, ACROSS) == 1
    assert f"0 ok, 0 FAILED, {len(ACROSS)} not run" in capsys.readouterr().out


def test_unknown_names_are_no_fault_of_a_strategy() -> None:
    with pytest.raises(ConfigurationError, match="Did you mean 'ddp'"):
        run("dpd", None)
    with pytest.raises(ConfigurationError, match="Did you mean 'clip_norm'"):
        run("cpu", 1, ["clip_norms"])


def test_processes_are_kept_and_replaced(importable: None) -> None:
    with Processes(2) as processes:
        assert processes.check(DDP(find_unused_parameters=True), "gradient_full_window") is None
        with pytest.raises(ConformanceError, match="KnowsOneModel breaks the rule two_models"):
            processes.check("broken_strategies:KnowsOneModel", "two_models")
        assert processes.check("ddp", "teardown_and_again") is None
    processes.close()


def test_check_skips_what_needs_more_processes() -> None:
    with pytest.raises(RuleNotRun, match="needs 2 processes"):
        check("cpu", "replicas_agree", 1)


# --- what authors read ----------------------------------------------------------------------------------------


def test_the_guide_lists_every_rule_and_every_method() -> None:
    guide = GUIDE.read_text()
    listed = re.findall(r"^\| `(\w+)` \|", guide, re.MULTILINE)
    assert [name for name in listed if name in RULES] == list(RULES)
    methods = [name for name in vars(Strategy) if getattr(getattr(Strategy, name), "__isabstractmethod__", False)]
    assert {re.sub(r"\(.*", "", name) for name in re.findall(r"^\| `(\w+\(.*?)`", guide, re.MULTILINE)} == set(methods)


def test_the_example_keeps_every_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE.parent))
    strategy = registry.resolve("custom_strategy:AverageByHand")
    with Processes(2) as processes:
        for name in RULES:
            assert processes.check(strategy(), name) is None


def test_the_example_runs() -> None:
    expected = re.findall(r"^    (epoch \d: loss .*)$", EXAMPLE.read_text(), re.MULTILINE)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(EXAMPLE)], capture_output=True, text=True, check=True, env=environment)
    assert without_gloo_lines(done.stdout).splitlines() == expected
