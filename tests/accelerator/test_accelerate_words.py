"""Every word of Accelerate's `Accelerator` means the same here, or is answered with what to say instead."""

from __future__ import annotations

import ast
import importlib.util
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from accelerator import DDP, Accelerator, accelerate_words
from rank_pool import RankPool
from strategies import ConfigurationError

# Names of Accelerate's for what is the same in the same place; setters, which here are settings.
RENAMED = {
    ("broadcast", "tensor"): "tree",
    ("no_sync", "model"): "models",
    ("prepare", "args"): "objects",
    ("print", "args"): "values",
    ("print", "kwargs"): "arguments",
    ("backward", "kwargs"): "arguments",
    ("save_state", "save_model_func_kwargs"): "",
    ("load_state", "load_model_func_kwargs"): "",
}
OTHER_DEFAULTS = {
    ("save_model", "max_shard_size"),  # 5 GB, as the hub takes them
    ("unwrap_model", "keep_fp32_wrapper"),  # there is none to keep
    ("on_main_process", "function"),  # there without one it is an error, too
}


def theirs() -> dict[str, ast.arguments]:
    """The public methods and properties of Accelerate's class, from its source: importing it takes seconds."""
    found = importlib.util.find_spec("accelerate")
    if found is None or found.origin is None:
        pytest.skip("Accelerate is not installed")
    tree = ast.parse(Path(found.origin).with_name("accelerator.py").read_text(encoding="utf-8"))
    (cls,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Accelerator"]
    methods = [node for node in cls.body if isinstance(node, ast.FunctionDef)]
    named = {node.name: node for node in methods if not node.name.startswith("_") or node.name == "__init__"}
    return {name: node.args for name, node in reversed(named.items())}


def test_every_public_name_is_here_or_answered() -> None:
    unknown = [name for name in theirs() if not hasattr(Accelerator, name) and name not in accelerate_words.ATTRIBUTES]
    assert [name for name in unknown if "parallel" not in name and "deepspeed" not in name] == []
    assert not [name for name in accelerate_words.ATTRIBUTES if hasattr(Accelerator, name)]


def test_every_argument_is_here_in_the_same_place_or_answered() -> None:
    wrong = []
    for name, arguments in theirs().items():
        method: Any = inspect.getattr_static(Accelerator, name, None)
        if method is None or isinstance(method, property):
            continue
        answered = accelerate_words.ARGUMENTS.get(name, {})
        ours = inspect.signature(method).parameters
        positions = [p.name for p in ours.values() if p.kind is not p.KEYWORD_ONLY]
        listed = [*arguments.args, *filter(None, [arguments.vararg, arguments.kwarg])]
        defaults = [None] * (len(arguments.args) - len(arguments.defaults)) + [*arguments.defaults]
        values = dict(zip([argument.arg for argument in arguments.args], defaults, strict=True))
        for place, argument in enumerate(listed):
            word = RENAMED.get((name, argument.arg), argument.arg)
            if not word or word in answered:
                continue
            if word not in ours:
                wrong.append(f"{name}({word}) is unknown")
                continue
            if name != "__init__" and word in positions and positions[place] != word:
                wrong.append(f"{name}({word}) is in another place")
            default = values.get(argument.arg)
            compared = name != "__init__" and default is not None and (name, word) not in OTHER_DEFAULTS
            if compared and ours[word].default != ast.literal_eval(default):
                wrong.append(f"{name}({word}={ours[word].default}), not {ast.unparse(default)}")
    assert wrong == []


@pytest.mark.parametrize(
    ("method", "argument"),
    [(method, argument) for method, words in accelerate_words.ARGUMENTS.items() for argument in words],
)
def test_an_argument_of_accelerates_is_answered(method: str, argument: str) -> None:
    subject: Any = Accelerator if method == "__init__" else getattr(Accelerator("cpu"), method)
    with pytest.raises(TypeError, match=rf"Accelerator.{method}\(\) has no argument '{argument}': \w+"):
        subject(**{argument: None})


def test_an_attribute_of_accelerates_is_answered_and_others_are_not() -> None:
    accelerator: Any = Accelerator("cpu")
    with pytest.raises(AttributeError, match="no attribute 'skip_first_batches': leave it out"):
        _ = accelerator.skip_first_batches
    with pytest.raises(AttributeError, match=r"no attribute 'nonsense'$"):
        _ = accelerator.nonsense
    with pytest.raises(AttributeError, match="no attribute 'data_parallel_rank': only data are parallel"):
        _ = accelerator.data_parallel_rank
    assert not hasattr(accelerator, "scaler")
    with pytest.raises(TypeError, match="unexpected keyword argument 'nonsense'"):
        accelerator.prepare(nn.Linear(1, 1), nonsense=True)


def test_what_a_property_raises_is_not_hidden() -> None:
    class Mine(Accelerator):
        @property
        def state(self) -> Any:
            return self.device.nonsense  # type: ignore[attr-defined]

    with pytest.raises(AttributeError, match=r"'torch.device' object has no attribute 'nonsense'"):
        _ = Mine("cpu").state


def test_the_module_inside_with_accelerates_words() -> None:
    accelerator = Accelerator("cpu")
    module = nn.Linear(2, 1)
    compiled = torch.compile(module, backend="eager")
    model = accelerator.prepare(compiled)
    assert accelerator.unwrap_model(model, keep_fp32_wrapper=False) is compiled
    assert accelerator.unwrap_model(model, keep_torch_compile=False) is module
    assert accelerator.unwrap_model(module, False, False) is module
    with pytest.raises(ConfigurationError, match="keep_fp32_wrapper is True; expected False"):
        accelerator.unwrap_model(model, keep_fp32_wrapper=True)


def gather_objects() -> list[Any]:
    accelerator = Accelerator(DDP(device="cpu"))
    rank = accelerator.process_index
    boxes = [torch.full((rank + 1, 2), float(rank)), torch.ones(3)]  # of any shape
    found = accelerator.gather_for_metrics(boxes, use_gather_object=True)
    texts = accelerator.gather_for_metrics(input_data=[f"rank {rank}"], use_gather_object=True)
    accelerator.end_training()
    return [[tuple(tensor.shape) for tensor in found], texts]


def test_tensors_of_any_shape_are_gathered_as_objects(ranks: RankPool) -> None:
    everyone = [[(1, 2), (3,), (2, 2), (3,)], ["rank 0", "rank 1"]]
    assert ranks(gather_objects) == [everyone, everyone]
    alone = Accelerator("cpu").gather_for_metrics([torch.ones(2, requires_grad=True)], use_gather_object=True)
    assert [tensor.requires_grad for tensor in alone] == [False]
