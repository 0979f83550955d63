"""A checkpoint on disk: a folder that is there as a whole or not at all, with a digest of every file in it.

Files are written into a hidden folder beside their place. `manifest.json`, written last, names every file with its
size and digest (xxh3, 128 bits); then everything is flushed to the disk and one rename puts the folder in its
place. A folder without a manifest that fits is no checkpoint.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import xxhash

from strategies.errors import StateError, listed

FORMAT = 1
MANIFEST, CERTIFICATE = "manifest.json", "certificate.json"
_NAME = re.compile(r"step-(\d{9})")
_HIDDEN = ".writing-"
OLD = ".old-"
_BESIDE = {MANIFEST, CERTIFICATE, f".{CERTIFICATE}.new"}
_OF_A_CHECKPOINT = re.compile(
    r"manifest\.json|state\.json|\.?certificate\.json(\.new)?|tensors/(\.metadata|[^/]+\.distcp)"
)
_OPEN = "/proc/self/fd/"
_ELSEWHERE = "Name a folder that is not there yet, or an older checkpoint."
_BLOCK = 2**20  # fits the cache of a core: what was digested there is written from there


@dataclass(frozen=True)
class FileEntry:
    """One file as the manifest knows it."""

    size: int
    digest: str


class Digested:
    """A binary file that is written through it from its begin to its end, and digested on the way."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._digest = xxhash.xxh3_128()
        self._size = 0
        self.failure: OSError | None = None  # torch's writer of zip files keeps no reason

    @property
    def entry(self) -> FileEntry:
        """What was written so far."""
        return FileEntry(self._size, self._digest.hexdigest())

    def write(self, data: Any) -> int:
        """Append bytes, or what gives its memory as bytes."""
        view = memoryview(data)
        for start in range(0, len(view), _BLOCK):
            block = view[start : start + _BLOCK]
            self._digest.update(block)
            try:
                self._file.write(block)
            except OSError as error:
                self.failure = error
                raise
        self._size += len(view)
        return len(view)

    def tell(self) -> int:
        """How many bytes were written."""
        return self._size

    def flush(self) -> None:
        """Hand all to the system."""
        self._file.flush()

    def fileno(self) -> int:
        """The descriptor of the file, of which the system has all by now: torch asks for it to put it on the disk."""
        self.flush()
        return self._file.fileno()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def write_file(path: Path, content: bytes) -> FileEntry:
    """Write a file and put it on the disk."""
    with path.open("wb") as raw:
        file = Digested(raw)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return file.entry


def name_of(step: int) -> str:
    """The name of the folder for an optimizer step."""
    return f"step-{step:09d}"


def step_of(folder: Path) -> int | None:
    """The optimizer step in a folder's name; `None` for a name of another kind."""
    found = _NAME.fullmatch(folder.name)
    return int(found[1]) if found else None


def newest_first(parent: Path) -> list[Path]:
    """The checkpoints below `parent`, the one written last first. Whether they are whole is not looked at.

    The time counts, not the step: after going back, a run writes lower steps than those that it has abandoned.
    """
    return sorted(all_in(parent), key=lambda path: (_written_at(path), path.name), reverse=True)


def all_in(parent: Path) -> list[Path]:
    """The folders below `parent` that are called like checkpoints, in no order."""
    if not parent.is_dir():
        return []
    return [path for path in parent.iterdir() if step_of(path) is not None and path.is_dir()]


def _written_at(path: Path) -> float:
    try:
        return float(json.loads((path / MANIFEST).read_text())["time"])
    except (OSError, ValueError, KeyError, TypeError):  # a broken one, or deleted just now
        return path.stat().st_mtime if path.exists() else 0.0


def hidden_beside(target: Path, token: str) -> Path:
    """Where the files of `target` are written until it is whole; `token` tells this attempt from all others."""
    return target.with_name(f"{_HIDDEN}{target.name}.{token}")


def entry_of(path: Path) -> FileEntry:
    """Size and digest of a file, read block by block."""
    digest = xxhash.xxh3_128()
    size = 0
    block = memoryview(bytearray(_BLOCK))  # one for all: new memory for each costs more than the digest
    with path.open("rb", buffering=0) as file:
        while read := file.readinto(block):
            digest.update(block[:read])
            size += read
    return FileEntry(size, digest.hexdigest())


