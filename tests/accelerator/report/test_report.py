"""`accelerator report`: what is on the page, and that a real browser shows it, in light and dark, wide and narrow."""

from __future__ import annotations

import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from accelerator.cli import main
from accelerator.lines import LineFile
from accelerator.report import page, read_run
from accelerator.report.svg import line_chart, stacked_bars

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def write(path: Path, records: list[dict[str, Any]]) -> None:
    file = LineFile(path)
    file.write(records)
    file.close()


def make_run(
    folder: Path,
    *,
    ranks: int = 2,
    note: str = "plain",
    device: str = "cpu",
    exchange: tuple[float, float] | None = None,
) -> Path:
    """A run of 40 steps as the library writes it, cut in the middle of the last line. `exchange`: its seconds."""
    times = [1763712000.0 + step for step in range(41)]
    write(
        folder / "log.jsonl",
        [
            {"config": {"width": 512, "note": note}},
            *({"step": s, "time": times[s], "values": {"loss": 2.0 / s, "accuracy": 1 - 1 / s}} for s in range(1, 41)),
            {"event": "resumed", "step": 20, "time": times[20], "dropped": 3},
        ],
    )
    for rank in range(ranks):
        phases = {"data": 0.1, "forward": 0.2, "backward": 0.1, "closing_backward": 0.3 + 0.1 * rank, "optimizer": 0.1}
        write(
            folder / "timing" / f"rank{rank}.jsonl",
            [
                {"run": {"rank": rank, "size": ranks, "device": device, "time": times[0]}},
                {"plan": [["strategy", "auto", "DDP (strategies.ddp)", "default"]]} if rank == 0 else {},
                {"flops": {"micro_batch": 6_000_000, "samples": 32}},
                *(
                    {
                        "step": step,
                        "time": times[step],
                        "seconds": 1.0,
                        "phases": phases,
                        "micro_batches": 8,
                        "windows": 4,
                        "samples": 256,
                        "memory": {"resident": 2**28 + step * 2**16},
                        "lr": [1e-3 * (1 - step / 41)],
                        "grad_norm": 1.0 / step,
                        "exchanges": [[step, *exchange]] if exchange is not None else [],
                    }
                    for step in range(4, 41, 4)
                ),
                {"event": "checkpoint", "step": 20, "time": times[20], "seconds": 0.5, "text": "checkpoints/step-20"},
                {"event": "skipped step", "step": 30, "time": times[30], "text": "float16 overflow"},
            ],
        )
        with open(folder / "timing" / f"rank{rank}.jsonl", "a") as file:
            file.write('{"step": 44, "ti')
    return folder


def test_the_page_holds_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path / "first")
    assert main(["report", str(folder), "--peak-tflops", "0.001"]) == 0
    output = Path(capsys.readouterr().out.strip())
    text = output.read_text()
    assert output == folder / "report.html"
    for words in (
        *("<h1>first</h1>", "DDP (strategies.ddp)", "<figcaption>loss</figcaption>", "<figcaption>lr</figcaption>"),
        *("<figcaption>grad_norm</figcaption>", "<figcaption>accuracy</figcaption>", "float16 overflow", "resumed"),
        *("3 later lines were taken back", "checkpoints/step-20 held the loop for 0.50 s", "closing backward"),
        *("<td>samples per second</td><td>512</td>", "<td>model FLOP/s, all processes</td><td>96M</td>"),
        *("<td>model FLOPs utilisation</td><td>4.8%</td>", "about 30.0% of the time", "rank 1", "258 MiB"),
    ):
        assert words in text, words
    assert text.count("checkpoints/step-20 held") == 1  # not once for each rank
    assert not re.search(r"(src|href)=|@import|url\(|https?://", text)  # nothing to load


