"""Rules on the gradient of a step: that of the mean loss over all samples of the window, over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch.optim import SGD

from ...base import Strategy
from ..loop import Loop, Step, weights_of
from ..oracle import LEARNING_RATE, Net, Samples, Weights, compare, gradient_of, mean_loss, net_with, norm_of
from ..rule import Broken, rule

BATCH_SIZE = 3  # of each rank: a short batch of 2, padded by repeating a sample, has another mean
STEPS = 3  # micro-batches in a full window


@rule()
def gradient_full_window(strategy: Strategy) -> None:
    """In a full window of three micro-batches, the gradient is that of the mean loss over all its samples.

    The loop weights each micro-batch; the strategy takes the plain mean over ranks, once per window, in
    backward or in `reduce_gradients`, and nothing else.
    """
    _check_epochs(strategy, lambda size: 2 * STEPS * BATCH_SIZE * size)


@rule()
def gradient_short_window(strategy: Strategy) -> None:
    """In a last window of fewer micro-batches than the others, the gradient is still that of the mean loss.

    A strategy that divides by the configured number of micro-batches makes it too small. It does not know how
    many a window has, and need not: the loop does.
    """
    _check_epochs(strategy, lambda size: (STEPS + 2) * BATCH_SIZE * size)


@rule(min_processes=2)
def gradient_uneven_ranks(strategy: Strategy) -> None:
    """Where the last batch gives some ranks fewer samples than others, every sample still weighs the same.

    Ranks average with equal weights, and hand on batches at the size they have: padding one by repeating
    samples, or averaging by the number of samples, weighs them twice.
    """
    _check_epochs(strategy, lambda size: STEPS * BATCH_SIZE * size - 1)


@rule(min_processes=2)
def gradient_ghost_rank(strategy: Strategy) -> None:
    """A rank that has no samples left takes part with a zero gradient, and counts in the mean over ranks.

    The weights of the others already allow for it. Divide by `world.size`, not by the number of ranks that
    have something, and do not leave the reduction out on a rank whose gradient is zero.
    """
    _check_epochs(strategy, lambda size: (STEPS - 1) * BATCH_SIZE * size + 1)  # at the end of a window
    _check_epochs(strategy, lambda size: STEPS * BATCH_SIZE * size + 1)  # alone in a window


@rule()
def gradient_weighted(strategy: Strategy) -> None:
    """With `backward(loss, weight=tokens)` the gradient is that of the mean over all tokens of the window.

    The true sum of weights is known only at the close of the window: gradients are rescaled once, after
    `reduce_gradients`. So they must be complete when it returns, and batches must keep the values they had.
    """
    _check_epochs(strategy, lambda size: (STEPS + 2) * BATCH_SIZE * size - 1, by_tokens=True)


@rule()
def clip_norm(strategy: Strategy) -> None:
    """The norm that clipping sees and returns is that of the whole mean gradient, the same on every rank.

    Clipping comes between `reduce_gradients` and the optimizer step. A strategy that reduces later, in a hook
    of the optimizer for one, clips every rank by a norm of its own.
    """
    max_norm = 0.05
    with Loop(strategy, steps=STEPS) as loop:
        model, optimizer = loop.model_and_optimizer()
        samples, loader = loop.loader(2 * STEPS * BATCH_SIZE * loop.world.size, BATCH_SIZE)
        windows = _windows(len(samples), STEPS * BATCH_SIZE * loop.world.size)
        for number, step in enumerate(loop.train(model, optimizer, loader, max_norm=max_norm)):
            gradient = gradient_of(step.before, samples, windows[number])
            norm = norm_of(gradient)
            if step.norm is None or abs(step.norm - norm) > loop.tolerance * norm:
                raise Broken(
                    f"at optimizer step {number + 1}, clipping returned the norm {step.norm}",
                    expected=f"{norm:.6g}, the norm of the mean gradient over all ranks",
                    advice="Gradients must be reduced completely, on every rank, when reduce_gradients() returns.",
                )
            clipped = {name: tensor * (max_norm / norm) for name, tensor in gradient.items()}
            tolerance = max(loop.tolerance, 1e-4)  # torch adds 1e-6 to the norm
            where = f"at optimizer step {number + 1}, clipped to a norm of {max_norm}"
            compare(step.gradient, clipped, tolerance=tolerance, where=where, num_ranks=loop.world.size)


@rule()
def forward_before_step(strategy: Strategy) -> None:
    """A forward between backward and the step, as for a metric, changes nothing: the next one sees the new weights.

    A strategy that makes weights ready for a forward (gathers, casts, copies them) and puts them away in the backward
    that follows must put them away before a step as well, where none does.
    """
    with Loop(strategy, steps=2) as loop:
        model, optimizer = loop.model_and_optimizer()
        samples, loader = loop.loader(3 * 2 * BATCH_SIZE * loop.world.size, BATCH_SIZE)
        windows = iter(_windows(len(samples), 2 * BATCH_SIZE * loop.world.size))
        before = weights_of(model)
        for number, batch in enumerate(loader, start=1):
            with loop.accumulate(model):
                loop.backward(mean_loss(model(batch["x"]), batch))
                model(batch["x"])
                loop.finish_gradients(model)
                model(batch["x"])
                optimizer.step()
                optimizer.zero_grad()
            if loop.closes_window:
                after = weights_of(model)
                compare(
                    Step(before, after, None).gradient,
                    gradient_of(before, samples, next(windows)),
                    tolerance=loop.tolerance,
                    where=f"after a forward beside the loss, in the window that ends with micro-batch {number}",
                    num_ranks=loop.world.size,
                )
                before = after


@rule()
def two_models(strategy: Strategy) -> None:
    """Two models in one loop, each with an optimizer and a window of its own, do not disturb each other.

    As in a GAN: one iteration opens a window of either. Everything a strategy keeps must belong to one wrapped
    model, and `reduce_gradients` reduces the models it is given: no more and no others.
    """
    with Loop(strategy, steps=2) as loop:
        generator, generator_optimizer = loop.model_and_optimizer(seed=1)
        critic, critic_optimizer = loop.model_and_optimizer(seed=2)
        samples, loader = loop.loader(2 * 2 * BATCH_SIZE * loop.world.size, BATCH_SIZE)
        global_batch = BATCH_SIZE * loop.world.size
        window: list[list[int]] = []
        before = weights_of(critic), weights_of(generator)
        for number, batch in enumerate(loader):
            window.append(list(range(number * global_batch, (number + 1) * global_batch)))
            with loop.accumulate(critic):
                loop.backward(mean_loss(critic(generator(batch["x"]).detach()), batch))
                critic_optimizer.step()
                critic_optimizer.zero_grad()
            with loop.accumulate(generator):
                loop.backward(critic(generator(batch["x"])).square().mean())
                generator_optimizer.step()
                generator_optimizer.zero_grad()
            if not loop.closes_window:
                continue
            expected = _gan_window(before, samples, window)
            after = weights_of(critic), weights_of(generator)
            for name, old, new, oracle in zip(("critic", "generator"), before, after, expected, strict=True):
                where = f"in the window that ends with micro-batch {number + 1}, for the {name} of a GAN"
                used = Step(old, new, None).gradient
                compare(used, oracle, tolerance=loop.tolerance, where=where, num_ranks=loop.world.size)
            before = after
            window.clear()


def _check_epochs(strategy: Strategy, length: Callable[[int], int], *, by_tokens: bool = False) -> None:
    """Two epochs over as many samples as `length` says for this world; every step is compared with the oracle."""
    with Loop(strategy, steps=STEPS) as loop:
        model, optimizer = loop.model_and_optimizer()
        samples, loader = loop.loader(length(loop.world.size), BATCH_SIZE)
        windows = _windows(len(samples), STEPS * BATCH_SIZE * loop.world.size)
        for epoch in range(2):
            steps = list(loop.train(model, optimizer, loader, by_tokens=by_tokens))
            if len(steps) != len(windows):
                raise Broken(
                    f"an epoch of {len(samples)} samples had {len(steps)} optimizer steps",
                    expected=f"{len(windows)} on {loop.world.size} ranks that take {BATCH_SIZE} samples at a time",
                    advice="device_loader() must yield every batch it is given.",
                )
            for number, (step, window) in enumerate(zip(steps, windows, strict=True), start=1):
                expected = gradient_of(step.before, samples, window, by_tokens=by_tokens)
                where = f"at optimizer step {number} of epoch {epoch + 1}"
                compare(step.gradient, expected, tolerance=loop.tolerance, where=where, num_ranks=loop.world.size)


def _windows(length: int, samples_per_window: int) -> list[list[int]]:
    """The samples of each optimizer step of one epoch."""
    positions = list(range(length))
    return [positions[start : start + samples_per_window] for start in range(0, length, samples_per_window)]


def _gan_window(
    before: tuple[Weights, Weights], samples: Samples, window: Sequence[Sequence[int]]
) -> tuple[Weights, Weights]:
    """The gradients of one window of `two_models`, in plain PyTorch: of the critic and of the generator."""
    critic, generator = (net_with(weights) for weights in before)
    optimizers = [SGD(net.parameters(), lr=LEARNING_RATE) for net in (critic, generator)]
    gradients: list[Weights] = [{}, {}]

    def step(which: int, net: Net) -> None:
        gradients[which] = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
        optimizers[which].step()

    for number, indices in enumerate(window, start=1):
        batch = samples.batch(indices)
        critic_only = list(critic.parameters())
        loss = mean_loss(critic(generator(batch["x"]).detach()), batch) / len(window)
        loss.backward(inputs=critic_only)
        if number == len(window):
            step(0, critic)
        loss = critic(generator(batch["x"])).square().mean() / len(window)
        loss.backward(inputs=list(generator.parameters()))
        if number == len(window):
            step(1, generator)
    return gradients[0], gradients[1]
