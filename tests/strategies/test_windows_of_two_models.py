"""Two models with windows of their own, in one iteration, against plain PyTorch."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from accelerator import Accelerator
from loops import assert_close, sgd
from oracle import Case, flat, make_data, make_model
from rank_pool import RankPool


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
