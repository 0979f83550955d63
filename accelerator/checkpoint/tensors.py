"""Tensors through `torch.distributed.checkpoint`: each rank its part, read again by any number of ranks.

Its index, `.metadata`, is a pickle, and reading a pickle can run anything. Here only the classes that an index is
made of are let through, and nothing but tensors is read.
"""

from __future__ import annotations

import dataclasses
import functools
import pickle
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any, ClassVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from strategies import World, xla_layout, xla_planners
from strategies.errors import StateError

from .folder import Digested, FileEntry

_KNOWS_PLACES = hasattr(torch.serialization, "_is_meta_location")  # else torch.load reads what it puts on "meta"
_WORTH = 2**20
_CHECKPOINT = "torch.distributed.checkpoint"
_DTYPES = {name for name, value in vars(torch).items() if isinstance(value, torch.dtype | torch.layout)}
_ALLOWED = {
    (f"{_CHECKPOINT}.metadata", "Metadata"),
    (f"{_CHECKPOINT}.metadata", "MetadataIndex"),
    (f"{_CHECKPOINT}.metadata", "TensorStorageMetadata"),
    (f"{_CHECKPOINT}.metadata", "ChunkStorageMetadata"),
    (f"{_CHECKPOINT}.metadata", "TensorProperties"),
    (f"{_CHECKPOINT}.metadata", "StorageMeta"),
    (f"{_CHECKPOINT}.metadata", "_MEM_FORMAT_ENCODING"),
    (f"{_CHECKPOINT}.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("builtins", "set"),
} | {("torch", name) for name in _DTYPES}


_PythonsOwn: Any = pickle._Unpickler  # what typeshed knows of it differs from release to release


class _OnlyAnIndex(_PythonsOwn):  # type: ignore[misc]
    """Reads the classes of an index and refuses all others; gives values to none but their instances.

    Python's own unpickler, and not the one in C: a pickle can also set attributes of what it names, such as a class.
    """

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("pathlib") and name.endswith("Path"):  # where it was written, which nobody asks
            return lambda *parts: "/".join(parts)
        if (module, name) not in _ALLOWED:
            raise StateError(f"the index of the tensors names {module}.{name}, which no checkpoint needs: not read")
        return super().find_class(module, name)

    def load_build(self) -> None:
        """Set the attributes of a value, which must be of a class of the index."""
        target = self.stack[-2]
        if not dataclasses.is_dataclass(type(target)):
            raise StateError(f"the index of the tensors sets attributes of {target!r:.80}: not read")
        super().load_build()

    dispatch: ClassVar[Mapping[int, Any]] = {**_PythonsOwn.dispatch, pickle.BUILD[0]: load_build}


def stage(tensors: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in CPU memory, cut as the tensors are; in the memory of `before` where it has the same. Not a collective.

    What is on a device is copied by the stager of `torch.distributed.checkpoint`, but for torch_xla's, which is copied
    device by device and whole here.
    """
    on_device = {name: tensor for name, tensor in tensors.items() if tensor.device.type not in ("cpu", "xla")}
    staged: dict[str, Tensor] = {}
    if on_device:
        from torch.distributed.checkpoint.staging import BlockingAsyncStager

        staged.update(cast(dict[str, Tensor], BlockingAsyncStager().stage(on_device)))
    with torch.no_grad():
        for name, tensor in tensors.items():
            if name in on_device:
                continue
            held, kept = xla_layout.on_host(tensor) if tensor.device.type == "xla" else tensor, before.get(name)
            if kept is not None and _is_cut_alike(held, kept):
                staged[name] = kept.copy_(held)
            else:
                staged[name] = held.clone() if held is tensor else held
    return staged


def _is_cut_alike(one: Tensor, two: Tensor) -> bool:
    alike = type(one) is type(two) and one.shape == two.shape and one.dtype == two.dtype
    return alike and getattr(one, "placements", None) == getattr(two, "placements", None)


def write(
    tensors: Mapping[str, Tensor], folder: Path, world: World, group: dist.ProcessGroup | None = None
) -> dict[str, FileEntry]:
    """Write this rank's part of every tensor, over a process group; return the files that this rank wrote. Collective.

    What all ranks have is written once. The files are digested while they are written, and are on the disk at the end.
    """
    from torch.distributed.checkpoint import save
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.utils.serialization import config

    folder.mkdir(parents=True, exist_ok=True)
    writer = _writer(folder)
    without_sums = cast(Any, config).patch("save.compute_crc32", False)  # they cost more than the digests, and say less
    background = threading.current_thread() is not threading.main_thread()
    try:
        with nullcontext() if background else _quiet(), without_sums:  # filters of warnings belong to all threads
            if world.size == 1:
                _write_alone(cast(dict[str, Any], dict(tensors)), writer)
            else:
                save(cast(dict[str, Any], dict(tensors)), storage_writer=writer, process_group=group)
    except CheckpointException as error:  # derives from BaseException
        raise StateError(f"writing tensors failed: {_first_reason(error)}") from error
    except (OSError, RuntimeError) as error:
        raise StateError(f"writing tensors failed: {error!r}") from error
    return writer.fs.written()  # type: ignore[no-any-return]


def _writer(folder: Path) -> Any:
    """Torch's writer to a folder, which puts each file on the disk; its files are digested on their way."""
    from torch.distributed.checkpoint import FileSystemWriter
    from torch.distributed.checkpoint.filesystem import FileSystem

    class Files(FileSystem):
        def __init__(self) -> None:
            self._files: dict[str, Digested] = {}

        @contextmanager
        def create_stream(self, path: Any, mode: str) -> Any:
            with super().create_stream(path, mode) as raw:
                self._files[Path(path).name] = file = Digested(raw)  # type: ignore[arg-type]
                yield file

        def rename(self, path: Any, new_path: Any) -> None:
            super().rename(path, new_path)
            self._files[Path(new_path).name] = self._files.pop(Path(path).name)

        def written(self) -> dict[str, FileEntry]:
            return {name: file.entry for name, file in self._files.items()}

        def failure(self) -> OSError | None:
            return next((file.failure for file in self._files.values() if file.failure is not None), None)

    class Writer(FileSystemWriter):
        def write_data(self, *arguments: Any, **named: Any) -> Any:
            try:
                return super().write_data(*arguments, **named)
            except Exception as error:  # of a full disk torch says "unexpected pos"
                raise files.failure() or error from error

    files = Files()
    writer = Writer(folder)
    writer.fs = files
    return writer


def _write_alone(tensors: dict[str, Any], writer: Any) -> None:
    """What `save` of torch does on one process, without its warning that there is one."""
    from torch.distributed.checkpoint import DefaultSavePlanner

    planner = xla_planners.save_planner() if _is_on_xla(tensors) else DefaultSavePlanner()
    planner.set_up_planner(tensors, is_coordinator=True)
    writer.set_up_storage_writer(True)
    plan = writer.prepare_local_plan(planner.create_local_plan())
    plans, metadata = planner.create_global_plan([plan])
    plan = planner.finish_plan(writer.prepare_global_plan(plans)[0])
    results = writer.write_data(plan, planner)
    results.wait()
    writer.finish(metadata, [results.value()])


def read(tensors: Mapping[str, Tensor], folder: Path, world: World, reader: Any = None) -> None:
    """Read this rank's part of every tensor into its place. Collective.

    `reader`: of the folder, from `reader_of`, for whoever reads from it many times.
    """
    from torch.distributed.checkpoint import DefaultLoadPlanner, load
    from torch.distributed.checkpoint.api import CheckpointException

    planner = xla_planners.load_planner() if _is_on_xla(tensors) else DefaultLoadPlanner()
    wanted = cast(dict[str, Any], dict(tensors))
    try:
        with _quiet():
            load(wanted, storage_reader=reader or reader_of(folder), planner=planner, no_dist=world.size == 1)
    except CheckpointException as error:
        raise StateError(f"reading tensors failed: {_first_reason(error)}") from error


def index_of(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of every tensor in the folder. Raises `StateError` for anything but tensors there."""
    metadata = _metadata_of(folder)
    return {name: (item.size, item.properties.dtype) for name, item in metadata.state_dict_metadata.items()}


def files_of(folder: Path) -> set[str]:
    """The names of the files that the index of the folder needs."""
    return {place.relative_path for place in (_metadata_of(folder).storage_data or {}).values()}


def reader_of(folder: Path) -> Any:
    """What `torch.distributed.checkpoint` reads the folder with; it reads the index once, and checks it."""
    from torch.distributed.checkpoint import FileSystemReader

    class Reader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            return self._checked

        @functools.cached_property
        def _checked(self) -> Any:
            return _metadata_of(folder)

        def read_data(self, plan: Any, planner: Any) -> Any:
            rest = [item for item in plan.items if not self._read_straight(item, planner)]
            return super().read_data(dataclasses.replace(plan, items=rest), planner)

        def _read_straight(self, item: Any, planner: Any) -> bool:
            """Read large numbers from the file to their place; torch's way makes a tensor of them, and copies that."""
            target, stored = planner.resolve_tensor(item).detach(), self.storage_data[item.storage_index]
            if not _KNOWS_PLACES or target.nbytes < _WORTH or not _is_plain(target):
                return False
            with (folder / stored.relative_path).open("rb", buffering=0) as file:
                found = torch.load(self._slice_file(file, stored), map_location="meta", weights_only=True)
                start = found.untyped_storage()._checkpoint_offset
                file.seek(stored.offset)
                if sys.byteorder.encode() not in file.read(start) or not _is_cut_in_rows(found, target, item):
                    return False
                file.seek(stored.offset + start + item.storage_offsets[0] * found.stride(0) * found.itemsize)
                _fill(target, file)
            planner.commit_tensor(item, target)
            return True

    return Reader(folder)


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) is Tensor and tensor.device.type == "cpu" and tensor.ndim > 0 and tensor.is_contiguous()


def _is_cut_in_rows(stored: Tensor, target: Tensor, item: Any) -> bool:
    """Whether `target` is rows of what is in the file, one behind the other there as well."""
    alike = type(stored) is Tensor and stored.dtype == target.dtype and stored.shape[1:] == target.shape[1:]
    at_begin = stored.ndim > 0 and stored.storage_offset() == 0 and stored.is_contiguous()
    return alike and at_begin and item.lengths == target.shape and item.storage_offsets[0] + len(target) <= len(stored)


def _fill(target: Tensor, file: IO[bytes]) -> None:
    memory = target.flatten().view(torch.uint8).numpy().data
    while memory:
        read = file.readinto(memory)  # type: ignore[attr-defined]
        if not read:
            raise EOFError("a file of tensors ends early")
        memory = memory[read:]
    target[:0].zero_()  # for autograd, which is to know that the numbers are others now


def _metadata_of(folder: Path) -> Any:
    from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

    try:
        with (folder / ".metadata").open("rb") as file:
            metadata = _OnlyAnIndex(file).load()
        if not isinstance(metadata, Metadata):
            raise StateError(f"the index of the tensors in {str(folder)!r} is a {type(metadata).__name__}")
        for name, item in metadata.state_dict_metadata.items():
            if not isinstance(item, TensorStorageMetadata):
                raise StateError(f"{name} in {str(folder)!r} is no tensor, and nothing else is read from there")
        for place in (metadata.storage_data or {}).values():
            if Path(place.relative_path).name != place.relative_path:
                raise StateError(f"the index in {str(folder)!r} leads elsewhere: {place.relative_path!r}")
            if getattr(place, "transform_descriptors", None):
                raise StateError(f"the index in {str(folder)!r} asks for {place.transform_descriptors!r}")
    except StateError:
        raise
    except Exception as error:  # a forged one can fail anywhere
        raise StateError(f"the index of the tensors in {str(folder)!r} cannot be read: {error!r}") from error
    metadata.storage_meta = None
    return metadata


def _is_on_xla(tensors: Mapping[str, Tensor]) -> bool:
    """Whether any is on a device of torch_xla, which `torch.distributed.checkpoint` reaches through its planners."""
    return any(tensor.device.type == "xla" for tensor in tensors.values())


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warnings that it saves in one process, which is what is meant, and of its own deprecations."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="TypedStorage is deprecated")  # torch 2.9
        warnings.filterwarnings("ignore", message="Using a non-tuple sequence")  # torch_xla 2.9
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


def _first_reason(error: Any) -> str:
    failures = getattr(error, "failures", {})
    for rank, (reason, _) in sorted(failures.items()):
        return f"rank {rank}: {reason!r}"
    return repr(error)
