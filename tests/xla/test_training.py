"""Every mode of XLA trains as one plain process does: in numbers, in compilations, and where its shards are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(600)
MODES = ("none", "data", "fsdp", "hybrid")


@pytest.fixture(scope="module", params=MODES)
def parts(request: pytest.FixtureRequest, run: Callable[..., Any]) -> Any:
    """What came of every part under one mode."""
    return request.param, run("parts.py", request.param)


def of(parts: Any, name: str) -> Any:
    result = parts[1][name]
    assert not isinstance(result, dict) or "error" not in result, result["error"]
    return result


@pytest.mark.parametrize("name", ["sgd", "adamw", "by_tokens"])
def test_losses_norms_and_weights_are_those_of_one_plain_process(parts: Any, name: str) -> None:
    result = of(parts, name)
    assert result["losses"] < 5e-6
    assert result["norms"] < 5e-6
    assert result["weights"] < 5e-6


def test_bfloat16_stays_near_float32(parts: Any) -> None:
    assert of(parts, "bf16")["losses"] < 3e-3


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_window_is_one_program(parts: Any, name: str) -> None:
    costs = [tuple(cost) for cost in of(parts, name)["costs"]]
    assert len(costs) == 12
    assert costs[:5] == [(1, 1), (1, 1), (0, 1), (0, 1), (0, 1)]
    assert costs[5] == (1, 1)  # the short window has a shape of its own
    assert costs[6:] == [(0, 1)] * 6


def test_explicit_weights_cost_one_more_program_in_the_first_window(parts: Any) -> None:
    costs = [tuple(cost) for cost in of(parts, "by_tokens")["costs"]]
    assert costs[:4] == [(2, 2), (1, 1), (0, 1), (0, 1)]
    assert costs[6:] == [(0, 1)] * 6


def test_tied_weights_stay_tied(parts: Any) -> None:
    assert of(parts, "sgd")["tied"]


def test_each_device_holds_its_part_of_parameters_and_optimizer_state(parts: Any) -> None:
    mode, _ = parts
    shapes = of(parts, "sgd")["shapes"]
    number = {"none": 1}.get(mode, 4)
    part = {"fsdp": 4, "hybrid": 2}.get(mode, 1)
    for name in ("up.weight", "momentum of up.weight"):
        assert shapes[name] == [[64 // part, 32]] * number
    for name in ("down.weight", "momentum of down.weight"):
        assert shapes[name] == [[32, 64 // part]] * number
    assert shapes["norm.weight"] == [[32]] * number  # below min_sharded_elements


def test_explain_shows_devices_mesh_and_what_is_cut(parts: Any) -> None:
    mode, _ = parts
    said = of(parts, "sgd")["explain"]
    assert ("1 of torch_xla" if mode == "none" else "4 of torch_xla, one program") in said
    words = {
        "data": "4 copies of the model over 1 device each",
        "fsdp": "1 copy of the model over 4 devices each",
        "hybrid": "2 copies of the model over 2 devices each",
    }
    assert words.get(mode, "") in said
    assert ("4160 of 4256 elements" in said) == (mode in ("fsdp", "hybrid"))


def test_batch_normalisation_keeps_the_statistics_of_torch(parts: Any) -> None:
    assert all(value < 2e-5 for value in of(parts, "batch_norm").values())


def test_an_evaluation_inside_a_window_changes_nothing_and_does_not_pile_up(parts: Any) -> None:
    result = of(parts, "evaluation")
    assert result["length"] == 43
    assert result["metrics"] < 1e-6
    assert result["weights"] < 1e-6
    assert result["longest"] == result["first"]  # recorded operations, batch after batch


def test_resuming_is_exact(parts: Any) -> None:
    assert of(parts, "resume") == {"weights": 0.0, "same shapes": True}


def test_seeds_reach_the_device(parts: Any) -> None:
    assert of(parts, "dropout") == {"same": True, "other": True}


def test_optimizers_of_torch_step_as_on_a_cpu_or_are_refused(parts: Any) -> None:
    result = dict(of(parts, "optimizers"))
    for name in ("AdamW fused", "SGD fused"):
        refused = result.pop(name)
        assert refused.startswith(f"PrepareError: {name.split()[0]} cannot step on parameters on xla")
        assert refused.endswith("Leave out fused=True.")
    assert len(result) == 13
    assert all(difference < 1e-5 for difference in result.values()), result


def test_clipping_by_value(parts: Any) -> None:
    assert of(parts, "clip_value") < 1e-6


def test_exceptions_of_the_dataset_reach_the_loop(parts: Any) -> None:
    assert of(parts, "exceptions") == {"0": [3, True], "2": [3, True]}


def test_weights_go_out_whole_and_come_back_as_they_were_cut(parts: Any) -> None:
    assert all(of(parts, "export").values())
