"""FSDP around the step: where weights come from and go to, memory, optimizers, blocks, and what is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from accelerator import Accelerator
from blocks_net import Net, make_net
from rank_pool import RankPool
from strategies import CPU, DDP, FSDP, ConfigurationError, PrepareError, StateError, StepError
from strategies.shards import is_sharded, local, whole

# -- initialisation --------------------------------------------------------------------------------------------


def built(strategy: Any, dtype: torch.dtype | None) -> tuple[dict[str, Tensor], Tensor]:
    accelerator = Accelerator(strategy)
    torch.manual_seed(3 + 10 * accelerator.process_index)  # rank 0's numbers are those that count
    with accelerator.init_module(dtype=dtype):
        net = Net()
    after = torch.rand(3)
    model = accelerator.prepare(net)
    tensors = [*model.named_parameters(), *model.named_buffers()]
    result = {name: whole(tensor).clone() for name, tensor in tensors}
    accelerator.end_training()
    return result, after


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_init_module_gives_the_numbers_of_one_process(ranks: RankPool, dtype: torch.dtype | None) -> None:
    torch.manual_seed(3)
    torch.set_default_dtype(dtype or torch.float32)
    try:
        plain = Net()
    finally:
        torch.set_default_dtype(torch.float32)
    after = torch.rand(3)
    expected = dict([*plain.named_parameters(), *plain.named_buffers()])
    for strategy, nproc in [(CPU(), 1), (DDP(), 2), (FSDP(), 1), (FSDP(), 2), (FSDP(replicate=2), 4)]:
        results = ranks(built, strategy, dtype, nproc=nproc)
        assert torch.equal(results[0][1], after)
        for tensors, _ in results:
            assert tensors.keys() == expected.keys()
            for name, tensor in tensors.items():
                assert tensor.dtype == expected[name].dtype
                assert torch.equal(tensor, expected[name]), (strategy, name)


def built_empty(strategy: Any, state: dict[str, Tensor] | None) -> tuple[bool, float]:
    accelerator = Accelerator(strategy)
    with accelerator.init_module(empty=True):
        net = Net()
    model = accelerator.prepare(net)
    empty = all(bool(local(p.detach()).isnan().all()) for p in model.parameters())
    if state is not None:
        model.load_state_dict(state)
    return empty, float(model(torch.ones(2, 5)).detach().sum())


@pytest.mark.parametrize(("strategy", "nproc"), [(CPU(), 1), (DDP(), 2), (FSDP(), 2)], ids=["cpu", "ddp", "fsdp"])
def test_an_empty_model_is_loaded_or_warned_of(ranks: RankPool, caplog: Any, strategy: Any, nproc: int) -> None:
    plain = make_net()
    for empty, output in ranks(built_empty, strategy, plain.state_dict(), nproc=nproc):
        assert empty
        assert output == pytest.approx(float(plain(torch.ones(2, 5)).detach().sum()), rel=1e-6)
    for message in ranks(warned, strategy, nproc=nproc):
        assert "built with init_module(empty=True), and nothing was loaded into" in message


def warned(strategy: Any) -> str:
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("accelerator")
    log.addHandler(handler)
    try:
        built_empty(strategy, None)
    finally:
        log.removeHandler(handler)
    (message,) = messages
    return message


# -- memory ----------------------------------------------------------------------------------------------------


def bytes_held() -> tuple[int, int]:
    """Bytes of parameters, gradients and optimizer state on this rank after a backward, and of the whole."""
    accelerator = Accelerator(FSDP())
    net = Net(width=64, depth=4)
    del net.scale
    net.scale = torch.tensor(1.0)  # type: ignore[assignment]
    model, optimizer = accelerator.prepare(net, torch.optim.AdamW(net.parameters()))
    for _ in range(2):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.ones(2, 5)).mean())
            optimizer.step()
    tensors = [*model.parameters(), *(p.grad for p in model.parameters())]
    tensors += [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    return tuple(sum(f(t).numel() * t.element_size() for t in tensors) for f in (local, lambda t: t))


@pytest.mark.parametrize("nproc", [1, 2, 4])
def test_a_rank_holds_its_part(ranks: RankPool, nproc: int) -> None:
    for held, everything in ranks(bytes_held, nproc=nproc):
        assert held == pytest.approx(everything / nproc, rel=0.05)


# -- optimizers ------------------------------------------------------------------------------------------------

WORK = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, eps=1e-3),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.01, eps=1e-3, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.01, eps=1e-3, fused=True),
    "AdamW tensor rate": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01), eps=1e-3),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, eps=1e-3),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, eps=1e-3),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.01, eps=1e-3),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01, eps=1e-3),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.01, eps=1e-3),
}
FAIL = {
    "Adafactor": lambda p: torch.optim.Adafactor(p),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, fused=True),
}


def groups_of(net: nn.Module) -> list[dict[str, Any]]:
    named = list(net.named_parameters())
    return [
        {"params": [p for name, p in named if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for name, p in named if p.ndim <= 1], "weight_decay": 0.0, "note": "no decay"},
    ]


def two_steps_later(strategy: Any, name: str, steps_before: int) -> tuple[dict[str, Tensor], Any]:
    """Some steps are taken before `prepare`: the optimizer's state goes with it."""
    accelerator = Accelerator(strategy)
    net = make_net()
    optimizer = WORK[name](groups_of(net))
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    for _ in range(steps_before):
        net(x).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model, optimizer = accelerator.prepare(net, optimizer)
    for _ in range(2):
        with accelerator.accumulate(model):
            accelerator.backward(model(x).mean())
            optimizer.step()
            optimizer.zero_grad()
    facts = [
        {key: value for key, value in group.items() if key not in ("params", "lr")} for group in optimizer.param_groups
    ]
    return {key: value for key, value in accelerator.get_state_dict(model).items() if key != "seen"}, facts


