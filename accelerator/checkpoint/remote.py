"""Checkpoints at a URL of `fsspec`: copied to each machine, verified there, and read from there."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from strategies.errors import StateError

from . import folder as folders
from .peers import Peers


def is_url(place: str) -> bool:
    """Whether `place` is a URL, or what `Path` makes of one, `s3:/bucket`, and no path on this machine."""
    return "://" in place or re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", place) is not None


@contextmanager
def fetched(url: str, peers: Peers) -> Iterator[Path]:
    """A temporary folder on this machine with the files of the checkpoint at `url`, for the block. Collective.

    One process of each machine copies them. They are not verified yet. Raises `StateError` on every rank if one of
    them cannot be read; what is raised in the block names the URL.
    """
    world = peers.world
    with ExitStack() as stack:

        def fetch() -> str:
            if not world.is_local_main:
                return ""
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="checkpoint-"))
            _fetch(url, Path(folder))
            return folder

        folder = peers.each(fetch)[world.rank - world.local_rank]
        try:
            yield Path(folder)
        except StateError as error:
            raise StateError(str(error).replace(folder, url)) from error
        peers.gather(None)  # all have read it


def _fetch(url: str, folder: Path) -> None:
    """Copy the manifest, and the files that it names, if they have the sizes that it says."""
    try:
        system, place = _open(url)
        system.get_file(f"{place}/{folders.MANIFEST}", str(folder / folders.MANIFEST))
        for name, entry in folders.read_manifest(folder)["files"].items():
            size = system.size(f"{place}/{name}")
            if size != entry["size"]:
                raise StateError(f"{url!r} is not as it was written: {name} has {size} bytes, not {entry['size']}")
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            system.get_file(f"{place}/{name}", str(folder / name))
        if system.exists(f"{place}/{folders.CERTIFICATE}"):
            system.get_file(f"{place}/{folders.CERTIFICATE}", str(folder / folders.CERTIFICATE))
    except StateError as error:
        raise StateError(str(error).replace(str(folder), url)) from error
    except Exception as error:  # every file system has errors of its own
        raise StateError(f"the checkpoint at {url!r} cannot be read: {error!r}") from error


def _open(url: str) -> tuple[Any, str]:
    import fsspec  # type: ignore[import-untyped,unused-ignore]

    system, place = fsspec.core.url_to_fs(url)
    system.invalidate_cache()
    return system, place.rstrip("/")
