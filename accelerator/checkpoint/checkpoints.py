"""The checkpoints of one run: saved now or in the background, loaded, and deleted when they are not needed."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch.distributed as dist
from torch import Tensor

from strategies import collectives
from strategies.accumulation import Accumulation
from strategies.errors import ConfigurationError, PrepareError, StateError

from . import folder as folders
from . import loading, remote, retention, saving
from .certificate import Awaited, Certificates, OnDrift
from .lineage import Lineage
from .peers import Peers
from .preemption import REQUEUE, Timetable
from .retention import Health, Keep, Verdict
from .saving import Draft


class Checkpoints:
    """What one Accelerator saves and loads. Every method but `register` is called by every rank."""

    def __init__(self, accumulation: Accumulation, about: dict[str, Any], project_dir: Path | None) -> None:
        self._accumulation = accumulation
        self._about = about
        self._project_dir = project_dir
        self._peers = Peers(accumulation.world)
        self._timetable = Timetable(accumulation.world)
        self._registered: list[Any] = []
        self._certificates = Certificates(accumulation, about, self._peers)
        self._lineage = Lineage()
        self._look()
        self._health: Health | None = None
        self._loaded: str | None = None
        self._group: dist.ProcessGroup | None = None  # that of saves in the background
        self._staging: dict[str, Tensor] = {}
        self._in_flight: threading.Thread | None = None
        self._failure: BaseException | None = None

    def register(self, objects: tuple[Any, ...]) -> None:
        """Keep these too."""
        for item in objects:
            if not (callable(getattr(item, "state_dict", None)) and callable(getattr(item, "load_state_dict", None))):
                raise PrepareError(
                    f"register_for_checkpointing() got {type(item).__name__}; expected objects with state_dict() and "
                    "load_state_dict()"
                )
        self._registered += objects

    @property
    def folder(self) -> Path:
        """Where checkpoints without a path go."""
        if self._project_dir is None:
            raise StateError("a checkpoint has no place: give save_state(path), or Accelerator(project_dir=...)")
        return self._project_dir / "checkpoints"

    @property
    def step(self) -> int:
        """Steps that the optimizers have taken; the most of any of them."""
        return self._accumulation.steps_taken

    def save(self, place: str | None, *, metrics: Mapping[str, float] | None, keep: Keep, in_background: bool) -> Path:
        """Write a checkpoint, after the one that may still be written; see `Accelerator.save_state`."""
        path = Path(place) if place is not None else None
        self._meet("save_state", path, f"async_={in_background}, {keep}")
        if place is not None and remote.is_url(place):
            raise StateError(
                f"save_state got the URL {place!r}; expected a path on a disk, where a whole folder can be renamed. "
                "Save there, and copy the folder with the store's own tool."
            )
        self.wait()
        target = path if path is not None else self.folder / folders.name_of(self.step)
        beside = path is None or keep.deletes
        about = {**self._about, "step": self.step, "metrics": _numbers(metrics if metrics is not None else {})}
        about |= self._lineage.about()
        if in_background:  # it is refused by this call, and not by the next one
            self._peers.on_main(lambda: folders.refuse_loss(target.absolute(), self._project_dir))
        draft = saving.collect(self._accumulation, self._registered, about, self._peers)
        verdict = self._watched().judge(keep.healthy_after) if keep.deletes else Verdict()
        awaited = self._certificates.saved(target.absolute())
        if not in_background:
            self._finish(draft, awaited, beside, keep, verdict, self._peers)
        else:
            draft = draft.staged(self._staging)
            self._staging = draft.tensors
            peers = Peers(self._accumulation.world, self._own_group())
            arguments = (draft, awaited, beside, keep, verdict, peers)
            self._in_flight = threading.Thread(target=self._finish_later, args=arguments, name="save_state")
            self._in_flight.start()
        if self._health is not None:
            self._health.saved(target.name)
        self._timetable.saved(self.step)
        return target

    def wait(self) -> None:
        """Return once nothing is being written. Raises what the last save in the background failed with, once."""
        thread, self._in_flight = self._in_flight, None
        if thread is not None:
            thread.join()
        failure, self._failure = self._failure, None
        if isinstance(failure, StateError):
            raise StateError(f"the last save_state(async_=True) failed: {failure}") from failure
        if failure is not None:
            raise failure

    def load(self, place: str, on_drift: OnDrift) -> Path:
        """Load one checkpoint, from a path or a URL."""
        path = Path(place)
        self._meet("load_state", place if remote.is_url(place) else path, _checked(on_drift))
        self.wait()
        self._look(path.absolute().parent)
        self._peers.on_main(lambda: saving.bring_back(path.absolute().parent, path.name))
        if remote.is_url(place):
            with remote.fetched(place, self._peers) as copy:
                self._load(copy, loading.verified(copy, self._peers, per_machine=True), on_drift, place)
        else:
            with folders.held(path.absolute()) as here:
                self._load(here, loading.verified(here, self._peers), on_drift, path.name)
        return path

    def due(self, *, every_steps: int | None, every_minutes: float | None, signals: Sequence[str]) -> bool:
        """Whether a checkpoint is due; see `Accelerator.checkpoint_due`."""
        self._timetable.signals.watch(signals)
        if self._accumulation.current is not None or self._accumulation.open_windows():
            return False
        return self._timetable.due(self.step, every_steps=every_steps, every_minutes=every_minutes)

    def exit_if_preempted(self) -> None:
        """Leave, once everything is on the disk."""
        if self._timetable.preempted:
            self.wait()
            raise SystemExit(REQUEUE)

    def close(self) -> None:
        """Wait for the last save, and put signal handlers back. Not a collective."""
        self._timetable.signals.close()
        self.wait()

    def resume(self, on_drift: OnDrift) -> Path | None:
        """Load the one written last of those that are whole, if there is any."""
        self._meet("resume", None, _checked(on_drift))
        self.wait()
        self._look()
        with ExitStack() as stack:
            found = loading.newest(self.folder.absolute(), self._peers, stack)
            if found is not None:
                path, here, manifest = found
                self._load(here, manifest, on_drift, path.name)
        return found[0] if found is not None else None

    def _load(self, path: Path, manifest: dict[str, Any], on_drift: OnDrift, name: str) -> None:
        loading.load(path, manifest, self._accumulation, self._registered, self._peers)
        self._certificates.loaded(path, manifest, on_drift, name)
        self._loaded = name
        self._lineage.loaded(manifest)
        self._timetable.loaded(self.step)
        if self._health is not None:
            self._health.loaded(name)

    def _look(self, *more: Path) -> None:
        """Know of the checkpoints that are there, before one is chosen: any other to come is of another job."""
        if self._accumulation.world.is_main:
            own = [self.folder.absolute()] if self._project_dir is not None else []
            for parent in {*own, *more}:
                self._lineage.look(parent)

    def _meet(self, call: str, place: Path | str | None, options: str = "") -> None:
        """Go on once all ranks are in the same call with the same arguments. Raises `CollectiveError` if not.

        Raises `StateError` inside `LocalSGD`.
        """
        self._accumulation.refuse_apart(call)
        place = place if place is not None else self._project_dir
        where = place.absolute() if isinstance(place, Path) else place
        collectives.meet_alike(call, f"{where} {options}".rstrip(), self._accumulation.world)

    def _watched(self) -> Health:
        if self._health is None:
            self._health = Health()
            if self._loaded is not None:
                self._health.saved(self._loaded)
            self._accumulation.observers.append(self._health)
        return self._health

    def _finish(self, draft: Draft, awaited: Awaited, beside: bool, keep: Keep, verdict: Verdict, peers: Peers) -> None:
        lineage = self._lineage if beside else None
        saving.write(draft, awaited.target, peers, lineage=lineage, project_dir=self._project_dir)
        if peers.world.is_main:
            awaited.committed()
        if keep.deletes:
            good = frozenset.intersection(*(one.good for one in peers.gather(verdict)))
            peers.on_main(lambda: retention.delete(awaited.target, keep, replace(verdict, good=good)))

    def _finish_later(self, *arguments: Any) -> None:
        try:
            self._finish(*arguments)
        except BaseException as error:
            self._failure = error

    def _own_group(self) -> dist.ProcessGroup | None:
        """A group for the background: over that of training, its collectives would mix with those of the loop."""
        if self._group is None and self._accumulation.world.size > 1:
            self._group = dist.new_group(backend="gloo")
        return self._group


def _checked(on_drift: str) -> str:
    if on_drift not in get_args(OnDrift):
        raise ConfigurationError(f"on_drift is {on_drift!r}; expected one of {', '.join(map(repr, get_args(OnDrift)))}")
    return f"on_drift={on_drift!r}"


def _numbers(metrics: Mapping[str, float]) -> dict[str, float]:
    if not isinstance(metrics, Mapping):
        raise StateError(f"metrics is {metrics!r:.80}; expected numbers by name: {{'val_loss': 0.5}}")
    found = {}
    for name, value in metrics.items():
        try:
            found[name] = float(value)
        except (TypeError, ValueError):
            raise StateError(f"metrics[{name!r}] is {value!r}; expected a number") from None
        if not math.isfinite(found[name]):
            del found[name]  # the best one is never one of these
    return found
