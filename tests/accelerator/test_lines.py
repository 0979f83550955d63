"""Files of JSON lines: cut, gone on with, moved aside, and never with a step twice."""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from accelerator.lines import LineFile, read_lines


def numbered(*steps: int) -> list[dict[str, Any]]:
    return [{"step": step} for step in steps]


def write(path: Path, records: list[dict[str, Any]]) -> None:
    """As a process of its own would."""
    with contextlib.closing(LineFile(path)) as file:
        file.write(records)


def steps_in(path: Path) -> list[int]:
    return [record["step"] for record in read_lines(path) if "event" not in record]


@given(cut=st.integers(0, 200), last=st.integers(1, 12), resumed=st.integers(0, 14))
@settings(max_examples=60)
def test_a_run_cut_anywhere_goes_on_without_a_step_twice(cut: int, last: int, resumed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log.jsonl"
        write(path, numbered(*range(1, last + 1)))
        path.write_bytes(path.read_bytes()[:cut])
        whole = path.read_bytes().count(b"\n") + (path.read_bytes()[-1:] == b"}")
        file = LineFile(path)
        file.resume(resumed)
        file.write(numbered(*range(resumed + 1, 16)))
        file.close()
        assert steps_in(path) == [*range(1, min(whole, resumed) + 1), *range(resumed + 1, 16)]
        for line in path.read_text().splitlines():
            json.loads(line)
        mark = next(record for record in read_lines(path) if record.get("event") == "resumed")
        assert (mark["step"], mark["dropped"]) == (resumed, max(0, whole - resumed))
        moved = steps_in(path.with_name(mark["moved_to"])) if mark["dropped"] else []
        assert moved == [*range(resumed + 1, whole + 1)]


def test_another_run_in_the_same_folder_moves_the_file_aside(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    for run in range(3):
        write(path, numbered(run))
    assert [steps_in(tmp_path / name) for name in ("log.1.jsonl", "log.2.jsonl", "log.jsonl")] == [[0], [1], [2]]


def test_resuming_after_the_first_line_still_goes_on_with_the_earlier_file(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    write(path, numbered(1, 2, 3))
    file = LineFile(path)
    file.write([{"step": 0, "note": "before resume()"}])
    file.resume(2)
    file.write(numbered(3))
    file.close()
    assert steps_in(path) == [1, 2, 0, 3]
    assert steps_in(tmp_path / "log.2.jsonl") == [3]
    assert sorted(tmp_path.iterdir()) == [tmp_path / "log.2.jsonl", path]


def test_going_back_within_a_run_takes_its_later_lines_and_keeps_events(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    file = LineFile(path)
    file.write([*numbered(1, 2), {"step": 3, "event": "skipped"}])
    file.resume(1)
    file.write(numbered(2))
    file.close()
    assert [record.get("event", record["step"]) for record in read_lines(path)] == [1, "skipped", "resumed", 2]


def test_a_step_of_another_unit_is_compared_by_the_optimizer_steps_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    file = LineFile(path)
    file.write([{"step": 8 * taken, "optimizer_steps": taken} for taken in (1, 2, 3)])
    file.write([{"step": 0, "optimizer_steps": 3}])
    file.resume(2)
    file.close()
    assert steps_in(path) == [8, 16]


def test_numbers_that_json_has_not_are_read_back(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    write(path, [{"values": {"loss": math.nan, "more": [math.inf]}}])
    values = json.loads(path.read_text(), parse_constant=lambda name: 1 / 0)["values"]
    assert math.isnan(float(values["loss"]))
    assert float(values["more"][0]) == math.inf
