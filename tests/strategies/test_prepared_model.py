"""The prepared model: the user's own in every respect but how it is called and zeroed."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from accelerator import Accelerator
from oracle import flat, make_model
from rank_pool import RankPool
from strategies import DDP, PrepareError


class Net(nn.Module):
    """A model as users write them: with settings, methods, a buffer and a property."""

    kind = "net"

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.encoder = nn.Linear(3, 4)
        self.head = nn.Linear(4, 1)
        self.config = {"width": 4}
        self.register_buffer("scale", torch.ones(()))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.head(torch.tanh(self.encoder(x)))

    def loss(self, x: Tensor) -> Tensor:
        return self(x).square().mean()

    def remember(self, value: Any) -> None:
        self.remembered = value

    @property
    def width(self) -> int:
        return self.config["width"]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        with torch.no_grad():
            for number, parameter in enumerate(self.parameters()):
                parameter.copy_(torch.linspace(-1, 1 + number, parameter.numel()).reshape(parameter.shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


X = torch.linspace(-1, 1, 18).reshape(6, 3)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3, momentum=0.9)


def prepared(model: nn.Module | None = None, **settings: Any) -> tuple[Accelerator, Any]:
    accelerator = Accelerator("cpu", **settings)
    return accelerator, accelerator.prepare(Net() if model is None else model)


# -- the same object -------------------------------------------------------------------------------------------


def test_it_is_of_the_users_class_and_looks_like_it() -> None:
    model = Net()
    _, view = prepared(model)
    assert isinstance(view, Net)
    assert repr(view) == repr(model)
    assert view.kind == "net"
    assert view.__doc__ == Net.__doc__


def test_attributes_are_shared_both_ways() -> None:
    model = Net()
    _, view = prepared(model)
    assert view.config is model.config
    assert view.width == 4
    view.config = {"width": 5}
    assert model.width == 5
    model.note = "theirs"
    assert view.note == "theirs"
    view.remember(7)
    assert model.remembered == 7
    view.extra = nn.Linear(2, 2)
    assert "extra.weight" in model.state_dict()
    del model.note
    assert not hasattr(view, "note")
    with pytest.raises(AttributeError, match="nothing"):
        view.nothing  # noqa: B018


def test_names_and_tensors_are_those_of_the_users_model() -> None:
    model = Net()
    _, view = prepared(model)
    for names in (nn.Module.named_parameters, nn.Module.named_buffers):
        assert [(name, id(tensor)) for name, tensor in names(view)] == [(n, id(t)) for n, t in names(model)]
    assert list(view.state_dict()) == list(Net().state_dict())
    assert [name for name, _ in view.named_modules()] == ["", "encoder", "head"]


def test_a_state_dict_is_loaded_into_the_users_model() -> None:
    model = Net()
    _, view = prepared(model)
    view.load_state_dict({name: tensor + 1 for name, tensor in Net().state_dict().items()})
    assert torch.equal(flat(model), flat(Net()) + 1)


def test_train_and_eval_reach_the_users_model() -> None:
    model = Net()
    _, view = prepared(model)
    assert view.eval() is view
    assert not model.training
    assert not model.head.training
    view.train()
    assert model.training
    view.requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("registered", ["before", "after"])
def test_hooks_run_once_per_call(registered: str) -> None:
    model = Net()
    called: list[str] = []

    def register(module: nn.Module) -> None:
        module.register_forward_pre_hook(lambda *_: called.append("before"))
        module.register_forward_hook(lambda *_: called.append("after"))
        module.register_full_backward_hook(lambda *_: called.append("backward"))

    if registered == "before":
        register(model)
    accelerator, view = prepared(model)
    if registered == "after":
        register(view)
    accelerator.backward(view(X.clone().requires_grad_()).mean())
    assert called == ["before", "after", "backward"]


def test_copies_are_of_the_users_class_and_independent() -> None:
    _, view = prepared()
    for made in (pickle.loads(pickle.dumps(view)), copy.deepcopy(view)):
        assert type(made) is Net
        assert torch.equal(flat(made), flat(view))
        assert made.head.weight is not view.head.weight


def test_an_average_of_weights_is_made_from_it() -> None:
    _, view = prepared()
    averaged = torch.optim.swa_utils.AveragedModel(view)
    averaged.update_parameters(view)
    assert torch.equal(averaged(X), view(X))


def test_unwrap_gives_the_users_object() -> None:
    model, other = Net(), Net()
    accelerator, view = prepared(model)
    assert accelerator.unwrap_model(view) is model
    assert accelerator.unwrap_model(other) is other


def unwrap_on_ranks(strategy: DDP) -> None:
    model = Net()
    accelerator = Accelerator(strategy)
    view = accelerator.prepare(model)
    assert accelerator.unwrap_model(view) is model
    assert isinstance(view, Net)
    assert list(view.state_dict()) == list(Net().state_dict())
    assert type(pickle.loads(pickle.dumps(view))) is Net
    called: list[str] = []
    view.register_forward_hook(lambda *_: called.append("hook"))
    view(X)
    assert called == ["hook"]


def test_under_ddp_it_is_the_users_model_too(ranks: RankPool) -> None:
    ranks(unwrap_on_ranks, DDP())


def test_it_is_freed_with_its_accelerator() -> None:
    model = Net()
    accelerator, view = prepared(model)
    seen = weakref.ref(model)
    accelerator.free_memory()
    del accelerator, view, model
    gc.collect()
    assert seen() is None


# -- training it -----------------------------------------------------------------------------------------------


def train_plain(make: Callable[[], nn.Module], loss: Callable[[Any, Tensor], Tensor]) -> Tensor:
    """The oracle: three steps on all samples."""
    model = make()
    optimizer = sgd(model)
    for _ in range(3):
        optimizer.zero_grad()
        loss(model, X).backward()
        optimizer.step()
    return flat(model)


def train(
    strategy: str, make: Callable[[], nn.Module], loss: Callable[[Any, Tensor], Tensor], compiled: bool = False
) -> Tensor:
    """The same on every rank's share of the samples."""
    accelerator = Accelerator(strategy)
    model = make()
    model, optimizer = accelerator.prepare(torch.compile(model, backend="aot_eager") if compiled else model, sgd(model))
    share = X.chunk(accelerator.num_processes)[accelerator.process_index]
    for _ in range(3):
        with accelerator.accumulate(model):
            accelerator.backward(loss(model, share))
            optimizer.step()
            optimizer.zero_grad()
    weights = flat(model)
    accelerator.end_training()
    return weights


