"""Windows in loops as people write them, against plain PyTorch in one process with the global batch."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from itertools import chain
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from accelerator import Accelerator
from oracle import Case, flat, make_data, make_model, sample_losses
from rank_pool import RankPool
from strategies import StepError


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.8)


def prepared(case: Case) -> tuple[Accelerator, Any, Any, Any]:
    accelerator = Accelerator("ddp" if case.world > 1 else "cpu", gradient_accumulation_steps=case.steps)
    model = make_model()
    return accelerator, *accelerator.prepare(model, sgd(model), DataLoader(make_data(case), batch_size=case.batch_size))


def train_plain(case: Case, windows: list[list[int]] | None = None) -> Tensor:
    """The oracle: one step for each window of samples, those of the case unless others are given."""
    model, (x, y, _) = make_model(), make_data(case).tensors
    optimizer = sgd(model)
    if windows is None:
        windows = [list(chain(*window)) for window in case.windows()]
    for samples in windows:
        optimizer.zero_grad()
        sample_losses(model, x[samples], y[samples]).mean().backward()
        optimizer.step()
    return flat(model)


def assert_close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


def step(accelerator: Accelerator, model: Any, optimizer: Any, x: Tensor, y: Tensor) -> None:
    """One micro-batch."""
    with accelerator.accumulate(model):
        accelerator.backward(sample_losses(model, x, y).mean())
        optimizer.step()
        optimizer.zero_grad()


# -- two windows in one iteration ------------------------------------------------------------------------------


def make_gan() -> tuple[nn.Module, nn.Module]:
    return make_model(seed=1), nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def discriminator_losses(discriminator: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    return 0.1 * ((discriminator(real) - 1) ** 2 + discriminator(fake.detach()) ** 2)


def generator_losses(discriminator: nn.Module, fake: Tensor) -> Tensor:
    return 0.1 * (discriminator(fake) - 1) ** 2


def train_gan_plain(case: Case) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    (generator, discriminator), (x, y, _) = make_gan(), make_data(case).tensors
    of_generator, of_discriminator = sgd(generator), sgd(discriminator)
    for window in case.windows() * case.epochs:
        samples = list(chain(*window))
        real = y[samples].unsqueeze(-1)
        before = generator(x[samples])
        # The generator's losses of all but the last micro-batch meet the discriminator before its step.
        early, late = list(chain(*window[:-1])), window[-1]
        with_old = generator_losses(discriminator, generator(x[early])).sum() if early else torch.zeros(())
        discriminator_losses(discriminator, real, before).mean().backward(inputs=list(discriminator.parameters()))
        gradients = torch.autograd.grad(with_old, list(generator.parameters())) if early else None
        of_discriminator.step()
        of_discriminator.zero_grad()
        with_new = generator_losses(discriminator, generator(x[late])).sum()
        for index, (parameter, gradient) in enumerate(
            zip(generator.parameters(), torch.autograd.grad(with_new, list(generator.parameters())), strict=True)
        ):
            parameter.grad = (gradient + (gradients[index] if gradients else 0)) / len(samples)
        of_generator.step()
        of_generator.zero_grad()
    return flat(generator), flat(discriminator)


def train_gan(case: Case) -> tuple[Tensor, Tensor]:
    accelerator = Accelerator("ddp" if case.world > 1 else "cpu", gradient_accumulation_steps=case.steps)
    torch.manual_seed(0)
    generator, discriminator = make_gan()
    generator, discriminator, of_generator, of_discriminator, loader = accelerator.prepare(
        generator,
        discriminator,
        sgd(generator),
        sgd(discriminator),
        DataLoader(make_data(case), batch_size=case.batch_size),
    )
    for _ in range(case.epochs):
        for x, y, _ in loader:
            with accelerator.accumulate(discriminator):
                losses = discriminator_losses(discriminator, y.unsqueeze(-1), generator(x))
                accelerator.backward(losses.mean())
                of_discriminator.step()
                of_discriminator.zero_grad()
            with accelerator.accumulate(generator):
                accelerator.backward(generator_losses(discriminator, generator(x)).mean())
                of_generator.step()
                of_generator.zero_grad()
    weights = flat(generator), flat(discriminator)
    accelerator.end_training()
    return weights


GANS = [
    Case(length=length, world=world, steps=steps, epochs=2)
    for world in (1, 2)
    for steps in (1, 3)
    for length in (12 * world, 7 * world, 4 * world + 1)
]


def train_gans(several: list[Case]) -> list[tuple[Tensor, Tensor]]:
    dist.init_process_group("gloo")
    return [train_gan(case) for case in several]


@pytest.mark.parametrize("world", [1, 2])
def test_a_gan_equals_the_plain_one(ranks: RankPool, world: int) -> None:
    several = [case for case in GANS if case.world == world]
    for runs in ranks(train_gans, several, nproc=world):
        for case, got in zip(several, runs, strict=True):
            for ours, theirs in zip(got, train_gan_plain(case), strict=True):
                assert_close(ours, theirs)


def test_models_named_together_share_a_window() -> None:
    accelerator = Accelerator("cpu", gradient_accumulation_steps=2)
    encoder, decoder = make_model(seed=1), nn.Linear(1, 1).double()
    plain = nn.Sequential(make_model(seed=1), nn.Linear(1, 1).double())
    plain[1].load_state_dict(decoder.state_dict())
    of_plain, (x, y, _) = sgd(plain), make_data(Case(length=8)).tensors
    loader = DataLoader(TensorDataset(x, y), batch_size=2)
    encoder, decoder, of_encoder, of_decoder, loader = accelerator.prepare(
        encoder, decoder, sgd(encoder), sgd(decoder), loader
    )
    for inputs, targets in loader:
        with accelerator.accumulate(encoder, decoder):
            accelerator.backward((decoder(encoder(inputs)).squeeze(-1) - targets).square().mean())
            for optimizer in (of_encoder, of_decoder):
                optimizer.step()
                optimizer.zero_grad()
    for samples in (slice(0, 4), slice(4, 8)):
        of_plain.zero_grad()
        (plain(x[samples]).squeeze(-1) - y[samples]).square().mean().backward()
        of_plain.step()
    assert_close(torch.cat([flat(encoder), flat(decoder)]), flat(plain))


# -- an eval loop inside ---------------------------------------------------------------------------------------


def train_with_evaluation(case: Case, how: str) -> Tensor:
    accelerator, model, optimizer, loader = prepared(case)
    held_out = accelerator.prepare(DataLoader(TensorDataset(torch.zeros(9, 3).double()), batch_size=2))
    held_open = []
    for number, (x, y, _) in enumerate(loader):
        if how == "left by break":
            model.eval()
            for (inputs,) in held_out:
                with torch.no_grad():
                    model(inputs)
                if number % 2:
                    break
            model.train()
        elif how == "held open":
            with torch.no_grad():
                iterator = iter(held_out)
                model(next(iterator)[0])
                held_open.append(iterator)
        elif how == "named":
            iterator = iter(held_out)
            next(iterator)
            held_open.append(iterator)
        with accelerator.accumulate(model, loader=loader if how == "named" else None):
            accelerator.backward(sample_losses(model, x, y).mean())
            optimizer.step()
            optimizer.zero_grad()
    return flat(model)


@pytest.mark.parametrize("how", ["left by break", "held open", "named"])
@pytest.mark.parametrize("world", [1, 2])
def test_evaluation_inside_the_loop_disturbs_nothing(ranks: RankPool, how: str, world: int) -> None:
    case = Case(length=15, world=world, steps=2)
    for weights in ranks(train_with_evaluation, case, how, nproc=world):
        assert_close(weights, train_plain(case))


def test_another_loader_held_open_with_gradients_must_be_told_apart() -> None:
    accelerator, model, _, loader = prepared(Case(length=15))
    other = accelerator.prepare(DataLoader(TensorDataset(torch.zeros(9, 3).double()), batch_size=2))
    iterator, held_open = iter(loader), iter(other)
    next(iterator)
    next(held_open)
    with (
        pytest.raises(StepError, match=r"two prepared loaders are open, .*15 samples.*9 samples.*loader=loader"),
        accelerator.accumulate(model),
    ):
        pass


def test_a_named_loader_must_hold_a_batch() -> None:
    accelerator, model, _, loader = prepared(Case())
    with (
        pytest.raises(StepError, match="gave no batch that the loop still holds"),
        accelerator.accumulate(model, loader=loader),
    ):
        pass


# -- backward outside accumulate -------------------------------------------------------------------------------


def train_without_accumulate(case: Case) -> Tensor:
    accelerator, model, optimizer, loader = prepared(case)
    for _ in range(case.epochs):
        for x, y, _ in loader:
            accelerator.backward(sample_losses(model, x, y).mean())
            optimizer.step()
            optimizer.zero_grad()
    return flat(model)


@pytest.mark.parametrize("world", [1, 2])
def test_backward_outside_accumulate_is_right_without_accumulation(ranks: RankPool, world: int) -> None:
    for length in (12, 11, 9):  # the last: a rank with nothing left
        case = Case(length=length, world=world, epochs=1)
        for weights in ranks(train_without_accumulate, case, nproc=world):
            assert_close(weights, train_plain(case))


def test_backward_outside_accumulate_is_refused_with_accumulation() -> None:
    with pytest.raises(StepError, match=r"backward\(\) ran outside accumulate\(\) although gradients are to be accum"):
        train_without_accumulate(Case(steps=2))


def test_backward_outside_accumulate_is_refused_for_two_float16_optimizers() -> None:
    accelerator = Accelerator("cpu", mixed_precision="fp16")
    first, second = make_model(torch.float32), make_model(torch.float32)
    first, second, *_ = accelerator.prepare(first, second, sgd(first), sgd(second))
    with pytest.raises(StepError, match="float16 and 2 optimizers, whose loss scales must not mix"):
        accelerator.backward(first(torch.ones(1, 3)).sum())


# -- the losses of one micro-batch -----------------------------------------------------------------------------


def train_on_two_losses(case: Case, weighted: bool) -> Tensor:
    accelerator, model, optimizer, loader = prepared(case)
    for x, y, _ in loader:
        with accelerator.accumulate(model):
            weight = float(len(x)) if weighted else None
            accelerator.backward(0.25 * sample_losses(model, x, y).mean(), weight=weight)
            accelerator.backward(0.75 * sample_losses(model, x, y).mean(), weight=weight)
            optimizer.step()
            optimizer.zero_grad()
    return flat(model)


@pytest.mark.parametrize(("weighted", "steps"), [(False, 1), (False, 2), (True, 2)])
def test_several_losses_of_a_micro_batch_add_up(weighted: bool, steps: int) -> None:
    case = Case(length=9, steps=steps)
    assert_close(train_on_two_losses(case, weighted), train_plain(case))


def test_several_losses_add_up_on_two_processes(ranks: RankPool) -> None:
    case = Case(length=11, world=2, steps=2)
    for weights in ranks(train_on_two_losses, case, False):
        assert_close(weights, train_plain(case))


def test_losses_of_one_micro_batch_share_its_weight() -> None:
    accelerator, model, _, loader = prepared(Case(steps=2))
    x, y, _ = next(iter(loader))
    with accelerator.accumulate(model):
        accelerator.backward(sample_losses(model, x, y).mean(), weight=2)
        with pytest.raises(StepError, match=r"got weight=3\.0 after weight=2\.0 in the same micro-batch"):
            accelerator.backward(sample_losses(model, x, y).mean(), weight=3)


def test_weights_are_given_in_all_micro_batches_of_a_window_or_in_none() -> None:
    accelerator, model, optimizer, loader = prepared(Case(steps=2))
    iterator = iter(loader)
    x, y, _ = next(iterator)
    step(accelerator, model, optimizer, x, y)
    x, y, _ = next(iterator)
    with accelerator.accumulate(model), pytest.raises(StepError, match="weight= in some micro-batches of one window"):
        accelerator.backward(sample_losses(model, x, y).mean(), weight=2)


@pytest.mark.parametrize("weight", [-1, float("nan"), float("inf"), True, "3", torch.ones(2)])
def test_a_weight_that_is_no_count_is_refused(weight: Any) -> None:
    accelerator, model, _, _ = prepared(Case())
    with accelerator.accumulate(model), pytest.raises(StepError, match=r"weight (is|has shape) .*expected .*number"):
        accelerator.backward(sample_losses(model, *make_data(Case()).tensors[:2]).mean(), weight=weight)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("vector", r"loss has shape \(8,\); expected a scalar: the mean over the samples"),
        ("detached", "loss carries no gradient. Was it detached"),
        ("no_grad", "loss carries no gradient. Was it detached, computed under torch.no_grad"),
        ("number", "loss is float; expected a scalar tensor"),
        ("tuple", "loss is tuple; expected a scalar tensor"),
    ],
)
@pytest.mark.parametrize("inside", [True, False])
def test_a_loss_that_is_none_is_refused(kind: str, message: str, inside: bool) -> None:
    accelerator, model, _, _ = prepared(Case())
    losses = sample_losses(model, *make_data(Case()).tensors[:2])
    with torch.no_grad():
        silent = sample_losses(model, *make_data(Case()).tensors[:2]).mean()
    given: Any = {
        "vector": losses,
        "detached": losses.mean().detach(),
        "no_grad": silent,
        "number": losses.mean().item(),
        "tuple": (losses.mean(),),
    }[kind]
    if inside:
        with accelerator.accumulate(model), pytest.raises(StepError, match=message):
            accelerator.backward(given)
    else:
        with pytest.raises(StepError, match=message):
            accelerator.backward(given)


def test_a_loss_of_one_element_is_a_scalar() -> None:
    case = Case(length=9, steps=2)
    accelerator, model, optimizer, loader = prepared(case)
    for x, y, _ in loader:
        with accelerator.accumulate(model):
            accelerator.backward(sample_losses(model, x, y).mean(dim=0, keepdim=True))
            optimizer.step()
            optimizer.zero_grad()
    assert_close(flat(model), train_plain(case))


# -- clipping --------------------------------------------------------------------------------------------------


def test_clipping_inside_an_open_window_changes_nothing() -> None:
    accelerator, model, _, loader = prepared(Case(steps=2))
    x, y, _ = next(iter(loader))
    with accelerator.accumulate(model):
        accelerator.backward(1000 * sample_losses(model, x, y).mean())
        before = [parameter.grad.clone() for parameter in model.parameters()]
        assert accelerator.clip_grad_norm_(model.parameters(), 1e-3) is None
        assert accelerator.clip_grad_value_(model.parameters(), 1e-3) is None
        assert all(torch.equal(b, p.grad) for b, p in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("steps", [1, 3])
def test_clipping_by_value_equals_the_plain_one(steps: int) -> None:
    case = Case(length=14, steps=steps)
    accelerator, model, optimizer, loader = prepared(case)
    plain, (x, y, _) = make_model(), make_data(case).tensors
    of_plain = sgd(plain)
    for inputs, targets, _ in loader:
        with accelerator.accumulate(model):
            accelerator.backward(sample_losses(model, inputs, targets).mean())
            accelerator.clip_grad_value_(model.parameters(), 1e-4)
            optimizer.step()
            optimizer.zero_grad()
    for window in case.windows():
        samples = list(chain(*window))
        of_plain.zero_grad()
        sample_losses(plain, x[samples], y[samples]).mean().backward()
        nn.utils.clip_grad_value_(plain.parameters(), 1e-4)
        of_plain.step()
    assert_close(flat(model), flat(plain))


def test_clipping_takes_one_tensor_and_other_norms() -> None:
    accelerator, model, _, loader = prepared(Case())
    plain = make_model()
    x, y, _ = next(iter(loader))
    with accelerator.accumulate(model):
        accelerator.backward(sample_losses(model, x, y).mean())
        norm = accelerator.clip_grad_norm_(model[0].weight, 1e-5, norm_type=1)
    sample_losses(plain, x, y).mean().backward()
    assert norm is not None
    assert_close(norm, nn.utils.clip_grad_norm_(plain[0].weight, 1e-5, norm_type=1))
    assert_close(model[0].weight.grad, plain[0].weight.grad)


def test_clipping_strangers_is_refused() -> None:
    accelerator, *_ = prepared(Case())
    for clip in (accelerator.clip_grad_norm_, accelerator.clip_grad_value_):
        with pytest.raises(StepError, match="clipping got 4 parameters, none of which a prepared optimizer holds"):
            clip(make_model().parameters(), 1.0)


# -- entering and leaving --------------------------------------------------------------------------------------


def test_a_model_that_was_not_prepared_is_refused() -> None:
    accelerator, *_ = prepared(Case())
    for stranger in (make_model(), prepared(Case())[1]):
        with pytest.raises(StepError, match="Sequential was not prepared by this Accelerator"):
            accelerator.accumulate(stranger)


def test_the_users_own_model_is_refused() -> None:
    accelerator, model = Accelerator("cpu"), make_model()
    accelerator.prepare(model)
    with pytest.raises(StepError, match=r"Use the model that prepare\(\) returned"):
        accelerator.accumulate(model)


def test_nesting_is_refused() -> None:
    accelerator, model, _, _ = prepared(Case())
    with accelerator.accumulate(model), pytest.raises(StepError, match="inside another accumulate"):
        accelerator.accumulate(model).__enter__()


def test_preparing_inside_an_open_window_is_refused() -> None:
    accelerator, model, optimizer, loader = prepared(Case(steps=2))
    x, y, _ = next(iter(loader))
    step(accelerator, model, optimizer, x, y)
    with pytest.raises(StepError, match=r"added inside an open accumulation window"):
        accelerator.prepare(nn.Linear(2, 2))


@pytest.mark.parametrize("named", [True, False])
def test_naming_no_model_names_all(named: bool) -> None:
    case = Case(length=9, steps=2)
    accelerator, model, optimizer, loader = prepared(case)
    for x, y, _ in loader:
        with accelerator.accumulate(*([model] if named else [])):
            accelerator.backward(sample_losses(model, x, y).mean())
            optimizer.step()
            optimizer.zero_grad()
    assert_close(flat(model), train_plain(case))


def test_an_exception_drops_its_window(caplog: pytest.LogCaptureFixture) -> None:
    case = Case(length=12, steps=2)
    accelerator, model, optimizer, loader = prepared(case)
    for number, (x, y, _) in enumerate(loader):
        try:
            with accelerator.accumulate(model):
                accelerator.backward(sample_losses(model, x, y).mean())
                if number == 1:
                    raise ValueError("bad batch")
                optimizer.step()
                optimizer.zero_grad()
        except ValueError:
            assert all(parameter.grad is None for parameter in model.parameters())
    assert "dropped the gradients of 1 earlier micro-batches" in caplog.text
    assert_close(flat(model), train_plain(case, [[4, 5, 6, 7], [8, 9, 10, 11]]))


def train_with_an_exception(case: Case) -> Tensor:
    accelerator, model, optimizer, loader = prepared(case)
    for number, (x, y, _) in enumerate(loader):
        with contextlib.suppress(ValueError), accelerator.accumulate(model):
            loss = sample_losses(model, x, y).mean()
            if number == 1:
                raise ValueError("bad batch")
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    return flat(model)


def test_an_exception_on_all_ranks_drops_its_window(ranks: RankPool) -> None:
    case = Case(length=24, world=2, steps=2)
    for weights in ranks(train_with_an_exception, case):
        assert_close(weights, train_plain(case, [[*range(8, 16)], [*range(16, 24)]]))


# -- batches that are not trained on as planned ----------------------------------------------------------------


def train_skipping(case: Case, skipped: int, twice: int) -> Tensor:
    accelerator, model, optimizer, loader = prepared(case)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* batches of this epoch were taken but not trained on")
        for number, (x, y, _) in enumerate(loader):
            if number == skipped:
                continue
            step(accelerator, model, optimizer, x, y)
            if number == twice:
                step(accelerator, model, optimizer, x, y)
    return flat(model)


@pytest.mark.parametrize("world", [1, 2])
def test_a_batch_skipped_with_continue_leaves_its_weight_to_the_others(ranks: RankPool, world: int) -> None:
    case = Case(length=6 * world + 1, world=world, steps=3)
    g = case.global_batch
    first = [*range(g), *range(2 * g, case.length)]  # 0, 2 and the tail
    for weights in ranks(train_skipping, case, 1, -1, nproc=world):
        assert_close(weights, train_plain(case, [first]))


@pytest.mark.parametrize("world", [1, 2])
def test_a_batch_used_twice_weighs_twice(ranks: RankPool, world: int) -> None:
    case = Case(length=6 * world + 1, world=world, steps=3)
    g = case.global_batch
    windows = [[*range(g), *range(g), *range(g, 2 * g)], [*range(2 * g, case.length)]]
    for weights in ranks(train_skipping, case, -1, 0, nproc=world):
        assert_close(weights, train_plain(case, windows))


def test_batches_without_backward_are_counted_but_weigh_nothing() -> None:
    case = Case(length=8, steps=2)
    accelerator, model, optimizer, loader = prepared(case)
    for number, (x, y, _) in enumerate(loader):
        with accelerator.accumulate(model):
            if number != 1:
                accelerator.backward(sample_losses(model, x, y).mean(), weight=len(x))
            optimizer.step()
            optimizer.zero_grad()
    assert_close(flat(model), train_plain(case, [[0, 1], [4, 5, 6, 7]]))


@pytest.mark.parametrize("world", [1, 2])
def test_a_loop_left_by_break_carries_its_window_into_the_next_pass(ranks: RankPool, world: int) -> None:
    case = Case(length=8 * world, world=world, steps=2)
    g = case.global_batch
    windows = [[*range(2 * g)], [*range(2 * g, 3 * g), *range(g)], [*range(g, 3 * g)], [*range(3 * g, 4 * g)]]
    for weights in ranks(train_left_by_break, case, nproc=world):
        assert_close(weights, train_plain(case, windows))


def train_left_by_break(case: Case) -> Tensor:
    accelerator, model, optimizer, loader = prepared(case)
    for number, (x, y, _) in enumerate(loader):
        step(accelerator, model, optimizer, x, y)
        if number == 2:
            break
    for x, y, _ in loader:
        step(accelerator, model, optimizer, x, y)
    return flat(model)


def read_ahead(batches: Any) -> Iterator[Any]:
    held = None
    for batch in batches:
        if held is not None:
            yield held
        held = batch
    yield held


def train_reading_ahead(case: Case) -> None:
    accelerator, model, optimizer, loader = prepared(case)
    for x, y, _ in read_ahead(loader):
        step(accelerator, model, optimizer, x, y)


def test_reading_one_batch_ahead_warns() -> None:
    with pytest.warns(UserWarning, match=r"1 of the 5 batches .* not trained on.*reads ahead"):
        train_reading_ahead(Case(length=10))


# -- no prepared loader, streams, loops of one's own -----------------------------------------------------------


def train_without_loader(case: Case) -> Tensor:
    accelerator = Accelerator("ddp", gradient_accumulation_steps=case.steps)
    model = make_model()
    model, optimizer = accelerator.prepare(model, sgd(model))
    x, y, _ = make_data(case).tensors
    for samples in torch.arange(case.length).split(case.global_batch):
        mine = samples.chunk(case.world)[accelerator.process_index]
        step(accelerator, model, optimizer, x[mine], y[mine])
    return flat(model)


@pytest.mark.parametrize("world", [1, 2])
def test_a_loop_without_a_prepared_loader_is_right_for_equal_batches(ranks: RankPool, world: int) -> None:
    case = Case(length=8 * world, world=world, steps=2)
    for weights in ranks(train_without_loader, case, nproc=world):
        assert_close(weights, train_plain(case))


class Stream(IterableDataset[Any]):
    def __init__(self, dataset: TensorDataset) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[Any]:
        return (self.dataset[index] for index in range(len(self.dataset)))


@pytest.mark.parametrize("length", [8, 9, 11])
def test_a_stream_is_weighed_by_what_it_gave(length: int) -> None:
    case = Case(length=length, steps=2)
    accelerator = Accelerator("cpu", gradient_accumulation_steps=2)
    model = make_model()
    model, optimizer, loader = accelerator.prepare(model, sgd(model), DataLoader(Stream(make_data(case)), batch_size=2))
    for x, y, _ in loader:
        step(accelerator, model, optimizer, x, y)
    assert_close(flat(model), train_plain(case))


def train_with_no_sync(case: Case) -> tuple[Tensor, bool]:
    accelerator, model, optimizer, loader = prepared(Case(length=case.length, world=case.world))
    differed = False
    for number, (x, y, _) in enumerate(loader):
        if number % 2 == 0:
            with accelerator.no_sync(model):
                accelerator.backward(0.5 * sample_losses(model, x, y).mean())
            everyone = accelerator.gather(model[2].bias.grad)
            differed |= everyone[0].item() != everyone[-1].item()
        else:
            accelerator.backward(0.5 * sample_losses(model, x, y).mean())
            optimizer.step()
            optimizer.zero_grad()
    return flat(model), differed


def test_no_sync_by_hand_keeps_gradients_local(ranks: RankPool) -> None:
    case = Case(length=16, world=2, steps=2)
    for weights, differed in ranks(train_with_no_sync, case):
        assert differed
        assert_close(weights, train_plain(case))
