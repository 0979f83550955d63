"""Trackers: where the values go that a loop logs, and the protocol for one's own."""

from .jsonl import JSONLines
from .log import Log
from .mlflow import MLflow
from .registry import known_names, name_of, resolve
from .tensorboard import TensorBoard
from .tracker import Histogram, Image, Run, Table, Tracker, Value
from .trackio import Trackio
from .wandb import WandB

__all__ = [
    "Histogram",
    "Image",
    "JSONLines",
    "Log",
    "MLflow",
    "Run",
    "Table",
    "TensorBoard",
    "Tracker",
    "Trackio",
    "Value",
    "WandB",
    "known_names",
    "name_of",
    "resolve",
]