def flush(path: Path) -> None:
    """Have the system put the names in a folder on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def commit(hidden: Path, target: Path, files: Mapping[str, FileEntry], about: Mapping[str, Any]) -> None:
    """Write the manifest of the files in `hidden`, and put the folder in its place as `target`. One rank calls it."""
    entries = {name: {"size": entry.size, "xxh3_128": entry.digest} for name, entry in sorted(files.items())}
    body = {"format": FORMAT, **about, "files": entries}
    write_file(hidden / MANIFEST, json.dumps({**body, "digest": digest_of(body)}, indent=1).encode())
    for folder in {(hidden / name).parent for name in files} | {hidden}:
        flush(folder)
    if target.exists():  # an older one of the same step: out of the way in one rename, and only then deleted
        old = target.with_name(OLD + target.name)
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
        hidden.rename(target)
        _delete(old)
    else:
        hidden.rename(target)
    flush(target.parent)


def refuse_loss(target: Path, project_dir: Path | None) -> None:
    """Raise `StateError` if a checkpoint in the place of `target` would delete anything but an older checkpoint."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise StateError(
            f"{str(target)!r} is a {'link' if target.is_symlink() else 'file'}; expected a folder, or nothing"
        )
    if not target.exists():
        return
    inside = [project_dir.resolve()] if project_dir is not None else []
    with contextlib.suppress(FileNotFoundError):  # it was deleted
        inside.append(Path.cwd())
    for path in inside:
        if path.is_relative_to(target.resolve()):
            raise StateError(f"{str(target)!r} holds {str(path)!r}, which a checkpoint would replace. {_ELSEWHERE}")
    is_one, foreign = foreign_in(target)
    if foreign and is_one:
        raise StateError(
            f"{str(target)!r} is a checkpoint, and {listed(foreign[:5])} in it would be deleted. Move it first, or "
            "save elsewhere."
        )
    if foreign:
        raise StateError(
            f"{str(target)!r} is no checkpoint, or holds more than one: {listed(foreign[:5])}. Saving there would "
            f"delete it. {_ELSEWHERE}"
        )