@pytest.mark.parametrize("steps_before", [0, 2])
def test_optimizers_keep_options_and_state(ranks: RankPool, steps_before: int) -> None:
    names = list(WORK) if not steps_before else ["AdamW", "AdamW fused", "SGD"]
    expected = ranks(each_optimizer, CPU(), names, steps_before, nproc=1)[0]
    got = ranks(each_optimizer, FSDP(), names, steps_before, nproc=2, timeout=60)[0]
    for name in names:
        for key, weight in expected[name][0].items():
            torch.testing.assert_close(got[name][0][key], weight, atol=1e-6, rtol=1e-5)
        assert got[name][1] == expected[name][1]


def each_optimizer(strategy: Any, names: list[str], steps_before: int) -> dict[str, Any]:
    return {name: two_steps_later(strategy, name, steps_before) for name in names}


def prepare_with(name: str) -> None:
    accelerator = Accelerator(FSDP())
    net = make_net()
    accelerator.prepare(net, FAIL[name](net.parameters()))


@pytest.mark.parametrize("name", list(FAIL))
def test_an_optimizer_that_cannot_step_on_shards_is_refused(ranks: RankPool, name: str) -> None:
    # Adafactor raises with torch 2.13, and takes the norm of its shard alone for the whole with torch 2.9.
    with pytest.raises(
        PrepareError, match=f"{name} (cannot step on|gives other numbers on) sharded.*(AdamW, Adam|Leave out fused)"
    ):
        ranks(prepare_with, name, nproc=2)


# -- weights out and in ----------------------------------------------------------------------------------------


def save_and_load(folder: str) -> None:
    accelerator = Accelerator(FSDP())
    model = accelerator.prepare(make_net())
    accelerator.save_model(model, folder, max_shard_size="2KB")
    full = accelerator.get_state_dict(model)
    assert (full == {}) == (not accelerator.is_main_process)
    sharded = accelerator.get_state_dict(model, sharded=True)
    assert all(is_sharded(value) for name, value in sharded.items() if name not in ("scale", "seen"))
    other = accelerator.prepare(make_net(seed=9))
    other.load_state_dict(sharded)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(local(one), local(two))


