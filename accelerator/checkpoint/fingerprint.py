"""A batch known by its contents: one digest of all of it, and one sum over its samples, in whatever order they come."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from strategies.sources import Cursor
from strategies.tree import describe, iterate_leaves, iterate_tensors, num_samples

_PLAIN = (str, bytes, int, float, bool, np.generic, type(None))


@dataclass(frozen=True)
class Fingerprint:
    """What this rank was given, and from where.

    `place` is the position in the epoch before the global batch; `None` for a stream. `samples` is 0 for a ghost.
    `shape` are the shapes of the samples. `total` is the sum of a digest of each sample, modulo 2^64: the same for the
    same samples, over however many ranks they are dealt. All but `digest` and `total` serve to say what differs.
    """

    epoch: int
    place: int | None
    samples: int
    shape: str
    digest: str
    total: int


def fingerprint(batch: Any, cursor: Cursor) -> Fingerprint | None:
    """The fingerprint of a batch that the loop was given; `None` if there is nothing in it that can be read.

    Waits for a batch that is on a device.
    """
    whole = xxhash.xxh3_128(describe(batch).encode())
    number = num_samples(batch) or 0
    of_samples = [b""] * number
    something = False
    for tensor in iterate_tensors(batch):
        content = _bytes_of(tensor)
        if content is None:
            continue
        something = True
        whole.update(content)
        if number and tensor.ndim and len(tensor) == number:
            rows = memoryview(content).cast("B")
            width = len(rows) // number
            for index in range(number):
                of_samples[index] += xxhash.xxh3_64_digest(rows[index * width : (index + 1) * width])
    for leaf in iterate_leaves(batch):
        if isinstance(leaf, _PLAIN):
            something = True
            whole.update(repr(leaf).encode())
        elif isinstance(leaf, np.ndarray) and not leaf.dtype.hasobject:
            something = True
            whole.update(f"{leaf.dtype.str} {leaf.shape}".encode())
            whole.update(np.ascontiguousarray(leaf).tobytes())
    if not something:
        return None
    total = sum(xxhash.xxh3_64_intdigest(sample) for sample in of_samples) % 2**64
    place = None if cursor.cut is None else cursor.cut.position_after(cursor.index - 1)
    samples = cursor.samples
    shape = ", ".join(describe(tensor, any_length_of=0) for tensor in iterate_tensors(batch))
    return Fingerprint(cursor.epoch, place, samples, shape, whole.hexdigest(), total if samples else 0)


def _bytes_of(tensor: Tensor) -> Any:
    """The elements in CPU memory; `None` of a kind that has no such memory."""
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested or tensor.is_meta:
        return None
    held = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return held.reshape(-1).view(torch.uint8).numpy() if held.numel() else b""