def test_runs_stand_side_by_side(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / "a" / "run"), make_run(tmp_path / "b" / "run"), make_run(tmp_path / "other")]
    text = page([read_run(folder) for folder in folders])
    assert f"<th>{tmp_path / 'a' / 'run'}</th>" in text  # the whole path where names are the same
    assert "<th>other</th>" in text
    loss = text.partition("<figcaption>loss</figcaption>")[2].partition("</svg>")[0]
    assert loss.count("<polyline") == 3


def test_what_runs_wrote_is_shown_and_not_run(tmp_path: Path) -> None:
    text = page([read_run(make_run(tmp_path / "<b>bold", note="<script>alert(1)</script>"))])
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "<h1>&lt;b&gt;bold</h1>" in text


def test_a_run_with_a_log_alone_or_timers_alone_has_a_page(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    shutil.rmtree(folder / "timing")
    assert "nothing was recorded" in page([read_run(folder)])
    folder = make_run(tmp_path / "another")
    (folder / "log.jsonl").unlink()
    text = page([read_run(folder)])
    assert "<figcaption>lr</figcaption>" in text
    assert "<figcaption>grad_norm</figcaption>" in text


def test_what_backward_did_not_hide_is_communication_and_is_counted_once(tmp_path: Path) -> None:
    measured = read_run(make_run(tmp_path / "cpu", exchange=(0.05, 0.02)))
    phases = measured.ranks[0].phases()  # 40 windows in 10 s
    assert phases["communication"] == pytest.approx(40 * 0.03)
    assert phases["closing_backward"] == pytest.approx(3.0 - 40 * 0.03)
    assert sum(phases.values()) == pytest.approx(10.0)
    text = page([measured])
    cells = ("rank 1", "50.00 ms", "20.00 ms", "30.00 ms", "12.0%", "10")
    assert "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>" in text
    assert "what closing backwards take more" not in text
    # A few slow windows, which were measured, do not make it more than closing backward took.
    slow = read_run(make_run(tmp_path / "slow", exchange=(0.5, 0.1)))
    assert slow.ranks[0].phases()["communication"] == pytest.approx(3.0)
    assert slow.ranks[0].phases()["closing_backward"] == pytest.approx(0.0)
    assert "<td>400.00 ms</td><td>30.0%</td>" in page([slow])
    # A device's seconds are not the host's.
    assert (
        "communication"
        not in read_run(make_run(tmp_path / "gpu", device="cuda:0", exchange=(9.0, 0.0))).ranks[0].phases()
    )


def test_models_that_begin_to_be_trained_one_after_the_other_are_told_apart(tmp_path: Path) -> None:
    """As a GAN's: until the first is trained, the exchange that is measured is the second's."""
    line = {"step": 1, "time": 1.0, "seconds": 1.0, "phases": {"closing_backward": 0.9}, "windows": 1, "samples": 0}
    first, second = [1, 0.5, 0.25], [1, 0.125, 0.0625]
    for rank in range(2):
        exchanges = [[None, None], [None, second], [first, [2, *second[1:]]]]
        write(tmp_path / "timing" / f"rank{rank}.jsonl", [{**line, "exchanges": told} for told in exchanges])
    run = read_run(tmp_path)
    assert run.samples_per_second() is None
    assert run.ranks[0].exchanges() == {1: (1, *first[1:]), 2: (2, *second[1:])}
    text = page([run])
    assert "<td>rank 1, model 1</td><td>500.00 ms</td><td>250.00 ms</td><td>250.00 ms</td><td></td>" in text
    assert "on a CPU and with one model, the communication above" in text


def test_a_restart_of_all_ranks_is_one_event(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    for rank in range(2):  # two jobs, the second of which started twice again
        texts = ("number 1", "number 1", "number 2")
        events = [{"event": "restart", "step": 9, "time": 1.0 + index, "text": t} for index, t in enumerate(texts)]
        write(folder / "timing" / f"rank{rank}.jsonl", events)
    restarts = [event for event in read_run(folder).events if event["event"] == "restart"]
    assert [event["text"] for event in restarts] == ["number 1", "number 1", "number 2"]
    assert not any("rank" in event for event in restarts)


def test_a_number_that_no_float_holds_is_left_out(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    (folder / "log.jsonl").unlink()
    write(
        folder / "log.jsonl", [{"step": s, "time": float(s), "values": {"x": 10**400 * s, "loss": 1}} for s in (0, 1)]
    )
    assert "<figcaption>x</figcaption>" in page([read_run(folder)])


def test_a_folder_without_a_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path / "gone")]) == 2
    assert "holds no run: expected log.jsonl or timing/rank0.jsonl" in capsys.readouterr().err
    run = make_run(tmp_path / "run")
    assert main(["report", str(run), "-o", str(tmp_path / "no" / "such" / "x.html")]) == 2
    assert "the report cannot be written" in capsys.readouterr().err
    assert main(["report", str(run), "--peak-tflops", "-1"]) == 2
    assert "expected a number > 0" in capsys.readouterr().err


