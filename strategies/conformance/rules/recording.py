"""Rules on hardware that records operations and runs them later."""

from __future__ import annotations

from ...base import Strategy
from ..loop import Loop
from ..oracle import mean_loss
from ..rule import Broken, rule


@rule()
def recorded_work_runs(strategy: Strategy) -> str | None:
    """On hardware that records operations, `mark_step` runs them: after every update, nothing is left waiting.

    Otherwise every step's program contains all steps before it, until something reads a value. No number shows it;
    memory and compile times grow. Where operations run as they are called, there is nothing to check.
    """
    with Loop(strategy) as loop:
        if loop.world.device.type != "xla":
            return None
        import torch_xla

        model, optimizer = loop.model_and_optimizer()
        _, loader = loop.loader(4)
        for number, batch in enumerate(loader, start=1):
            with loop.accumulate(model):
                loop.backward(mean_loss(model(x=batch["x"]), batch))
                optimizer.step()
                optimizer.zero_grad()
            recorded = torch_xla._XLAC._get_xla_tensors_text(list(model.parameters())).count("aten::")
            if recorded:
                raise Broken(
                    f"after optimizer step {number}, {recorded} operations wait to be run",
                    expected="none: the program of a window runs when it closes",
                    advice="mark_step() must call torch_xla.sync(), or that of XLA.",
                )
    return None
