"""How tensors on devices of torch_xla are written and read by `torch.distributed.checkpoint`: device by device.

torch_xla's own planners, which move each device's part by itself. `tensor.cpu()` would put a tensor that is cut
together on the devices first, in a program compiled for each read.
"""

from __future__ import annotations

import dataclasses
from typing import Any


def save_planner() -> Any:
    """A planner for `torch.distributed.checkpoint.save`, for tensors on devices of torch_xla and on the CPU."""
    import torch_xla.core.xla_model as xm
    from torch_xla.experimental.distributed_checkpoint import SPMDSavePlanner

    class Planner(SPMDSavePlanner):  # type: ignore[misc]  # torch_xla has no annotations
        def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
            xm.wait_device_ops()  # of what is still running, the planner would read what is not there yet
            super().set_up_planner(state_dict, is_coordinator)  # torch warns of planners without storage_meta

        def create_local_plan(self) -> Any:
            # Where several devices hold the same part, torch_xla 2.9 drops the tensor, and says nothing.
            plan = super().create_local_plan()
            return dataclasses.replace(plan, items=list({item.index: item for item in plan.items}.values()))

    return Planner()


def load_planner() -> Any:
    """A planner for `torch.distributed.checkpoint.load` into tensors on devices of torch_xla and on the CPU."""
    from torch_xla.experimental.distributed_checkpoint import SPMDLoadPlanner

    return SPMDLoadPlanner()
