"""Checkpoints whose names are not those of the model: by a mapping, and as transformers renames them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from accelerator import Accelerator
from accelerator.bigmodel import (
    init_empty_weights,
    load_checkpoint_and_dispatch,
    load_checkpoint_in_model,
    quantization_errors,
)
from blocks_net import Net, make_net
from strategies.errors import ConfigurationError, StateError
from torch_version import torchao_runs


def named_otherwise(folder: Path) -> Path:
    state = {f"module.{name}".replace("layers", "h"): tensor for name, tensor in make_net().state_dict().items()}
    save_file(state, folder / "model.safetensors")
    return folder


MAPPING = {r"^module\.": "", r"\bh\.(\d+)": r"layers.\1"}


def test_names_by_a_mapping(tmp_path: Path) -> None:
    folder = named_otherwise(tmp_path)
    with init_empty_weights():
        model = Net()
    load_checkpoint_and_dispatch(
        model, folder, {"": "disk"}, key_mapping=MAPPING
    )  # mapped: there is no folder to write
    x = torch.ones(2, 5)
    with torch.no_grad():
        assert torch.equal(model(x), make_net()(x))


@pytest.mark.parametrize(
    ("key_mapping", "message"),
    [
        (
            {r"layers\.\d": "layers.0"},
            "layers.0.norm.weight and layers.1.norm.weight of the checkpoint are both layers",
        ),
        ({"(": ""}, r"key_mapping has '\(': '' \(missing \)"),
        ({"head": r"\1"}, r"key_mapping has 'head': .* \(invalid group reference"),
        ({"head": None}, "key_mapping has 'head': None"),
        (["head"], "key_mapping is .*; expected regular expressions"),
    ],
)
def test_what_is_no_mapping(key_mapping: Any, message: str) -> None:
    with pytest.raises((ConfigurationError, StateError), match=message):
        load_checkpoint_in_model(make_net(), make_net().state_dict(), key_mapping=key_mapping)


def test_a_checkpoint_of_save_state_has_the_names_of_the_model(tmp_path: Path) -> None:
    accelerator = Accelerator("cpu", project_dir=tmp_path)
    accelerator.prepare(make_net())
    with pytest.raises(ConfigurationError, match="key_mapping is not for what save_state wrote"):
        load_checkpoint_in_model(make_net(), accelerator.save_state(), key_mapping={"a": "b"})


# -- transformers ------------------------------------------------------------------------------------------

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(**SMALL, image_size=32, patch_size=8))


def clip() -> nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    return CLIPVisionModel(CLIPVisionConfig(**SMALL, image_size=32, patch_size=8))


def neox() -> nn.Module:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    return GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL, vocab_size=99, max_position_embeddings=32))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=99, n_positions=32))


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(**SMALL, vocab_size=99))


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**SMALL, num_key_value_heads=2, vocab_size=99, num_local_experts=2))


def rewrite(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def as_of_2019(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): state[name] for name in state}


def as_on_the_hub(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """GPT-2 as its first file is: without the name of the model in front, with masks that are no weights any more."""
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 32, 32).tril() for layer in range(2)}
    return {name.removeprefix("transformer."): state[name] for name in state} | masks


def as_in_transformers_4(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"vision_model.{name}": tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("build", "change"),
    [(vit, None), (clip, as_in_transformers_4), (neox, None), (bert, as_of_2019), (gpt2, as_on_the_hub)],
)
def test_names_that_transformers_gives(build: Any, change: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    expected = build().eval()
    expected.save_pretrained(tmp_path)
    if change is not None:
        rewrite(tmp_path, change)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert names - {name for name, _ in expected.named_parameters()}, "the names are the model's"
    with init_empty_weights():
        model = build().eval()
    load_checkpoint_and_dispatch(model, tmp_path, {"": "disk"})  # from that file: there is no folder to write to
    torch.testing.assert_close(dict(model.state_dict()), dict(expected.state_dict()), rtol=0, atol=0)
    own = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(dict(model.state_dict()), dict(own.state_dict()), rtol=0, atol=0)


def test_a_mapping_comes_before_the_names_of_transformers(tmp_path: Path) -> None:
    """What DDP saved of a model whose files have other names."""
    expected = vit()
    expected.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda state: {f"module.{name}": tensor for name, tensor in state.items()})
    with init_empty_weights():
        model = vit()
    load_checkpoint_in_model(model, tmp_path, key_mapping={r"^module\.": ""})
    torch.testing.assert_close(dict(model.state_dict()), dict(expected.state_dict()), rtol=0, atol=0)


def test_weights_that_transformers_merges(tmp_path: Path) -> None:
    expected = mixtral().eval()
    expected.save_pretrained(tmp_path)
    with init_empty_weights():
        model = mixtral()
    with pytest.raises(
        StateError, match=r"experts.*w1.weight.* are not only renamed in MixtralForCausalLM.*from_pretrained.*offload"
    ) as raised:
        load_checkpoint_in_model(model, tmp_path)
    assert "embed_tokens" not in str(raised.value)
    save_file(expected.state_dict(), tmp_path / "model.safetensors")  # with its own names
    load_checkpoint_in_model(model, tmp_path)
    torch.testing.assert_close(dict(model.state_dict()), dict(expected.state_dict()), rtol=0, atol=0)


def test_a_foreign_file_is_reported_with_the_names_it_has(tmp_path: Path) -> None:
    vit().save_pretrained(tmp_path)
    rewrite(tmp_path, lambda state: {name: state[name] for name in list(state)[1:]} | {"more": torch.ones(1)})
    with init_empty_weights():
        model = vit()
    with pytest.raises(StateError, match=r"missing: \S+\. unexpected: more\."):
        load_checkpoint_in_model(model, tmp_path)


@torchao_runs
def test_errors_of_quantizing_are_found_under_other_names(tmp_path: Path) -> None:
    vit().save_pretrained(tmp_path)
    with init_empty_weights():
        model = vit()
    load_checkpoint_in_model(model, tmp_path, quantize={"vit.layers": "int8"})
    assert len(quantization_errors(model, tmp_path)) == 2 * 6
