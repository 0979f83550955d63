"""Every mode of XLA trains as one plain process does: in numbers, in compilations, and where its shards are."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(1500)
Of = Callable[[str], Any]
one_and_cut = pytest.mark.parametrize("mode", ["none", "fsdp"], indirect=True)


@pytest.fixture(params=["none", "data", "fsdp", "hybrid"])
def mode(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def of(mode: str, came: Callable[[str, str], Any]) -> Of:
    """What came of a part of `parts.py` under this mode."""
    return lambda part: came(mode, part)


@pytest.mark.parametrize("part", ["sgd", "adamw", "by_tokens"])
def test_losses_norms_and_weights_are_those_of_one_plain_process(of: Of, part: str) -> None:
    result = of(part)
    assert result["losses"] < 5e-6
    assert result["norms"] < 5e-6
    assert result["weights"] < 5e-6


def test_windows_of_other_lengths_are_those_of_one_plain_process(of: Of) -> None:
    result = of("accumulation")
    assert sorted(result) == ["1", "2", "4"]
    assert all(value < 5e-6 for distances in result.values() for value in distances.values()), result


def test_bfloat16_stays_near_float32(of: Of) -> None:
    assert 1e-5 < of("bf16")["losses"] < 5e-3


@pytest.mark.parametrize("part", ["sgd", "adamw"])
def test_a_window_is_one_program(of: Of, part: str) -> None:
    costs = [tuple(cost) for cost in of(part)["costs"]]
    assert len(costs) == 12
    assert costs[:5] == [(1, 1), (1, 1), (0, 1), (0, 1), (0, 1)]
    assert costs[5] == (1, 1)  # the short window has a shape of its own
    assert costs[6:] == [(0, 1)] * 6


def test_explicit_weights_cost_no_further_program(of: Of) -> None:
    costs = [tuple(cost) for cost in of("by_tokens")["costs"]]
    assert costs[:4] == [(1, 1), (1, 1), (0, 1), (0, 1)]
    assert costs[6:] == [(0, 1)] * 6


@one_and_cut
def test_a_padded_batch_costs_no_program_and_changes_no_number(of: Of) -> None:
    for result in of("padded").values():
        assert [tuple(cost) for cost in result["costs"]] == [(1, 1), (1, 1), *[(0, 1)] * 6]
        assert result["weights"] < 2e-6
        assert result["gathered"] == [8, 8, 8, 3] * 2


def test_tied_weights_stay_tied(of: Of) -> None:
    assert of("sgd")["tied"]


def test_each_device_holds_its_part_of_parameters_and_optimizer_state(mode: str, of: Of) -> None:
    shapes = of("sgd")["shapes"]
    number = {"none": 1}.get(mode, 4)
    part = {"fsdp": 4, "hybrid": 2}.get(mode, 1)
    for name in ("up.weight", "momentum of up.weight"):
        assert shapes[name] == [[64 // part, 32]] * number
    for name in ("down.weight", "momentum of down.weight"):
        assert shapes[name] == [[32, 64 // part]] * number
    assert shapes["norm.weight"] == [[32]] * number  # below min_sharded_elements


@pytest.mark.parametrize("mode", ["fsdp"], indirect=True)
def test_a_sharded_window_gathers_parameters_and_reduces_gradients(of: Of, programs: Path) -> None:
    """Read from the programs that the compiler dumps; that of a window of three micro-batches is the longest."""
    of("sgd")
    texts = [path.read_text() for path in programs.glob("*SyncTensorsGraph*after_optimizations.txt")]
    window = max(texts, key=len)
    assert len(re.findall(r" all-gather\(", window)) >= 2  # the two weights that are cut
    assert len(re.findall(r" all-reduce\(", window)) >= 2


def test_explain_shows_devices_mesh_and_what_is_cut(mode: str, of: Of) -> None:
    said = of("sgd")["explain"]
    assert ("1 of 4 x CPU of torch_xla" if mode == "none" else "4 of 4 x CPU of torch_xla, one program") in said
    words = {
        "data": "4 copies of the model over 1 device each",
        "fsdp": "1 copy of the model over 4 devices each",
        "hybrid": "2 copies of the model over 2 devices each",
    }
    assert words.get(mode, "") in said
    assert ("4160 of 4256 elements" in said) == (mode in ("fsdp", "hybrid"))


@one_and_cut
def test_blocks_computed_again_change_no_number(of: Of) -> None:
    result = of("recomputed")
    assert result["losses"] < 5e-6
    assert result["gradient"] < 1e-7  # with dropout, whose mask is drawn again
    assert result["tanhs"] == [2, 4]
    assert result["of copies"] == 0.0
    assert result["explain"]


def test_normalisations_keep_the_statistics_of_torch(of: Of) -> None:
    result = of("normalising")
    assert all(value < 5e-5 for value in result.values()), result


def test_an_evaluation_inside_a_window_changes_nothing_and_does_not_pile_up(of: Of) -> None:
    result = of("evaluation")
    assert result["length"] == 43
    assert result["metrics"] < 1e-6
    assert result["weights"] < 1e-6
    assert result["longest"] == result["first"]  # recorded operations, batch after batch


def test_resuming_from_state_dicts_is_exact(of: Of) -> None:
    assert of("resume") == {"weights": 0.0, "same shapes": True, "same before a step": True}


@pytest.mark.parametrize("mode", ["data", "fsdp"], indirect=True)
def test_averages_of_weights_lie_where_the_weights_lie(of: Of) -> None:
    result = of("averaged")
    assert result.pop("averages") < 1e-6
    assert result == {"apart": True, "restored": True, "cut as before": True, "cut alike": True}


def test_seeds_reach_the_device_and_evaluation_draws_nothing(of: Of) -> None:
    assert of("dropout") == {"same": True, "other": True}


@pytest.mark.parametrize("mode", ["fsdp"], indirect=True)
def test_optimizers_of_torch_step_as_on_a_cpu_or_are_refused(of: Of) -> None:
    result = dict(of("optimizers"))
    for name in ("AdamW fused", "SGD fused"):
        refused = result.pop(name)
        assert refused.startswith(f"PrepareError: {name.split()[0]} cannot step on parameters on xla")
        assert refused.endswith("Leave out fused=True.")
    assert len(result) == 13
    assert all(difference < 1e-5 for difference in result.values()), result


def test_clipping_by_value_and_by_the_largest_element_reads_nothing(of: Of) -> None:
    result = of("clipping")
    assert result["value"] < 1e-6
    assert result["largest"] < 1e-6
    assert result["reads for value"] == result["reads for largest"] == 0


def test_exceptions_of_the_dataset_reach_the_loop(of: Of) -> None:
    assert of("exceptions") == {"0": [3, True], "2": [3, True]}


@pytest.mark.parametrize("mode", ["data"], indirect=True)
def test_a_worker_that_uses_the_device_is_an_error_and_no_hang(of: Of) -> None:
    assert of("workers").startswith("a worker process of the loader used a device of torch_xla, and forked processes")


def test_weights_go_out_whole_and_come_back_as_they_were_cut(of: Of) -> None:
    assert all(of("export").values())
