"""The facade: what a training script asks for, each handed to the part that does it."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from strategies import Precision, Strategy, clipping
from strategies.accumulation import Accumulation
from strategies.errors import AcceleratorError, PrepareError, StateError
from strategies.gathering import gather_samples
from strategies.prepared import View, prepare
from strategies.recording import default_dtype

from . import export, processes
from .accelerate_words import says_it_in_our_words
from .batch_arithmetic import BatchArithmetic
from .choice import check_world, chosen_alike, chosen_name, options_of
from .config import NOT_GIVEN, NotGiven, given, resolve_settings
from .ending import Ending, end_run
from .explain import Explanation, explain
from .profiling import Rounds, profiled
from .progress import progress
from .ranks import Ranks

if TYPE_CHECKING:
    from .trackers import Tracker

T = TypeVar("T")


@says_it_in_our_words
class Accelerator(Ranks):
    """Runs a training loop on whatever hardware is configured, with the numbers of one process.

    Every rank constructs it, with the same arguments, and calls `prepare` with the same objects.

    Arguments, each also a key of `accelerator.toml`, an `ACCELERATOR_*` variable and, but for the last two,
    a flag of `accelerator launch`; what is given here wins:

    - `strategy`: `"auto"`, a registered name, `"package.module:Class"`, a `Strategy` class or an instance.
    - `mixed_precision`: `"no"`, `"bf16"` or `"fp16"`: the dtype of autocast in forward.
    - `gradient_accumulation_steps`: micro-batches per optimizer step, at least 1.
    - `global_batch_size`: samples per optimizer step over all ranks; the accumulation steps follow from it.
    - `split_batches`: whether a loader's `batch_size` is that of all ranks together instead of each rank's.
    - `dispatch_batches`: whether rank 0 alone reads iterable datasets, and sends the others their batches.
    - `pad_batches`: whether short batches are filled up with ghosts: repeated samples, which count nothing.
    - `seed_samples`: whether the random draws of a sample depend on seed, epoch and index alone.
    - `seed`: of Python's, NumPy's and torch's generators and of the order of the data.
    - `project_dir`: where the run's files go, and where `accelerator.toml` is looked for.
    - `trackers`: what keeps the values given to `log`: names such as `"jsonl"` or `"tensorboard"`, or `Tracker`s.
    - `data_ledger`: whether to write down which samples each rank was given, in `project_dir`.
    - `detect_nonfinite`: whether to stop where a NaN or an infinity first appears, and name the place.
    - `hang_notice`: seconds that ranks wait in vain until one logs, once, where each of them is; 0 for never.
    - `hang_timeout`, `first_step_timeout`: seconds without progress, after and before the first optimizer step, until
      every process says where it waits, and all end.
    - `timers`, `count_flops`: whether to measure where time goes, and to count the operations of one micro-batch.
    - `config`: the path of a configuration file.

    Raises `ConfigurationError` or `LaunchError` before any work is done.
    """

    def __init__(
        self,
        strategy: str | Strategy | type[Strategy] | NotGiven = NOT_GIVEN,
        *,
        mixed_precision: Literal["no", "bf16", "fp16"] | NotGiven = NOT_GIVEN,
        gradient_accumulation_steps: int | NotGiven = NOT_GIVEN,
        global_batch_size: int | NotGiven | None = NOT_GIVEN,
        split_batches: bool | NotGiven = NOT_GIVEN,
        dispatch_batches: bool | NotGiven = NOT_GIVEN,
        pad_batches: bool | NotGiven = NOT_GIVEN,
        seed_samples: bool | NotGiven = NOT_GIVEN,
        seed: int | NotGiven | None = NOT_GIVEN,
        project_dir: str | os.PathLike[str] | NotGiven | None = NOT_GIVEN,
        trackers: Sequence[str | Tracker] | NotGiven = NOT_GIVEN,
        data_ledger: bool | NotGiven = NOT_GIVEN,
        timers: bool | NotGiven = NOT_GIVEN,
        count_flops: bool | NotGiven = NOT_GIVEN,
        detect_nonfinite: bool | NotGiven = NOT_GIVEN,
        hang_notice: int | NotGiven = NOT_GIVEN,
        hang_timeout: int | NotGiven | None = NOT_GIVEN,
        first_step_timeout: int | NotGiven | None = NOT_GIVEN,
        config: str | os.PathLike[str] | None = None,
    ) -> None:
        arguments = {name: value for name, value in locals().items() if name not in ("self", "config", "__class__")}
        from .checkpoint import Checkpoints  # what a run is made of is imported where one begins
        from .debugging import Debugging
        from .record import Record, chosen_trackers, names_of, values_of

        arguments["project_dir"] = project_dir if isinstance(project_dir, NotGiven | None) else os.fspath(project_dir)
        arguments["trackers"] = trackers if isinstance(trackers, NotGiven) else names_of(trackers)
        code = given(**arguments)
        self._resolved = resolve_settings(code, config=config, environ=os.environ, directory=Path.cwd())
        self._settings = self._resolved.settings
        precision = Precision(self._settings.mixed_precision)
        self._strategy_name = chosen_name(self._resolved, os.environ)
        self._strategy = self._resolved.strategy_for(self._strategy_name)
        kept_by = chosen_trackers(self._resolved, trackers)
        super().__init__(self._strategy.setup())
        self._arithmetic = BatchArithmetic(self._resolved, self._world)
        self._accumulation = Accumulation(self._strategy, self._world, precision, self._arithmetic.steps_for)
        self._record = Record(self._resolved, kept_by, self._accumulation, self._strategy_name, self._arithmetic)
        self._debugging = Debugging(self._settings, self._accumulation)
        configured = {**values_of(self._settings), "strategy": repr(self._strategy)}
        about = {"strategy": self._strategy_name, "mixed_precision": precision.mode, "configuration": configured}
        self._checkpoints = Checkpoints(self._accumulation, about, self.project_dir)
        self._seeded_apart = False
        self._seed()
        ends = self._accumulation, self._record, self._checkpoints, self._debugging
        self._ending = Ending(self, end_run, *ends)
        self._check()

    def _check(self) -> None:
        from .ledger import start_ledger

        try:
            check_world(self._resolved, self._world)
            self._accumulation.precision.check(self._world.device)
            start_ledger(self._settings, self._accumulation)
        except AcceleratorError:
            self._ending()
            raise

    def _seed(self) -> None:
        if self._settings.seed is not None:
            processes.seed_everything(self._settings.seed)
            self._strategy.seed(self._settings.seed, self._world)

    # -- the five lines ------------------------------------------------------------------------------------

    def prepare(self, *objects: Any) -> Any:
        """Hand models, optimizers, schedulers and dataloaders, in any order, to the strategy. Collective.

        Returns their prepared counterparts in the same order; a single one by itself. Each is still an instance
        of its class and shares its state with the object given. Raises `PrepareError` for an object that is
        unknown, was prepared before or does not fit the others, `DataError` for a loader that cannot be cut; on every
        rank, where they differ in what they prepare or in a setting that decides the step.
        """
        if not objects:
            raise PrepareError("prepare() got nothing; expected models, optimizers, schedulers or dataloaders")
        seed = self._settings.seed
        alike = chosen_alike(self._resolved, self._strategy_name, self._strategy)
        options = options_of(self._settings)
        prepared = prepare(objects, self._accumulation, seed=seed, options=options, settings=alike)
        self._debugging.attach()
        self._arithmetic.add([item for item in prepared if isinstance(item, DataLoader)])
        if seed is not None and not self._seeded_apart and self._accumulation.models:
            self._seeded_apart = True
            processes.seed_apart(seed, self._world)
        return prepared[0] if len(prepared) == 1 else tuple(prepared)

    def accumulate(self, *models: nn.Module, loader: DataLoader[Any] | None = None) -> AbstractContextManager[Any]:
        """Open one micro-batch of the accumulation window of `models` (of all prepared ones without any).

        Forward, `backward`, clipping, `step` and `zero_grad` belong inside. The window closes after
        `gradient_accumulation_steps` micro-batches or with the last batch of the data; until then clipping,
        stepping and zeroing do nothing and ranks do not communicate. Models named together share a window;
        models with windows of their own do not get gradients from each other's losses. `loader` says which
        prepared loader the micro-batch comes from, where two are open at once.
        """
        return self._accumulation.window(models).on(loader)

    def backward(self, loss: Tensor, *, weight: float | Tensor | None = None, **arguments: Any) -> None:
        """Backward of `loss`: the mean over the samples of this micro-batch on this rank, or a loss for each of them.

        It is weighted so that the gradient at the optimizer's step is that of the mean over all samples of
        the window, over all ranks. `weight`, a number >= 0 or scalar tensor, is the count of what `loss` is a mean
        over where that is not samples (tokens, pixels): it costs one small all-reduce per window.

        Of losses of shape (batch,) the mean is taken here; with `pad_batches` ghosts are left out of it, and a scalar
        is an error. A `weight` of their own shape, (batch,) or (batch, tokens), has it be the mean weighted by that.
        `arguments` go to `Tensor.backward`. Raises `StepError` for a loss of another shape or without a gradient,
        and outside `accumulate` where gradients are to be accumulated.
        """
        window = self._accumulation.current or self._accumulation.window_alone()
        window.backward(loss, weight, arguments)

    # -- the step ------------------------------------------------------------------------------------------

    @contextmanager
    def no_sync(self, *models: nn.Module) -> Iterator[None]:
        """Keep the gradients of `models` local to this rank, for a loop that does its own accumulation."""
        with ExitStack() as contexts:
            for model in models:
                contexts.enter_context(self._strategy.no_sync(self._accumulation.link(model).wrapped))
            yield

    def autocast(self) -> AbstractContextManager[Any]:
        """A context in which operations outside a prepared model run in the configured precision too."""
        if self._accumulation.precision.dtype is None:
            return ExitStack()
        return self._strategy.autocast(self._world, self._accumulation.precision)

    def clip_grad_norm_(
        self, parameters: Iterable[Tensor] | Tensor, max_norm: float, norm_type: float = 2.0
    ) -> Tensor | None:
        """Scale gradients so that their joint norm is at most `max_norm`, before the step. Collective.

        Returns the norm before, a scalar, the same on every rank; `None`, having done nothing, inside an open
        window, so that the loop needs no `if`.
        """
        held = self._accumulation.finish(parameters)
        if held is None:
            return None
        norm = clipping.clip_grad_norm(held, max_norm, norm_type)
        for observer in self._accumulation.observers:
            observer.gradients_clipped(norm)
        return norm

    def clip_grad_value_(self, parameters: Iterable[Tensor] | Tensor, clip_value: float) -> None:
        """Clamp every element of the gradients to [-clip_value, clip_value], before the step. Collective.

        Does nothing inside an open window.
        """
        held = self._accumulation.finish(parameters)
        if held is not None:
            clipping.clip_grad_value(held, clip_value)

    @property
    def sync_gradients(self) -> bool:
        """Whether the micro-batch that is open, or was last, closes its window."""
        latest = self._accumulation.latest
        return latest is None or latest.closing

    @property
    def optimizer_step_was_skipped(self) -> bool:
        """Whether the last step of a prepared optimizer was skipped because float16 gradients overflowed."""
        return self._accumulation.step_was_skipped

    @property
    def gradient_accumulation_steps(self) -> int:
        """Micro-batches per window; with `global_batch_size`, for the loader prepared first that divides it."""
        return self._arithmetic.steps

    def gather_for_metrics(
        self, input_data: Any, use_gather_object: bool = False, *, loader: DataLoader[Any] | None = None
    ) -> Any:
        """What each rank computed from its part of a batch, gathered so that every sample counts once, in order.

        Tensors of any nesting may have any length along dimension 0 on each rank; scalars become one value per
        rank that had samples. Lists of other objects are concatenated, with `use_gather_object` those of tensors too.
        What was computed from a repeated sample, because the batch had none for a rank, or was short under
        `pad_batches`, is left out; in a loop that trains under `pad_batches`, values have a row per sample. Collective.
        `loader` says which prepared loader the values belong to, where loops are nested and sizes do not tell.
        """
        sources = self._accumulation.sources
        with self._collective():
            return gather_samples(input_data, sources, self._world, loader, as_objects=use_gather_object)

    # -- around the loop -----------------------------------------------------------------------------------

    @property
    def strategy(self) -> Strategy:
        """The strategy that runs, with its settings."""
        return self._strategy

    @property
    def mixed_precision(self) -> str:
        """The configured precision: `"no"`, `"bf16"` or `"fp16"`."""
        return self._accumulation.precision.mode

    @property
    def project_dir(self) -> Path | None:
        """Where the run's files go."""
        return Path(self._settings.project_dir) if self._settings.project_dir is not None else None

    @contextmanager
    def init_module(self, *, empty: bool = False, dtype: torch.dtype | None = None) -> Iterator[None]:
        """Build a model in this block where the strategy wants its parameters, in `dtype` (torch's default without).

        On the device that trains it; under FSDP without memory, so that `prepare` makes on each rank only its
        part. The numbers are those of building it on one device from the same state of the random generator. With
        `empty`, nothing is drawn: parameters hold NaN until they are loaded, and a forward before that warns.
        """
        with default_dtype(dtype or torch.get_default_dtype()), self._strategy.init_context(self._world, empty=empty):
            yield

    def save_state(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        async_: bool = False,
        metrics: Mapping[str, float] | None = None,
        keep_last: int | None = None,
        keep_every: int | None = None,
        keep_best: tuple[str, Literal["min", "max"]] | None = None,
        healthy_after: int = 10,
    ) -> Path:
        """Write a checkpoint of everything prepared and registered; return its folder. Collective.

        Without `path`, into `checkpoints/step-<optimizer steps>` of `project_dir`. It is there as a whole or not at
        all. With `async_` the loop waits only for a copy in CPU memory; the files are written in the background, one
        checkpoint at a time, and what goes wrong is raised by the next call of this, `load_state`, `resume` or
        `end_training`. `metrics` are noted in it.

        Afterwards, if any `keep_...` is given, those beside it are deleted that are not among the `keep_last`, of a
        multiple of `keep_every` steps, the best by `keep_best=("val_loss", "min")`, or the newest that was followed
        by `healthy_after` updates of finite loss. Raises `StateError` on every rank if one fails.
        """
        from .checkpoint import Keep

        keep = Keep(last=keep_last, every=keep_every, best=keep_best, healthy_after=healthy_after)
        target = None if path is None else os.fspath(path)
        return self._record.saving(
            lambda: self._checkpoints.save(target, metrics=metrics, keep=keep, in_background=async_)
        )

    def load_state(
        self, path: str | os.PathLike[str] | None = None, *, on_drift: Literal["warn", "error"] = "warn"
    ) -> Path:
        """Go on from a checkpoint, on any strategy and number of processes; return its folder. Collective.

        Without `path`, which may be a URL of `fsspec`, from the newest in `project_dir` that is whole. Every file is
        verified before anything is changed. Raises `StateError` if there is none, or if it does not fit what is
        prepared. `on_drift`: see `resume`.
        """
        if path is not None:
            loaded = self._checkpoints.load(os.fspath(path), on_drift)
            self._record.resumed()
            return loaded
        found = self.resume(on_drift=on_drift)
        if found is None:
            raise StateError(f"load_state() found no checkpoint in {str(self._checkpoints.folder)!r}; give its path")
        return found

    def resume(self, *, on_drift: Literal["warn", "error"] = "warn") -> Path | None:
        """Go on from the newest whole checkpoint in `project_dir`, if there is one; `None` if not. Collective.

        The first step is compared with the one that followed the checkpoint: its data, losses and gradient norm. The
        result goes to the log; with `on_drift="error"` the step raises `StateError` for wrong data and for a drift.
        """
        found = self._checkpoints.resume(on_drift)
        if found is not None:
            self._record.resumed()
        return found

    def checkpoint_due(
        self,
        *,
        every_steps: int | None = None,
        every_minutes: float | None = None,
        signals: Sequence[str] = ("SIGTERM", "SIGUSR1"),
    ) -> bool:
        """Whether to call `save_state` now, the same on every rank. Collective: each calls it after every micro-batch.

        Every so many optimizer steps, every so many minutes since the last save, and once after one of `signals`
        reached any rank, which they agree on within a quarter of a second or at the next step. From the first call to
        `end_training` these signals do not end the process. False inside an open accumulation window.
        """
        return self._checkpoints.due(every_steps=every_steps, every_minutes=every_minutes, signals=signals)

    def exit_if_preempted(self) -> None:
        """Leave with exit code 75, "try again later", if a signal made a checkpoint due; wait for the last save before.

        Every rank calls it, after `save_state`. `accelerator launch` ends with the same code, without a restart.
        """
        self._checkpoints.exit_if_preempted()

    def register_for_checkpointing(self, *objects: Any) -> None:
        """Have `save_state` and `load_state` keep these too: objects with `state_dict` and `load_state_dict`."""
        self._checkpoints.register(objects)

    def get_state_dict(self, model: nn.Module, *, sharded: bool = False) -> dict[str, Any]:
        """The weights of `model`: whole, in CPU memory, on rank 0 and empty elsewhere. Collective.

        With `sharded`, as each rank holds them, without communication.
        """
        self._accumulation.refuse_apart("get_state_dict")
        return export.state_dict(self.unwrap_model(model), self._world, sharded=sharded)

    def save_model(self, model: nn.Module, folder: str | os.PathLike[str], max_shard_size: int | str = "5GB") -> None:
        """Write the weights of `model` as safetensors files, with an index where there are several. Collective.

        Rank 0 writes, one file of at most `max_shard_size` at a time. `transformers` loads the folder; tied
        weights are written once. Raises `StateError` on every rank if writing fails.
        """
        self._accumulation.refuse_apart("save_model")
        export.save(self.unwrap_model(model), folder, self._world, max_shard_size=max_shard_size)

    def load_model(self, model: nn.Module, folder: str | os.PathLike[str]) -> None:
        """Load weights that `save_model`, `accelerator export` or `transformers` wrote into `model`. Collective.

        `folder` may be a URL of `fsspec`. Each rank reads one tensor at a time. Raises `StateError` on every rank,
        before anything is changed, naming all that is missing, foreign or of another shape or kind.
        """
        export.load(self.unwrap_model(model), folder, self._world)

    def unwrap_model(
        self, model: nn.Module, keep_fp32_wrapper: bool = False, keep_torch_compile: bool = True
    ) -> nn.Module:
        """The user's own module behind a prepared one; a module that was not prepared is returned as it is.

        Without `keep_torch_compile`, what `torch.compile` was given. `keep_fp32_wrapper` can only be False: autocast is
        around the call of the prepared model, and nothing of it in the module.
        """
        own = self._accumulation.link(model).original if isinstance(model, View) else model
        return export.own_module(own, keep_fp32_wrapper=keep_fp32_wrapper, keep_torch_compile=keep_torch_compile)

    def log(
        self,
        values: Mapping[str, Any] | None = None,
        step: int | None = None,
        *,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Give numbers, scalar tensors, text, images, histograms or tables to the trackers, by name.

        `step` is the optimizer steps taken, unless given. The main process logs its values; the others may call it too.
        Nothing waits: numbers on a device are copied and read later. `config` holds what the script wants to
        be remembered by. Raises `StepError` for a value of another kind, `ConfigurationError` where the trackers
        need a `project_dir` and there is none.
        """
        self._record.log(values or {}, step, config)

    def watch(
        self, model: nn.Module, *, every: int = 100, log: Callable[[Mapping[str, Any]], None] | None = None
    ) -> None:
        """Log mean, std, max_abs and share of zeros of activations and gradients, each step that `every` divides.

        Every rank calls it, for a prepared model. The numbers, scalar tensors over all ranks, go to `log` on the main
        process, without to the trackers. Raises `ConfigurationError` for a compiled model.
        """
        self._debugging.watch(model, every, log if log is not None else self.log)

    def verify_replicas(self, every: int | None = None) -> None:
        """Raise `ReplicasDifferError` if ranks that hold copies of a parameter or buffer hold other bits. Collective.

        With `every`, not now but after each optimizer step that it divides. Between updates buffers may differ.
        """
        self._debugging.verify_replicas(every)

    def progress(
        self,
        items: Iterable[T],
        *,
        description: str = "",
        total: int | None = None,
        style: Literal["bar", "lines", "none"] | None = None,
    ) -> Iterator[T]:
        """Go over `items`, a loader or a range, and show on the main process how far: loss, samples/s, time left.

        Any rank may call it. A bar on a terminal, a line every ten seconds elsewhere, nothing in CI (where the variable
        `CI` is set), unless `style` says which. It reads the loss at most four times a second, without waiting.
        """
        return progress(items, self._accumulation, description=description, total=total, style=style)

    def profile(
        self,
        folder: str | os.PathLike[str] | None = None,
        *,
        wait: int = 1,
        warmup: int = 1,
        active: int = 3,
        repeat: int = 1,
        **options: Any,
    ) -> AbstractContextManager[torch.profiler.profile]:
        """A block around the loop in which torch's profiler records some optimizer steps, on each rank that enters it.

        It leaves `wait` steps out, warms up for `warmup`, records `active`, and does so `repeat` times (0: always).
        Traces go to `folder`, else to `profile` in the `project_dir`; `options` to `torch.profiler.profile`.
        """
        where = Path(folder) if folder is not None else self.project_dir and self.project_dir / "profile"
        rounds = Rounds(wait=wait, warmup=warmup, active=active, repeat=repeat)
        return profiled(self._accumulation, where, rounds, options)

    def explain(self) -> Explanation:
        """What was asked and what runs, every setting with its origin. Print it; not a collective."""
        return explain(self._resolved, self._strategy_name, self._accumulation, self._arithmetic)

    def free_memory(self, *objects: Any) -> list[None]:
        """Let go of everything prepared, and return cached device memory. What was prepared is unusable after.

        Returns a `None` for each of `objects`, whatever they are: `model, loader = free_memory(model, loader)`.
        """
        self._accumulation.release()
        self._record.watch()
        gc.collect()
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()
        return [None] * len(objects)

    def end_training(self) -> None:
        """Let go of everything prepared and leave the process group. Every rank; done at exit otherwise."""
        self._ending()
