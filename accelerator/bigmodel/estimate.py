"""What a model takes in memory, before there is any: parameters, its largest block, inference and training."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from accelerator.byte_sizes import in_words
from accelerator.saved_weights import SavedWeights
from strategies.errors import AcceleratorError, ConfigurationError

from .build import init_empty_weights
from .files import tensors_of
from .parts import parts_of

# Bytes that the state of torch's optimizers takes for each parameter, in float32.
OPTIMIZERS: Mapping[str, int] = {
    "sgd": 0,
    "sgd-momentum": 4,
    "adagrad": 4,
    "rmsprop": 4,
    "adam": 8,
    "adamw": 8,
}
PRECISIONS = ("no", "bf16", "fp16")
_BITS = {"float32": 32, "bfloat16, float16": 16, "int8": 8, "int4": 4}


@dataclass(frozen=True)
class Size:
    """How large a model is."""

    name: str
    num_parameters: int  # tied ones once
    num_buffer_bytes: int
    largest_block: str
    largest_block_parameters: int
    stored_bytes: int  # in the dtypes that it has


@dataclass(frozen=True)
class Training:
    """Bytes per parameter that training holds, and where they go."""

    weights: int
    low_precision_copies: int
    gradients: int
    optimizer: int

    @classmethod
    def of(cls, optimizer: str, precision: str) -> Training:
        """Weights, gradients and optimizer state are float32; autocast keeps copies of 2 bytes for a forward."""
        return cls(4, 0 if precision == "no" else 2, 4, OPTIMIZERS[optimizer])

    @property
    def total(self) -> int:
        """All of it, in one process."""
        return self.weights + self.low_precision_copies + self.gradients + self.optimizer


def size_of_model(model: str) -> Size:
    """The size of a checkpoint (a file or folder, of which only names and shapes are read) or of `module:function`.

    The function, or class, is called without arguments and returns an `nn.Module`; it is built without memory. Raises
    `ConfigurationError` if there is no such thing, `StateError` for a checkpoint that cannot be read.
    """
    if os.path.exists(model) or not re.fullmatch(r"[\w.]+:[\w.]+", model):
        if not os.path.exists(model):
            raise ConfigurationError(
                f"MODEL is {model!r}; expected a checkpoint (a file or folder that is there) or module:function"
            )
        return _of_checkpoint(Path(model))
    return _of_module(model)


def _of_checkpoint(path: Path) -> Size:
    tensors: dict[tuple[int, int], Tensor] = {}
    blocks: dict[str, int] = {}
    found = tensors_of(path)
    for name, tensor in (found.outlines if isinstance(found, SavedWeights) else found).items():
        memory = (tensor.data_ptr(), tensor.nbytes)
        if tensor.nbytes and tensors.setdefault(memory, tensor) is not tensor:
            continue  # tied: torch.save keeps one memory under both names
        numbered = re.match(r"(.*?\.|)\d+(?=\.)", name)
        block = numbered[0] if numbered else name.rpartition(".")[0] or name
        blocks[block] = blocks.get(block, 0) + tensor.numel()
    return _size(path.resolve().name, list(tensors.values()), [], blocks)


def _of_module(target: str) -> Size:
    module_name, _, attribute = target.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        function = importlib.import_module(module_name)
        for part in attribute.split("."):
            function = getattr(function, part)
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(f"MODEL is {target!r}, which cannot be imported: {error}") from error
    finally:
        sys.path.remove(os.getcwd())
    try:
        with init_empty_weights(include_buffers=True):
            model = function() if callable(function) else function
    except AcceleratorError:
        raise
    except Exception as error:
        raise ConfigurationError(
            f"MODEL is {target!r}, which raised {type(error).__name__}: {error}. It is called without arguments, and "
            "returns an nn.Module."
        ) from error
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"MODEL is {target!r}, which gives a {type(model).__name__}; expected an nn.Module")
    blocks = {part.names[0]: sum(tensor.numel() for tensor in part.tensors) for part in parts_of(model)}
    return _size(type(model).__name__, list(model.parameters()), list(model.buffers()), blocks)


def _size(name: str, parameters: Sequence[Tensor], buffers: Sequence[Tensor], blocks: Mapping[str, int]) -> Size:
    largest = max(blocks, key=lambda block: blocks[block], default="")
    return Size(
        name,
        sum(tensor.numel() for tensor in parameters),
        sum(tensor.nbytes for tensor in buffers),
        largest,
        blocks.get(largest, 0),
        sum(tensor.nbytes for tensor in parameters),
    )


def bytes_on_a_rank(size: Size, training: Training, strategy: Literal["one process", "ddp", "fsdp"], ranks: int) -> int:
    """What training holds on each of `ranks` processes, without activations.

    `ddp`: all of it, and the gradients once more, in the buckets in which they travel.
    `fsdp`: a share of weights, gradients and optimizer state; besides, of the largest block, two gathered in the
    precision of the forward (one runs, the next is fetched), and the whole float32 gradients of one.
    """
    if strategy != "fsdp":
        held = training.total + (training.gradients if strategy == "ddp" else 0)
        return size.num_parameters * held + size.num_buffer_bytes
    each = training.weights + training.gradients + training.optimizer
    gathered = 2 * (training.low_precision_copies or training.weights) + training.gradients
    return -(-size.num_parameters * each // ranks) + size.largest_block_parameters * gathered + size.num_buffer_bytes


def report(size: Size, optimizer: str, precision: str, ranks: Sequence[int]) -> str:
    """Tables for people."""
    from rich.console import Console
    from rich.table import Table

    training = Training.of(optimizer, precision)
    inference = Table("weights in", "bytes", "least, one block at a time from the disk", box=None)
    for dtype, bits in _BITS.items():
        block = 2 * size.largest_block_parameters * bits / 8
        inference.add_row(dtype, in_words(size.num_parameters * bits / 8 + size.num_buffer_bytes), in_words(block))
    where = Table("training holds", "bytes per parameter", "bytes", box=None)
    for words, count in (
        ("weights, float32", training.weights),
        (f"their copies in {precision}, in forward and backward", training.low_precision_copies),
        ("gradients, float32", training.gradients),
        (f"state of {optimizer}, float32", training.optimizer),
        ("together", training.total),
    ):
        if count or words.startswith("state"):
            where.add_row(words, str(count), in_words(count * size.num_parameters))
    spread = Table("strategy", "processes", "bytes on each", box=None)
    spread.add_row("one process", "1", in_words(bytes_on_a_rank(size, training, "one process", 1)))
    for count in ranks:
        spread.add_row("ddp", str(count), in_words(bytes_on_a_rank(size, training, "ddp", count)))
        spread.add_row("fsdp", str(count), in_words(bytes_on_a_rank(size, training, "fsdp", count)))
    console = Console(width=100, color_system=None)
    with console.capture() as capture:
        console.print(
            f"{size.name}: {size.num_parameters:,} parameters, {in_words(size.stored_bytes)} as they are; largest "
            f"block {size.largest_block or 'all'} with {size.largest_block_parameters:,}\n",
            highlight=False,
        )
        for table in (inference, where, spread):
            console.print(table)
            console.print()
        console.print("Without activations, which depend on the batch, and without what the device itself takes.")
    return "\n".join(line.rstrip() for line in capture.get().splitlines())
