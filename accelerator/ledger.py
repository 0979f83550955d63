"""The account of the data: which samples which rank was given at which step, kept as JSON lines and reconciled.

Each rank of each run appends to a file of its own, `data_ledger/run-<number>-rank-<rank>.jsonl` in `project_dir`, one
row for the beginning of a pass and one for each batch, with the optimizer steps taken before it;
`pandas.read_json(path, lines=True)` reads it. `account` adds all files up. A run that goes on from a position takes
back what came after it: those samples' training was undone.
"""

from __future__ import annotations

import json
import os
import re
import weakref
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from strategies import collectives
from strategies.accumulation import Accumulation
from strategies.drawn import ListedBatchSampler
from strategies.errors import ConfigurationError, DataError
from strategies.observer import Observer
from strategies.prepared.dataloader import DataLoaderLink
from strategies.sharding import Cut
from strategies.sources import Cursor

from .config import Settings

FOLDER = "data_ledger"
_NAME = re.compile(r"run-(\d+)-rank-(\d+)\.jsonl")


class Ledger(Observer):
    """Writes down every batch that the loop is given, before the loop has it."""

    def __init__(self, folder: Path, accumulation: Accumulation) -> None:
        world = accumulation.world
        folder.mkdir(parents=True, exist_ok=True)
        known = [int(match[1]) for match in map(_NAME.fullmatch, os.listdir(folder)) if match]
        run = collectives.all_gather_integers([max(known, default=-1) + 1], world)[0][0]
        path = folder / f"run-{run:04d}-rank-{world.rank}.jsonl"
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        weakref.finalize(self, os.close, self._file)
        self._accumulation = accumulation
        self._cursors: dict[int, Cursor] = {}  # the pass that each loader is in

    def batch_taken(self, cursor: Cursor, batch: object) -> None:
        """Note the samples of the batch that the loop gets. An evaluation inside an epoch is none of its account."""
        if cursor.is_look:
            return
        view: Any = cursor.loader
        link = view._link
        number = self._accumulation.loaders.index(link)
        if self._cursors.get(number) is not cursor:
            self._cursors[number] = cursor
            self._write(_beginning(number, cursor, link))
        indices = link.indices(cursor, cursor.index)
        row = {"event": "batch", "loader": number, "epoch": cursor.epoch, "batch": cursor.index, "rank": cursor.rank}
        row["step"] = self._accumulation.steps_taken  # of the optimizer, before this batch
        row["position"] = None if cursor.cut is None else cursor.cut.position_after(cursor.index - 1)
        # An item is what the dataset gives at once.
        counts_items = cursor.cut is not None and not cursor.cut.counts_samples
        row |= {"ghost": cursor.is_ghost, "samples": int(not cursor.is_ghost) if counts_items else cursor.samples}
        self._write(row | {"indices": None if indices is None else [_plain(index) for index in indices]})

    def _write(self, row: dict[str, Any]) -> None:
        os.write(self._file, json.dumps(row).encode() + b"\n")  # in one piece: a kill leaves whole lines


@dataclass
class Account:
    """What one epoch of one loader gave out, over all runs and ranks.

    `length` is how many samples its sampler or batch sampler gives, `None` if that is not known. A sample is what the
    dataset gives at one index, also where that is a batch (`batch_size=None`).
    """

    loader: int
    epoch: int
    length: int | None
    samples: int = 0  # that were given out and not taken back
    different: int = 0  # samples among them that are not the same, where they are known
    ghosts: int = 0  # computed again with weight zero
    dropped: int = 0  # left out by drop_last
    resumed: int = 0  # how often the epoch was gone on with from a position inside it
    undone: int = 0  # given out after a position that a later run went back to
    used: Counter[Any] = field(default_factory=Counter, repr=False)  # index: how often

    @property
    def is_whole(self) -> bool:
        """Whether every sample was given out once, or was dropped."""
        return self.length == self.samples + self.dropped and self.different in (0, self.samples)


