"""The settings themselves: frozen dataclasses whose fields are also the flags, the variables and the TOML keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from enum import Enum
from functools import cache
from types import MappingProxyType
from typing import Final, Literal, TypeVar, get_type_hints

T = TypeVar("T")


class NotGiven(Enum):
    """The type of `NOT_GIVEN`: the default of an argument for which `None` is a value of its own."""

    TOKEN = "not given"


NOT_GIVEN: Final = NotGiven.TOKEN


def given(**arguments: object) -> dict[str, object]:
    """Only the arguments that are not `NOT_GIVEN`: what `resolve_settings` takes as `code`."""
    return {name: value for name, value in arguments.items() if value is not NOT_GIVEN}


@dataclass(frozen=True)
class Form:
    """What a text must look like: a regular expression for all of it, and the same in words for people."""

    pattern: str
    words: str


def setting(
    default: T, help_text: str, *, minimum: int | None = None, maximum: int | None = None, form: Form | None = None
) -> T:
    """A dataclass field with what its flag's help and its validation need; a number is bounded by the two."""
    metadata = {"help": help_text, "minimum": minimum, "maximum": maximum, "form": form}
    return field(default=default, metadata=metadata)


NODES = Form(r"[1-9]\d*(:[1-9]\d*)?", "a number of nodes >= 1, or MIN:MAX")
PAIRS = Form(r"(\w+=[^,=]+(,|$))*", "key=value,key=value")


@dataclass(frozen=True, kw_only=True)
class LaunchSettings:
    """How many processes `accelerator launch` starts, where, and how they find each other."""

    nproc_per_node: int | None = setting(
        None, "processes on this node (default: one per accelerator device, else 1)", minimum=1
    )
    nnodes: str = setting("1", "number of nodes, or MIN:MAX for an elastic job", form=NODES)
    node_rank: int | None = setting(
        None, "this node's rank; with c10d rendezvous it says who hosts the store (0 does)", minimum=0
    )
    rdzv_backend: str = setting("c10d", "rendezvous backend of torch's elastic agent")
    rdzv_endpoint: str = setting("", "HOST:PORT where nodes meet; a free local port for one node")
    rdzv_id: str | None = setting(None, "id of the job, the same on every node")
    rdzv_conf: str = setting("", "further rendezvous settings, key=value,key=value", form=PAIRS)
    max_restarts: int = setting(0, "how often all processes may be started again after a failure", minimum=0)
    local_addr: str | None = setting(None, "address of this node for the others (default: its host name)")
    num_cpu_threads: int | None = setting(
        None, "OMP_NUM_THREADS of each process (default: the variable, else cores / processes)", minimum=1
    )


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything a script can ask of the library without naming a strategy's own options.

    `strategy_options` holds the options by strategy name as they were written; `Resolved.strategy_for`
    turns them into a strategy.
    """

    strategy: str = setting("auto", "auto, a strategy's name, or package.module:Class")
    mixed_precision: Literal["no", "bf16", "fp16"] = setting("no", "dtype of forward and backward")
    gradient_accumulation_steps: int = setting(1, "micro-batches per optimizer step", minimum=1)
    global_batch_size: int | None = setting(
        None, "samples per optimizer step over all processes; gives the accumulation steps", minimum=1
    )
    split_batches: bool = setting(False, "the loader's batch size is that of all processes together")
    dispatch_batches: bool = setting(False, "rank 0 alone reads iterable datasets and sends the others their batches")
    pad_batches: bool = setting(False, "short batches are filled up with ghosts, samples repeated that count nothing")
    seed_samples: bool = setting(False, "the random draws of a sample depend on seed, epoch and index alone")
    seed: int | None = setting(
        None, "seed of every random number generator and of the order of the data", minimum=0, maximum=2**64 - 1
    )
    project_dir: str | None = setting(None, "where checkpoints and logs go, and accelerator.toml is looked for")
    trackers: tuple[str, ...] = setting(
        ("jsonl",), "what keeps the values that a loop logs: names, or package.module:Class"
    )
    data_ledger: bool = setting(False, "write down in project_dir which samples each rank was given at which step")
    detect_nonfinite: bool = setting(False, "stop where a NaN or an infinity first appears, and name the place")
    hang_notice: int = setting(
        60, "seconds that ranks wait in vain until one logs, once, where each of them is; 0 for never", minimum=0
    )
    hang_timeout: int | None = setting(
        None, "seconds without progress after which all processes say where they wait, and end", minimum=1
    )
    first_step_timeout: int | None = setting(
        None, "the same until the first optimizer step (default: 300, or hang_timeout if that is longer)", minimum=1
    )
    timers: bool = setting(True, "measure where the time of each step goes, into project_dir, for accelerator report")
    count_flops: bool = setting(False, "let the timers count the operations of the first micro-batch")
    launch: LaunchSettings = field(default_factory=LaunchSettings)
    strategy_options: Mapping[str, Mapping[str, object]] = field(default_factory=lambda: MappingProxyType({}))


TABLES: Final = ("launch", "strategy_options")


@cache
def catalogue() -> Mapping[str, tuple[Field[object], object]]:
    """Every setting by its dotted name (`seed`, `launch.nnodes`), with its field and its resolved type."""
    own, launch = get_type_hints(Settings), get_type_hints(LaunchSettings)
    found = {item.name: (item, own[item.name]) for item in fields(Settings) if item.name not in TABLES}
    found |= {f"launch.{item.name}": (item, launch[item.name]) for item in fields(LaunchSettings)}
    return MappingProxyType(found)
