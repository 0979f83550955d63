"""The dataloader that `prepare` returns: this rank's slices of a global order, batch by batch on its device."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from torch.utils.data import DataLoader

from .. import seeded
from ..drawn import ListedBatchSampler, Repeat
from ..errors import DataError
from ..lockstep import Step
from ..randomness import undrawn
from ..sharding import ComputedOrder, Cut
from ..sources import Cursor
from ..transfer import unrecorded
from ..tree import num_samples
from .agreement import Seed
from .options import DataOptions
from .position import Position, describe, describe_stream, is_at_end, read, read_stream
from .sampling import PlannedSampler, length_now, refuse_unpadded, sampler_for
from .stream import Stream
from .view import View, make_view

if TYPE_CHECKING:
    from ..accumulation import Accumulation


class DataLoaderLink:
    """What a prepared dataloader knows: its cut of the data, and where in it the loop stands.

    A pass that ran to its end was an epoch, and the next one is of the next epoch. One that was left after training
    goes on with the next. A look, at a batch on any ranks or under `no_grad` at a whole epoch that training has left
    in the middle, leaves the next pass as it was.
    """

    def __init__(
        self,
        original: DataLoader[Any],
        accumulation: Accumulation,
        source: PlannedSampler | Stream,
        *,
        seed: Seed,
        global_batch_size: int | None,
        options: DataOptions,
    ) -> None:
        self.original = original
        self.accumulation = accumulation
        self.source = source
        self.global_batch_size = global_batch_size
        self.seeds_samples = options.seed_samples
        self._pads = options.pad_batches
        self._seed = seed
        self._begin = Position()  # of the next pass, unless the last one counts
        self._last: Cursor | None = None

    @property
    def epoch(self) -> int:
        """The epoch of the pass that was begun last; of the one to come before the first, and after a load."""
        return self._last.epoch if self._last is not None else self._begin.epoch

    @property
    def global_stride(self) -> int:
        """How far one full batch over all ranks moves the position: samples, items or batches of a batch sampler."""
        if isinstance(self.source, ListedBatchSampler):
            return self.source.cut.together
        return self.global_batch_size or self.accumulation.world.size

    def state_dict(self) -> dict[str, Any]:
        """The position after the batches that the loop has taken. Collective for a stream on several ranks."""
        source, last = self.source, self._last
        # Without a model nobody can tell a use from a look: what was taken counts.
        inside = last is not None and last.index >= 0 and not last.finished and not last.is_look
        if last is None or not inside or not (last.is_open or not self.accumulation.models):
            return describe(self._next_begin(), source)
        if isinstance(source, Stream):
            return describe_stream(last.epoch, source, None)
        assert last.cut is not None
        return describe(Position(last.epoch, last.cut.position_after(last.index)), source)

    def drop_rest(self) -> None:
        """Begin the next pass with the next epoch, if one was left in the middle."""
        begin = self._next_begin()
        if self._last is not None and self._last.is_open:  # of an iterator that is kept; going on with it raises
            self.accumulation.sources.close(self._last)
            self._last.is_open, self._begin, self._last = False, begin, None
        if not begin.is_begun:
            return
        if not isinstance(self.source, Stream):
            self.source.order.begin(begin.epoch)  # a loaded state of a sampler is that before this epoch
        self._begin, self._last = Position(begin.epoch + 1), None

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raise what `load_state_dict` would, and change nothing."""
        self._read(state, dry=True)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Begin the next pass at a position."""
        self._begin = self._read(state)
        self._last = None

    def _read(self, state: Mapping[str, Any], *, dry: bool = False) -> Position:
        if self._last is not None and self._last.is_open:
            raise DataError("load_state_dict was called inside a loop over the loader. Call it before the loop.")
        dataset = type(self.original.dataset).__name__
        if isinstance(self.source, Stream):
            return read_stream(state, self.source, dataset)
        needs_seed = self._seed.was_given and (self.seeds_samples or self.source.order.kind != "sequential")
        return read(state, self.source, needs_seed=needs_seed, dataset=dataset, dry=dry)

    def iterate(self, view: DataLoader[Any], make_iterator: Callable[[], Iterator[Any]]) -> Iterator[Any]:
        """One pass over this rank's batches, keeping the loop's position for the weights of its windows."""
        accumulation, source = self.accumulation, self.source
        sources, world, observers = accumulation.sources, accumulation.world, accumulation.observers
        refuse_unpadded(self.original, source, pads=self._pads)
        self._begin = self._next_begin()
        begin = self._begin.entered(trains=torch.is_grad_enabled())
        cut, seed, digest = None, self._seed.value, 0
        if isinstance(source, Stream):
            source.begin(begin.epoch, begin.stream, view)
        else:
            self._check_length(source)
            cut, seed, digest = source.begin(begin.epoch, begin.start), source.order.seed, source.order.digest
        cursor = self._last = Cursor(
            view, cut, world, epoch=begin.epoch, seed=seed, digest=digest, global_batch=self.global_batch_size
        )
        cursor.is_look = begin is not self._begin
        sources.open(cursor)
        cursor.is_open = True
        try:
            if isinstance(source, Stream):
                yield from self._stream(source, make_iterator, cursor, resumed=begin.stream.is_begun)
            else:
                with undrawn(begin.start > 0):
                    iterator = make_iterator()
                batches = accumulation.strategy.device_loader(unrecorded(iterator), world)
                if cursor.is_planned:  # the usual pass, without another generator around it
                    assert cut is not None
                    is_grad_enabled, mark_step = torch.is_grad_enabled, accumulation.strategy.mark_step
                    before_last, final = cut.num_batches - 2, cut.num_batches - 1
                    for index, batch in enumerate(self._watched(batches)):
                        if self._last is not cursor:
                            self._refuse_two()
                        cursor.index, cursor.is_last = index, index == final  # `advance`, without its call
                        cursor.grad_enabled = is_grad_enabled()
                        sources.latest = cursor
                        for observer in observers:
                            observer.batch_taken(cursor, batch)
                        if index == before_last:
                            cursor.remember(batch)
                        yield batch
                        if cursor.last_trained != index:
                            mark_step(world)
                else:
                    yield from self._of_unknown_sizes(batches, cursor)
            if self._last is not cursor:
                self._refuse_two()
            if cut is not None:
                self._check_number(cursor, cut.num_batches)
            cursor.finished = True
        except Exception as error:
            sources.fail(error, self._note(error, cursor))
            raise
        finally:
            cursor.is_open = False
            sources.close(cursor)
        self._check_trained(cursor)

    def _note(self, error: Exception, cursor: Cursor) -> str:
        """Say which samples were to be read when `error` came: for this rank in a note, for the others in words."""
        indices = None if isinstance(error, DataError) else self.indices(cursor, cursor.index + 1)
        if not indices:
            return ""
        where = f"reading batch {cursor.index + 1} of epoch {cursor.epoch}, samples {indices!s:.200}"
        if hasattr(error, "add_note"):  # from Python 3.11
            error.add_note(f"while {where} on rank {cursor.rank}")
        return f"{where}: "

    def indices(self, cursor: Cursor, batch: int) -> list[Any] | None:
        """Which samples this rank has in a batch of the pass `cursor`, as the dataset counts; `None` if not known."""
        source, cut = self.source, cursor.cut
        if isinstance(source, Stream) or cut is None or not 0 <= batch < cut.num_batches:
            return None
        if isinstance(source, ListedBatchSampler):
            found = source.batch(batch)
        else:
            assert isinstance(cut, Cut)
            found = source.order.indices(np.arange(*cut.bounds(batch, cursor.rank), dtype=np.int64), cursor.epoch)
        return [index.index if isinstance(index, Repeat) else index for index in found]

    def _watched(self, batches: Iterator[Any]) -> Iterator[Any]:
        """`batches`, each announced to observers, if there are any when the pass begins, before it is waited for."""
        return self._announced(batches) if self.accumulation.observers else batches

    def _announced(self, batches: Iterator[Any]) -> Iterator[Any]:
        while True:
            for observer in self.accumulation.observers:
                observer.batch_wanted(self.original)
            try:
                batch = next(batches)
            except StopIteration:
                return
            yield batch

    def _next_begin(self) -> Position:
        last = self._last
        if last is None or not last.counts:
            return self._begin
        if last.is_over:
            return Position(last.epoch + 1)
        if isinstance(self.source, Stream):
            return Position(last.epoch, stream=self.source.place(used=last.used > last.index), is_left=True)
        assert last.cut is not None
        return Position(last.epoch, last.cut.position_after(last.used - 1), is_left=True)

    def _of_unknown_sizes(self, batches: Iterator[Any], cursor: Cursor) -> Iterator[Any]:
        """Batches of a planned number, whose sizes only they themselves know."""
        assert cursor.cut is not None
        advance, final = self.accumulation.sources.advance, cursor.cut.num_batches - 1
        for index, batch in enumerate(self._watched(batches)):
            if self._last is not cursor:
                self._refuse_two()
            mine = index > final or cursor.cut.local_samples(index, cursor.rank) > 0
            cursor.samples_seen = (num_samples(batch) or 1) if mine else 0
            advance(cursor, index, index == final)
            if index == final - 1:
                cursor.remember(batch)
            for observer in self.accumulation.observers:
                observer.batch_taken(cursor, batch)
            yield batch
            self._run_untrained(cursor)

    def _refuse_two(self) -> NoReturn:
        raise DataError(
            f"a pass over the loader over {type(self.original.dataset).__name__} went on after another one had begun: "
            "two loops over one loader, zip(loader, loader), or an iterator kept from before, also from before "
            "drop_rest(). A loader stands at one place: prepare a second DataLoader for the other loop."
        )

    def _check_length(self, sampler: PlannedSampler) -> None:
        length = length_now(self.original, sampler)
        if length != sampler.order.length:
            named = (
                type(self.original.dataset).__name__ if isinstance(sampler.order, ComputedOrder) else sampler.order.kind
            )
            raise DataError(
                f"{named} had {sampler.order.length} samples when its loader was "
                f"prepared and has {length} now. Prepare a new loader over it."
            )

    def _check_number(self, cursor: Cursor, num_batches: int) -> None:
        if cursor.index + 1 != num_batches:
            raise DataError(
                f"the loader gave {cursor.index + 1} instead of {num_batches} batches. Does its class have an "
                "__iter__ of its own? It must yield one batch per element of batch_sampler."
            )

    def _stream(
        self, source: Stream, make_iterator: Callable[[], Iterator[Any]], cursor: Cursor, *, resumed: bool
    ) -> Iterator[Any]:
        accumulation = self.accumulation
        waiting: deque[Step] = deque()  # the steps of batches that the device's loader has read ahead
        with undrawn(resumed):
            steps = source.steps(make_iterator)
        batches = accumulation.strategy.device_loader(source.stepped(steps, waiting), accumulation.world)
        for batch in self._watched(batches):
            if self._last is not cursor:
                self._refuse_two()
            step = waiting.popleft()
            cursor.sizes = step.sizes
            cursor.samples_seen = step.sizes[cursor.rank]
            cursor.had_ghosts |= 0 in step.sizes
            source.take(step.taken)
            accumulation.sources.advance(cursor, cursor.index + 1, step.is_last)
            if cursor.index == 1 and not step.is_last:
                cursor.remember(batch)
            for observer in accumulation.observers:
                observer.batch_taken(cursor, batch)
            yield batch
            self._run_untrained(cursor)

    def _run_untrained(self, cursor: Cursor) -> None:
        """Run what was recorded for a batch that no window closes with."""
        if cursor.last_trained != cursor.index:
            self.accumulation.strategy.mark_step(self.accumulation.world)

    def _check_trained(self, cursor: Cursor) -> None:
        missed = cursor.index + 1 - cursor.num_trained
        cut = cursor.cut
        if isinstance(cut, Cut) and cut.padded and cut.num_batches > cut.num_full and not cursor.num_trained:
            raise DataError(
                f"pad_batches=True filled the last batch of the loader over {type(self.original.dataset).__name__} up "
                "with ghosts, and nothing was trained on: what this loop counted has them in it. Take batches that are "
                "not for training under torch.no_grad(), where they keep their lengths."
            )
        if cursor.num_trained and missed:
            warnings.warn(
                f"{missed} of the {cursor.index + 1} batches of this epoch were taken but not trained on. If the loop "
                "skipped them, all is well. If something between loader and loop reads ahead, the window closed too "
                "early: iterate the prepared loader itself.",
                stacklevel=3,
            )


class PreparedDataLoader(View):
    """What comes before the user's own methods in a prepared dataloader."""

    __slots__ = ()

    _link: DataLoaderLink

    def __iter__(self) -> Iterator[Any]:
        """One pass: this rank's part of an epoch, on its device. Not a collective."""
        # DataLoader follows in the view
        batches = self._link.iterate(self, super().__iter__)  # type: ignore[arg-type, misc]
        # A resumed pass without a batch ends at once: `zip` does not ask its second loader once the first has ended.
        return iter(list(batches)) if is_at_end(self._link._next_begin(), self._link.source) else batches

    def __len__(self) -> int:
        """Batches of a whole epoch on this rank. An estimate for an iterable dataset, from its own length."""
        source, number = self._link.source, super().__len__()  # type: ignore[misc]  # DataLoader follows in the view
        return source.share_of(number) if isinstance(source, Stream) else number

    def _get_iterator(self) -> Any:
        source = self._link.source
        make = super()._get_iterator  # type: ignore[misc]  # DataLoader follows in the view
        if isinstance(source, Stream):
            return source.make_iterator(self, make)
        return seeded.make_iterator(self, source, make) if self._link.seeds_samples else make()

    @property
    def epoch(self) -> int:
        """The epoch of the pass that was begun last; 0 before the first."""
        return self._link.epoch

    @property
    def global_batch_size(self) -> int | None:
        """Samples of one full batch over all ranks; `None` where it is not known."""
        return self._link.global_batch_size

    def state_dict(self) -> dict[str, Any]:
        """Where the loop stands: what it took, not what workers read ahead. The same on every rank.

        Inside a loop the batch in hand counts as taken. Outside it is what the next pass here begins with: after
        `break`, the batch in hand counts if it was trained on. A pass without training on any of its batches was only
        a look, where a model is prepared; where none is, what it took counts here, and the next pass begins anew.
        """
        return self._link.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Begin the next pass where `state` was taken, on any number of ranks, with any batch size and workers.

        Every rank calls it, with the same state. Raises `DataError` for a state of other data, another order or
        another seed, changing nothing.
        """
        self._link.load_state_dict(state)

    def drop_rest(self) -> None:
        """Leave out what a loop that was left by `break`, or by a shorter loader in `zip`, has not taken.

        The next pass is then of the next epoch, instead of going on where that one was left. Does nothing at the
        beginning of an epoch. An iterator that is still held ends there: going on with it raises `DataError`. Every
        rank calls it.
        """
        self._link.drop_rest()


def prepare_dataloader(loader: DataLoader[Any], accumulation: Accumulation, *, options: DataOptions, seed: Seed) -> Any:
    """`loader` cut into this rank's part, behind a view that is still an instance of its class.

    Everything the user set (workers, collate function, pinning, ...) is carried over; only the sampler is ours.
    Raises `DataError` for a loader that cannot be cut so that every sample is seen once.
    """
    world = accumulation.world
    sampler = sampler_for(loader, world, seed=seed.value, options=options)
    source = sampler or Stream(loader, world, seed.value, dispatch=options.dispatch_batches)
    copied = object.__new__(type(loader))
    copied.__dict__.update(loader.__dict__)
    copied.__dict__["_iterator"] = None  # persistent workers belong to one loader
    if sampler is not None:
        copied.__dict__["sampler" if loader.batch_sampler is None else "batch_sampler"] = sampler
    together = loader.batch_size
    if together is not None and not options.split_batches:
        together *= world.size
    link = DataLoaderLink(loader, accumulation, source, seed=seed, global_batch_size=together, options=options)
    accumulation.loaders.append(link)
    return make_view(copied, PreparedDataLoader, link)
