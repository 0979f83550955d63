"""Join and leave the processes of a job: what the environment says, torch's process group, and who was lost."""

from __future__ import annotations

import gc
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist

from .errors import AcceleratorError, CollectiveError, ConfigurationError, LaunchError, PeerLostError, nearest
from .world import World

_ROLL_CALL_SECONDS = 3.0
_LOST_CONNECTION = re.compile(
    r"closed by peer|connection reset|broken pipe|timed out|timeout|connection refused|remote process exited",
    re.IGNORECASE,
)


@dataclass(frozen=True, kw_only=True)
class Placement:
    """What a launcher told this process: its ranks and the two sizes. `launcher` says who told it."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1
    local_size: int = 1
    launcher: str = "none"


def read_environment(environ: Mapping[str, str]) -> Placement:
    """The placement that torchrun's or SLURM's variables describe; a single process without either.

    SLURM's are read only inside a step (`srun`), where there is one process per task; a batch script or
    an allocation by itself is one process. Raises `LaunchError` for variables that contradict each other.
    """
    if "RANK" in environ or "WORLD_SIZE" in environ:
        size = _integer(environ, "WORLD_SIZE")
        rank = _integer(environ, "RANK")
        placement = Placement(
            rank=rank,
            size=size,
            local_rank=_integer(environ, "LOCAL_RANK", default=rank),
            local_size=_integer(environ, "LOCAL_WORLD_SIZE", default=size),
            launcher="torchrun",
        )
    elif _integer(environ, "SLURM_STEP_NUM_TASKS", default=1) > 1:
        tasks_per_node = environ.get("SLURM_STEP_TASKS_PER_NODE", environ["SLURM_STEP_NUM_TASKS"])
        placement = Placement(
            rank=_integer(environ, "SLURM_PROCID"),
            size=_integer(environ, "SLURM_STEP_NUM_TASKS"),
            local_rank=_integer(environ, "SLURM_LOCALID"),
            local_size=_tasks_on_node(tasks_per_node, _integer(environ, "SLURM_NODEID", default=0)),
            launcher="slurm",
        )
    else:
        return Placement()
    if not (0 <= placement.rank < placement.size and 0 <= placement.local_rank < placement.local_size):
        raise LaunchError(
            f"{placement.launcher} placed this process as rank {placement.rank} of {placement.size}, local rank "
            f"{placement.local_rank} of {placement.local_size}; expected each rank to be below its size. "
            "Check RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE."
        )
    return placement


def pick_device(wanted: str, local_rank: int) -> torch.device:
    """The device of this process: `"auto"` is the machine's accelerator, or the CPU where there is none.

    A device type without an index takes the device number `local_rank` of this node. Raises
    `ConfigurationError` for a device that is not there.
    """
    if wanted == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        wanted = accelerator.type if accelerator is not None else "cpu"
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise ConfigurationError(f"device is {wanted!r}; expected 'auto', 'cpu', 'cuda', 'cuda:0', ...") from error
    if device.type == "cpu":
        return torch.device("cpu")
    available = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if available is None or available.type != device.type:
        there = available.type if available is not None else "only the CPU"
        raise ConfigurationError(f"device is {wanted!r}, but this machine has {there}. Use device='auto'.")
    index = device.index if device.index is not None else local_rank
    if index >= torch.accelerator.device_count():
        raise ConfigurationError(
            f"local rank {local_rank} needs {device.type}:{index}, but this machine has "
            f"{torch.accelerator.device_count()} of them. Start at most that many processes on it."
        )
    torch.accelerator.set_device_index(index)
    return torch.device(device.type, index)


def _default_backend(device: torch.device) -> str:
    try:
        return dist.get_default_backend_for_device(device)
    except ValueError as error:
        raise ConfigurationError(
            f"torch has no default backend of collectives for {device.type}; expected its name, as in backend='nccl'"
        ) from error


def _check_backend(backend: str) -> None:
    """Raise `ConfigurationError` for a name, of one backend or in "cpu:gloo,cuda:nccl", that this torch has not."""
    there = [name for name in dist.Backend.backend_list if name != "undefined" and dist.is_backend_available(name)]
    real = [name for name in there if name != "fake"]  # torch's own, for tests
    for name in (part.rpartition(":")[2] for part in backend.split(",")):
        if name.lower() not in there:
            raise ConfigurationError(
                f"backend is {backend!r}; expected one of {', '.join(real)}, which this torch has, or one for each "
                f"kind of device, as 'cpu:gloo,cuda:nccl'.{nearest(name, real)}"
            )


def join(device: str, backend: str | None, timeout: timedelta) -> World:
    """Join the process group that the environment describes, or find this process's place in the joined one.

    `backend` `None` is the default one of the device, with gloo beside it for the CPU. Collective.
    """
    placement = read_environment(os.environ)
    picked = pick_device(device, placement.local_rank)
    if not dist.is_initialized():
        # Imported once there is a group, as DistributedDataParallel does, it would keep that one for ever in its
        # arguments' defaults (`group=group.WORLD`): connections stay open, and ranks that wait in them are not woken.
        import torch.distributed.nn.functional  # noqa: F401

        if backend is None:
            default = _default_backend(picked)
            backend = default if picked.type == "cpu" else f"cpu:gloo,{picked.type}:{default}"
        _check_backend(backend)
        hook = sys.excepthook
        dist.init_process_group(
            backend,
            store=_store(placement, timeout),
            rank=placement.rank,
            world_size=placement.size,
            timeout=timeout,
            device_id=picked if picked.type == "cuda" else None,
        )
        if hook.__name__ == "_distributed_excepthook":  # torch's, of a group before: another would say [rank1]: again
            sys.excepthook = hook
        _default_store().set(_key("ours"), "1")
    _default_store().add(_key("members"), 1)
    if dist.get_world_size() != placement.size and placement.launcher != "none":
        raise LaunchError(
            f"the process group has {dist.get_world_size()} processes, but {placement.launcher} started "
            f"{placement.size}. Let Accelerator join the group, or join it with every process."
        )
    return World(
        rank=dist.get_rank(),
        size=dist.get_world_size(),
        local_rank=placement.local_rank,
        local_size=placement.local_size,
        device=picked,
        backend=dist.get_backend_config(),
    )


def leave() -> None:
    """Take back one `join`. With the last one the process group ends, unless the script made it by itself.

    Its threads must end before the interpreter does, and after the models that use it.
    """
    if not dist.is_initialized():
        return
    try:
        store = _default_store()
        if store.add(_key("members"), -1) > 0 or not store.check([_key("ours")]):
            return
    except RuntimeError:  # the store went with its host: nothing is left to share
        pass
    dist.destroy_process_group()


def close_groups() -> None:
    """End every process group and close its connections: ranks that wait in it get an error. Not a collective."""
    if dist.is_initialized():
        dist.destroy_process_group()
    if "torch.distributed.device_mesh" in sys.modules:
        from torch.distributed.device_mesh import DeviceMesh

        for item in gc.get_objects():  # caches of DTensor keep meshes for ever, and those of torch 2.13 their groups
            if type(item) is DeviceMesh:
                getattr(item, "_pg_registry", {}).clear()


@contextmanager
def named_failures(world: World | None = None) -> Iterator[None]:
    """Turn the backend's "connection closed" in this block into a `PeerLostError` that names the rank.

    Without `world`, that of the process group.
    """
    if (world is None or world.size > 1) and not dist.is_initialized():
        raise CollectiveError(
            "a collective was called after the process group was left. Call end_training() after the last one."
        )
    world = World(rank=dist.get_rank(), size=dist.get_world_size()) if world is None else world
    try:
        yield
    except RuntimeError as error:
        lost = explain_lost_peer(world, error)
        if lost is None:
            raise
        raise lost from error


def leave_last_words(world: World, error: BaseException, where: str = "") -> None:
    """Tell the other ranks why, and `where`, this one is about to go, for their `PeerLostError`. Not collective."""
    if world.size == 1 or not dist.is_initialized():
        return
    lines = str(error).strip().splitlines() or [""]
    # An error of a DataLoader's worker carries its whole traceback, whose last line says what happened.
    words = lines[0] if len(lines) == 1 else f"{lines[0]} ... {lines[-1]}"
    try:
        _default_store().set(_key("last_words"), f"{where}{type(error).__name__}: {words}"[:500])
    except RuntimeError:  # the store went with its host: there is nobody left to tell
        return


def take_back_last_words(world: World) -> None:
    """Note that the script has recovered from the error it left words about. Not collective."""
    if world.size > 1 and dist.is_initialized():
        for what in ("last_words", "alive"):
            _default_store().delete_key(_key(what))


def explain_lost_peer(world: World, error: RuntimeError) -> PeerLostError | None:
    """Name the ranks behind a failed collective, or `None` if `error` has another cause.

    Ranks that are alive answer a roll call in the job's store within a few seconds; the others are lost.
    """
    if world.size == 1 or isinstance(error, AcceleratorError) or not _LOST_CONNECTION.search(str(error)):
        return None
    if not dist.is_initialized():
        return None
    first_line = str(error).strip().splitlines()[0][:200]
    try:
        store = _default_store()
        store.set(_key("alive"), "1")
        missing = [rank for rank in range(world.size) if rank != world.rank]
        deadline = time.monotonic() + _ROLL_CALL_SECONDS
        while missing and time.monotonic() < deadline:
            missing = [rank for rank in missing if not store.check([f"accelerator/alive/{rank}"])]
            if any(store.check([f"accelerator/last_words/{rank}"]) for rank in missing):
                break
            time.sleep(0.05)
        words = {
            rank: store.get(f"accelerator/last_words/{rank}").decode()
            for rank in missing
            if store.check([f"accelerator/last_words/{rank}"])
        }
    except RuntimeError:
        return PeerLostError(
            f"rank {world.rank}: a collective failed and the job's store no longer answers: the process that hosts it "
            f"(rank 0, or the launcher) is gone. The backend said: {first_line}"
        )
    if not missing:
        if not re.search("timed out|timeout", first_line, re.IGNORECASE):
            return None
        return PeerLostError(
            f"rank {world.rank} waited in a collective until the timeout although every rank is alive: they are in "
            "different calls. Does one of them break, continue, branch or give weight= where others do not? "
            "hang_timeout=120 ends such a wait early and says where each rank is. The backend said: "
            f"{first_line}"
        )
    told = [
        f"rank {rank} left, it had raised {words[rank]}"
        if rank in words
        else f"rank {rank} left or did not answer within {_ROLL_CALL_SECONDS:.0f} s; look for its own error"
        for rank in missing
    ]
    return PeerLostError(
        f"rank {world.rank} waited in a collective that cannot end: {'; '.join(told)}. The backend said: {first_line}"
    )


def meeting_store() -> tuple[int, int, dist.Store]:
    """This process's rank, the number of processes, and a store of theirs that no process group owns. Every rank."""
    placement = read_environment(os.environ)
    return placement.rank, placement.size, _store(placement, timedelta(minutes=30))


