"""Collectives over real processes: every nesting, every dtype, and errors instead of garbage."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from rank_pool import RankPool
from strategies import DDP, CollectiveError, ShapeMismatchError, World, collectives

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]
REDUCED = [
    torch.uint8,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
]


class Pair(NamedTuple):
    left: Any
    right: Any


@dataclasses.dataclass
class Batch:
    inputs: Tensor
    name: str = "batch"


def join() -> World:
    return DDP(device="cpu").setup()


def of_rank(rank: int) -> Tensor:
    return torch.tensor([[rank, 1], [0, 2]])


def gather_every_dtype() -> list[Any]:
    world = join()
    gathered = [collectives.gather(of_rank(world.rank).to(dtype), world) for dtype in DTYPES]
    return [(tensor.dtype, tensor.to(torch.complex128).tolist()) for tensor in gathered]


def test_every_dtype_is_gathered(ranks: RankPool) -> None:
    both = torch.cat([of_rank(0), of_rank(1)])
    expected = [(dtype, both.to(dtype).to(torch.complex128).tolist()) for dtype in DTYPES]
    assert ranks(gather_every_dtype) == [expected, expected]


def gather_nested() -> Any:
    world = join()
    tree = {"pair": Pair(torch.ones(1) * world.rank, [torch.tensor(world.rank)]), "none": None}
    return collectives.gather(tree, world)


def test_a_nesting_is_gathered_and_scalars_become_one_per_rank(ranks: RankPool) -> None:
    for gathered in ranks(gather_nested, nproc=3):
        assert isinstance(gathered["pair"], Pair)
        assert gathered["pair"].left.tolist() == [0, 1, 2]
        assert gathered["pair"].right[0].tolist() == [0, 1, 2]
        assert gathered["none"] is None


def gather_unusual() -> list[list[Any]]:
    world = join()
    held = torch.arange(12.0).reshape(3, 4) + world.rank
    unusual = [
        held.T,
        held[:, ::2],
        held[1:1],
        held[:1, 0],
        torch.nn.Parameter(held),
        held[:1].expand(2, 4),
        -1j * held.to(torch.complex64),
    ]
    gathered = [collectives.gather(tensor, world) for tensor in unusual]
    assert not any(tensor.requires_grad for tensor in gathered)
    return [tensor.tolist() for tensor in gathered]


def test_views_empty_tensors_and_parameters_are_gathered(ranks: RankPool) -> None:
    both = [torch.arange(12.0).reshape(3, 4) + rank for rank in range(2)]
    makers: list[Callable[[Tensor], Tensor]] = [
        lambda t: t.T,
        lambda t: t[:, ::2],
        lambda t: t[1:1],
        lambda t: t[:1, 0],
        lambda t: t,
        lambda t: t[:1].expand(2, 4),
        lambda t: -1j * t.to(torch.complex64),
    ]
    expected = [torch.cat([make(tensor) for tensor in both]).tolist() for make in makers]
    assert ranks(gather_unusual) == [expected, expected]


def bring(kind: str) -> None:
    world = join()
    rank = world.rank
    trees: dict[str, Callable[[], Any]] = {
        "shape": lambda: torch.zeros(2 + rank),
        "trailing": lambda: torch.zeros(2, 2 + rank),
        "dimensions": lambda: torch.zeros([2] * (1 + rank)),
        "dtype": lambda: torch.zeros(2, dtype=[torch.float32, torch.float64][rank]),
        "number": lambda: [torch.zeros(2)] * (1 + rank),
        "nothing": lambda: [torch.zeros(2)] if rank else [],
        "none": lambda: {"a": torch.zeros(2) if rank else None},
    }
    act = {"gather": collectives.gather, "reduce": collectives.reduce}
    act["uneven"] = lambda tree, world: collectives.gather_uneven(tree, world, keep=True)
    name, _, operation = kind.partition(" ")
    act[operation](trees[name](), world)


@pytest.mark.parametrize("operation", ["gather", "reduce"])
@pytest.mark.parametrize("kind", ["shape", "trailing", "dimensions", "dtype", "number", "nothing", "none"])
def test_unequal_tensors_are_an_error_on_every_rank_naming_each(ranks: RankPool, kind: str, operation: str) -> None:
    for error in ranks(bring, f"{kind} {operation}", return_exceptions=True):
        assert isinstance(error, ShapeMismatchError), error
        assert "rank 0: " in str(error)
        assert "rank 1: " in str(error)
    if kind == "shape":
        assert "rank 0: (2,) float32; rank 1: (3,) float32" in str(error)
        assert "pad_across_processes" in str(error)


@pytest.mark.parametrize("kind", ["trailing", "dimensions", "dtype", "number"])
def test_unequal_trailing_dimensions_are_an_error_on_every_rank(ranks: RankPool, kind: str) -> None:
    for error in ranks(bring, f"{kind} uneven", return_exceptions=True):
        assert isinstance(error, ShapeMismatchError), error
        assert "rank 0: " in str(error)
        assert "rank 1: " in str(error)


def test_ranks_go_on_after_a_mismatch(ranks: RankPool) -> None:
    assert ranks(gather_after_a_mismatch) == [[0, 0, 1, 1]] * 2


def gather_after_a_mismatch() -> list[float]:
    world = join()
    with pytest.raises(ShapeMismatchError):
        collectives.gather(torch.zeros(1 + world.rank), world)
    return collectives.gather(torch.full((2,), float(world.rank)), world).tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("wrong", [1, "text", [torch.zeros(1), 2.0]])
def test_what_is_no_tensor_is_refused(wrong: object) -> None:
    for function in (collectives.gather, collectives.reduce):
        with pytest.raises(
            CollectiveError, match=r"a collective got (int|str|float) .*; expected tensors in any nesting"
        ):
            function(wrong, World())


def reduce_all() -> dict[str, Any]:
    world = join()
    value = of_rank(world.rank)
    given = {"float": value.float(), "nested": [Pair(value, value.double())]}
    before = given["float"].clone()
    results = {
        "sum": collectives.reduce(given, world),
        "mean": collectives.reduce(given, world, reduction="mean"),
        "scaled": collectives.reduce(given, world, reduction="mean", scale=0.5),
        "dtypes": [collectives.reduce(value.to(dtype), world) for dtype in REDUCED],
    }
    assert torch.equal(given["float"], before)
    return results


def test_reduction_sums_averages_and_scales(ranks: RankPool) -> None:
    total = of_rank(0) + of_rank(1) + of_rank(2)
    for results in ranks(reduce_all, nproc=3):
        assert results["sum"]["float"].tolist() == total.tolist()
        assert results["sum"]["nested"][0].left.tolist() == total.tolist()
        assert torch.allclose(results["mean"]["nested"][0].right, total.double() / 3)
        assert torch.allclose(results["scaled"]["float"], total / 6)
        for dtype, result in zip(REDUCED, results["dtypes"], strict=True):
            assert result.dtype is dtype
            assert result.to(torch.complex128).tolist() == total.to(torch.complex128).tolist()


def test_an_unknown_reduction_is_refused() -> None:
    with pytest.raises(CollectiveError, match="reduction is 'max'; expected 'sum' or 'mean'"):
        collectives.reduce(torch.ones(1), World(), reduction="max")  # type: ignore[arg-type]  # that is the point


def test_one_process_gets_what_many_would_get() -> None:
    world = World()
    tensor = torch.tensor([[1.0, 2.0]], requires_grad=True)
    assert collectives.gather(torch.tensor(3), world).tolist() == [3]
    assert collectives.gather(tensor, world).tolist() == [[1, 2]]
    assert not collectives.gather(tensor, world).requires_grad
    assert collectives.gather_uneven(["a", "b"], world, keep=True) == ["a", "b"]
    assert collectives.gather_uneven("text", world, keep=True) == ["text"]
    reduced = collectives.reduce(tensor, world, reduction="mean", scale=2.0)
    assert reduced.tolist() == [[2, 4]]
    assert collectives.pad_across_processes(tensor, world) is tensor
    assert collectives.any_true(True, world)
    collectives.barrier(world)


def broadcast_all() -> list[Any]:
    world = join()
    tree = Batch(torch.ones(2, 2).T * world.rank, f"of rank {world.rank}"), {"dtypes": [], "set": {world.rank}}
    if world.is_main:
        tree[1]["dtypes"] = [torch.tensor([0, 1, 2]).to(dtype) for dtype in (torch.bool, torch.int64, torch.bfloat16)]
        tree[1]["scalar"] = torch.tensor(5, dtype=torch.uint8)
    return [collectives.broadcast(tree, world), collectives.broadcast("text" * (1 + world.rank), world)]


def test_every_rank_gets_the_first_ones_tensors_and_objects(ranks: RankPool) -> None:
    for (batch, rest), text in ranks(broadcast_all):
        assert text == "text"
        assert batch.inputs.tolist() == [[0, 0], [0, 0]]
        assert batch.name == "of rank 0"
        assert rest["set"] == {0}
        assert rest["scalar"].item() == 5
        assert [(tensor.dtype, tensor.tolist()) for tensor in rest["dtypes"]] == [
            (torch.bool, [False, True, True]),
            (torch.int64, [0, 1, 2]),
            (torch.bfloat16, [0, 1, 2]),
        ]


def pad_all() -> list[Any]:
    world = join()
    tensor = torch.full((1 + world.rank, 2), world.rank)
    tree = {"ids": tensor, "mask": [tensor.T == 1]}
    return [
        collectives.pad_across_processes(tree, world)["ids"].tolist(),
        collectives.pad_across_processes(tree, world, pad_index=-1, pad_first=True)["ids"].tolist(),
        collectives.pad_across_processes(tree["mask"], world, dim=-1)[0].tolist(),
        collectives.gather(collectives.pad_across_processes(tensor, world), world).shape,
    ]


def test_padding_reaches_the_longest_of_all_ranks(ranks: RankPool) -> None:
    first, second = ranks(pad_all)
    assert first == [[[0, 0], [0, 0]], [[-1, -1], [0, 0]], [[False, False], [False, False]], (4, 2)]
    assert second == [[[1, 1], [1, 1]], [[1, 1], [1, 1]], [[True, True], [True, True]], (4, 2)]


def test_padding_along_a_dimension_that_is_not_there_is_refused() -> None:
    for dim in (1, -2):
        with pytest.raises(CollectiveError, match=f"dim is {dim}, but a tensor to pad has 1 dimensions"):
            collectives.pad_across_processes(torch.ones(2), World(), dim=dim)


def gather_lengths() -> list[Any]:
    world = join()
    rank = world.rank
    lengths = torch.full((rank * 2, 2), float(rank))
    words = [f"{rank}{letter}" for letter in "ab"[: 1 + rank % 2]]
    keep = rank != 1
    return [
        collectives.gather_uneven(lengths, world, keep=True).tolist(),
        collectives.gather_uneven({"ids": lengths, "scalar": torch.tensor(rank)}, world, keep=keep)["scalar"].tolist(),
        collectives.gather_uneven(words, world, keep=True),
        collectives.gather_uneven(words, world, keep=keep),
        collectives.gather_uneven((rank, {"rank": rank}), world, keep=keep),
        [tensor.tolist() for tensor in collectives.gather_uneven([lengths, lengths + 1], world, keep=keep)],
    ]


def test_any_lengths_are_gathered_and_ranks_without_samples_left_out(ranks: RankPool) -> None:
    expected = [
        [[1, 1]] * 2 + [[2, 2]] * 4,
        [0, 2],
        ["0a", "1a", "1b", "2a"],
        ["0a", "2a"],
        [(0, {"rank": 0}), (2, {"rank": 2})],
        [[[2, 2]] * 4, [[3, 3]] * 4],
    ]
    assert ranks(gather_lengths, nproc=3) == [expected] * 3


def exchange_integers() -> list[Any]:
    world = join()
    values = (world.rank, -(2**63), 2**63 - 1, 2**64 - 1)
    return [
        collectives.all_gather_integers(values, world),
        collectives.any_true(world.rank == 1, world),
        collectives.any_true(False, world),
        collectives.sum_scalar(0.5 + world.rank, world, "a sum").item(),
        collectives.all_gather_objects({"rank": world.rank}, world),
    ]


def test_integers_flags_sums_and_objects(ranks: RankPool) -> None:
    rows = [(rank, -(2**63), 2**63 - 1, -1) for rank in range(2)]
    assert ranks(exchange_integers) == [[rows, True, False, 2.0, [{"rank": 0}, {"rank": 1}]]] * 2


def test_a_rank_that_ends_is_named(ranks: RankPool) -> None:
    error = ranks(end_or_gather, return_exceptions=True)[0]
    assert "cannot end: rank 1 left or did not answer" in str(error)


def end_or_gather() -> None:
    world = join()
    if world.rank == 1:
        os._exit(0)
    collectives.gather(torch.ones(1), world)


def broadcast_every_dtype() -> list[Any]:
    world = join()
    received = [collectives.broadcast(torch.tensor([0, 1 + world.rank]).to(dtype), world) for dtype in DTYPES]
    return [(tensor.dtype, tensor.to(torch.complex128).tolist()) for tensor in received]


def test_every_dtype_is_broadcast(ranks: RankPool) -> None:  # int16, uint16, float8: "Invalid scalar type"
    assert ranks(broadcast_every_dtype) == [[(dtype, [0, 1]) for dtype in DTYPES]] * 2


def gather_conjugates() -> Any:
    return collectives.gather(torch.tensor([1 + 2j]).conj(), join()).tolist()


def test_lazy_conjugates_are_gathered(ranks: RankPool) -> None:
    assert ranks(gather_conjugates) == [[1 - 2j, 1 - 2j]] * 2


def reduce_layouts() -> Any:
    world = join()
    tensor = torch.arange(6.0).reshape(2, 3)
    return collectives.reduce(tensor.T.contiguous().T if world.rank else tensor, world).tolist()


def test_the_memory_layout_changes_no_sum(ranks: RankPool) -> None:
    assert ranks(reduce_layouts) == [[[0, 2, 4], [6, 8, 10]]] * 2


def gather_keys(operation: str) -> None:
    world = join()
    one, two = torch.ones(1), torch.full((1,), 2.0)
    tree: Any = {"a": one, "b": two} if world.rank else {"b": two, "a": one}
    if operation == "nesting":
        tree = [one, two] if world.rank else [(one, two)]
    gathered = collectives.gather(tree, world)
    assert operation == "order"
    assert gathered["a"].tolist() == [1, 1]


def test_the_same_keys_in_another_order_are_not_mixed(ranks: RankPool) -> None:
    for result in ranks(gather_keys, "order", return_exceptions=True):
        assert result is None or isinstance(result, ShapeMismatchError), result


def test_another_nesting_is_an_error_on_every_rank(ranks: RankPool) -> None:
    for error in ranks(gather_keys, "nesting", return_exceptions=True):
        assert isinstance(error, ShapeMismatchError), error


def pad_numbers() -> None:
    world = join()
    collectives.pad_across_processes([torch.zeros(1 + world.rank)] * (1 + world.rank), world)
    collectives.barrier(world)


def test_padding_of_unequal_numbers_of_tensors_is_an_error_on_every_rank(ranks: RankPool) -> None:
    for error in ranks(pad_numbers, timeout=15, return_exceptions=True):
        assert isinstance(error, ShapeMismatchError), error
