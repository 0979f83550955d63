"""MLflow: a SQLite file and artifacts in the folder of the run, or the server of `MLFLOW_TRACKING_URI`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from .kept_id import KeptId
from .tracker import Histogram, Image, Run, Table, Tracker, Value


@dataclass
class MLflow(Tracker):
    """One MLflow run, driven through a client of its own: nothing global is set. Keeps no histograms.

    MLflow takes no points back: a run that is resumed keeps those it has, and new ones only of later steps.
    """

    needs_folder: ClassVar[bool] = True

    experiment: str = "torch-accelerator"

    def begin(self, run: Run) -> None:
        """Find or make the experiment and the run. Making the SQLite file takes MLflow some ten seconds."""
        from mlflow.tracking import MlflowClient

        assert run.folder is not None
        folder = run.folder.absolute()
        folder.mkdir(parents=True, exist_ok=True)
        own = f"sqlite:///{folder / 'mlflow.db'}"
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        self._client = MlflowClient(tracking_uri=uri or own)
        self._last: dict[str, int] = {}  # by name, the last step that was there when the run went on
        kept = KeptId(run, "mlflow")
        if kept.value is not None:
            self._id = kept.value
            for name in self._client.get_run(self._id).data.metrics:
                self._last[name] = max(point.step for point in self._client.get_metric_history(self._id, name))
            return
        found = self._client.get_experiment_by_name(self.experiment)
        place = None if uri else (folder / "mlartifacts").as_uri()
        experiment = found.experiment_id if found else self._client.create_experiment(self.experiment, place)
        self._id = self._client.create_run(experiment, run_name=run.name).info.run_id
        kept.keep(self._id)

    def log_config(self, config: Mapping[str, Any]) -> None:
        """As tags, since MLflow refuses a parameter that changes."""
        for key, value in config.items():
            self._client.set_tag(self._id, key, str(value))

    def log(self, values: Mapping[str, Value], step: int, time: float) -> Sequence[str]:
        """Numbers in one batch; images and tables as artifacts; text as a tag of its name."""
        from mlflow.entities import Metric

        numbers, left = [], []
        for name, value in values.items():
            if isinstance(value, Image):
                self._client.log_image(self._id, value.array(), key=name, step=step)
            elif isinstance(value, Table):
                columns = {column: [row[index] for row in value.rows] for index, column in enumerate(value.columns)}
                self._client.log_table(self._id, columns, artifact_file=f"{name}-{step:09d}.json")
            elif isinstance(value, Histogram):
                left.append(name)
            elif isinstance(value, str):
                self._client.set_tag(self._id, name, value)
            elif step > self._last.get(name, -1):
                numbers.append(Metric(name, float(value), int(time * 1000), step))
        if numbers:
            self._client.log_batch(self._id, metrics=numbers)
        return left

    def close(self) -> None:
        """Say that the run is over."""
        self._client.set_terminated(self._id)
