"""Every example runs and prints what its docstring says.

`make demo` starts one of them as its reader would start it, on two processes by `accelerator launch`.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import runpy
import sys
import textwrap
import warnings
from pathlib import Path

import pytest

from fresh_process import FreshProcesses
from rank_pool import RankPool

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


class Player:
    """Runs scripts on ranks that have torch already, which takes a tenth of starting an interpreter for each."""

    def __init__(self, ranks: RankPool) -> None:
        self._ranks = ranks

    def __call__(self, script: str | Path, *arguments: str, nproc: int = 1, strategy: str = "auto") -> str:
        """What a script, or an example by its name, prints on `nproc` processes, rank by rank."""
        path = script if isinstance(script, Path) else EXAMPLES / f"{script}.py"
        alone = dict.fromkeys(("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
        env = {"ACCELERATOR_STRATEGY": strategy, **(alone if nproc == 1 else {})}
        return "".join(self._ranks(play, str(path), arguments, nproc=nproc, env=env, timeout=280))


def play(script: str, arguments: tuple[str, ...]) -> str:
    """What `python script arguments` prints on this rank."""
    sys.argv[:] = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    logger, printed = logging.getLogger("accelerator"), io.StringIO()
    level, handlers = logger.level, list(logging.getLogger().handlers)
    with contextlib.redirect_stdout(printed), warnings.catch_warnings():
        warnings.resetwarnings()  # a script's warnings are not errors
        runpy.run_path(script, run_name="__main__")
    logger.setLevel(level)
    logging.getLogger().handlers[:] = handlers
    return printed.getvalue()


@pytest.fixture
def run(ranks: RankPool) -> Player:
    return Player(ranks)


def shortened(name: str, folder: Path, text: str, shorter: str) -> Path:
    """A copy of an example that trains for less time."""
    whole = (EXAMPLES / f"{name}.py").read_text()
    assert text in whole
    path = folder / f"{name}.py"
    path.write_text(whole.replace(text, shorter))
    return path


@pytest.fixture
def digits(run: Player, tmp_path: Path):  # type: ignore[no-untyped-def]  # a function with a default
    """Run a digits script for two epochs; its losses and its accuracy."""

    def losses(name: str, *, nproc: int = 1, shuffle: bool = True) -> tuple[list[float], float]:
        script = shortened(name, tmp_path, "NUM_EPOCHS = 10", "NUM_EPOCHS = 2")
        curve = tmp_path / f"{name}_{nproc}.json"
        if not shuffle:
            script.write_text(script.read_text().replace("shuffle=True", "shuffle=False"))
        output = run(script, "--curve", str(curve), nproc=nproc, strategy="ddp" if nproc > 1 else "cpu")
        assert len(re.findall(r"^epoch \d+  loss", output, re.MULTILINE)) == 2  # on the main process only
        result = json.loads(curve.read_text())
        return result["losses"], result["accuracy"]

    return losses


def test_examples_are_short_and_say_what_they_print() -> None:
    for script in EXAMPLES.glob("*.py"):
        text = script.read_text()
        assert len(text.splitlines()) < 100, script.name
        assert "xpected output" in text.split('"""')[1], script.name


def test_plain_and_prepared_loop_agree_to_the_last_bit(digits) -> None:  # type: ignore[no-untyped-def]
    # Shuffled, the two take the samples in different orders: the prepared one does not draw from torch's generator.
    plain, plain_accuracy = digits("plain_loop", shuffle=False)
    prepared, accuracy = digits("train_digits", shuffle=False)
    assert len(plain) == 46
    assert (plain, plain_accuracy) == (prepared, accuracy)


def test_one_and_two_processes_agree(digits) -> None:  # type: ignore[no-untyped-def]
    one, accuracy_one = digits("train_digits")
    two, accuracy_two = digits("train_digits", nproc=2)
    assert max(abs(a - b) for a, b in zip(one, two, strict=True)) < 1e-5
    assert accuracy_one == pytest.approx(accuracy_two, abs=1 / 360)
    assert accuracy_one > 0.93


