"""With `pad_batches` every batch that is trained on has one length, and the numbers are those of short ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler, TensorDataset

from accelerator import Accelerator
from loops import assert_close, sgd, train_plain
from oracle import Case, flat, make_data, make_model, sample_losses
from oracle import train_plain as run_plain
from rank_pool import RankPool
from strategies import DataError, StepError


def make(case: Case, strategy: str = "cpu", **options: Any) -> tuple[Accelerator, Any, Any, Any]:
    accelerator = Accelerator(strategy, pad_batches=True, **options)
    loader = DataLoader(make_data(case), case.batch_size, drop_last=case.drop_last)
    model = make_model()
    return accelerator, *accelerator.prepare(model, sgd(model), loader)


def train(case: Case, strategy: str = "cpu") -> tuple[Tensor | None, list[int], list[float]]:
    """The weights after training (on rank 0), the length of every batch, and the losses of every sample."""
    accelerator, model, optimizer, loader = make(case, strategy, gradient_accumulation_steps=case.steps)
    lengths, gathered = [], []
    for _ in range(case.epochs):
        for x, y, tokens in loader:
            with accelerator.accumulate(model):
                losses = sample_losses(model, x, y)
                accelerator.backward(losses, weight=tokens if case.weights == "tensor" else None)
                accelerator.clip_grad_norm_(model.parameters(), 0.05)
                optimizer.step()
                optimizer.zero_grad()
            lengths.append(len(x))
            gathered += accelerator.gather_for_metrics({"losses": losses.detach()})["losses"].tolist()
    weights = [tensor.reshape(-1) for tensor in accelerator.get_state_dict(model).values()]
    accelerator.end_training()
    return torch.cat(weights) if weights else None, lengths, gathered


@pytest.mark.parametrize("strategy", ["cpu", "ddp", "fsdp"])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("length", [3, 14, 17])  # on two ranks 17 leaves one of them nothing at all
def test_ghosts_weigh_nothing_and_are_not_gathered(ranks: RankPool, strategy: str, steps: int, length: int) -> None:
    world = 1 if strategy == "cpu" else 2
    case = Case(length=length, batch_size=4, world=world, steps=steps, clip=0.05, scheduler="none")
    for case_now in (case, replace(case, weights="tensor")):
        trained = ranks(train, case_now, strategy, nproc=world)
        assert_close(trained[0][0], run_plain(case_now).weights[-1])
        for _, lengths, gathered in trained:
            assert lengths == [4] * 2 * case.num_batches
            assert len(gathered) == 2 * length


def test_full_batches_train_to_the_bit_as_in_a_plain_loop() -> None:
    case = Case(length=24, batch_size=6, epochs=1)
    accelerator, model, optimizer, loader = make(case)
    for x, y, _ in loader:
        with accelerator.accumulate(model):
            accelerator.backward(sample_losses(model, x, y))
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(flat(model), train_plain(case))


@pytest.mark.parametrize("padded", [True, False])
def test_a_mean_over_tokens_is_that_of_the_samples(padded: bool) -> None:
    """Losses and weights of shape (batch, tokens), the last batch of which is short."""
    accelerator = Accelerator("cpu", pad_batches=padded, gradient_accumulation_steps=2)
    model, twin = make_model(), make_model()
    x, y = torch.randn(7, 5, 3, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor([5, 1, 2, 0, 4, 3, 5]).unsqueeze(1)
    loader = DataLoader(TensorDataset(x, y, mask), batch_size=4)
    model, optimizer, loader = accelerator.prepare(model, sgd(model), loader)
    for x_now, y_now, mask_now in loader:
        with accelerator.accumulate(model):
            accelerator.backward(sample_losses(model, x_now, y_now), weight=mask_now)
            optimizer.step()
    (sample_losses(twin, x, y)[mask].mean()).backward()
    sgd(twin).step()
    assert_close(flat(model), flat(twin))


def test_a_batch_of_which_no_token_counts_moves_nothing() -> None:
    case = Case(length=7, batch_size=4)
    accelerator, model, _, loader = make(case)
    for x, y, _ in loader:
        with accelerator.accumulate(model):
            accelerator.backward(sample_losses(model, x, y), weight=torch.zeros(4))
            assert not torch.cat([parameter.grad.reshape(-1) for parameter in model.parameters()]).any()


def test_a_model_is_compiled_once() -> None:
    compiled: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    accelerator = Accelerator("cpu", pad_batches=True)
    net = make_model()
    model, optimizer = accelerator.prepare(torch.compile(net, backend=backend), sgd(net))
    loader = accelerator.prepare(DataLoader(make_data(Case(length=10)), batch_size=4))
    for x, y, _ in loader:
        with accelerator.accumulate(model):
            accelerator.backward(sample_losses(model, x, y))
            optimizer.step()
    assert len(compiled) == 1


def test_an_evaluation_keeps_its_lengths() -> None:
    accelerator, model, _, loader = make(Case(length=7, batch_size=4))
    with torch.no_grad():
        lengths = [len(x) for x, *_ in loader]
    assert lengths == [4, 3]
    for x, y, _ in loader:
        with accelerator.accumulate(model):
            accelerator.backward(sample_losses(model, x, y))
    assert len(x) == 4


def test_ghosts_that_were_not_trained_on_may_have_been_counted() -> None:
    _, _, _, loader = make(Case(length=7, batch_size=4))
    with pytest.raises(DataError, match=r"nothing was trained on.*not for training under torch\.no_grad\(\)"):
        sum(len(x) for x, *_ in loader)


def first_batch(case: Case, loss: Callable[[Tensor], Tensor], **arguments: Any) -> None:
    accelerator, model, _, loader = make(case)
    for x, y, _ in loader:
        with accelerator.accumulate(model):
            accelerator.backward(loss(sample_losses(model, x, y)), **arguments)
        break


def refuse(message: str, loss: Callable[[Tensor], Tensor] = lambda losses: losses, **arguments: Any) -> None:
    with pytest.raises(StepError, match=message):
        first_batch(Case(length=14, batch_size=4), loss, **arguments)


def test_a_mean_is_refused_at_the_first_batch_and_taken_where_none_is_short() -> None:
    refuse(r"loss is a scalar, and pad_batches=True .* one loss for each row \(reduction='none'\)", Tensor.mean)
    first_batch(Case(length=14, batch_size=4, drop_last=True), Tensor.mean)


def test_losses_and_weights_of_another_shape_are_refused() -> None:
    refuse(r"loss has shape \(3,\); .* one loss per sample, of shape \(4,\)", lambda losses: losses[:3])
    refuse(
        r"loss has shape \(4, 2\); .* For a mean over tokens give weight=", lambda losses: losses[:, None].expand(4, 2)
    )
    refuse(r"weight is 3\.0, and loss has shape \(4,\); expected a weight for each loss", weight=3.0)
    refuse(r"weight is of shape \(2,\), and loss has shape \(4,\)", weight=torch.ones(2))
    refuse("weight has elements below 0 or NaN", weight=torch.tensor([1, 2, -1, 0]))
    refuse("loss carries no gradient", Tensor.detach)


def test_losses_without_ghosts_need_the_length_of_their_batch_too() -> None:
    accelerator, model = Accelerator("cpu"), make_model()
    x, y, _ = next(iter(loader := accelerator.prepare(DataLoader(make_data(Case()), batch_size=4))))
    model, _ = accelerator.prepare(model, sgd(model))
    for _ in loader:
        with pytest.raises(StepError, match=r"loss has shape \(8,\).*of shape \(4,\)"), accelerator.accumulate(model):
            accelerator.backward(sample_losses(model, x, y).repeat(2))
        break


@pytest.mark.parametrize("normalisation", [nn.BatchNorm1d(4), nn.BatchNorm1d(4, track_running_stats=False).eval()])
def test_a_normalisation_over_the_batch_is_refused(normalisation: nn.Module) -> None:
    accelerator = Accelerator("cpu", pad_batches=True)
    net = nn.Sequential(nn.Linear(3, 4), normalisation).double()
    model, _, loader = accelerator.prepare(net, sgd(net), DataLoader(make_data(Case()), batch_size=3))
    for x, *_ in loader:
        with pytest.raises(StepError, match=r"1 is BatchNorm1d in training mode, .*count the ghosts"):
            accelerator.backward(model(x).mean(1))
        break


def test_a_frozen_batch_normalisation_is_no_hindrance() -> None:
    accelerator = Accelerator("cpu", pad_batches=True)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4).eval()).double()
    model, _, loader = accelerator.prepare(net, sgd(net), DataLoader(make_data(Case()), batch_size=3))
    for x, *_ in loader:
        accelerator.backward(model(x).mean(1))


class Numbers(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(range(5))


def test_batches_whose_length_is_not_the_library_s_are_refused_for_training_only() -> None:
    accelerator = Accelerator("cpu", pad_batches=True)
    own = BatchSampler(SequentialSampler(range(5)), 2, drop_last=False)
    refused = {
        "come from an iterable dataset": DataLoader(Numbers(), batch_size=2),
        "come from a batch_sampler of its own": DataLoader(range(5), batch_sampler=own),  # type: ignore[arg-type]
        "are the dataset's own": DataLoader(range(5), batch_size=None),  # type: ignore[arg-type]
    }
    for words, plain in refused.items():
        loader = accelerator.prepare(plain)
        with torch.no_grad():
            assert torch.as_tensor(next(iter(loader))).numel()
        with pytest.raises(DataError, match=rf"pad_batches=True, and the batches of the loader over \w+ {words}"):
            next(iter(loader))
    next(iter(accelerator.prepare(DataLoader(Numbers(), batch_size=2, drop_last=True))))


def test_what_is_gathered_has_a_row_for_each_sample() -> None:
    accelerator, model, _, loader = make(Case(length=7, batch_size=4))
    names, found = [], []
    for x, y, _ in loader:
        with accelerator.accumulate(model):
            losses = sample_losses(model, x, y)
            accelerator.backward(losses)
        names += accelerator.gather_for_metrics([str(number) for number in range(4)])
        for wrong in (losses.mean(), losses[:3], {"losses": losses, "first": losses[:1]}, "text"):
            with pytest.raises(DataError, match=r"gather_for_metrics got .* expected 4 rows, one for each sample"):
                accelerator.gather_for_metrics(wrong)
        spans = [torch.full((4,), float(number)) for number in range(4)]  # as long as the batch, by chance
        found += accelerator.gather_for_metrics(spans, use_gather_object=True)
        with pytest.raises(DataError, match="gather_for_metrics got list"):
            accelerator.gather_for_metrics(spans[:3], use_gather_object=True)
    assert names == ["0", "1", "2", "3", "0", "1", "2"]
    assert [tensor.tolist() for tensor in found] == [[float(name)] * 4 for name in names]
    with pytest.raises(DataError, match="after the loop over its loader had ended"):
        accelerator.gather_for_metrics(losses)


def test_explain_tells_of_it() -> None:
    assert "pad_batches" in str(Accelerator("cpu", pad_batches=True).explain())