def account(project_dir: str | os.PathLike[str]) -> list[Account]:
    """The accounts of all epochs of all loaders, in order, from the files of a run and of those it went on from.

    Raises `DataError` if there is no ledger.
    """
    found = sorted(
        (int(match[1]), int(match[2]), path)
        for path in (Path(project_dir) / FOLDER).glob("*.jsonl")
        if (match := _NAME.fullmatch(path.name))
    )
    if not found:
        raise DataError(
            f"{str(project_dir)!r} has no {FOLDER}; expected the project_dir of a run with data_ledger=True"
        )
    accounts: dict[tuple[int, int], Account] = {}
    kept: list[dict[str, Any]] = []
    for run in sorted({number for number, _, _ in found}):
        ranks = [
            [json.loads(line) for line in path.read_text().splitlines()] for number, _, path in found if number == run
        ]
        for row in _in_step(ranks):
            one = accounts.setdefault((row["loader"], row["epoch"]), Account(row["loader"], row["epoch"], None))
            if row["event"] == "batch":
                kept.append(row)
                continue
            one.length, one.dropped = row["length"], row["dropped"]
            one.resumed += bool(row["position"])
            stays = [other for other in kept if not _comes_after(other, row)]
            for other in kept:
                if _comes_after(other, row):
                    accounts[other["loader"], other["epoch"]].undone += other["samples"]
            kept = stays
    for row in kept:
        one = accounts[row["loader"], row["epoch"]]
        one.ghosts += row["ghost"]
        one.samples += row["samples"]
        if row["indices"] is not None and not row["ghost"]:
            one.used.update(index if isinstance(index, int) else str(index) for index in row["indices"])
    for one in accounts.values():
        one.different = len(one.used)
    return [accounts[key] for key in sorted(accounts)]


def start_ledger(settings: Settings, accumulation: Accumulation) -> None:
    """Keep a ledger if that was asked for. Raises `ConfigurationError` where it has no place."""
    if not settings.data_ledger:
        return
    if settings.project_dir is None:
        raise ConfigurationError(
            "data_ledger is true and project_dir is none; expected a folder to write to. Set project_dir."
        )
    accumulation.observers.append(Ledger(Path(settings.project_dir) / FOLDER, accumulation))


def _beginning(loader: int, cursor: Cursor, link: DataLoaderLink) -> dict[str, Any]:
    cut, world_size = cursor.cut, link.accumulation.world.size
    position = 0 if cut is None else cut.start
    length = dropped = None
    if isinstance(cut, Cut):
        length = cut.length
        dropped = cut.length - cut.start - cut.window_samples(0, cut.num_batches)
    elif isinstance(link.source, ListedBatchSampler):
        length = sum(len(batch) for batch in link.source.order.drawn)
    row = {"event": "pass", "loader": loader, "epoch": cursor.epoch, "rank": cursor.rank, "world_size": world_size}
    return row | {"position": position, "seed": cursor.seed, "length": length, "dropped": dropped or 0}


def _in_step(ranks: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The rows of all ranks: each pass once, followed by the batches of all of them in it."""
    passes: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for rows in ranks:
        counts: Counter[int] = Counter()
        for row in rows:
            begins = row["event"] == "pass"
            counts[row["loader"]] += begins
            of_pass = passes.setdefault((row["loader"], counts[row["loader"]]), [])
            if not begins or not of_pass:
                of_pass.append(row)
    return [row for of_pass in passes.values() for row in of_pass]


def _comes_after(row: dict[str, Any], begin: dict[str, Any]) -> bool:
    """Whether a pass that begins there takes back what this row gave out."""
    if row["loader"] != begin["loader"]:
        return False
    return bool((row["epoch"], row["position"] or 0) >= (begin["epoch"], begin["position"]))


def _plain(index: Any) -> Any:
    return index if isinstance(index, int | str) else str(index)
