"""Rules on communication: none that a window does not need, and all that it needs."""

from __future__ import annotations

from ...base import Strategy
from ...tree import move
from ..communication import Communication
from ..loop import Loop, weights_of
from ..oracle import Samples, Weights, mean_loss
from ..rule import Broken, rule

STEPS = 3


@rule(min_processes=2)
def no_communication_in_open_window(strategy: Strategy) -> None:
    """While a window is open, no gradients are exchanged: only its last micro-batch pays for communication.

    No number shows it when the saving is lost, so collectives are counted. Inside `no_sync`, backward leaves
    gradients on their rank; parameters may be gathered, where they are sharded.
    """
    with Loop(strategy, steps=STEPS) as loop:
        _, windows = _count(loop, num_windows=2)
        for number, window in enumerate(windows, start=1):
            *opened, closing = window
            for index, counted in enumerate(opened, start=1):
                if counted.num_reductions or counted.num_collectives >= closing.num_collectives > 0:
                    raise Broken(
                        f"micro-batch {index} of {STEPS} in window {number} ran {counted.num_collectives} collectives, "
                        f"{counted.num_reductions} of them reductions of {counted.num_reduced_elements} elements; the "
                        f"last micro-batch ran {closing.num_collectives}",
                        expected="no reduction, and fewer collectives than the micro-batch that closes the window",
                        advice="no_sync() must keep gradients local in forward and backward of the model it is given.",
                    )


@rule(min_processes=2)
def communication_at_close(strategy: Strategy) -> None:
    """The last micro-batch of every window exchanges gradients, and exchanges each of them once.

    Without it ranks train models of their own; averaging twice changes no number and doubles the traffic. The
    context that `no_sync` returns restores what it changed; backward and `reduce_gradients` do not both reduce.
    """
    with Loop(strategy, steps=STEPS) as loop:
        weights, windows = _count(loop, num_windows=3)
        num_elements = sum(weight.numel() for weight in weights.values())
        for number, (*_, closing) in enumerate(windows, start=1):
            if not closing.num_collectives:
                raise Broken(
                    f"window {number} closed without any collective on rank {loop.world.rank}",
                    expected="the gradients of every window to be averaged over ranks",
                    advice="Leave the context of no_sync() as it was entered, also for the second window; or reduce in "
                    "reduce_gradients().",
                )
            if closing.num_reduced_elements >= 2 * num_elements:
                raise Broken(
                    f"window {number} reduced {closing.num_reduced_elements} elements at its close",
                    expected=f"fewer than twice the {num_elements} elements of the gradients",
                    advice="Average in backward or in reduce_gradients(), not in both.",
                )


def _count(loop: Loop, num_windows: int) -> tuple[Weights, list[list[Communication]]]:
    """The weights after training, and what each micro-batch of each window communicated, up to the optimizer step.

    Two windows go before that are not counted: a reducer may settle on its buckets in them, as DDP's does.
    """
    model, optimizer = loop.model_and_optimizer()
    samples = Samples(2 * loop.world.size, loop.dtype)
    mine = slice(2 * loop.world.rank, 2 * loop.world.rank + 2)
    batch = move({"x": samples.x[mine], "y": samples.y[mine]}, loop.world.device)
    windows: list[list[Communication]] = []
    for _ in range(2 + num_windows):
        windows.append([])
        for _ in range(STEPS):
            with Communication() as counted, loop.accumulate(model):
                loop.backward(mean_loss(model(x=batch["x"]), batch))
                optimizer.step()
                optimizer.zero_grad()
            windows[-1].append(counted)
    return weights_of(model), windows[2:]
