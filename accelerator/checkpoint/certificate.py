"""What the step after a checkpoint was given and computed, kept beside it, and compared when a run is resumed.

The certificate is a file of its own in the checkpoint's folder, `certificate.json`, put there by one rename after the
step that follows the save. It names the manifest that it belongs to, and has a digest. Without it a checkpoint is
whole; only a resumed run cannot say then whether it goes on as the first one did.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from strategies import clipping
from strategies.accumulation import Accumulation
from strategies.errors import StateError
from strategies.observer import Observer
from strategies.sources import Cursor

from . import folder as folders
from .comparison import MicroBatch, Step, Verdict, compare
from .fingerprint import Fingerprint, fingerprint
from .peers import Peers
from .saving import topology

if TYPE_CHECKING:
    from strategies.prepared.optimizer import OptimizerLink
    from strategies.window import Window

OnDrift = Literal["warn", "error"]
_log = logging.getLogger("accelerator")


class Awaited:
    """A checkpoint whose certificate is written once both are there: its folder, and the step after it."""

    def __init__(self, target: Path, first: int, *, inside_window: bool) -> None:
        self.target = target
        self.first = first  # micro-batches noted before it
        self.inside_window = inside_window
        self._lock = threading.Lock()  # a save in the background ends in a thread
        self._is_there = False
        self._step: Step | None = None

    def committed(self) -> None:
        """The folder is in its place. One rank calls it."""
        with self._lock:
            self._is_there = True
            self._write()

    def followed(self, step: Step) -> None:
        """The step after it was taken. One rank calls it."""
        with self._lock:
            self._step = step
            self._write()

    def _write(self) -> None:
        if not self._is_there or self._step is None:
            return
        try:
            write(self.target, self._step)
        except (OSError, StateError) as error:
            if self.target.exists():  # else it was deleted since
                _log.warning("%s has no certificate: %s", self.target.name, error)


def write(target: Path, step: Step) -> None:
    """Put a certificate into a checkpoint, as a whole or not at all."""
    body = {"of": folders.digest_of(folders.read_manifest(target)), **asdict(step)}
    new = target / f".{folders.CERTIFICATE}.new"
    new.write_text(json.dumps({**body, "digest": folders.digest_of(body)}))
    os.replace(new, target / folders.CERTIFICATE)


def read(path: Path, manifest: Mapping[str, Any]) -> Step | None:
    """The certificate of a checkpoint; `None` if it has none. Raises `StateError` if it is not as it was written."""
    try:
        found = json.loads((path / folders.CERTIFICATE).read_text())
        body = {key: value for key, value in found.items() if key not in ("digest", "of")}
        whole = found["digest"] == folders.digest_of({"of": found["of"], **body})
        if whole and found["of"] != folders.digest_of(manifest):
            return None  # of an earlier checkpoint in this place
        if whole:
            return Step.of(body)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StateError(f"{str(path / folders.CERTIFICATE)!r} cannot be read: {error!r}") from error
    raise StateError(f"{str(path / folders.CERTIFICATE)!r} is not as it was written")


@dataclass
class _Noted:
    """A micro-batch as the loop has it: its loss is not read yet."""

    batch: Fingerprint | None
    loss: Tensor
    weight: float | Tensor


@dataclass(frozen=True)
class _Expected:
    """What the first step of a resumed run is compared with."""

    name: str
    step: Step
    same_place: bool
    tolerance: float
    on_drift: OnDrift


class Certificates(Observer):
    """Notes the step after each save and each load. Between those it does nothing.

    The step's values are read once it has ended: the one wait for the device, and one exchange between ranks.
    """

    def __init__(self, accumulation: Accumulation, about: Mapping[str, Any], peers: Peers) -> None:
        self._accumulation = accumulation
        self._about = about
        self._peers = peers
        self._awaited: list[Awaited] = []
        self._expected: _Expected | None = None
        self._forget()

    def saved(self, target: Path) -> Awaited:
        """A checkpoint is on its way to `target`; tell the result when it is there."""
        self._watch()
        inside = bool(self._accumulation.open_windows())
        awaited = Awaited(target, len(self._noted), inside_window=inside)
        if self._accumulation.optimizers:  # else no step will follow
            self._awaited = [*(one for one in self._awaited if one.target != target), awaited]
        return awaited

    def loaded(self, path: Path, manifest: Mapping[str, Any], on_drift: OnDrift, name: str) -> None:
        """The run goes on from a checkpoint, which is called `name`. Collective."""
        self._watch()
        self._awaited.clear()
        self._expected = None
        self._forget()
        step, problem = self._peers.gather(_read_on_main(path, manifest, self._peers.world.is_main))[0]
        if step is not None and self._accumulation.optimizers:
            modes = {self._about["mixed_precision"], manifest.get("mixed_precision")}
            laid_out_alike = manifest.get("world") == topology(self._peers.world)
            same = laid_out_alike and manifest.get("strategy") == self._about["strategy"]
            tolerance = 1e-5 if modes == {"no"} else 1e-2
            self._expected = _Expected(name, step, same and len(modes) == 1, tolerance, on_drift)
        elif step is None and self._peers.world.is_main:
            log = _log.warning if problem or on_drift == "error" else _log.info
            text = problem or f"{name} has no certificate, since no whole step followed it"
            log("the first step is not compared: %s", text)

    def _watch(self) -> None:
        if self not in self._accumulation.observers:
            self._accumulation.observers.append(self)

    def _forget(self) -> None:
        self._noted: list[_Noted] = []
        self._batches: dict[Cursor, tuple[int, Fingerprint | None]] = {}
        self._norm: Tensor | None = None
        self._ended = False

    # -- the loop ------------------------------------------------------------------------------------------

    def batch_taken(self, cursor: Cursor, batch: object) -> None:
        """Look at a batch that may be trained on."""
        if (self._awaited or self._expected is not None) and cursor.grad_enabled:
            self._batches[cursor] = cursor.index, fingerprint(batch, cursor)

    def backward_ended(self, window: Window, loss: Tensor) -> None:
        """Note the loss, and which batch it is of."""
        if self._awaited or self._expected is not None:
            cursor = window.cursor
            index, batch = self._batches.get(cursor, (-1, None)) if cursor is not None else (-1, None)
            known = batch if cursor is not None and index == cursor.index else None
            self._noted.append(_Noted(known, loss.detach(), window.weighting.latest))

    def gradients_ready(self, optimizer: OptimizerLink) -> None:
        """Compute the norm of the gradients, but not on torch_xla: it would be another graph, to be compiled."""
        noting = self._awaited or self._expected is not None
        if noting and self._norm is None and self._accumulation.world.device.type != "xla":
            self._norm = clipping.total_norm(optimizer.parameters())

    def update_ended(self, optimizer: OptimizerLink, taken: bool) -> None:
        """The step has ended, but for what is left of `accumulate`."""
        self._ended = bool(self._awaited) or self._expected is not None
        if self._ended and self._accumulation.current is None:
            self._settle()

    def micro_batch_ended(self, window: Window) -> None:
        """The step has ended."""
        if self._ended:
            self._settle()

    def raised(self, error: BaseException) -> None:
        """What the step was to be known by is not all there."""
        if self._expected is not None and self._peers.world.is_main:
            _log.warning("the first step after %s is not compared: it raised %r", self._expected.name, error)
        self._awaited.clear()
        self._expected = None
        self._forget()

    def _settle(self) -> None:
        """Compare the step with the one that is expected, and certify the checkpoints before it. Collective."""
        mine = [MicroBatch(one.batch, float(one.loss), float(one.weight)) for one in self._noted]
        gathered = self._peers.gather((mine, None if self._norm is None else float(self._norm)))
        everyone, norm = [noted for noted, _ in gathered], gathered[0][1]  # one for all, also where ranks train alone
        awaited, expected = self._awaited, self._expected
        self._awaited, self._expected = [], None
        self._forget()
        if self._peers.world.is_main:
            for one in awaited:
                one.followed(Step([noted[one.first :] for noted in everyone], norm, one.inside_window))
        if expected is not None:
            step = Step(everyone, norm, expected.step.inside_window)
            self._report(
                expected, compare(expected.step, step, same_place=expected.same_place, tolerance=expected.tolerance)
            )

    def _report(self, expected: _Expected, verdict: Verdict) -> None:
        text = f"the first step after {expected.name}: {verdict.text}"
        if verdict.is_wrong and expected.on_drift == "error":
            raise StateError(f"{text}. The checkpoint is untouched; on_drift='warn' goes on.")
        if self._peers.world.is_main:
            (_log.info if verdict.is_good else _log.warning)("%s", text)


def _read_on_main(path: Path, manifest: Mapping[str, Any], is_main: bool) -> tuple[Step | None, str | None]:
    if is_main:
        try:
            return read(path.resolve(), manifest), None
        except StateError as error:
            return None, str(error)
    return None, None