def called(model: Any, x: Tensor) -> Tensor:
    return model(x).square().mean()


def through_its_method(model: Any, x: Tensor) -> Tensor:
    return model.loss(x)


def partly_frozen() -> Net:
    model = Net()
    model.encoder.requires_grad_(False)
    return model


KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, Tensor], Tensor]]] = {
    "called": (Net, called),
    "a method that calls self": (Net, through_its_method),
    "tied weights": (Tied, called),
    "frozen parameters": (partly_frozen, called),
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_as_the_plain_one(kind: str) -> None:
    torch.testing.assert_close(train("cpu", *KINDS[kind]), train_plain(*KINDS[kind]))


def train_every_kind() -> dict[str, Tensor]:
    return {kind: train("ddp", *KINDS[kind]) for kind in KINDS}


def test_it_trains_as_the_plain_one_on_two_processes(ranks: RankPool) -> None:
    for weights in ranks(train_every_kind):
        for kind in KINDS:
            torch.testing.assert_close(
                weights[kind], train_plain(*KINDS[kind]), msg=lambda text, k=kind: f"{k}: {text}"
            )


def test_tied_weights_stay_tied() -> None:
    _, view = prepared(Tied())
    assert view.second.weight is view.first.weight
    assert len(list(view.parameters())) == 3


@pytest.mark.parametrize("nproc", [1, 2])
def test_compiled_before_prepare_it_trains_as_the_plain_one(ranks: RankPool, nproc: int) -> None:
    for weights in ranks(train, "ddp", Net, called, True, nproc=nproc):
        torch.testing.assert_close(weights, train_plain(Net, called))


def call_without_trainable_parameters() -> Tensor:
    accelerator = Accelerator("ddp")
    model = Net().requires_grad_(False)
    teacher = accelerator.prepare(model)
    assert isinstance(teacher, Net)
    return teacher(X)


def test_a_model_without_trainable_parameters_may_be_prepared(ranks: RankPool) -> None:
    for output in ranks(call_without_trainable_parameters):
        torch.testing.assert_close(output, Net()(X))
        assert not output.requires_grad


def test_a_model_without_parameters_may_be_prepared() -> None:
    _, view = prepared(nn.ReLU())
    assert torch.equal(view(X), X.relu())


def test_zeroing_is_held_while_a_window_is_open() -> None:
    accelerator = Accelerator("cpu", gradient_accumulation_steps=2)
    model = Net()
    model, optimizer = accelerator.prepare(model, sgd(model))
    for closing in (False, True):
        with accelerator.accumulate(model):
            accelerator.backward(model(X).mean())
            optimizer.step()
            model.zero_grad()
        assert (model.head.weight.grad is None) == closing


def test_forward_runs_in_the_precision_and_leaves_its_dtype() -> None:
    accelerator, view = prepared(mixed_precision="bf16")
    assert view(X).dtype == torch.bfloat16
    assert view.head.weight.dtype == torch.float32
    assert (X @ X.T).dtype == torch.float32
    with accelerator.autocast():
        assert (X @ X.T).dtype == torch.bfloat16


# -- refused ---------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_a_script_module_is_refused() -> None:
    with pytest.raises(PrepareError, match=r"RecursiveScriptModule is a TorchScript module.*Give the Python module"):
        prepared(torch.jit.script(nn.Linear(3, 1)))


def prepare_parallel() -> None:
    accelerator = Accelerator("ddp")
    accelerator.prepare(nn.parallel.DistributedDataParallel(nn.Linear(3, 1)))


def test_a_parallel_model_is_refused(ranks: RankPool) -> None:
    for error in ranks(prepare_parallel, nproc=1, return_exceptions=True):
        assert isinstance(error, PrepareError)
        assert "DistributedDataParallel is already parallel. Give the module inside it (model.module)" in str(error)


def test_preparing_twice_is_refused() -> None:
    model = Net()
    accelerator, view = prepared(model)
    for again in (model, view):
        with pytest.raises(PrepareError, match=r"Net is prepared already\. Prepare each object once"):
            accelerator.prepare(again)
    with pytest.raises(PrepareError, match="prepared already"):
        Accelerator("cpu").prepare(view)
    other = make_model()
    with pytest.raises(PrepareError, match="Sequential is prepared already"):
        accelerator.prepare(other, other)


class Counting:
    """A backend of torch.compile that counts what it is given to compile."""

    def __init__(self) -> None:
        self.number = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.number += 1
        return graph.forward


def count_compilations() -> list[int]:
    """Of a model that is compiled after prepare(): after calls in evaluation, and after steps of training."""
    torch._dynamo.reset()
    accelerator, backend = Accelerator("ddp"), Counting()
    model, optimizer = accelerator.prepare(net := Net(), torch.optim.SGD(net.parameters(), lr=0.1))
    compiled: Any = torch.compile(model, backend=backend)
    numbers = []
    for _ in range(3):
        with torch.no_grad():
            compiled(X)
        numbers.append(backend.number)
    for _ in range(6):
        with accelerator.accumulate(model):
            accelerator.backward(compiled(X).square().mean())
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            compiled(X)
        numbers.append(backend.number)
    torch._dynamo.reset()
    return numbers


@pytest.mark.parametrize("nproc", [1, 2])
def test_compiled_after_prepare_it_is_not_compiled_again(ranks: RankPool, nproc: int) -> None:
    for numbers in ranks(count_compilations, nproc=nproc):
        assert numbers[:3] == [1, 1, 1]
        assert numbers[4:] == [3] * 5  # DDP itself differs in its first forward