def collectives_called() -> int:
    """How many collectives this process has called in the job's group; 0 where its backend does not count them."""
    try:
        group: Any = dist.distributed_c10d._get_default_group()  # its annotations lack what counts
        return int(group._get_sequence_number_for_group())
    except (RuntimeError, ValueError):
        return 0


def shared_store(seconds: float) -> dist.Store:
    """The job's store over a connection of its own, so that a thread need not wait for another's; it gives up then."""
    store: dist.Store = _default_store().clone()  # type: ignore[attr-defined]  # its annotations lack it
    store.set_timeout(timedelta(seconds=seconds))
    return store


def _key(what: str) -> str:
    """This rank's key in the store of the process group, where the process keeps what belongs to the group."""
    return f"accelerator/{what}/{dist.get_rank()}"


def _default_store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()


def _store(placement: Placement, timeout: timedelta) -> dist.Store:
    """The store through which the ranks find each other. A single process needs none but its own."""
    if placement.launcher == "none":
        return dist.HashStore()
    if placement.launcher == "slurm":
        host, port = _slurm_address(os.environ)
        store = dist.TCPStore(host, port, placement.size, is_master=placement.rank == 0, timeout=timeout)
        return _own_part(store, placement)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise LaunchError(f"WORLD_SIZE is set but {name} is not. Start the script with `accelerator launch`.")
    # torch's own handler knows when the agent hosts the store (TORCHELASTIC_USE_AGENT_STORE)
    store, _, _ = next(iter(dist.rendezvous("env://", placement.rank, placement.size, timeout=timeout)))
    return _own_part(cast(dist.Store, store), placement)


