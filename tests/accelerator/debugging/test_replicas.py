"""`verify_replicas` names the first tensor that ranks hold differently, and the ranks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from accelerator import Accelerator
from accelerator.debugging.replicas import fingerprint
from rank_pool import RankPool
from strategies import DDP, FSDP, ConfigurationError, ReplicasDifferError
from strategies.shards import local

HSDP = FSDP(device="cpu", replicate=2, shard=2)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 1)
        self.register_buffer("count", torch.zeros(3, dtype=torch.long))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).tanh())


def differ(strategy: DDP | FSDP, name: str, odd: list[int], every: int | None) -> tuple[str, int]:
    """The error on this rank, and after which step; `odd` ranks change one element by one bit in the second step."""
    accelerator = Accelerator(strategy, seed=0)
    model = Net()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    if every is not None:
        accelerator.verify_replicas(every)
    for step in range(4):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.ones(2, 4)).mean())
            if step == 1 and accelerator.process_index in odd:
                tensor = dict(model.named_parameters()) | dict(model.named_buffers())
                bits = local(tensor[name].detach()).view(-1).view(torch.int32)
                bits[-1] ^= 1 << 20
            try:
                optimizer.step()
                if every is None:
                    accelerator.verify_replicas()
            except ReplicasDifferError as error:
                return str(error), step
            optimizer.zero_grad()
    return "", 4


@pytest.mark.parametrize("every", [None, 1, 2, 3])
def test_ddp_names_the_parameter_and_the_rank(every: int | None, ranks: RankPool) -> None:
    told = ranks(differ, DDP(device="cpu"), "first.weight", [1], every)
    assert told[0] == told[1]
    assert told[0][0].startswith("parameter first.weight of Net differs on rank 1 from rank 0.")
    assert told[0][1] == {None: 1, 1: 1, 2: 1, 3: 2}[every]


def test_buffers_are_compared_where_ranks_share_them(ranks: RankPool) -> None:
    told = ranks(differ, DDP(device="cpu"), "count", [1], None)
    assert told == [("", 4)] * 2  # the step has just given every rank rank 0's
    told = ranks(changed_buffer, True)
    assert told[0].startswith("buffer count of Net differs on rank 1 from rank 0.")
    assert told[0] == told[1]
    assert ranks(changed_buffer, False) == ["", ""]


def changed_buffer(shared: bool) -> str:
    accelerator = Accelerator(DDP(device="cpu", broadcast_buffers=shared))
    model = accelerator.prepare(Net())
    model.count += accelerator.process_index
    try:
        accelerator.verify_replicas()
    except ReplicasDifferError as error:
        return str(error)
    return ""


def test_hsdp_compares_ranks_that_hold_the_same_part(ranks: RankPool) -> None:
    """Ranks 0 and 2 hold one half, 1 and 3 the other."""
    told = ranks(differ, HSDP, "second.weight", [2], 1, nproc=4)
    assert told[0] == told[1] == told[2] == told[3]
    assert told[0] == ("", 4) or told[0][0].startswith("parameter second.weight of Net differs on rank 2 from rank 0.")
    told = ranks(differ, HSDP, "first.weight", [3], 1, nproc=4)
    assert told[0][0].startswith("parameter first.weight of Net differs on rank 3 from rank 1.")
    assert ranks(differ, HSDP, "first.weight", [], 1, nproc=4) == [("", 4)] * 4


def test_one_process_has_nothing_to_compare() -> None:
    assert differ(DDP(device="cpu"), "first.weight", [0], 1) == ("", 4)


def test_a_wrong_interval_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"every is 0; expected a number of steps >= 1"):
        Accelerator("cpu").verify_replicas(0)


DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.complex64,
]


@settings(max_examples=60)
@given(st.sampled_from(DTYPES), st.integers(1, 40), st.data())
def test_a_fingerprint_sees_one_changed_element_and_two_exchanged(
    dtype: torch.dtype, n: int, data: st.DataObject
) -> None:
    tensor = (torch.arange(n) % 2).to(dtype) if dtype is torch.bool else torch.arange(n).to(dtype)
    at = data.draw(st.integers(0, n - 1))
    changed = tensor.clone()
    changed[at] = ~changed[at] if dtype is torch.bool else changed[at] + 1
    assert not torch.equal(fingerprint(tensor), fingerprint(changed))
    other = data.draw(st.integers(0, n - 1))
    exchanged = tensor.clone()
    exchanged[[at, other]] = tensor[[other, at]]
    assert torch.equal(fingerprint(tensor), fingerprint(exchanged)) == torch.equal(tensor, exchanged)