def test_the_diff_is_five_lines_of_training_and_five_of_reporting() -> None:
    plain, prepared = (
        {line.strip() for line in (EXAMPLES / f"{name}.py").read_text().split('"""', 2)[2].splitlines()}
        for name in ("plain_loop", "train_digits")
    )
    changed = [line for line in prepared - plain if "ccelerator" in line]
    assert len(changed) == 10


@pytest.mark.parametrize("nproc", [1, 2])
def test_accumulate_gradients(run: Player, nproc: int) -> None:
    output = run("accumulate_gradients", nproc=nproc)
    steps = re.findall(r"step (\d): +(\d+) samples, gradient \[(.*?)\], of one big batch \[(.*?)\]", output)
    assert [(step, samples) for step, samples, *_ in steps] == [("1", "16"), ("2", "6")]
    for *_, ours, truth in steps:
        numbers = [[float(number) for number in row.split(",")] for row in (ours, truth)]
        assert numbers[0] == pytest.approx(numbers[1], abs=1.01e-4)


@pytest.mark.parametrize("nproc", [1, 2])
def test_weigh_by_tokens(run: Player, nproc: int) -> None:
    output = run("weigh_by_tokens", nproc=nproc)
    weighted, unweighted = (float(number) for number in re.findall(r"([\d.]+) %", output))
    assert weighted == 0.0
    assert unweighted > 100


@pytest.mark.parametrize("nproc", [1, 2])
def test_pad_last_batch(run: Player, nproc: int) -> None:
    output = run("pad_last_batch", nproc=nproc)
    (difference,) = re.findall(r"short batches: ([\d.]+)$", output, re.MULTILINE)
    assert float(difference) == 0.0  # to five decimals
    assert f"trained on:{f' {8 // nproc}' * 6}\n" in output
    assert "gathered in an epoch: 42\n" in output


def test_train_a_gan(run: Player, tmp_path: Path) -> None:
    output = run(shortened("train_a_gan", tmp_path, "NUM_EPOCHS = 60", "NUM_EPOCHS = 40"), nproc=2)
    assert "steps G 640  D 640" in output
    before, after = re.findall(r"ring: ([\d.]+) before, ([\d.]+) after", output)[0]
    assert float(after) < float(before) / 2


@pytest.mark.parametrize("nproc", [1, 2])
def test_mixed_precision(run: Player, nproc: int) -> None:
    output = run("mixed_precision", nproc=nproc)
    rows = re.findall(r"^(\w+) +outputs (\w+) +(\d+) .* (\d+) skipped, scheduler at (\d+)", output, re.MULTILINE)
    assert [row[:2] for row in rows] == [("no", "float32"), ("bf16", "bfloat16"), ("fp16", "float16")]
    assert all(int(taken) + int(skipped) == 50 and taken == scheduled for _, _, taken, skipped, scheduled in rows)
    assert [int(skipped) > 0 for *_, skipped, _ in rows] == [False, False, True]


def test_train_fsdp(run: Player, tmp_path: Path) -> None:
    script = shortened("train_fsdp", tmp_path, "STEPS = 64, 4, 4, 64, 120", "STEPS = 64, 4, 4, 64, 60")
    outputs = [run(script, nproc=1), run(script, nproc=2, strategy="fsdp")]
    one, two = ([float(loss) for loss in re.findall(r"^step +\d+  loss ([\d.]+)", text, re.M)] for text in outputs)
    assert len(one) == 3
    assert one == pytest.approx(two, abs=0.011)
    assert one[-1] < one[0] - 0.1
    assert "4 x Block of 49,984 + the rest of GPT of 16,512 parameters; 108,224 of 216,448 on each rank" in outputs[1]


def test_survive_a_kill(run: Player, tmp_path: Path) -> None:
    output = run(shortened("survive_a_kill", tmp_path, "(0.05, 0.09, 0.13)", "(0.09,)"))
    assert output == "killed 1 times, finished 40 steps\nweights equal those of a run that was never killed: True\n"