def _own_part(store: dist.Store, placement: Placement) -> dist.Store:
    """A part of the store that no earlier process group used, whose dead addresses gloo would try to reach.

    Groups of one process are told apart by counting. Attempts of an elastic job are told apart by the restart
    count, on one node only: with several, a node that joined late has another count than the others.
    """
    single_node = placement.size == placement.local_size
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if single_node else "0"
    group = store.add(f"accelerator/groups/{attempt}/{placement.rank}", 1)
    return dist.PrefixStore(f"accelerator/{attempt}/{group}", store)


def _integer(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name)
    if text is None:
        if default is None:
            raise LaunchError(f"{name} is not set, but the variables beside it are. Use `accelerator launch`.")
        return default
    try:
        return int(text)
    except ValueError:
        raise LaunchError(f"{name} is {text!r}; expected an integer") from None


def _tasks_on_node(tasks_per_node: str, node: int) -> int:
    """Element `node` of SLURM's compressed list, such as "4(x2),3"."""
    counts: list[int] = []
    for part in tasks_per_node.split(","):
        matched = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if matched is None:
            raise LaunchError(f"SLURM_STEP_TASKS_PER_NODE is {tasks_per_node!r}; expected a list such as '4(x2),3'")
        counts += [int(matched[1])] * int(matched[2] or 1)
    return counts[min(node, len(counts) - 1)]


