"""Which parts of a model are in memory: brought in ahead of their use, within a budget of bytes."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor

from strategies.errors import StepError

from . import pages
from .parts import Part

_AHEAD = 2  # parts that are brought in while one runs, if the budget has room for them


class Holding(Protocol):
    """The weights of one part, which rest where they cannot be used at full speed, or at all."""

    num_bytes: int

    def bring_in(self) -> None:
        """Have the weights where they are used when this returns. Called in the reader thread."""

    def use(self) -> None:
        """Put what was brought in into the model, if it is not there. Called in the thread that runs the model."""

    def rest(self) -> None:
        """Take out of the model what `use` put there, and keep it."""

    def give_back(self) -> None:
        """Free what `bring_in` took."""


class MappedPages:
    """Weights that are mapped from a file, and used where they are."""

    def __init__(self, part: Part, mappings: pages.FileMappings) -> None:
        self._tensors = [tensor.detach() for tensor in part.fetched if mappings.hold(tensor)]
        self.num_bytes = sum(tensor.nbytes for tensor in self._tensors)

    def bring_in(self) -> None:
        """Read the pages."""
        for tensor in self._tensors:
            pages.bring_in(tensor)

    def use(self) -> None:
        """They are in the model all the time."""

    def rest(self) -> None:
        """They stay in the model."""

    def give_back(self) -> None:
        """Let the pages go, but for tensors that were written to."""
        for tensor in self._tensors:
            if pages.are_in_memory(tensor):
                pages.give_back(tensor)


class Copies:
    """Weights that rest in CPU memory, their own or a mapped file's, and are copied to a device.

    Parameters show the copies only while their part runs, so that what is written to a model at rest is written where
    it stays. A copy is made anew if its parameter was written to, or shows another tensor.
    """

    def __init__(self, part: Part, device: torch.device, mappings: pages.FileMappings) -> None:
        self.parameters = part.fetched
        self.num_bytes = sum(parameter.nbytes for parameter in self.parameters)
        self._resting = [parameter.data for parameter in self.parameters]
        self._versions = [_version(parameter) for parameter in self.parameters]
        self._mapped = [tensor for tensor in self._resting if mappings.hold(tensor)]
        self._device = device
        self._stream = torch.Stream(device) if device.type != "cpu" else None
        self._copies: list[Tensor] = []
        self._in_use = False

    def bring_in(self) -> None:
        """Copy, by way of pinned memory, on a stream of the reader's own."""
        self._versions = [_version(parameter) for parameter in self.parameters]  # before the numbers
        self._resting = [parameter.data for parameter in self.parameters]
        if self._stream is None:
            self._copies = [tensor.clone() for tensor in self._resting]
            return
        with self._stream:
            pinned = [tensor.pin_memory() if _is_pageable(tensor) else tensor for tensor in self._resting]
            self._copies = [tensor.to(self._device, non_blocking=True) for tensor in pinned]
            for tensor in self._mapped:
                pages.give_back(tensor)  # they are in pinned memory
            self._stream.synchronize()

    def use(self) -> None:
        """Have the parameters show the copies."""
        if self._in_use:
            return
        if not all(map(_shows, self.parameters, self._resting, self._versions)):
            self.bring_in()
        for parameter, copy in zip(self.parameters, self._copies, strict=True):
            parameter.data = copy
        self._in_use = True

    def rest(self) -> None:
        """Have the parameters show what rests, with what their modules wrote to the copies."""
        if not self._in_use:
            return
        for index, parameter in enumerate(self.parameters):
            if _version(parameter) != self._versions[index]:
                self._resting[index].copy_(self._copies[index])
                self._versions[index] = _version(parameter)
            parameter.data = self._resting[index]
        self._in_use = False

    def give_back(self) -> None:
        """Free the copies once the device is done with them."""
        self.rest()
        if self._stream is not None:
            for copy in self._copies:
                copy.record_stream(torch.accelerator.current_stream(self._device))
        self._copies = []