@pytest.mark.parametrize("nproc", [1, 3])
def test_evaluate_exactly(run: Player, nproc: int) -> None:
    output = run("evaluate_exactly", nproc=nproc)
    assert f"{nproc} processes" in output
    assert f"gathered {list(range(11))}" in output
    assert "right 7 of 11" in output


def test_early_stopping(run: Player) -> None:
    output = run("early_stopping", nproc=2)
    step = re.findall(r"rank 1 is content after step (\d+)", output)
    assert len(step) == 1
    assert f"rank 0 of 2 stopped after step {step[0]}\n" in output
    assert f"rank 1 of 2 stopped after step {step[0]}\n" in output


def test_track_metrics(run: Player) -> None:
    assert run("track_metrics", nproc=1) == promised("track_metrics")


def promised(name: str) -> str:
    """What the docstring of an example says that it prints, to its end."""
    text = (EXAMPLES / f"{name}.py").read_text().split('"""')[1]
    return textwrap.dedent(text.partition("xpected output:\n")[2]).strip() + "\n"


def test_find_a_nan(run: Player) -> None:
    output = run("find_a_nan", nproc=2)
    assert "in forward: the output of 0 (Normalise) of Sequential, whose inputs are finite" in output
    assert "samples [61, 37, 45, 21]" in output


def test_load_big_model(run: Player) -> None:
    output = run("load_big_model", "--gigabytes", "0.1", "--budget", "30MB")
    assert "built 0.0999 GB of weights on the meta device" in output
    assert len(re.findall(r"^forward \d: [\d.]+ s", output, re.MULTILINE)) == 3
    assert int(re.findall(r"peak memory: (\d+) MB", output)[0]) < 60


def test_load_four_ways(fresh: FreshProcesses) -> None:
    (finished,) = fresh(EXAMPLES / "load_four_ways.py", "64", timeout=280)
    output = finished.stdout
    peaks = {way.strip(): int(peak) for way, peak in re.findall(r"^(\S.*\S) +peak (\d+) MB", output, re.MULTILINE)}
    assert len(peaks) == 6
    by_hand = [peak for way, peak in peaks.items() if not way.startswith("accelerator")]
    assert peaks["accelerator.bigmodel"] <= min(by_hand) + 3
    # its numbers, the largest tensor, and what the process needs besides
    assert peaks["accelerator.bigmodel, cast to bfloat16"] < 32 + 4 + 12


def test_distributed_inference(run: Player) -> None:
    one, two = (run("distributed_inference", nproc=nproc) for nproc in (1, 2))
    results = re.findall(r"^\[.*\]: [\d ]+$", two, re.MULTILINE)
    assert len(results) == 7
    assert results == re.findall(r"^\[.*\]: [\d ]+$", one, re.MULTILINE)
    assert "process 1 of 2: 3 prompts" in two


def test_evaluate_perplexity(run: Player) -> None:
    one, two = (re.findall(r"^stride \d+: .*$", run("evaluate_perplexity", nproc=n), re.M) for n in (1, 2))
    assert len(one) == 3
    assert one == two
    assert len({line.split(" over ")[1] for line in one}) == 1  # every token once, whatever the stride


def test_resume_exactly(run: Player) -> None:
    assert run("resume_exactly") == promised("resume_exactly")


def test_certify_a_resume(run: Player) -> None:
    assert run("certify_a_resume") == promised("certify_a_resume")


def test_change_world_size(run: Player, tmp_path: Path) -> None:
    printed = [run("change_world_size", str(tmp_path), nproc=nproc) for nproc in (3, 2, 1)]
    assert "".join(printed) == promised("change_world_size")


def test_profile_a_run(run: Player) -> None:
    assert run("profile_a_run") == promised("profile_a_run")


def test_average_weights(run: Player) -> None:
    assert run("average_weights", nproc=2, strategy="fsdp") == promised("average_weights")