def _slurm_address(environ: Mapping[str, str]) -> tuple[str, int]:
    """Host and port of rank 0's store: the first node of the step, and a port made from the job and step ids."""
    if "MASTER_ADDR" in environ:
        host = environ["MASTER_ADDR"]
    else:
        nodes = environ.get("SLURM_STEP_NODELIST", environ.get("SLURM_JOB_NODELIST", "localhost"))
        host = nodes if re.fullmatch(r"[\w.-]+", nodes) else _first_host(nodes)
        host = "127.0.0.1" if host == socket.gethostname() and environ.get("SLURM_NNODES", "1") == "1" else host
    if "MASTER_PORT" in environ:
        return host, _integer(environ, "MASTER_PORT")
    # Ports 20000 to 59999: below Linux's usual ephemeral range's end, above the well-known ones.
    job, step = _integer(environ, "SLURM_JOB_ID", default=0), _integer(environ, "SLURM_STEP_ID", default=0)
    return host, 20000 + (job * 101 + step) % 40000


def _first_host(nodes: str) -> str:
    """The first name of a compressed host list, expanded by SLURM itself."""
    try:
        listed = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], check=True, capture_output=True, text=True
        ).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise LaunchError(
            f"SLURM's node list is {nodes!r} and `scontrol show hostnames` cannot expand it ({error}). "
            "Set MASTER_ADDR to the host of the first task."
        ) from error
    return listed.splitlines()[0]