def _is_pageable(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and not tensor.is_pinned()


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # counts the writes, not those through `.data`


def _shows(parameter: Tensor, tensor: Tensor, version: int) -> bool:
    is_alike = (parameter.dtype, parameter.device) == (tensor.dtype, tensor.device)
    return is_alike and parameter.is_set_to(tensor) and _version(parameter) == version


class Residency:
    """Keeps holdings in memory, at most `budget_bytes` of them, those that are needed next first.

    One thread brings in what comes next while the model runs. What is needed last is given back first: models run
    their parts round and round, so that is usually the one that just ran.
    """

    def __init__(self, holdings: Sequence[Holding], budget_bytes: int) -> None:
        self._holdings = holdings
        self._budget = budget_bytes
        self._order = list(range(len(holdings)))  # of execution, as far as it is known
        self._turn = {index: index for index in self._order}
        self._seen: dict[int, None] = {}
        self._held: dict[int, Future[None]] = {}
        self.held_bytes = 0  # in memory, or on their way there
        self.is_closed = False
        self._start()

    def _start(self) -> None:
        self._process = os.getpid()
        self._running = [0] * len(self._holdings)
        self._lock = threading.RLock()  # backward runs in other threads, and forwards may
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="accelerator-reader")

    def _start_in_child(self) -> None:
        """In a forked process, where the reader's thread is not, begin anew."""
        if self._process != os.getpid():
            self._start()
            for index in list(self._held):
                self._forget(index)
                self._holdings[index].give_back()

    def begin(self) -> None:
        """The model starts to run: note the order from here on."""
        self._start_in_child()
        self._seen = {}

    def end(self) -> None:
        """The model ran: expect the same order next time."""
        with self._lock:
            order = [*self._seen, *(index for index in self._order if index not in self._seen)]
            if order != self._order:
                self._order = order
                self._turn = {index: turn for turn, index in enumerate(order)}
            for index, holding in enumerate(self._holdings):
                if index not in self._held:
                    holding.give_back()  # weights may have been used past their module

    def enter(self, index: int, *, backward: bool = False) -> None:
        """Have a holding in memory, and keep it there until `leave`."""
        if self.is_closed:
            raise StepError(
                "remove_dispatch(model) was called between forward and backward, which needs weights on the device "
                "they ran on. Call it after backward()."
            )
        self._start_in_child()
        with self._lock:
            if not backward:
                self._seen[index] = None
            direction = -1 if backward else 1
            if index not in self._held:
                self._make_room(index, index, direction)
                self._bring_in(index)
            self._running[index] += 1
            reading = self._held[index]
            if len(self._held) < len(self._holdings):
                self._read_ahead(index, direction)
        try:
            reading.result()
            with self._lock:
                self._holdings[index].use()
        except BaseException:
            with self._lock:
                self._running[index] -= 1
                if self._held.get(index) is reading:
                    self._forget(index)
            raise

    def leave(self, index: int) -> None:
        """Let a holding be given back, when its room is needed."""
        with self._lock:
            self._running[index] -= 1
            if not self._running[index]:
                self._holdings[index].rest()
                if self.held_bytes > self._budget and index in self._held:  # forwards of several threads met
                    self._give_back(index)

    def close(self) -> None:
        """Give everything back."""
        self.is_closed = True
        self._start_in_child()
        self._reader.shutdown(wait=True, cancel_futures=True)
        for index in list(self._held):
            self._give_back(index)

    def _bring_in(self, index: int) -> None:
        self._held[index] = self._reader.submit(self._holdings[index].bring_in)
        self.held_bytes += self._holdings[index].num_bytes

    def _forget(self, index: int) -> Future[None]:
        self.held_bytes -= self._holdings[index].num_bytes
        return self._held.pop(index)

    def _read_ahead(self, current: int, direction: int) -> None:
        begun = 0
        for distance in range(1, len(self._order)):
            index = self._order[(self._turn[current] + direction * distance) % len(self._order)]
            if index in self._held:
                continue
            if begun == _AHEAD or not self._make_room(index, current, direction):
                return
            self._bring_in(index)
            begun += 1

    def _make_room(self, wanted: int, current: int, direction: int) -> bool:
        """Give back what is needed later than `wanted`, until that fits; for `current` itself, all that is idle."""

        def wait(index: int) -> int:  # how many turns until it is needed
            return direction * (self._turn[index] - self._turn[current]) % len(self._order)

        excess = self.held_bytes + self._holdings[wanted].num_bytes - self._budget
        if excess <= 0:
            return True
        idle = sorted((index for index in self._held if not self._running[index]), key=wait, reverse=True)
        if wanted != current:
            idle = [index for index in idle if wait(index) > wait(wanted) and self._held[index].done()]
        enough: list[int] = []
        for index in idle:
            if excess <= 0:
                break
            enough.append(index)
            excess -= self._holdings[index].num_bytes
        if excess > 0 and wanted != current:
            return False
        for index in enough:
            self._give_back(index)
        return True

    def _give_back(self, index: int) -> None:
        reading = self._forget(index)
        if not reading.cancel():
            reading.exception()  # wait for it; whoever needs the part meets the error
        self._holdings[index].give_back()


def as_view_of(saved: Tensor, weight: Tensor) -> Any:
    """How `saved` lies within `weight`, to be looked up again later; `None` if it is another tensor's memory."""
    if saved.device != weight.device or saved.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr():
        return None
    return saved.dtype, saved.size(), saved.stride(), saved.storage_offset()