NUMBERS = st.floats(allow_nan=True, allow_infinity=True, width=32)


@given(st.lists(st.tuples(st.integers(0, 10**9), NUMBERS), min_size=1, max_size=30), st.text(max_size=8))
@settings(max_examples=150)
def test_any_points_make_a_chart_within_its_frame(points: list[tuple[int, float]], name: str) -> None:
    name = re.sub(r"[^\x20-\x7e]", "?", name)
    text = line_chart({name: sorted(points, key=lambda point: point[0])})
    tree = ElementTree.fromstring(text)
    for line in tree.iter("polyline"):
        for pair in line.attrib["points"].split():
            x, y = map(float, pair.split(","))
            assert -1 <= x <= 561
            assert -1 <= y <= 241


def test_bars_fill_their_width() -> None:
    tree = ElementTree.fromstring(stacked_bars({"rank 0": {"a": 1.0, "b": 3.0}, "rank 1": {"a": 0.0}}, ["a", "b"]))
    widths = [float(bar.attrib["width"]) for bar in tree.iter("rect")]
    assert widths == pytest.approx([436 / 4, 436 * 3 / 4], abs=0.1)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")
@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (390, "dark")])
def test_a_browser_shows_it(tmp_path: Path, width: int, scheme: str) -> None:
    runs = [read_run(make_run(tmp_path / name, exchange=(0.05, 0.02))) for name in ("first", "second")]
    page_in_frame = escape(page(runs), quote=True)  # a window is not narrower than 500 pixels, a frame in it may be
    file, picture = tmp_path / "frame.html", tmp_path / "page.png"
    file.write_text(
        '<!doctype html><meta name="color-scheme" content="light dark"><style>body { margin:0 }'
        f" iframe {{ border:0; display:block; width:{width}px; height:2600px }}</style>"
        f'<iframe srcdoc="{page_in_frame}"></iframe><script>onload = () => {{ document.title = "needs " + '
        'document.querySelector("iframe").contentDocument.documentElement.scrollWidth }</script>'
    )
    chromium = [
        *(str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
        f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}",
        *(f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={max(width, 500)},2600"),
    ]
    for what in (f"--screenshot={picture}", "--dump-dom"):
        ended = subprocess.run(
            [*chromium, what, file.as_uri()], check=True, capture_output=True, timeout=100, text=True
        )
    assert f"<title>needs {width}</title>" in ended.stdout  # no scrolling sideways
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)[:, :width]
    corner = pixels[5, 5].mean()
    assert corner < 40 if scheme == "dark" else corner > 215  # paper
    blue = (pixels[:, :, 2] - pixels[:, :, 0] > 60).sum()
    orange = (pixels[:, :, 0] - pixels[:, :, 2] > 90).sum()
    assert blue > 500  # the curves of the first run
    assert orange > 500  # and of the second
    assert np.abs(pixels[:, -3:] - pixels[5, 5]).max() < 60  # nothing sticks out at the right