def foreign_in(target: Path) -> tuple[bool, list[str]]:
    """Whether a folder is a checkpoint by its manifest, and the files in it that no checkpoint has put there."""
    found = [path for path in target.rglob("*") if path.is_symlink() or not path.is_dir()]
    names = {path.relative_to(target).as_posix() for path in found}
    try:
        return True, sorted(names - {*read_manifest(target)["files"], *_BESIDE})
    except StateError:  # a broken one is known by its name, or those of its files
        is_broken = step_of(target) is not None or {"state.json", "tensors/.metadata"} <= names
        return False, sorted(name for name in names if not (is_broken and _OF_A_CHECKPOINT.fullmatch(name)))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint. Raises `StateError` if there is none, or if it is not as it was written."""
    path = folder / MANIFEST
    if path.is_symlink():
        raise StateError(f"{str(path)!r} is not as it was written")
    try:
        read = json.loads(path.read_text())
        body = {key: value for key, value in read.items() if key != "digest"}
        good = read["digest"] == digest_of(body)
        files, version = body["files"], body["format"]
        well_formed = all(_is_plain(name) and {"size", "xxh3_128"} <= entry.keys() for name, entry in files.items())
    except FileNotFoundError:
        raise StateError(f"{str(folder)!r} has no {MANIFEST}; it was never finished, or is no checkpoint") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StateError(f"{str(path)!r} cannot be read as a manifest: {error!r}") from error
    if not good or not well_formed:
        raise StateError(f"{str(path)!r} is not as it was written")
    if version != FORMAT:
        raise StateError(
            f"{str(folder)!r} has format {version}, and this release reads {FORMAT}. Read it with the release that "
            f"wrote it ({body.get('versions', {}).get('accelerator', 'not noted')})."
        )
    return body


def is_newer(folder: Path) -> bool:
    """Whether a checkpoint is of a later release, and its manifest as that wrote it."""
    try:
        read = json.loads((folder / MANIFEST).read_text())
        good = read["digest"] == digest_of({key: value for key, value in read.items() if key != "digest"})
        return good and isinstance(read["format"], int) and read["format"] > FORMAT
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def what_is_wrong(folder: Path, manifest: Mapping[str, Any], rank: int = 0, size: int = 1) -> list[str]:
    """What differs from the manifest, among every `size`-th file; nothing if all is as it was written."""
    wrong = []
    for index, (name, expected) in enumerate(manifest["files"].items()):
        if index % size != rank:
            continue
        path = folder / name
        if path.is_symlink() or not path.is_file():
            wrong.append(f"{name} is missing")
            continue
        if path.stat().st_size != expected["size"]:
            wrong.append(f"{name} has {path.stat().st_size} bytes instead of {expected['size']}")
        elif entry_of(path).digest != expected["xxh3_128"]:
            wrong.append(f"{name} has other contents than were written")
    return wrong


def half_exchanged(parent: Path, name: str | None = None) -> list[Path]:
    """The places of those of which the older one is out of the way and the new one not there, of `name` or any step."""
    places = [old.with_name(old.name.removeprefix(OLD)) for old in parent.glob(f"{OLD}*") if (old / MANIFEST).exists()]
    return [place for place in places if _is_one(place.name, name) and not place.exists()]


def clear_up(parent: Path, name: str | None = None) -> None:
    """Undo exchanges of `name`, or of every step, that were killed in the middle, and delete what is left of saves.

    To be called by the only writer of those.
    """
    for place in half_exchanged(parent, name):
        place.with_name(OLD + place.name).rename(place)
    left = [(path, path.name.removeprefix(OLD)) for path in parent.glob(f"{OLD}*")]
    left += [(path, path.name.removeprefix(_HIDDEN).rpartition(".")[0]) for path in parent.glob(f"{_HIDDEN}*")]
    for path, of in left:
        if _is_one(of, name):
            _delete(path)


def _is_one(of: str, name: str | None) -> bool:
    return of == name if name is not None else _NAME.fullmatch(of) is not None


def remove(folder: Path) -> None:
    """Delete a checkpoint, out of sight in one rename first: half of one is never seen. One that is read stays."""
    old = folder.with_name(OLD + folder.name)
    with _unread(folder) as unread:
        if unread:
            shutil.rmtree(old, ignore_errors=True)
            (folder / MANIFEST).unlink(missing_ok=True)  # else it might be brought back
            folder.rename(old)
            shutil.rmtree(old, ignore_errors=True)


def _delete(folder: Path) -> None:
    """Delete what is out of sight, unless somebody reads it: whoever clears up next does it then."""
    with _unread(folder) as unread:
        if unread:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def held(folder: Path) -> Iterator[Path]:
    """A path of the checkpoint that `folder` is now, for the block: not replaced by what is saved there, nor deleted.

    `folder` itself where there is none, and on systems that know no path of an open folder.
    """
    with contextlib.ExitStack() as stack:
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            yield folder
            return
        stack.callback(os.close, descriptor)
        with contextlib.suppress(OSError):  # it is just being deleted, or the file system has no locks
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        here = Path(f"{_OPEN}{descriptor}")
        try:
            yield here if here.is_dir() else folder
        except StateError as error:  # of any rank, whose descriptor may be another
            raise StateError(re.sub(rf"{_OPEN}\d+", lambda _: str(folder), str(error))) from error


@contextlib.contextmanager
def _unread(folder: Path) -> Iterator[bool]:
    """Whether nobody holds `folder`; if so, nobody begins to for the block."""
    with contextlib.ExitStack() as stack:
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:  # a file system without locks
            pass
        yield True


def _is_plain(name: str) -> bool:
    """Whether the path leads to a file inside the folder."""
    parts = Path(name).parts
    return bool(parts) and not Path(name).is_absolute() and ".." not in parts


def digest_of(body: Mapping[str, Any]) -> str:
    """What a manifest, and so every file that it names, is known by."""
    return xxhash.xxh3_128(json.dumps(body, sort_keys=True).encode()).hexdigest()