def test_a_saved_model_is_read_by_anyone(ranks: RankPool, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    ranks(save_and_load, str(tmp_path), nproc=2)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert {path.name for path in tmp_path.iterdir()} == {*index["weight_map"].values(), "model.safetensors.index.json"}
    state: dict[str, Tensor] = {}
    for name in set(index["weight_map"].values()):
        part = load_file(tmp_path / name)
        assert sum(value.nbytes for value in part.values()) <= 2000
        state |= part
    plain = make_net()
    assert state.keys() == plain.state_dict().keys()
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in state.values())
    for name, value in plain.state_dict().items():
        assert torch.equal(state[name], value)


def save_whole(strategy: Any, folder: str, size: Any) -> None:
    accelerator = Accelerator(strategy)
    accelerator.save_model(accelerator.prepare(make_net()), folder, size)


def test_a_later_save_leaves_nothing_of_an_earlier_one(ranks: RankPool, tmp_path: Path) -> None:
    for size in ("1KB", 10**6):
        ranks(save_whole, FSDP(), str(tmp_path), size, nproc=2)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_failed_save_is_told_to_every_rank(ranks: RankPool, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    outcomes = ranks(save_whole, DDP(), str(tmp_path / "file"), "5GB", nproc=2, return_exceptions=True)
    assert all("save_model could not write to" in str(outcome) for outcome in outcomes)
    with pytest.raises(ConfigurationError, match="max_shard_size is 'much'; expected a number of bytes"):
        ranks(save_whole, CPU(), str(tmp_path), "much", nproc=1)


def load(change: str) -> None:
    state = make_net().state_dict()
    if change == "names":
        state["encoder.weight"] = state.pop("head.weight")
        del state["first.bias"]
    else:
        state["head.weight"] = torch.zeros(2, 8)
    accelerator = Accelerator(FSDP())
    model = accelerator.prepare(make_net(seed=4))
    model.load_state_dict(state, assign=change == "assign")


def test_a_state_dict_that_does_not_fit_is_refused_with_all_names(ranks: RankPool) -> None:
    with pytest.raises(
        RuntimeError, match=r'Missing key\(s\).*"first.bias", "head.weight"(.|\n)*Unexpected.*"encoder.weight"'
    ):
        ranks(load, "names", nproc=2)
    with pytest.raises(RuntimeError, match=r"size mismatch for head.weight"):
        ranks(load, "shapes", nproc=2)
    with pytest.raises(StateError, match="assign=True"):
        ranks(load, "assign", nproc=2)


# -- blocks ----------------------------------------------------------------------------------------------------


def explained(strategy: FSDP, tied: bool) -> str:
    accelerator = Accelerator(strategy)
    net = make_net()
    if tied:
        net.layers[1].up = net.layers[0].up
    accelerator.prepare(net)
    return str(accelerator.explain())


@pytest.mark.parametrize(
    ("strategy", "words"),
    [
        (FSDP(), "3 x Block of 296 + the rest of Net of 57 parameters; 473 of 945 on each rank"),
        (FSDP(auto_wrap_policy="none"), "the rest of Net of 945 parameters; 473 of 945 on each rank"),
        (FSDP(min_num_params=140), "3 x Linear of 144 + 3 x Block of 152 + the rest of Net of 57"),
        (
            FSDP(transformer_layer_cls=("Block", "Linear")),
            "3 x Linear of 144 + 3 x Linear of 136 + 3 x Block of 16 + Linear of 48 + Linear of 9 +",
        ),
    ],
)
def test_explain_prints_blocks_and_mesh(ranks: RankPool, strategy: FSDP, words: str) -> None:
    for text in ranks(explained, strategy, False, nproc=2):
        assert words in text
        assert "one copy cut over 2 ranks" in text


def test_a_parameter_tied_over_blocks_is_refused(ranks: RankPool) -> None:
    with pytest.raises(PrepareError, match=r"layers.0.up.weight and layers.1.up.weight of Net are one tied parameter"):
        ranks(explained, FSDP(), True, nproc=2)


# -- what is refused -------------------------------------------------------------------------------------------


def construct_on_ranks(fields: dict[str, Any]) -> None:
    accelerator = Accelerator(FSDP(**fields))
    accelerator.prepare(make_net())


BAD_FIELDS = [
    ({"sharding_strategy": "FULL"}, r"sharding_strategy is 'FULL'; expected 'FULL_SHARD', 'SHARD_GRAD_OP'"),
    ({"auto_wrap_policy": "blocks"}, r"auto_wrap_policy is 'blocks'; expected one of 'transformer'"),
    ({"auto_wrap_policy": "transformer"}, "name the classes in transformer_layer_cls"),
    ({"auto_wrap_policy": "SIZE_BASED_WRAP"}, "least number of elements in min_num_params"),
    ({"auto_wrap_policy": "none", "min_num_params": 3}, "expected one way to choose blocks"),
    ({"min_num_params": 3, "transformer_layer_cls": ("A",)}, "expected one way to choose blocks"),
    ({"sharding_strategy": "FULL_SHARD", "reshard_after_forward": False}, "expected one of the two"),
    ({"sharding_strategy": "NO_SHARD", "replicate": 2}, "expected a mesh only with HYBRID_SHARD"),
    ({"replicate": 0}, "replicate is 0; expected at least 1"),
    ({"pin_memory": True}, "cpu_offload is False; expected it to be True"),
    ({"forward_prefetch": -1}, "expected a number of blocks >= 0"),
    ({"reduce_dtype": "float64"}, "reduce_dtype is 'float64'; expected 'float32', 'bfloat16', 'float16' or None"),
]


def nothing(name: str, module: nn.Module) -> bool:
    return False


BAD_ON_TWO = [
    ({"replicate": 3}, ConfigurationError, "expected two numbers whose product is 2"),
    ({"shard": 4}, ConfigurationError, "expected two numbers whose product is 2"),
    ({"sharding_strategy": "HYBRID_SHARD"}, ConfigurationError, "all 2 processes are on one. Say how many copies"),
    ({"reshard_after_forward": 2}, ConfigurationError, "a number of ranks between 1 and 2 that divides 2"),
    ({"cpu_offload": True, "pin_memory": True}, ConfigurationError, "only the CPU is here"),
    ({"transformer_layer_cls": ("Blok",)}, PrepareError, r"names 'Blok', but Net has no .*Block \(3\)"),
    ({"auto_wrap_policy": nothing}, PrepareError, "chose no module of Net"),
    ({"ignored_params": ("tail.*",)}, PrepareError, "names 'tail.*', but Net has no such parameter"),
    ({"forward_methods": ("generate",)}, PrepareError, "names 'generate', but Net has no such method"),
]


@pytest.mark.parametrize(("fields", "words"), BAD_FIELDS)
def test_settings_that_contradict_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        FSDP(**fields)


@pytest.mark.parametrize(("fields", "kind", "words"), BAD_ON_TWO)
def test_settings_that_do_not_fit_are_refused(ranks: RankPool, fields: Any, kind: Any, words: str) -> None:
    with pytest.raises(kind, match=words):
        ranks(construct_on_ranks, fields, nproc=2)


def test_hybrid_sharding_of_one_process_is_refused(ranks: RankPool) -> None:
    with pytest.raises(ConfigurationError, match="all 1 processes are on one"):
        ranks(construct_on_ranks, {"sharding_strategy": "HYBRID_SHARD"}, nproc=1)


def change(what: str) -> None:
    accelerator = Accelerator(FSDP())
    net = make_net()
    if what == "dtypes":
        net.layers[1].up.to(torch.float64)
    if what == "copy":
        optimizer = torch.optim.SGD(make_net().parameters(), lr=0.1)
    else:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(net, optimizer)
    if what == "replace":
        model.head.bias = nn.Parameter(torch.zeros(1))
    with accelerator.accumulate(model):
        accelerator.backward(model(torch.ones(2, 5)).mean())
        optimizer.step()


@pytest.mark.parametrize(
    ("what", "kind", "words"),
    [
        ("dtypes", PrepareError, "trainable parameters of layers.1 have several dtypes"),
        ("copy", PrepareError, "belong to no prepared model"),
        ("replace", StepError, "head.bias was replaced after prepare"),
    ],
)
def test_models_that_would_train_wrong_are_refused(ranks: RankPool, what: str, kind: Any, words: str) -> None:
    with pytest.raises(kind, match=words):
        ranks(change, what, nproc=2)
