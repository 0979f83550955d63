"""Each tracker against what its own package reads back."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import numpy as np
import pytest
import torch

from accelerator import Accelerator
from accelerator.trackers import Histogram, Image, MLflow, Table, Tracker, Trackio, WandB

PIXELS = torch.arange(12).reshape(3, 4).float() / 12
ROWS = [[1, "a"], [2, "b"]]


def run(folder: Path, tracker: str | Tracker) -> None:
    """Three steps, a stop, and three steps from the second on."""
    first = Accelerator("cpu", project_dir=folder, trackers=(tracker,))
    for step in (1, 2, 3):
        first.log({"loss": 1.0 / step}, step=step)
    first.log({"spread": Histogram(torch.randn(100)), "rows": Table(["n", "name"], ROWS), "picture": Image(PIXELS)}, 3)
    first.end_training()
    second = Accelerator("cpu", project_dir=folder, trackers=(tracker,))
    second._record._log.resumed(2)  # what `resume()` says
    for step in (3, 4, 5):
        second.log({"loss": 1.0 / step, "note": "again"}, step=step)
    second.end_training()


def test_tensorboard(tmp_path: Path) -> None:
    run(tmp_path, "tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert [event.step for event in found.Scalars("loss")] == [1, 2, 3, 4, 5]
    assert [event.value for event in found.Scalars("loss")] == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4, 1 / 5])
    assert found.Images("picture") == found.Histograms("spread") == []  # of a step that was taken back
    assert {"config/text_summary", "note/text_summary"} <= set(found.Tags()["tensors"])


def test_tensorboard_keeps_every_kind(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accelerator = Accelerator("cpu", project_dir=tmp_path, trackers=("tensorboard",))
    accelerator.log({"spread": Histogram(np.ones(5)), "rows": Table(["n", "name"], ROWS), "picture": Image(PIXELS)})
    accelerator.end_training()
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert found.Tags()["images"] == ["picture"]
    assert (found.Images("picture")[0].width, found.Images("picture")[0].height) == (4, 3)
    assert found.Histograms("spread")[0].histogram_value.num == 5
    assert b"| 2 | b |" in found.Tensors("rows/text_summary")[0].tensor_proto.string_val[0]


def test_tensorboard_takes_the_finite_values_and_one_channel(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accelerator = Accelerator("cpu", project_dir=tmp_path, trackers=("tensorboard",))
    nan = float("nan")
    accelerator.log({"some": Histogram([1.0, nan, 2.0]), "none": Histogram([nan]), "empty": Histogram([])})
    accelerator.log({"gray": Image(PIXELS[:, :, None])})
    accelerator.end_training()
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert found.Tags()["histograms"] == ["some"]
    assert found.Histograms("some")[0].histogram_value.num == 2
    assert (found.Images("gray")[0].width, found.Images("gray")[0].height) == (4, 3)
    assert not caplog.messages


def test_wandb(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="wandb is not in the extra `dev`: 60 MB, and a process of its own per run")
    run(tmp_path, WandB(project="tests"))
    folders = sorted(path.name for path in (tmp_path / "wandb").glob("offline-run-*"))
    assert folders
    assert len({name.rpartition("-")[2] for name in folders}) == 1  # the same id: `wandb sync` makes one run of both
    assert list((tmp_path / "wandb").glob("offline-run-*/files/media/images/picture*.png"))
    assert list((tmp_path / "wandb").glob("offline-run-*/files/media/table/rows*.json"))


@pytest.mark.filterwarnings("ignore")  # of the packages that it brings
def test_mlflow(tmp_path: Path) -> None:
    pytest.importorskip("mlflow", reason="mlflow is not in the extra `dev`: 400 MB with what it needs")
    run(tmp_path, MLflow(experiment="tests"))
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("tests")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(found.info.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(step, pytest.approx(1 / step)) for step in range(1, 6)]
    assert {item.path for item in client.list_artifacts(found.info.run_id)} >= {"images", "rows-000000003.json"}
    assert found.data.tags["note"] == "again"


def test_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio", reason="trackio needs an older pillow than the tests have")
    run(tmp_path, Trackio(project="tests"))
    with sqlite3.connect(tmp_path / "trackio" / "tests.db") as database:
        rows = database.execute("select run_name, step from metrics order by step").fetchall()
    assert len({name for name, _ in rows}) == 1
    assert {step for _, step in rows} == {1, 2, 3, 4, 5}
